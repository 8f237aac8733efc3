"""What the metrics promise: a table that is true, conventional names, few labels."""

from __future__ import annotations

import re
from pathlib import Path

from gateway.status.metrics import METRICS, OTHER_REASONS, REASONS_MAX, limit_reasons

DOC = Path(__file__).parents[4] / "docs" / "metrics.md"
ROW = re.compile(r"\| `(\w+)` \| (\w+) \| ([\w, ]*) \| (.+) \|")


def test_the_documented_table_is_the_one_in_the_source():
    rows = [ROW.fullmatch(line) for line in DOC.read_text(encoding="utf-8").splitlines()]
    table = [match.groups() for match in rows if match is not None]
    assert table == [(m.name, m.kind, ", ".join(m.labels), m.help) for m in METRICS]


def test_names_follow_the_conventions():
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert re.fullmatch(r"tidegate(_[a-z]+)+", metric.name), metric.name
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert not re.search(r"_(ms|us|minutes|hours|days|kb|mb|percent)(_|$)", metric.name), metric.name
        assert set(metric.labels) <= {"destination", "lane", "reason", "gateway_id", "version"}, metric.name


def test_reasons_beyond_the_bound_are_counted_together_and_none_moves():
    few = {f"r{n}": float(n) for n in range(REASONS_MAX)}
    assert limit_reasons(few) == {(reason,): value for reason, value in few.items()}
    many = {**few, "a": 5.0, "b": 7.0}
    assert limit_reasons(many) == {**limit_reasons(few), (OTHER_REASONS,): 12.0}
