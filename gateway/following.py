"""What follows the commits, as the settings want it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.alerting import alert_stage_of
from gateway.processing.commit_log import CommitLog
from gateway.processing.follower import Follower
from gateway.processing.roller import Roller
from gateway.spool.database import open_read_only
from gateway.spool.stored_rollups import StoredRollups

if TYPE_CHECKING:
    from gateway.parts import Parts
    from gateway.processing.alerts import AlertStage
    from gateway.processing.clock import Clock
    from gateway.processing.steps import Stage
    from gateway.settings import GatewaySettings
    from gateway.spool.database import Database
    from gateway.spool.segments import Segments
    from gateway.spool.series import SeriesBook


async def follower_of(
    settings: GatewaySettings, database: Database, segments: Segments, book: SeriesBook, clock: Clock
) -> tuple[Follower, Roller | None, AlertStage | None]:
    """The follower of an open spool with its stages, where it left off; and those among them that roll up and
    raise alerts.

    Raises:
        SpoolError: the spool cannot be read or written.
    """
    connection = open_read_only(database.path)  # of the follower's own thread
    stages: list[Stage] = []
    roller = None
    if settings.rollups.enabled:
        roller = Roller(StoredRollups(connection), settings.rollups.terms)
        stages.append(roller)
    alerts = alert_stage_of(settings, book)
    if alerts is not None:
        stages.append(alerts)
    follower = Follower(
        database,
        segments,
        CommitLog(connection, book),
        stages,
        settings.processing.terms,
        clock_us=clock.now_us,
        clock_trusted=lambda: clock.trusted,
    )
    await follower.load()
    return follower, roller, alerts


async def follow_on(settings: GatewaySettings, parts: Parts) -> None:
    """Have processing go on as other settings want it, from its next step on; its state stays.

    Raises:
        SpoolError: the spool cannot be read; nothing was changed.
    """
    roller, before = parts.roller, parts.alerts
    alerts = before
    if settings.alerts != parts.settings.alerts:
        alerts = alert_stage_of(settings, parts.book)

    def hand_over() -> None:
        if roller is not None:
            roller.retune(settings.rollups.terms)
        if alerts is not None and before is not None and alerts is not before:
            alerts.take_over(before)

    stages: list[Stage] = [stage for stage in (roller, alerts) if stage is not None]
    await parts.follower.change(settings.processing.terms, stages, hand_over)
    parts.alerts = alerts
