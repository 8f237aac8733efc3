"""The course of one alert: pending, firing, recovered, cooling down. Pure.

    good ──broken──> pending ──broken for `for`, no cooldown──> firing ──good──> cooling ──in time──> good
                        └──good──> good                            └──every `repeat`: told again

Times are those of the readings (of silence: the gateway's). A series without any course is good.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cloud_sync.notices import AlertState
from gateway.processing.alert_rules import Level

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from gateway.processing.alert_rules import Rule

NEVER = -(1 << 62)


class Course(NamedTuple):
    """Where an alert of one rule and one series stands; times in microseconds, `NEVER` for none.

    Attributes:
        since_us: since when the rule is broken, where it has to be so for some time.
        fired_us: when it fired, while it is firing.
        told_us: when it was told last, firing.
        noted_us: the time of the latest record of it, so that each has its own.
        findings: how many there were since then.
    """

    since_us: int = NEVER
    fired_us: int = NEVER
    told_us: int = NEVER
    noted_us: int = NEVER
    findings: int = 0

    @property
    def uncounted(self) -> Course:
        """The same without its findings."""
        return self._replace(findings=0)

    def is_told_from(self, later: Course) -> bool:
        """Whether what has become of it is worth writing: more than more findings."""
        return self.uncounted != later.uncounted or later.findings < self.findings

    @property
    def is_firing(self) -> bool:
        """Whether the alert has begun and not ended."""
        return self.fired_us != NEVER


class Change(NamedTuple):
    """Something to be told of an alert; `at_us` is no other's of the same course."""

    state: AlertState
    at_us: int
    value: float
    findings: int


def advance(
    rule: Rule, course: Course, level: Level, times: NDArray[np.int64], values: NDArray[np.float64]
) -> tuple[Course, list[Change]]:
    """Take the next findings of a series, all of one level; returns the new course and what it tells."""
    course = _in_time(rule, course, int(times[0]))
    if level is Level.GOOD or (level is Level.BETWEEN and not course.is_firing):
        return _good(rule, course, times, values)
    changes: list[Change] = []
    at = 0
    if not course.is_firing:
        since_us = course.since_us if course.since_us != NEVER else int(times[0])
        due_us = max(since_us + rule.for_us, course.told_us + rule.cooldown_us)
        at = _first_from(times, due_us)
        course = course._replace(
            since_us=since_us if rule.for_us else NEVER,
            findings=course.findings + min(at + 1, len(times)),
        )
        if at == len(times):
            return course, []
        course = _tell(course, int(times[at]), float(values[at]), changes)
        at += 1
    while rule.repeat_us and (to := at + _first_from(times[at:], course.told_us + rule.repeat_us)) < len(
        times
    ):
        course = course._replace(findings=course.findings + to + 1 - at)
        course = _tell(course, int(times[to]), float(values[to]), changes)
        at = to + 1
    return course._replace(findings=course.findings + len(times) - at), changes


def recovered(course: Course, at_us: int, value: float) -> tuple[Course, Change]:
    """A firing alert ends."""
    at_us += at_us == course.noted_us
    change = Change(AlertState.RECOVERED, at_us, value, max(course.findings, 1))
    return course._replace(since_us=NEVER, fired_us=NEVER, noted_us=at_us, findings=0), change


def is_cooling(rule: Rule, course: Course, now_us: int) -> bool:
    """Whether the cooldown after an alert still holds the next one back."""
    return course.told_us <= now_us + rule.cooldown_us and now_us < course.told_us + rule.cooldown_us


def is_over(rule: Rule, course: Course, now_us: int) -> bool:
    """Whether a course can be forgotten: nothing is broken and the cooldown has passed."""
    idle = course.since_us == NEVER and not course.is_firing
    return idle and course.told_us + rule.cooldown_us <= now_us


def _in_time(rule: Rule, course: Course, now_us: int) -> Course:
    """A course without times that a clock stepping back has left in the future."""
    if course.told_us > now_us + rule.cooldown_us:
        course = course._replace(told_us=NEVER)
    if course.since_us > now_us:
        course = course._replace(since_us=now_us)
    return course


def _good(
    rule: Rule, course: Course, times: NDArray[np.int64], values: NDArray[np.float64]
) -> tuple[Course, list[Change]]:
    if course.is_firing:
        course, change = recovered(course, int(times[0]), float(values[0]))
        return course, [change]
    cooling = is_cooling(rule, course, int(times[-1]))
    return course._replace(since_us=NEVER, findings=course.findings if cooling else 0), []


def _tell(course: Course, at_us: int, value: float, changes: list[Change]) -> Course:
    at_us += at_us == course.noted_us
    changes.append(Change(AlertState.FIRING, at_us, value, course.findings))
    fired_us = course.fired_us if course.is_firing else at_us
    return course._replace(fired_us=fired_us, told_us=at_us, noted_us=at_us, findings=0)


def _first_from(times: NDArray[np.int64], due_us: int) -> int:
    """Where the first time that is not before `due_us` stands; their number when there is none."""
    reached = times >= due_us
    return int(reached.argmax()) if reached.any() else len(times)
