"""What a stage of a program says of its own progress: when it will be heard of again, or that it rests.

A stage reports before each step how long the step may take at most, and before it waits for work that it
rests. A stage that does not keep its word is late: it hangs, whatever else of the program is alive.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


@dataclass(slots=True, eq=False)
class Stage:
    """One stage, by its own word. Times are seconds of `clock`, which is monotonic.

    Attributes:
        name: for people, e.g. "committer".
        steps: reports so far.
        heard_at: when it reported last.
        due_at: when it has to be heard of again; infinite while it rests.
    """

    name: str
    clock: Callable[[], float] = time.monotonic
    steps: int = 0
    heard_at: float = field(default=0.0)
    due_at: float = field(default=math.inf)

    def works(self, within_s: float) -> None:
        """A step begins that takes at most `within_s`, waits with a known end included."""
        self.steps += 1
        self.heard_at = self.clock()
        self.due_at = self.heard_at + within_s

    def rests(self) -> None:
        """There is nothing to do until something comes in, however long that takes, or ever again."""
        self.heard_at = self.clock()
        self.due_at = math.inf

    def late_s(self) -> float:
        """Seconds since it should have been heard of, 0 when it is as it should be."""
        return max(0.0, self.clock() - self.due_at)


@dataclass(frozen=True, slots=True)
class Late:
    """A stage that did not keep its word."""

    name: str
    silent_s: float
    allowed_s: float

    def __str__(self) -> str:
        return f"{self.name} has been silent for {self.silent_s:.0f} s, {self.allowed_s:.0f} s are allowed"


def late_of(stages: Iterable[Stage]) -> list[Late]:
    """The stages that hang."""
    return [
        Late(stage.name, stage.clock() - stage.heard_at, stage.due_at - stage.heard_at)
        for stage in stages
        if stage.late_s() > 0
    ]
