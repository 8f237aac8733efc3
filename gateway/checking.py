"""What happens to a group of readings before it is appended, as the settings want it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.processing.checks import Checks

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloud_sync.records import Readings
    from gateway.settings import GatewaySettings
    from gateway.spool.series import SeriesBook


def check_of(settings: GatewaySettings, book: SeriesBook) -> Callable[[Readings, int], Readings]:
    """The committer's check: sets the flags of a group, given its readings and the gateway's clock."""
    if not settings.checks.enabled:
        return lambda readings, _: readings
    return Checks(
        lambda number: book[number][:2],
        book.identities,
        base=settings.checks.base,
        rules=settings.checks.rules,
        plausible=settings.checks.plausible,
    ).check
