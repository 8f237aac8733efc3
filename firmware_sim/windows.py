"""When something happens in a simulation: windows of time, once or again and again. Pure.

Times are simulated seconds since the start of the run. In scenario files a duration is a number of seconds
or a text such as "90s", "15m", "6h", "2d".
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])")

Duration = float | str
"""Seconds, or a text with a unit."""


def duration_s(text: Duration) -> float:
    """Seconds of a duration.

    Raises:
        ValueError: it is none; the message says what is expected.
    """
    if isinstance(text, (int, float)):
        if text < 0:
            raise ValueError(f"{text:g}: expected seconds, 0 or more")
        return float(text)
    match = _DURATION.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text!r}: expected a duration such as 90, '90s', '15m', '6h', '2d'")
    return float(match[1]) * _UNITS_S[match[2]]


@dataclass(frozen=True, slots=True)
class Window:
    """From `at_s` on for `lasts_s`, and again `every_s` later (0: never again).

    A window without length stands for a moment: it is in force for nothing, but it has begun.
    """

    at_s: float = 0.0
    lasts_s: float = 0.0
    every_s: float = 0.0

    def begun(self, at_s: float) -> int:
        """How many times it has begun by then."""
        if at_s < self.at_s:
            return 0
        return 1 + int((at_s - self.at_s) // self.every_s) if self.every_s else 1

    def covers(self, at_s: float) -> bool:
        """Whether it is in force then."""
        times = self.begun(at_s)
        return bool(times) and at_s < self.at_s + (times - 1) * self.every_s + self.lasts_s


@dataclass(frozen=True, slots=True)
class Beat:
    """Publishes at a rate, with bursts: each cycle ends with `burst_s` at `factor` times the rate.

    Attributes:
        per_s: publishes a second outside bursts.
        cycle_s: from the beginning of one calm to the next; 0: there are no bursts.
    """

    per_s: float
    cycle_s: float = 0.0
    burst_s: float = 0.0
    factor: float = 1.0

    def time_of(self, number: int) -> float:
        """When publish `number` (from 0) is due, seconds after the start."""
        if not self.cycle_s:
            return number / self.per_s
        calm = self.per_s * (self.cycle_s - self.burst_s)
        cycles, rest = divmod(number, calm + self.per_s * self.factor * self.burst_s)
        begin_s = cycles * self.cycle_s
        if rest < calm:
            return begin_s + rest / self.per_s
        return begin_s + self.cycle_s - self.burst_s + (rest - calm) / (self.per_s * self.factor)

    def due(self, elapsed_s: float) -> int:
        """How many publishes are due by then."""
        if elapsed_s < 0:
            return 0
        if not self.cycle_s:
            guess = int(elapsed_s * self.per_s) + 1
        else:
            calm_s = self.cycle_s - self.burst_s
            cycles, rest_s = divmod(elapsed_s, self.cycle_s)
            each = self.per_s * (calm_s + self.factor * self.burst_s)
            rest = min(rest_s, calm_s) + self.factor * max(0.0, rest_s - calm_s)
            guess = int(cycles * each + rest * self.per_s) + 1
        while guess and self.time_of(guess - 1) > elapsed_s:
            guess -= 1
        while self.time_of(guess) <= elapsed_s:
            guess += 1
        return guess
