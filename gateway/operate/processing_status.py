"""What the operator reads of processing: how far behind it is, and what it has made."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from gateway.processing.roller import RollerCounters

if TYPE_CHECKING:
    from gateway.processing.follower import Follower
    from gateway.processing.roller import Roller


class ProcessingStatus(msgspec.Struct):
    """What becomes of readings once they are committed.

    `late_unrolled` counts late readings' windows whose rollups are gone from the spool: they get no revision.
    """

    lag_commits: int
    lag_s: float
    readings: int
    damaged_readings: int
    windows_open: int
    rollups: int
    revisions: int
    late_unrolled: int
    last_error: str


def processing_of(follower: Follower, roller: Roller | None) -> ProcessingStatus:
    """What a running gateway makes of its readings."""
    rolled = RollerCounters() if roller is None else roller.counters
    return ProcessingStatus(
        lag_commits=follower.lag_commits,
        lag_s=follower.counters.lag_s,
        readings=follower.counters.readings,
        damaged_readings=follower.counters.damaged_rows,
        windows_open=0 if roller is None else roller.open_windows,
        rollups=rolled.rollups,
        revisions=rolled.revisions,
        late_unrolled=rolled.late_unrolled,
        last_error=follower.counters.last_error,
    )
