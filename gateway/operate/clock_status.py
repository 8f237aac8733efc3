"""What the operator reads of the gateway's clock."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from gateway.processing.restamp import Restamper


class ClockStatus(msgspec.Struct):
    """Whether the clock is relied on, and what became of readings stamped while it was not.

    `waiting` readings are in the spool without their times; `restamped` got them since the start, `in_doubt`
    were committed as they were stamped.
    """

    trusted: bool
    why: str
    waiting: int
    restamped: int
    in_doubt: int


def clock_of(restamper: Restamper, waiting: int) -> ClockStatus:
    """The clock of a running gateway."""
    return ClockStatus(
        trusted=restamper.clock.trusted,
        why=restamper.clock.why,
        waiting=waiting,
        restamped=restamper.counters.restamped,
        in_doubt=restamper.counters.in_doubt,
    )
