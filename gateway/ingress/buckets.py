"""Token buckets by key: how often something may happen, for a bounded number of keys. Pure."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final, Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

_KEYS_MAX: Final = 10_000


class Buckets(Generic[Key]):
    """One bucket for each key, full at first, refilled evenly.

    `burst` fit into a bucket; `per_s` come back in a second.
    Beyond `keys_max` the bucket that was longest not taken from is forgotten, that is, full again.
    """

    def __init__(self, burst: int, per_s: float, *, keys_max: int = _KEYS_MAX) -> None:
        self._burst = float(burst)
        self._per_s = per_s
        self._keys_max = keys_max
        self._levels: dict[Key, tuple[float, float]] = {}

    def __len__(self) -> int:
        return len(self._levels)

    def holds(self, key: Key, *, now_s: float) -> bool:
        """Whether there is something to take. `now_s` is monotonic seconds."""
        return self._level(key, now_s) >= 1

    def take(self, key: Key, *, now_s: float) -> bool:
        """Take one, if there is one."""
        level = self._level(key, now_s)
        if level < 1:
            return False
        self._levels.pop(key, None)
        self._levels[key] = (level - 1, now_s)
        if len(self._levels) > self._keys_max:
            del self._levels[next(iter(self._levels))]
        return True

    def _level(self, key: Key, now_s: float) -> float:
        level, at_s = self._levels.get(key, (self._burst, now_s))
        return min(self._burst, level + (now_s - at_s) * self._per_s)
