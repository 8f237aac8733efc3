"""Rates, rate limits by key, and retry backoff; times are monotonic seconds. Pure.

Backoff is exponential with full jitter up to a ceiling, without end. A destination's Retry-After is a
floor, up to an hour.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from tenacity import RetryCallState, wait_random_exponential

if TYPE_CHECKING:
    from tenacity.wait import wait_base


@dataclass(slots=True)
class RateMeter:
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


BucketKey = TypeVar("BucketKey", bound=Hashable)

_KEYS_MAX: Final = 10_000


class TokenBuckets(Generic[BucketKey]):
    """One bucket for each key, full at first, refilled evenly.

    `burst` fit into a bucket; `per_s` come back in a second.
    Beyond `keys_max` the bucket that was longest not taken from is forgotten, that is, full again.
    """

    def __init__(self, burst: int, per_s: float, *, keys_max: int = _KEYS_MAX) -> None:
        self._burst = float(burst)
        self._per_s = per_s
        self._keys_max = keys_max
        self._levels: dict[BucketKey, tuple[float, float]] = {}

    def __len__(self) -> int:
        return len(self._levels)

    def holds(self, key: BucketKey, *, now_s: float) -> bool:
        """Whether there is something to take. `now_s` is monotonic seconds."""
        return self._level(key, now_s) >= 1

    def take(self, key: BucketKey, *, now_s: float) -> bool:
        """Take one, if there is one."""
        level = self._level(key, now_s)
        if level < 1:
            return False
        self._levels.pop(key, None)
        self._levels[key] = (level - 1, now_s)
        if len(self._levels) > self._keys_max:
            del self._levels[next(iter(self._levels))]
        return True

    def _level(self, key: BucketKey, now_s: float) -> float:
        level, at_s = self._levels.get(key, (self._burst, now_s))
        return min(self._burst, level + (now_s - at_s) * self._per_s)


MAX_RETRY_AFTER_S = 3600.0


@dataclass(frozen=True, slots=True)
class Backoff:
    """Waits of 0..first_s, 0..2 first_s, 0..4 first_s, ... up to 0..ceiling_s.

    `floor_s` keeps the jitter from asking again at once.
    """

    first_s: float = 0.5
    ceiling_s: float = 60.0
    floor_s: float = 0.1

    def wait_s(self, attempt: int, retry_after_s: float | None = None) -> float:
        """Seconds to wait after failed attempt number `attempt` (1, 2, ...)."""
        state = RetryCallState(None, None, (), {})  # type: ignore[arg-type]  # only its number is read
        state.attempt_number = attempt
        jittered = self._strategy(state)
        asked = min(retry_after_s or 0.0, MAX_RETRY_AFTER_S)
        return max(self.floor_s, jittered) if asked == 0.0 else asked + jittered

    @property
    def _strategy(self) -> wait_base:
        return wait_random_exponential(multiplier=self.first_s, max=self.ceiling_s)
