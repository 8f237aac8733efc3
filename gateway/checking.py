"""What happens to a group of readings before it is appended, as the settings want it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.processing.checks import Checks
from gateway.processing.deadband import Deadband

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloud_sync.records import Readings
    from gateway.processing.clock import Clock
    from gateway.settings import GatewaySettings
    from gateway.spool.series import SeriesBook

    Check = Callable[[Readings, int], Readings]


def check_of(settings: GatewaySettings, book: SeriesBook, clock: Clock | None = None) -> Check:
    """The committer's check: sets the flags of a group, given its readings and the gateway's clock."""

    def name_of(number: int) -> tuple[str, str]:
        return book[number][:2]

    check: Check = lambda readings, _: readings  # noqa: E731 - as short as it says
    if settings.checks.enabled:
        checks = Checks(
            name_of,
            book.identities,
            base=settings.checks.base,
            rules=settings.checks.rules,
            plausible=settings.checks.plausible,
        )

        def check(readings: Readings, now_us: int) -> Readings:
            trusted = clock is None or clock.trusted
            return checks.check(readings, now_us if trusted else None)

    if not settings.report_by_exception:
        return check
    mark = Deadband(name_of, book.identities, [r.compiled() for r in settings.report_by_exception]).mark
    return lambda readings, now_us: mark(check(readings, now_us))
