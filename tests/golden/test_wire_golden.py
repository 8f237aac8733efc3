"""Wire batches of every version, frozen. They are never written again: every later release reads them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cloud_sync.codec import wire

if TYPE_CHECKING:
    import numpy as np

    from cloud_sync.model.records import Batch

FROZEN = sorted(Path(__file__).parent.glob("wire_v*.tgwb"))


def as_json(batch: Batch) -> dict[str, Any]:
    """A batch as its frozen JSON has it: values as hexadecimal floats, absent floats as null."""

    def as_text(dtype: np.dtype[Any], value: Any) -> Any:
        if dtype.hasobject:
            return value
        if dtype.kind == "i":
            return int(value)
        if math.isnan(value):
            return None
        return float(value).hex() if dtype.itemsize == 8 else float(value)

    part = (
        {}
        if batch.range.parts == 1
        else {"part": [batch.range.part, batch.range.parts], "refused": batch.refused}
    )
    withheld = {"withheld": batch.withheld} if batch.withheld else {}
    return (
        part
        | withheld
        | {
            "gateway_id": batch.range.gateway_id,
            "epoch": str(batch.range.epoch),
            "class": batch.range.record_class.name.lower(),
            "first": batch.range.first_commit,
            "last": batch.range.last_commit,
            "series": [[s.sensor_id, s.sensor_type, dict(s.attributes)] for s in batch.series],
            "rows": [
                [
                    as_text(dtype, getattr(batch.records, name)[row])
                    for name, dtype in batch.records.columns.items()
                ]
                for row in range(batch.rows)
            ],
        }
    )


def test_the_frozen_batches_are_there():
    assert [path.stem for path in FROZEN] == [
        "wire_v1_alert",
        "wire_v1_all_refused",
        "wire_v1_columns",
        "wire_v1_declaration",
        "wire_v1_one_row",
        "wire_v1_part",
        "wire_v1_rollup",
        "wire_v1_small",
    ]


@pytest.mark.parametrize("path", FROZEN, ids=lambda path: path.stem)
def test_a_frozen_batch_still_means_what_it_meant(path):
    expected = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))

    assert as_json(wire.decode(path.read_bytes())) == expected


@pytest.mark.parametrize("path", FROZEN, ids=lambda path: path.stem)
def test_what_is_written_today_means_the_same(path):
    batch = wire.decode(path.read_bytes())

    assert as_json(wire.decode(wire.encode(batch))) == as_json(batch)
