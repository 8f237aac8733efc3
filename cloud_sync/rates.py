"""A moving rate of events per second. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(slots=True)
class Rate:
    """Events per second with exponential forgetting; times are monotonic seconds."""

    half_life_s: float = 15.0
    _weight: float = 0.0
    _since: float | None = None
    _at: float = 0.0

    def add(self, events: float, at: float) -> None:
        """Note `events` that happened at `at`."""
        if self._since is None:
            self._since = self._at = at
        self._forget(at)
        self._weight += events

    def per_s(self, at: float) -> float:
        """The rate as of `at`; honest from the first seconds on, when little has been seen."""
        if self._since is None:
            return 0.0
        self._forget(at)
        decay = math.log(2) / self.half_life_s
        seen_s = max(at - self._since, 1.0)
        return self._weight * decay / (1 - math.exp(-decay * seen_s))

    def _forget(self, at: float) -> None:
        self._weight *= 0.5 ** (max(at - self._at, 0.0) / self.half_life_s)
        self._at = max(at, self._at)
