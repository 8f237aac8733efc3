"""The comparison finds every kind of difference, and nothing where there is none."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from firmware_sim.ground_truth import PRODUCED_DTYPE, GroundTruth, SeriesState
from firmware_sim.verify.comparison import STORED_DTYPE, LossEvidence, StoredRows, compare_readings
from firmware_sim.verify.loss_explanation import ROLLED_UP_DTYPE, DeclaredLoss, match_declared_losses

STATES = (
    SeriesState("s1", "temperature", ("degC", "hall", "m", "1.0")),
    SeriesState("s1", "temperature", ("degC", "roof", "m", "1.0")),
    SeriesState("s2", "humidity", ("%", None, None, None)),
)
STATE_SERIES = np.array([0, 0, 1], np.int32)
BASE_US = 1_767_225_600_000_000


def truth_of(rows, acknowledged=None, refused=()):
    """Rows are (state, time in us after the base, value)."""
    produced = np.zeros(len(rows), PRODUCED_DTYPE)
    for at, (state, time_us, value) in enumerate(rows):
        produced[at] = (state, BASE_US + time_us, value, 97.3, np.nan, -60, at)
    count = len(rows)
    mask = np.ones(count, bool) if acknowledged is None else np.isin(np.arange(count), acknowledged)
    return GroundTruth(STATES, produced, mask, np.isin(np.arange(count), refused))


def stored_of(truth, index=None, **options):
    produced = truth.produced if index is None else truth.produced[index]
    rows = np.zeros(len(produced), STORED_DTYPE)
    for name in PRODUCED_DTYPE.fields or ():
        rows[name] = produced[name]
    rows["series"] = truth.series if index is None else truth.series[index]
    return StoredRows(rows, **options)


ROWS = [(0, 0, 1.5), (2, 0, 40.0), (0, 1, 1.5), (1, 2, -7.25), (2, 9, 41.0)]


def test_equal_sides_have_no_differences():
    truth = truth_of(ROWS)
    found = compare_readings(truth, stored_of(truth, [4, 2, 0, 1, 3]))
    assert found.clean
    assert (found.acknowledged, found.stored, found.matched) == (5, 5, 5)
    assert found.examples == {}


def test_an_acknowledged_reading_that_is_not_stored_is_lost():
    truth = truth_of(ROWS)
    found = compare_readings(truth, stored_of(truth, [0, 1, 2, 4]))
    assert (found.lost, found.duplicated, found.altered, found.clean) == (1, 0, 0, False)
    assert found.examples["lost"] == ["s1/temperature at 2026-01-01T00:00:00.000002Z value -7.25 seq 3"]


def test_an_unacknowledged_reading_may_be_missing_or_stored():
    truth = truth_of(ROWS, acknowledged=[0, 1])
    found = compare_readings(truth, stored_of(truth, [0, 1, 4]))
    assert found.clean
    assert (found.acknowledged, found.early, found.lost) == (2, 1, 0)


def test_a_refused_reading_is_counted_and_not_lost():
    truth = truth_of(ROWS, acknowledged=[0, 1, 2, 3], refused=[4])
    found = compare_readings(truth, stored_of(truth, [0, 1, 2, 3]))
    assert found.clean
    assert found.refused == 1


def test_a_reading_stored_three_times_is_duplicated_twice():
    truth = truth_of(ROWS)
    found = compare_readings(truth, stored_of(truth, [0, 1, 1, 1, 2, 3, 4]))
    assert (found.duplicated, found.lost, found.altered) == (2, 0, 0)
    assert found.examples["duplicated"] == ["s2/humidity at 2026-01-01T00:00:00.000000Z value 40.0: 3 rows"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("value", np.nextafter(1.5, 2)),
        ("quality", 97.4),
        ("quality", np.nan),
        ("battery_level", 50.0),
        ("signal_strength", -61),
        ("seq", 7),
        ("state", 1),
        ("state", -1),
    ],
)
def test_any_column_that_differs_is_altered_and_named(name, value):
    truth = truth_of(ROWS)
    stored = stored_of(truth)
    stored.rows[name][2] = value
    found = compare_readings(truth, stored)
    assert (found.altered, found.lost, found.duplicated) == (1, 0, 0)
    assert (name if name != "state" else "attributes") in found.examples["altered"][0]


def test_a_time_that_differs_by_a_microsecond_is_lost_and_unknown():
    truth = truth_of(ROWS)
    stored = stored_of(truth)
    stored.rows["time_us"][3] += 1
    found = compare_readings(truth, stored)
    assert (found.lost, found.unknown) == (1, 1)
    assert "00:00:00.000003Z" in found.examples["unknown"][0]


def test_columns_and_attributes_that_a_store_lacks_are_not_compared():
    truth = truth_of(ROWS)
    stored = stored_of(truth, compared=("value",), attributes=False)
    stored.rows["quality"] = 0
    stored.rows["state"] = -1
    assert compare_readings(truth, stored).clean


def test_of_repeated_readings_the_first_must_be_stored():
    truth = truth_of([(0, 5, 1.0), (0, 5, 2.0), (1, 5, 3.0)])
    assert compare_readings(truth, stored_of(truth, [0])).clean
    found = compare_readings(truth, stored_of(truth, [1]))
    assert (found.altered, found.repeated, found.acknowledged) == (1, 2, 1)


def test_where_rewriting_is_harmless_equal_copies_are_no_duplicates_and_others_are():
    truth = truth_of(ROWS)
    stored = stored_of(truth, [0, 0, 1, 1, 2, 3, 4], idempotent=True)
    assert compare_readings(truth, stored).rewritten == 2
    assert compare_readings(truth, stored).clean
    stored.rows["value"][1] = 99.0
    found = compare_readings(truth, stored)
    assert (found.rewritten, found.duplicated) == (1, 1)


def test_examples_are_few_and_counts_are_whole():
    truth = truth_of([(0, n, 1.0) for n in range(100)])
    found = compare_readings(truth, stored_of(truth, []))
    assert found.lost == 100
    assert len(found.examples["lost"]) == 5


def test_times_too_far_apart_for_one_integer_key_are_still_told_apart():
    truth = truth_of([(0, -(1 << 61), 1.0), (2, 1 << 61, 2.0), (2, 0, 3.0)])
    assert compare_readings(truth, stored_of(truth)).clean
    assert compare_readings(truth, stored_of(truth, [0, 1])).lost == 1


readings = st.tuples(st.integers(0, 2), st.integers(0, 6), st.sampled_from([1.0, 2.0]))


@given(
    produced=st.lists(readings, max_size=12),
    acknowledged=st.sets(st.integers(0, 11)),
    stored=st.lists(st.tuples(readings, st.booleans()), max_size=12),
)
def test_counts_are_those_of_a_comparison_by_hand(produced, acknowledged, stored):
    truth = truth_of(produced, acknowledged=sorted(acknowledged))
    other = truth_of([row for row, _ in stored])
    rows = stored_of(other)
    rows.rows["seq"] = 0
    truth.produced["seq"] = 0
    found = compare_readings(truth, rows)

    first: dict[tuple[int, int], tuple[int, float]] = {}
    acked, there = set(), defaultdict(list)
    for at, (state, time_us, value) in enumerate(produced):
        first.setdefault((STATE_SERIES[state], time_us), (state, value))
        if at in acknowledged:
            acked.add((STATE_SERIES[state], time_us))
    for (state, time_us, value), _ in stored:
        there[STATE_SERIES[state], time_us].append((state, value))
    assert found.lost == len(acked - there.keys())
    assert found.early == len((first.keys() & there.keys()) - acked)
    assert found.unknown == len(there.keys() - first.keys())
    assert found.duplicated == sum(len(copies) - 1 for copies in there.values())
    assert found.altered == sum(there[key][0] != first[key] for key in first.keys() & there.keys())


def test_a_missing_reading_is_explained_by_the_spool_the_quarantine_or_a_declaration():
    truth = truth_of([(0, n, 1.0) for n in range(10)])
    stored = stored_of(truth, range(3))
    evidence = LossEvidence(stored_of(truth, [2, 3, 4]).rows, stored_of(truth, [4, 5]).rows)
    found = compare_readings(truth, stored, evidence)
    assert (found.lost, found.waiting, found.quarantined, found.declared) == (4, 2, 1, 0)
    assert "seq 3" in found.examples["waiting"][0]
    assert "seq 5" in found.examples["quarantined"][0]
    assert not found.clean


def test_a_reading_that_stays_at_the_gateway_on_purpose_is_no_fault():
    truth = truth_of([(0, n, 1.0) for n in range(5)])
    spool = stored_of(truth).rows
    spool["flags"][[1, 2]] = 1024
    found = compare_readings(truth, stored_of(truth, [0, 3, 4]), LossEvidence(spool))
    assert (found.suppressed, found.waiting, found.lost, found.clean) == (2, 0, 0, True)


def test_declarations_explain_as_many_lost_readings_as_they_speak_of():
    truth = truth_of([(0, n, 1.0) for n in range(10)])
    stored = stored_of(truth, range(4))
    enough = compare_readings(
        truth, stored, LossEvidence(declared=[DeclaredLoss("g: full, rollup 60 s survives", 9)])
    )
    assert (enough.lost, enough.declared, enough.clean) == (0, 6, True)
    assert enough.examples == {"declared": ["9 by g: full, rollup 60 s survives"]}
    too_few = compare_readings(truth, stored, LossEvidence(declared=[DeclaredLoss("g: full", 5)]))
    assert (too_few.lost, too_few.declared, too_few.clean) == (1, 5, False)
    assert too_few.examples["lost"]
    assert (
        compare_readings(
            truth, stored_of(truth), LossEvidence(declared=[DeclaredLoss("g: full", 5)])
        ).declared
        == 0
    )


def test_a_declaration_explains_only_readings_of_its_times():
    truth = truth_of([(0, n, 1.0) for n in range(10)])
    stored = stored_of(truth, range(4))
    told = DeclaredLoss("g: full", 9, BASE_US + 2, BASE_US + 6, 11, 12)
    found = compare_readings(truth, stored, LossEvidence(declared=[told]))
    assert (found.lost, found.declared) == (3, 3)
    assert "seq 7" in found.examples["lost"][0]
    assert found.examples["declared"] == [
        "9 by g: full, of 2026-01-01T00:00:00.000002Z to 2026-01-01T00:00:00.000006Z, commits 11..12"
    ]


spans = st.tuples(st.integers(0, 5), st.integers(-1, 12), st.integers(0, 6))


@given(
    times=st.lists(st.integers(0, 12), max_size=10),
    spoken=st.lists(spans, max_size=4),
)
def test_as_many_are_explained_as_the_declarations_can(times, spoken):
    told = [DeclaredLoss("g", rows, begin, begin + length) for rows, begin, length in spoken]
    places = [span for span in told for _ in range(span.rows)]
    holder: dict[int, int] = {}

    def seat(place, tried):
        for number, time in enumerate(times):
            if places[place].from_us <= time <= places[place].to_us and number not in tried:
                tried.add(number)
                if number not in holder or seat(holder[number], tried):
                    holder[number] = place
                    return True
        return False

    most = sum(seat(place, set()) for place in range(len(places)))
    found = match_declared_losses(np.array(sorted(times), np.int64), np.ones(len(times), bool), told)
    assert found.sum() == most
    assert all(any(d.from_us <= t <= d.to_us for d in told) for t in np.array(sorted(times))[found])


def rolled_up(*windows):
    return np.array(
        [(series, BASE_US + begin, BASE_US + end, rows) for series, begin, end, rows in windows],
        ROLLED_UP_DTYPE,
    )


def test_what_rollups_count_as_suppressed_is_explained_window_by_window():
    truth = truth_of([(0, n, 1.0) for n in range(20)] + [(2, n, 1.0) for n in range(5)])
    stored = stored_of(truth, [0, 9, 10])
    windows = rolled_up((0, 0, 10, 8), (0, 10, 20, 6), (1, 0, 10, 5), (1, 10, 20, 9))
    found = compare_readings(truth, stored, LossEvidence(rolled_up=windows))
    assert (found.suppressed, found.lost) == (8 + 6 + 5, 3)
    spool = stored_of(truth, range(11, 15)).rows
    spool["flags"] = 1024
    found = compare_readings(truth, stored, LossEvidence(spool, rolled_up=windows))
    assert (found.suppressed, found.lost) == (8 + 6 + 5, 3), "those in the spool are among those counted"


def test_a_window_half_declared_and_half_suppressed_is_explained_whole():
    truth = truth_of([(0, n, 1.0) for n in range(10)])
    told = DeclaredLoss("g: full", 4, BASE_US, BASE_US + 3)
    evidence = LossEvidence(rolled_up=rolled_up((0, 0, 10, 6)), declared=[told])
    found = compare_readings(truth, stored_of(truth, []), evidence)
    assert (found.suppressed, found.declared, found.lost) == (6, 4, 0)
    evidence = LossEvidence(rolled_up=rolled_up((0, 0, 10, 5)), declared=[told])
    assert compare_readings(truth, stored_of(truth, []), evidence).lost == 1


def test_flags_are_counted_by_name():
    truth = truth_of(ROWS)
    stored = stored_of(truth)
    stored.rows["flags"] = [0, 32, 32 | 128, 0, 1]
    found = compare_readings(truth, stored)
    assert found.flagged == {"out_of_range": 1, "late": 2, "spike": 1}
    assert (found.late, found.clean) == (2, True)


def test_where_only_the_newest_attributes_are_kept_all_rows_must_show_those():
    truth = truth_of(ROWS)
    assert (
        compare_readings(truth, stored_of(truth, newest=True)).altered == 2
    )  # the first state is the older one
    stored = stored_of(truth, newest=True)
    stored.rows["state"][[0, 2]] = 1
    assert compare_readings(truth, stored).clean
    stored.rows["state"][0] = -1
    found = compare_readings(truth, stored)
    assert found.altered == 1
    assert "attributes" in found.examples["altered"][0]


def test_a_sensor_whose_newest_attributes_came_with_another_type_shows_them_with_all():
    states = (*STATES, SeriesState("s1", "pressure", ("hPa", "yard", "m", "2.0")))
    produced = truth_of([(0, 0, 1.0), (3, 5, 2.0)]).produced
    truth = GroundTruth(
        states,
        produced,
        np.ones(2, bool),
        np.zeros(2, bool),
    )
    stored = stored_of(
        truth, newest=True, states=(*states, SeriesState("s1", "temperature", ("degC", "yard", "m", "2.0")))
    )
    assert compare_readings(truth, stored).altered == 1
    stored.rows["state"][0] = 4
    assert compare_readings(truth, stored).clean
