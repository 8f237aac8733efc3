"""Rates, token buckets and retry backoff; times are monotonic seconds, randomness is given. Pure."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar


@dataclass(slots=True)
class RateMeter:
    """Events per second with exponential forgetting."""

    half_life_s: float = 15.0
    _weight: float = 0.0
    _since: float | None = None
    _at: float = 0.0

    def add(self, events: float, at: float) -> None:
        """Count events that happened at `at`."""
        if self._since is None:
            self._since = self._at = at
        self._forget(at)
        self._weight += events

    def per_s(self, at: float) -> float:
        """The rate as of `at`, corrected for how little was seen in the first seconds."""
        if self._since is None:
            return 0.0
        self._forget(at)
        decay = math.log(2) / self.half_life_s
        seen_s = max(at - self._since, 1.0)
        return self._weight * decay / (1 - math.exp(-decay * seen_s))

    def _forget(self, at: float) -> None:
        self._weight *= 0.5 ** (max(at - self._at, 0.0) / self.half_life_s)
        self._at = max(at, self._at)


@dataclass(slots=True)
class TokenBucket:
    """Tokens that come at `per_s` up to `burst`; more may be spent, which the next ones wait for."""

    per_s: float
    burst: float
    _level: float = 0.0
    _at: float | None = None

    def level(self, now_s: float) -> float:
        """Tokens there are now; negative when it is overspent."""
        if self._at is not None and now_s > self._at:
            self._level = min(self.burst, self._level + (now_s - self._at) * self.per_s)
        self._at = now_s if self._at is None else max(now_s, self._at)
        return self._level

    def spend(self, tokens: float, now_s: float) -> None:
        """Spend tokens, whether they are there or not."""
        self._level = self.level(now_s) - tokens

    def wait_s(self, now_s: float, *, debt_s: float = 0.0) -> float:
        """Seconds until no more than `debt_s` seconds' worth is overspent."""
        lacking = -debt_s * self.per_s - self.level(now_s)
        if lacking <= 0:
            return 0.0
        return lacking / self.per_s if self.per_s > 0 else math.inf

    def change_rate(self, per_s: float, now_s: float) -> None:
        """Another rate from now on, and one second's worth of it as the burst."""
        self.level(now_s)
        self.per_s = self.burst = per_s


BucketKey = TypeVar("BucketKey", bound=Hashable)


class TokenBuckets(Generic[BucketKey]):
    """One bucket for each key, full at first; past `max_keys` the one longest unused is full again."""

    def __init__(self, burst: int, per_s: float, *, max_keys: int = 10_000) -> None:
        self._burst = float(burst)
        self._per_s = per_s
        self._max_keys = max_keys
        self._buckets: OrderedDict[BucketKey, TokenBucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def has_token(self, key: BucketKey, *, now_s: float) -> bool:
        """Whether `try_spend` would succeed."""
        bucket = self._buckets.get(key)
        return bucket is None or bucket.level(now_s) >= 1

    def try_spend(self, key: BucketKey, *, now_s: float) -> bool:
        """Spend one token, if there is one."""
        if not self.has_token(key, now_s=now_s):
            return False
        bucket = self._buckets.setdefault(key, TokenBucket(self._per_s, self._burst, self._burst))
        bucket.spend(1, now_s)
        self._buckets.move_to_end(key)
        if len(self._buckets) > self._max_keys:
            self._buckets.popitem(last=False)
        return True


MAX_RETRY_AFTER_S = 3600.0
_MAX_DOUBLINGS = 1000


@dataclass(frozen=True, slots=True)
class Backoff:
    """Random waits of `floor_s` up to first_s, 2 first_s, 4 first_s, ... up to ceiling_s (full jitter)."""

    first_s: float = 0.5
    ceiling_s: float = 60.0
    floor_s: float = 0.1

    def wait_s(self, attempt: int, chance: float, retry_after_s: float | None = None) -> float:
        """Seconds to wait after failed attempt number `attempt` (1, 2, ...); `chance` is random, 0 to 1.

        A destination's Retry-After is a floor, believed up to an hour.
        """
        jittered = chance * min(self.ceiling_s, self.first_s * 2.0 ** min(attempt - 1, _MAX_DOUBLINGS))
        asked = min(retry_after_s or 0.0, MAX_RETRY_AFTER_S)
        return max(self.floor_s, jittered) if asked == 0.0 else asked + jittered
