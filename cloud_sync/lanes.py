"""The two lanes of a destination. Pure.

Live: the newest commits, so that what happens now is seen now. Backfill: what the live lane left behind,
the oldest gap first, with whatever budget is left. A destination that is served in order has one lane, named
by None: the oldest first, the newest last.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection

    from cloud_sync.records import BatchRange


class Lane(Enum):
    """Which end of the backlog a batch is taken from."""

    LIVE = "live"
    BACKFILL = "backfill"


class Wanted(NamedTuple):
    """What a courier asks the spool for.

    Attributes:
        lane: where to take it from; None is in order.
        max_rows: readings at most, unless a single segment has more.
        now_us: wall clock, microseconds since 1970.
        busy: batches that other couriers are carrying at this moment.
        urgent_only: only what does not wait for a schedule: alerts and declarations.
    """

    lane: Lane | None
    max_rows: int
    now_us: int
    busy: Collection[BatchRange] = ()
    urgent_only: bool = False
