"""The last hour in small: rates and backlogs at even steps, for the little charts. Pure."""

from __future__ import annotations

from collections import deque

import msgspec

STEP_S = 20.0
_KEPT = 181


class RecentStatus(msgspec.Struct):
    """Samples `step_s` apart, the newest last and taken at `until_us`.

    `readings_per_s` are what came in; `backlog` is each destination's, in readings, None before it was known.
    """

    step_s: float
    until_us: int
    readings_per_s: list[float]
    backlog: dict[str, list[int | None]]


class Recent:
    """Keeps the samples. Times are microseconds since 1970, and monotonic seconds for the steps."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, dict[str, int]]] = deque(maxlen=_KEPT)
        self._until_us = 0
        self._at_s = float("-inf")

    def is_due(self, now_s: float) -> bool:
        """Whether it is time for the next sample."""
        return now_s - self._at_s >= STEP_S

    def note(self, readings_per_s: float, backlog: dict[str, int], *, now_us: int, now_s: float) -> None:
        """Take a sample. After a pause (the machine slept) the samples begin anew."""
        if now_s - self._at_s > 3 * STEP_S:
            self._samples.clear()
        self._samples.append((readings_per_s, backlog))
        self._until_us, self._at_s = now_us, now_s

    def status(self) -> RecentStatus:
        """The samples as they are now."""
        names = {name: None for _, backlog in self._samples for name in backlog}
        return RecentStatus(
            step_s=STEP_S,
            until_us=self._until_us,
            readings_per_s=[round(rate, 2) for rate, _ in self._samples],
            backlog={name: [backlog.get(name) for _, backlog in self._samples] for name in names},
        )
