"""Faults of sensors, of publishes and of devices, by probability and by schedule. Pure.

Of a reading, each with a probability per reading:
    dropout       it is never taken
    spike         one value that is off by `size`
    stuck         the value again and again, for `hold` readings
    drift         off by more and more, up to `size` after `hold` readings; then it is calibrated
    noise         a deviation of `size` for `hold` readings
Of a publish, per publish:
    malformed     its payload comes again, spoilt: no record counts that as a reading
    duplicate     it is sent twice
    reorder       it is sent after the next one
    late          it is kept back and sent after `hold` others
Of a device, per publish:
    clock_jump    its clock jumps by `size` seconds until it is set again, `hold` readings later
    brown_out     it loses its memory: ring buffer, sequence number, and it gets a new boot id
    network_loss  its network is away for `hold` seconds

With `at`, `lasts`, `every` a fault is possible in its windows only, and certain there unless a probability
says otherwise. Those of a device happen once a window.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from firmware_sim.windows import Window

ReadingFault = Literal["dropout", "spike", "stuck", "drift", "noise"]
PublishFault = Literal["malformed", "duplicate", "reorder", "late"]
DeviceFault = Literal["clock_jump", "brown_out", "network_loss"]
FaultKind = ReadingFault | PublishFault | DeviceFault

OF_READINGS: frozenset[str] = frozenset(get_args(ReadingFault))
OF_DEVICES: frozenset[str] = frozenset(get_args(DeviceFault))
SPIKE_AND_NOISE_SIZE = 40.0
JUMP_S = 3600.0


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind of fault.

    Attributes:
        kind: which one.
        probability: per reading or per publish, 0..1.
        size: in units of the reading; of a clock jump in seconds.
        hold: readings, publishes or seconds, see above.
        window: when; None is always.
    """

    kind: FaultKind
    probability: float
    size: float = SPIKE_AND_NOISE_SIZE
    hold: int = 20
    window: Window | None = None

    def strikes(self, at_s: float, rng: random.Random) -> bool:
        """Whether it happens at a time of the simulation."""
        if self.window is not None and not self.window.covers(at_s):
            return False
        return self.probability >= 1 or rng.random() < self.probability


@dataclass(slots=True)
class SensorState:
    """What a faulty sensor remembers between readings."""

    last: float | None = None
    stuck_left: int = 0
    drift_left: int = 0
    drift: Fault | None = None
    noise_left: int = 0
    noise_size: float = 0.0


def distort(
    value: float, state: SensorState, faults: Sequence[Fault], rng: random.Random, at_s: float = 0.0
) -> float | None:
    """The value the sensor reports for a true `value`, or None when it reports nothing."""
    if state.stuck_left and state.last is not None:
        state.stuck_left -= 1
        return state.last
    reported = value
    for fault in faults:
        if fault.kind not in OF_READINGS or not fault.strikes(at_s, rng):
            continue
        if fault.kind == "dropout":
            return None
        if fault.kind == "spike":
            reported = value + rng.choice((-1, 1)) * fault.size
        else:
            _begin(fault, state)
    if state.drift_left and state.drift is not None:
        state.drift_left -= 1
        reported += state.drift.size * (1 - state.drift_left / state.drift.hold)
    if state.noise_left:
        state.noise_left -= 1
        reported = round(reported + rng.gauss(0, state.noise_size), 4)
    state.last = reported
    return reported


def _begin(fault: Fault, state: SensorState) -> None:
    """Begin a fault that lasts."""
    if fault.kind == "stuck":
        state.stuck_left = fault.hold
    elif fault.kind == "drift" and not state.drift_left:
        state.drift_left, state.drift = fault.hold, fault
    elif fault.kind == "noise" and not state.noise_left:
        state.noise_left, state.noise_size = fault.hold, fault.size


@dataclass(slots=True)
class DeviceFaults:
    """Which device faults have happened in which window; `due` says what happens now."""

    faults: Sequence[Fault]
    _begun: dict[int, int] = field(default_factory=dict)

    def due(self, at_s: float, rng: random.Random) -> list[Fault]:
        """Faults of the device that strike with the publish it is about to make."""
        struck = []
        for number, fault in enumerate(self.faults):
            if fault.window is not None:
                begun = fault.window.begun(at_s)
                if begun <= self._begun.get(number, 0):
                    continue
                self._begun[number] = begun
            if fault.probability >= 1 or rng.random() < fault.probability:
                struck.append(fault)
        return struck


def spoil(payload: bytes, rng: random.Random) -> bytes:
    """A payload of which no gateway can make a reading, one of many kinds."""
    half = payload[: len(payload) // 2].rstrip(b"}]") or b"{"
    kinds = (
        half,
        payload[:-2],
        b"",
        b"\xff\xfe" + payload,
        b'{"value": NaN, "ts": %d}' % rng.getrandbits(40),
        json.dumps({"value": "warm", "ts": 0}).encode(),
        b"[" * rng.randrange(100, 5_000),
        rng.randbytes(rng.randrange(1, 2_000)) + b"\x00",
    )
    return rng.choice(kinds) if payload[:1] in {b"{", b"["} else kinds[-1]
