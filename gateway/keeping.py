"""What the spool keeps, and for whom, as the settings want it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloud_sync.records import RecordClass
from gateway.spool.capacity import Capacity
from gateway.spool.giving_up import GivingUp
from gateway.spool.retention import Retention

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.settings import AnyDestination, GatewaySettings
    from gateway.spool.database import Database
    from gateway.spool.segments import Segments


def pruned_for(
    destinations: Sequence[AnyDestination], record_class: RecordClass = RecordClass.READING
) -> tuple[str, ...]:
    """Whose receipts are waited for before records of a class are pruned."""
    return tuple(d.name for d in destinations if record_class in d.classes)


def giving_up_of(
    settings: GatewaySettings, database: Database, segments: Segments, capacity: Capacity
) -> GivingUp:
    """What goes when there is no room, or too old; within no limits nothing but damage is declared."""
    spool = settings.spool
    return GivingUp(
        database,
        segments,
        capacity=capacity if spool.give_up else Capacity(),
        wanted_by={
            record_class: [d.name for d in settings.destinations if record_class in d.classes]
            for record_class in RecordClass
        },
        configured=[d.name for d in settings.destinations],
        windows_s=settings.rollups.windows_s if settings.rollups.enabled else (),
        max_age_s=None if spool.max_age_d is None else spool.max_age_d * 86_400,
    )


def retentions_of(settings: GatewaySettings, database: Database, capacity: Capacity) -> tuple[Retention, ...]:
    """What prunes everything but readings once it is delivered; one for each class."""
    return tuple(
        Retention(
            database,
            pruned_for(settings.destinations, record_class),
            keep_s=settings.rollups.keep_d * 86_400,
            capacity=capacity,
            record_class=record_class,
        )
        for record_class in (RecordClass.ROLLUP, RecordClass.ALERT, RecordClass.DECLARATION)
    )


async def limit_log(database: Database, max_bytes: int | None) -> None:
    """Keep the write-ahead log small where the spool has a cap."""
    if max_bytes is not None:
        await database.limit_log(min(16 << 20, max_bytes // 8))
