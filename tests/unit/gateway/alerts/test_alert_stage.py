"""The stage of alerts: what is judged, by which time, what is told, and what a crash leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_sync.model.records import Alerts, AlertState, Flag, Readings, Rollups, Severity
from gateway.alerts.evaluator import AlertEvaluator
from gateway.alerts.rules import DEFAULT_ALERT_RULES, Rule
from gateway.processing.series_pattern import Pattern
from gateway.processing.stage import StageInput, StageOutput

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.alerts.alert_state import AlertEvent

SECOND = 1_000_000
START = 1_790_000_000 * SECOND
NAN = float("nan")
EVERY = Pattern("*", "*")
TYPES = ("temperature", "humidity")


class Seen(NamedTuple):
    series: int
    time_us: int
    value: float
    quality: float = NAN
    battery: float = NAN
    flags: Flag = Flag(0)


class Told(NamedTuple):
    rule: str
    series: int
    state: str
    at_s: float
    detail: str


def readings(rows: Sequence[Seen]) -> Readings:
    if not rows:
        return Readings.empty()
    return Readings(
        np.array([r.series for r in rows], np.int32),
        np.array([r.time_us for r in rows], np.int64),
        np.array([r.value for r in rows], np.float64),
        np.array([r.quality for r in rows], np.float32),
        np.array([r.battery for r in rows], np.float32),
        np.full(len(rows), NAN, np.float32),
        np.full(len(rows), -1, np.int64),
        np.array([int(r.flags) for r in rows], np.int32),
    )


def name_of(number: int) -> tuple[str, str]:
    return f"d{number}", TYPES[number % 2]


class Bench:
    """A stage as the follower drives it; `crash` makes it anew from what is durable."""

    def __init__(self, rules: Sequence[Rule], known: Sequence[int] = (), **options) -> None:
        self.rules, self.known, self.options = rules, list(known), options
        self.durable: dict[str, bytes] = {}
        self.remembered: dict[str, bytes | None] = {}
        self.records: list[tuple] = []
        self.told: list[Told] = []
        self.stage = self.made()

    def made(self) -> AlertEvaluator:
        stage = AlertEvaluator(
            self.rules,
            name_of,
            lambda: np.array(self.known, np.int32),
            lambda _connection, _events, _now_us: None,
            **self.options,
        )
        stage.restore(self.durable)
        return stage

    def made_from(self, before: AlertEvaluator) -> AlertEvaluator:
        """With the rules of now, where another stage is."""
        durable, self.durable = self.durable, {}
        stage, self.durable = self.made(), durable
        stage.take_over(before)
        return stage

    def step(self, now_us: int, rows: Sequence[Seen] = (), rollups: Rollups | None = None) -> list[Told]:
        step = StageInput(readings(rows), rollups or Rollups.empty(), now_us)
        return self.settle(self.stage.step(step))

    def settle(self, outcome: StageOutput, *, durable: bool = True) -> list[Told]:
        found = []
        self.remembered |= outcome.state
        if durable:
            if outcome.snapshot is not None:
                self.remembered |= outcome.snapshot()
            for key, blob in self.remembered.items():
                self.durable.pop(key, None)
                if blob is not None:
                    self.durable[key] = blob
            self.remembered = {}
        for records in outcome.records:
            assert isinstance(records, Alerts)
            rows = zip(*(getattr(records, name).tolist() for name in Alerts.columns), strict=True)
            for row in rows:
                self.records.append(row)
                series, time_us, state, *_, rule, detail = row
                told = Told(rule, series, AlertState(state).name, (time_us - START) / SECOND, detail)
                found.append(told)
        self.stage.accept(outcome, durable=durable)
        self.told += found
        return found

    def crash(self, *, known: Sequence[int] = ()) -> None:
        self.known, self.remembered = list(known), {}
        self.stage = self.made()


def at(seconds: float) -> int:
    return START + round(seconds * SECOND)


def hot(**options) -> Rule:
    return Rule("hot", EVERY, "value", above=35, **{"cooldown_us": 0, **options})


def test_an_alert_begins_and_ends_with_a_record_of_what_was_seen():
    bench = Bench([hot(severity=Severity.CRITICAL)])
    bench.step(at(1), [Seen(2, at(0), 20), Seen(2, at(1), 36.5), Seen(4, at(1), 30)])
    bench.step(at(2), [Seen(2, at(2), 36)])
    bench.step(at(3), [Seen(2, at(3), 35)])
    assert bench.records == [
        (2, at(1), AlertState.FIRING, Severity.CRITICAL, 36.5, 35, 1, "hot", "value 36.5 is above 35"),
        (2, at(3), AlertState.RECOVERED, Severity.CRITICAL, 35, 35, 1, "hot", "value is back at 35"),
    ]
    assert (bench.stage.fired, bench.stage.recovered, bench.stage.firing_alerts()) == (1, 1, [])


def test_a_rule_is_for_the_series_of_its_pattern_but_for_those_it_names():
    rule = hot()._replace(pattern=Pattern("*", "temperature"), without=(Pattern("d4", "*"),))
    bench = Bench([rule])
    assert [t.series for t in bench.step(at(1), [Seen(n, at(1), 99) for n in (1, 2, 3, 4, 6)])] == [2, 6]


def test_what_is_absent_is_no_finding():
    bench = Bench([Rule("quality", EVERY, "quality", below=80)])
    told = bench.step(at(3), [Seen(2, at(1), 1, quality=50), Seen(2, at(2), 1), Seen(4, at(2), 1)])
    assert [(t.series, t.state) for t in told] == [(2, "FIRING")]


def test_late_and_stale_readings_are_no_findings():
    bench = Bench([hot()], stale_us=60 * SECOND)
    assert bench.step(at(100), [Seen(2, at(99), 90, flags=Flag.LATE), Seen(2, at(39), 90)]) == []
    assert bench.step(at(100), [Seen(2, at(41), 90)]) != []


def test_a_reading_with_its_time_in_doubt_counts_as_of_now():
    bench = Bench([hot()])
    far = Seen(2, at(10**9), 90, flags=Flag.CLOCK_IN_DOUBT)
    assert [t.at_s for t in bench.step(at(5), [far])] == [5]


def test_a_flag_raises_an_alert_while_it_is_set():
    bench = Bench([Rule("stuck", EVERY, "flag.stuck")])
    rows = [Seen(2, at(n), 1, flags=f) for n, f in enumerate([Flag.SPIKE, Flag.STUCK, Flag.STUCK, Flag(0)])]
    assert bench.step(at(5), rows) == [
        Told("stuck", 2, "FIRING", 1, "flagged stuck"),
        Told("stuck", 2, "RECOVERED", 3, "no longer flagged stuck"),
    ]
    assert np.isnan(bench.records[0][5])


@pytest.mark.parametrize("split", [1, 2, 100])
def test_a_rate_is_that_between_a_reading_and_the_one_before_it(split):
    rule = Rule("jump", EVERY, "rate_per_min", above=60, below=-120, cooldown_us=0)
    bench = Bench([rule])
    values = [0, 0.5, 2, 2.5, 0, 0]
    rows = [Seen(series, at(n), v) for n, v in enumerate(values) for series in (2, 4)]
    for start in range(0, len(rows), split):
        bench.step(at(9), rows[start : start + split])
        bench.crash()
    assert [t[2:] for t in bench.told if t.series == 2] == [
        ("FIRING", 2, "rate per minute 90 is above 60"),
        ("RECOVERED", 3, "rate per minute is back at 30"),
        ("FIRING", 4, "rate per minute -150 is below -120"),
        ("RECOVERED", 5, "rate per minute is back at 0"),
    ]
    assert sum(t.series == 4 for t in bench.told) == 4


def rollup(series: int, start_s: int, mean: float, *, window_s: int = 60, revision: int = 1) -> Rollups:
    values = dict.fromkeys(("mean", "m2", "minimum", "maximum", "first", "last"), mean)
    whole = {"series": series, "time_us": at(start_s), "window_s": window_s, "revision": revision, "count": 5}
    return Rollups(
        **{
            name: np.array([{**whole, **values}.get(name, 0)], dtype)
            for name, dtype in Rollups.columns.items()
        }
    )


def test_a_rollup_is_judged_when_its_window_closes_and_not_when_it_is_revised():
    bench = Bench([Rule("mean", EVERY, "rollup.mean", above=30, window_s=60)])
    assert bench.step(at(70), rollups=rollup(2, 0, 31)) == [
        Told("mean", 2, "FIRING", 60, "rollup mean 31 is above 30")
    ]
    assert bench.step(at(80), rollups=rollup(2, 0, 20, revision=2)) == []
    assert bench.step(at(90), rollups=rollup(2, 0, 20, window_s=300)) == []
    assert [t.state for t in bench.step(at(130), rollups=rollup(2, 60, 29))] == ["RECOVERED"]


SILENCE = Rule("silence", EVERY, "silence", above=30, cooldown_us=60 * SECOND, severity=Severity.CRITICAL)


def test_silence_is_told_once_and_ends_with_the_next_arrival_whatever_its_time():
    bench = Bench([SILENCE])
    bench.step(at(0), [Seen(2, at(0), 1), Seen(4, at(0), 1)])
    for second in range(10, 120, 10):
        bench.step(at(second), [Seen(4, at(second), 1)] if second < 60 else [])
    bench.step(at(120), [Seen(2, at(-9999), 1, flags=Flag.LATE)])
    assert bench.told == [
        Told("silence", 2, "FIRING", 40, "no data for 40 s"),
        Told("silence", 4, "FIRING", 90, "no data for 40 s"),
        Told("silence", 2, "RECOVERED", 120, "data again, 80 s after the alert"),
    ]
    assert np.isnan(bench.records[0][4])
    assert bench.records[0][5] == 30


def test_series_that_were_never_heard_since_the_start_are_expected_too():
    bench = Bench([SILENCE], known=[2, 4])
    for second in range(0, 50, 10):
        bench.step(at(second), [Seen(4, at(second), 1)])
    assert [(t.series, t.at_s) for t in bench.told] == [(2, 40)]


@pytest.mark.parametrize("leap_s", [10**8, -(10**8)])
def test_a_step_of_the_clock_makes_nobody_silent(leap_s):
    bench = Bench([SILENCE])
    bench.step(at(0), [Seen(2, at(0), 1)])
    bench.step(at(10))
    assert bench.step(at(leap_s)) == []
    assert bench.step(at(leap_s + 15)) == []
    assert [t.at_s for t in bench.step(at(leap_s + 31))] == [leap_s + 31]


def test_a_restart_forgets_no_silence_and_makes_nobody_silent():
    bench = Bench([SILENCE])
    bench.step(at(0), [Seen(2, at(0), 1), Seen(4, at(0), 1)])
    for second in range(10, 50, 10):
        bench.step(at(second), [Seen(4, at(second), 1)])
    bench.crash(known=[2, 4])
    assert bench.step(at(7000)) == []
    assert bench.step(at(7020)) == []
    assert [t[1:3] for t in bench.step(at(7021), [Seen(2, at(7021), 1)])] == [(2, "RECOVERED")]
    assert [t[1:3] for t in bench.step(at(7035))] == [(4, "FIRING")]


def test_silence_again_within_the_cooldown_is_told_after_it():
    bench = Bench([SILENCE])
    bench.step(at(0), [Seen(2, at(0), 1)])
    for second in range(10, 150, 10):
        bench.step(at(second), [Seen(2, at(second), 1)] if second == 50 else [])
    assert [(t.state, t.at_s) for t in bench.told] == [("FIRING", 40), ("RECOVERED", 50), ("FIRING", 100)]


def test_an_alert_of_a_rule_that_is_gone_ends_at_the_start():
    bench = Bench([hot(severity=Severity.CRITICAL), Rule("other", EVERY, "value", above=50)])
    bench.step(at(1), [Seen(2, at(1), 40)])
    bench.rules = [bench.rules[1]]
    bench.crash()
    assert bench.step(at(5)) == [Told("hot", 2, "RECOVERED", 5, "the rule is no longer in the configuration")]
    bench.crash()
    assert bench.step(at(6)) == []


@pytest.mark.parametrize("blob", [b"\x02", b"\x01", b"\x01\xff\xff", b"\x01" + b"\x91\x90"])
def test_state_of_another_version_or_broken_begins_anew(blob, caplog):
    bench = Bench([hot()])
    bench.durable = {"alerts/course/hot/2": blob, "alerts/course/x": b"\x01", "alerts/rates": blob}
    bench.crash()
    assert "2 alerts" in caplog.text
    assert bench.step(at(1), [Seen(2, at(1), 40)]) != []


def test_state_of_a_series_that_the_spool_has_lost_is_forgotten():
    bench = Bench([hot()])
    bench.step(at(1), [Seen(2, at(1), 40), Seen(4, at(1), 40)])

    def lost(number: int) -> tuple[str, str]:
        return {2: ("d2", "temperature")}[number]

    stage = AlertEvaluator([hot()], lost, lambda: np.array([2], np.int32), lambda *_: None)
    stage.restore(bench.durable)
    assert [series for _, series, _ in stage.firing_alerts()] == [2]


def test_a_step_that_is_not_accepted_changes_nothing():
    bench = Bench([hot(), SILENCE])
    step = StageInput(readings([Seen(2, at(1), 40)]), Rollups.empty(), at(1))
    first, second = bench.stage.step(step), bench.stage.step(step)
    assert first.records[0].select(np.array([0])).time_us == second.records[0].time_us
    assert len(bench.settle(second)) == 1


def test_nothing_is_written_while_nothing_is_out_of_the_ordinary():
    bench = Bench(DEFAULT_ALERT_RULES)
    for second in range(100):
        step = StageInput(readings([Seen(2, at(second), 20, 95, 90)]), Rollups.empty(), at(second))
        outcome = bench.stage.step(step)
        assert (outcome.records, dict(outcome.state), outcome.snapshot, outcome.also) == ((), {}, None, None)
        bench.stage.accept(outcome, durable=False)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32))
def test_a_crash_at_any_step_leaves_the_same_records(seed):
    """Raw is read again from the last durable step; what was told meanwhile was durable with its state."""
    rng = np.random.default_rng(seed)
    rules = [
        hot(for_us=3 * SECOND, cooldown_us=8 * SECOND, margin=3),
        Rule("low", EVERY, "battery_level", below=20, cooldown_us=5 * SECOND, repeat_us=6 * SECOND),
        Rule("jump", EVERY, "rate_per_min", above=600, cooldown_us=0),
        Rule("flagged", EVERY, "flag.spike", cooldown_us=2 * SECOND),
    ]
    chunks = []
    for step in range(40):
        rows = [
            Seen(
                int(rng.integers(1, 5)),
                at(step + n / 10),
                float(rng.integers(28, 42)),
                battery=float(rng.choice([10, 30, NAN])),
                flags=Flag(int(rng.choice([0, 0, 0, Flag.SPIKE, Flag.LATE]))),
            )
            for n in range(int(rng.integers(0, 9)))
        ]
        chunks.append(rows)
    whole = Bench(rules)
    for number, rows in enumerate(chunks):
        whole.step(at(number), rows)
    crashing, durable_to, pending = Bench(rules), 0, 0
    while pending < len(chunks):
        outcome = crashing.stage.step(StageInput(readings(chunks[pending]), Rollups.empty(), at(pending)))
        if rng.random() < 0.15:  # before the transaction
            crashing.crash()
            pending = durable_to
            continue
        durable = bool(outcome.records) or rng.random() < 0.2
        crashing.settle(outcome, durable=durable)
        pending += 1
        if durable:
            durable_to = pending
        if rng.random() < 0.15:  # after it
            crashing.crash()
            pending = durable_to

    def but_findings(record: tuple) -> str:
        return str((*record[:6], *record[7:]))

    assert list(map(but_findings, crashing.records)) == list(map(but_findings, whole.records))
    for found, expected in zip(crashing.records, whole.records, strict=True):
        assert 1 <= found[6] <= expected[6]


def test_a_series_that_comes_and_goes_about_a_limit_writes_nothing_between_its_records():
    bench = Bench([hot(cooldown_us=100 * SECOND)])
    written = []
    for second in range(300):
        outcome = bench.stage.step(
            StageInput(readings([Seen(2, at(second), 36 if second % 2 else 20)]), Rollups.empty(), at(second))
        )
        written.append((len(outcome.state), len(outcome.records)))
        bench.settle(outcome)
    assert all((state == 0) == (records == 0) for state, records in written)
    assert sum(records for _, records in written) == 6
    assert [r[6] for r in bench.records] == [1, 1, 50, 1, 50, 1]


def test_events_say_which_rule_and_series_they_are_of():
    told: list[AlertEvent] = []
    stage = AlertEvaluator([hot()], name_of, lambda: np.empty(0, np.int32), lambda _c, e, _n: told.extend(e))
    outcome = stage.step(StageInput(readings([Seen(2, at(1), 40)]), Rollups.empty(), at(1)))
    assert outcome.also is not None
    outcome.also(None)  # type: ignore[arg-type]  # this outbox needs no file
    assert [(e.rule.name, e.series, e.detail) for e in told] == [("hot", 2, "value 40 is above 35")]


# other rules while the gateway runs


def test_other_rules_keep_the_courses_of_those_that_stay_and_end_the_alerts_of_those_that_go() -> None:
    hot = Rule("hot", EVERY, "value", above=30)
    moist = Rule("moist", EVERY, "value", above=20)
    bench = Bench([moist, hot])
    bench.step(at(0), [Seen(0, at(0), 40)])
    assert [(t.rule, t.state) for t in bench.told] == [("moist", "FIRING"), ("hot", "FIRING")]
    before, bench.rules = (
        bench.stage,
        [hot._replace(severity=Severity.CRITICAL), Rule("cold", EVERY, "value", below=0)],
    )
    bench.stage = bench.made_from(before)
    bench.told.clear()
    bench.step(at(1), [Seen(0, at(1), 41)])
    assert [(t.rule, t.state) for t in bench.told] == [("moist", "RECOVERED")]
    bench.step(at(2), [Seen(0, at(2), -1)])
    assert [(t.rule, t.state) for t in bench.told[1:]] == [("hot", "RECOVERED"), ("cold", "FIRING")]
    assert {key for key in bench.durable if "course" in key} == {
        "alerts/course/cold/0",
        "alerts/course/hot/0",
    }
    assert (bench.stage.fired, bench.stage.recovered) == (3, 2)


def test_other_rules_do_not_forget_how_long_a_series_was_silent_nor_where_a_rate_began() -> None:
    silence = Rule("silence", EVERY, "silence", above=60)
    rate = Rule("rate", EVERY, "rate_per_min", above=10)
    bench = Bench([silence], known=[0])
    bench.step(at(0), [Seen(0, at(0), 1)])
    for second in range(20, 60, 20):
        bench.step(at(second))
    before, bench.rules = bench.stage, [rate, silence]
    bench.stage = bench.made_from(before)
    assert bench.step(at(60)) == []
    assert [t.rule for t in bench.step(at(61))] == ["silence"]
    bench.step(at(70), [Seen(0, at(70), 1)])
    before, bench.rules = bench.stage, [rate]
    bench.stage = bench.made_from(before)
    assert [(t.rule, t.state) for t in bench.step(at(80), [Seen(0, at(80), 21)])][-1] == ("rate", "FIRING")
