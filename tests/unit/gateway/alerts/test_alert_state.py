"""The course of one alert: `for`, cooldown, margin, repetition, recovery, and clocks that step back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from cloud_sync.model.records import Severity
from gateway.alerts.alert_state import AlertInstance, advance_instance
from gateway.alerts.rules import DEFAULT_ALERT_RULES, QUANTITIES, LimitState, Rule
from gateway.processing.series_pattern import NEVER_US, Pattern

if TYPE_CHECKING:
    from collections.abc import Sequence

SECOND = 1_000_000
START = 1_790_000_000 * SECOND
EVERY = Pattern("*", "*")


def told(
    rule: Rule, findings: Sequence[tuple[float, float]], split: int = 1000
) -> list[tuple[str, float, int]]:
    """What comes of (seconds, value): state, seconds and count of each change."""
    instance, found = AlertInstance(), []
    for start in range(0, len(findings), split):
        part = findings[start : start + split]
        times = np.array([START + round(s * SECOND) for s, _ in part], np.int64)
        values = np.array([v for _, v in part])
        levels = rule.levels(values)
        at = 0
        while at < len(part):
            stop = at + 1
            while stop < len(part) and levels[stop] == levels[at]:
                stop += 1
            instance, changes = advance_instance(
                rule, instance, LimitState(int(levels[at])), times[at:stop], values[at:stop]
            )
            found += changes
            at = stop
    return [(c.state.name, (c.at_us - START) / SECOND, c.findings) for c in found]


def hot(**options) -> Rule:
    return Rule("hot", EVERY, "value", above=35, **{"cooldown_us": 0, **options})


@pytest.mark.parametrize("split", [1, 2, 3, 1000])
class TestHoweverFindingsCome:
    def test_an_alert_begins_with_the_first_finding_and_ends_with_the_first_good_one(self, split):
        findings = [(0, 20), (1, 36), (2, 40), (3, 35), (4, 36)]
        assert told(hot(), findings, split) == [("FIRING", 1, 1), ("RECOVERED", 3, 1), ("FIRING", 4, 1)]

    def test_with_a_duration_it_takes_findings_without_a_break_for_as_long(self, split):
        findings = [(0, 36), (5, 36), (8, 30), (10, 36), (15, 36), (19, 36), (21, 36), (30, 1)]
        assert told(hot(for_us=10 * SECOND), findings, split) == [
            ("FIRING", 21, 4),
            ("RECOVERED", 30, 1),
        ]

    def test_during_the_cooldown_findings_are_counted_and_told_once_it_is_over(self, split):
        findings = [(0, 36), (1, 30), (2, 36), (3, 36), (4, 30), (9, 36), (11, 36), (12, 36)]
        assert told(hot(cooldown_us=10 * SECOND), findings, split) == [
            ("FIRING", 0, 1),
            ("RECOVERED", 1, 1),
            ("FIRING", 11, 4),
        ]

    def test_what_broke_and_mended_within_the_cooldown_is_not_told_after_it(self, split):
        findings = [(0, 36), (1, 30), (2, 36), (3, 30), (20, 30), (30, 36)]
        assert told(hot(cooldown_us=10 * SECOND), findings, split)[2:] == [("FIRING", 30, 1)]

    def test_with_a_margin_it_ends_only_well_inside_the_limit(self, split):
        findings = [(0, 34), (1, 36), (2, 34), (3, 34.5), (4, 36), (5, 32.9), (6, 34)]
        assert told(hot(margin=2), findings, split) == [("FIRING", 1, 1), ("RECOVERED", 5, 3)]

    def test_one_that_goes_on_is_told_again_after_the_repetition(self, split):
        findings = [(s, 36) for s in range(0, 25, 2)]
        assert told(hot(repeat_us=10 * SECOND), findings, split) == [
            ("FIRING", 0, 1),
            ("FIRING", 10, 5),
            ("FIRING", 20, 5),
        ]


def test_both_limits_break_a_rule_and_nan_does_not():
    rule = Rule("t", EVERY, "value", above=35, below=-10)
    values = np.array([-10, -10.1, 35, 35.1, np.nan])
    assert rule.levels(values).tolist() == [0, 2, 0, 2, 0]


@pytest.mark.parametrize(("value", "limit"), [(36, 35), (-11, -10), (33, 35), (-8, -10), (5, -10)])
def test_the_limit_that_is_told_is_the_one_that_was_broken_or_is_nearest(value, limit):
    assert Rule("t", EVERY, "value", above=35, below=-10).limit_for(value) == limit
    assert Rule("t", EVERY, "value", above=35).limit_for(value) == 35
    assert Rule("t", EVERY, "value", below=-10).limit_for(value) == -10


def test_a_clock_that_steps_back_by_years_silences_no_alert():
    rule = hot(cooldown_us=300 * SECOND)
    years = 3 * 365 * 86_400
    findings: list[tuple[float, float]] = [(0, 36), (1, 30), (-years, 36), (1 - years, 30)]
    assert told(rule, findings) == [
        ("FIRING", 0, 1),
        ("RECOVERED", 1, 1),
        ("FIRING", -years, 1),
        ("RECOVERED", 1 - years, 1),
    ]


def test_no_two_changes_of_an_alert_have_the_same_time():
    instance, changes = advance_instance(
        hot(), AlertInstance(recorded_us=START), LimitState.BROKEN, np.array([START]), np.array([36.0])
    )
    assert [c.at_us for c in changes] == [START + 1]
    assert instance.notified_us == START + 1


def test_a_good_series_has_no_course():
    instance, changes = advance_instance(
        hot(), AlertInstance(), LimitState.GOOD, np.array([START]), np.array([1.0])
    )
    assert (instance, changes) == (AlertInstance(), [])
    assert AlertInstance().notified_us == NEVER_US


def test_the_built_in_rules_are_those_of_the_design():
    table = {
        r.name: (str(r.pattern), r.on, r.above, r.below, r.severity, r.cooldown_us // SECOND)
        for r in DEFAULT_ALERT_RULES
    }
    inf = float("inf")
    assert table == {
        "temperature": ("*/temperature", "value", 35, -10, Severity.CRITICAL, 300),
        "battery": ("*/*", "battery_level", inf, 20, Severity.WARNING, 3600),
        "quality": ("*/*", "quality", inf, 80, Severity.WARNING, 1800),
        "silence": ("*/*", "silence", 300, -inf, Severity.CRITICAL, 600),
    }
    assert all(r.on in QUANTITIES for r in DEFAULT_ALERT_RULES)
