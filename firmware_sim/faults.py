"""Faults of sensors, by probability per reading. Pure: a value and a random number in, a value out.

dropout     the reading is never taken
spike       one value far off
stuck       the last value again (then it goes on being stuck for `hold` readings)
malformed   the publish carries broken JSON, which no record can count as a reading
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

FaultKind = Literal["dropout", "spike", "stuck", "malformed"]


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind of fault.

    Attributes:
        kind: which one.
        probability: per reading (malformed: per publish), 0..1.
        size: of a spike, in units of the reading.
        hold: readings that a stuck sensor stays stuck.
    """

    kind: FaultKind
    probability: float
    size: float = 40.0
    hold: int = 20


@dataclass(slots=True)
class SensorState:
    """What a faulty sensor remembers between readings."""

    last: float | None = None
    stuck_left: int = 0


def distort(value: float, state: SensorState, faults: Sequence[Fault], rng: random.Random) -> float | None:
    """The value the sensor reports for a true `value`, or None when it reports nothing."""
    if state.stuck_left and state.last is not None:
        state.stuck_left -= 1
        return state.last
    reported: float | None = value
    for fault in faults:
        if rng.random() >= fault.probability or fault.kind == "malformed":
            continue
        if fault.kind == "dropout":
            return None
        if fault.kind == "spike":
            reported = value + rng.choice((-1, 1)) * fault.size
        elif fault.kind == "stuck":
            state.stuck_left = fault.hold
    state.last = reported
    return reported


def spoils(faults: Sequence[Fault], rng: random.Random) -> bool:
    """Whether the next publish is malformed."""
    return any(fault.kind == "malformed" and rng.random() < fault.probability for fault in faults)
