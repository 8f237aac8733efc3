"""The benchmark report says what was measured, with its spread; sizes are of the same readings in every
form.
"""

from __future__ import annotations

import gzip
import json
import re

import pytest
import zstandard

from benchmarks import filling, sizes
from benchmarks.report import BenchmarkResult, machine, write

SWEEPS = {
    "throughput_by_batch": [[1, 100_000.0, 5.0], [50, 900_000.0, 0.8]],
    "latency_by_load": [[1000, 1000.0, 1.5, 4.0], [10_000, 9999.0, 2.0, 6.0]],
    "bytes_by_segment": {"segment": [[10, 36.1], [1000, 2.5]], "JSON": [[10, 214.9], [1000, 214.8]]},
    "memory_over_time": [[0.5, 50_000.0, 80.0], [1.0, 100_000.0, 81.0]],
    "cost_by_devices": [[100, 84.0, 60.0, 20.0]],
}


def test_the_report_shows_medians_spreads_goals_and_plots(tmp_path):
    pytest.importorskip("matplotlib")
    runs = [
        BenchmarkResult(
            "ingress",
            "python -m benchmarks.ingress",
            [
                {"publishes_per_s": 100_000.0, "publishes_per_s_best": 130_000.0, "file_system": "ext4"},
                {"publishes_per_s": 120_000.0, "publishes_per_s_worst": 90_000.0, "file_system": "ext4"},
                {"publishes_per_s": 110_000.0, "absent": None, "file_system": "ext4"},
            ],
            {"publishes_per_s": {"what": "publishes per second", "goal": ">= 100,000"}},
        ),
        BenchmarkResult("sweeps", "python -m benchmarks.sweeps", [SWEEPS]),
    ]
    out = tmp_path / "report.md"
    write(out, runs, machine(), 3)
    text = out.read_text()
    assert "| `publishes_per_s` | publishes per second | 110,000 | 90,000 | 130,000 | >= 100,000 |" in text
    assert "| `file_system` |  | ext4 |" in text
    assert "_best" not in text
    assert "Medians of 3 repeats" in text
    for word in ("processor", "commit", "Python", "disk"):
        assert f"| {word} | " in text
    pictures = re.findall(r"\]\((plots/\w+\.png)\)", text)
    assert len(pictures) == 5
    for picture in pictures:
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert "| segment | 36.10 | 2.50 |" in text


def test_every_form_holds_the_same_readings():
    part = filling.readings(0, 3, origin_us=1_750_000_000_000_000)
    written = [json.loads(line) for line in sizes.json_lines(part).splitlines()]
    assert len(written) == part.rows == 3000
    assert [row["value"] for row in written] == part.value.tolist()
    assert zstandard.ZstdDecompressor().decompress(sizes.zstd_json(part)) == sizes.json_lines(part)
    lines = b"".join(gzip.decompress(body) for body in sizes.gzipped_lines(part)).splitlines()
    assert len(lines) == 3000
    per_reading = sizes.bytes_per_reading(part, 3000)
    assert per_reading["segment"] < per_reading["gzipped line protocol"] < per_reading["JSON"]
