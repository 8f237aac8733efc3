"""The COPY body, read back by a naive reader of PostgreSQL's binary form."""

from __future__ import annotations

import itertools
import struct
from typing import Any

import numpy as np
import pytest

from cloud_sync.model.records import SEQ_ABSENT, Readings
from cloud_sync.timescale import row_store
from tests.support.wire_examples import readings

FORMS = dict(zip((*row_store.COPY_COLUMNS, row_store.ORDINAL_COLUMN), "iqdfffqii", strict=True))


def rows_of(body: bytes, names: tuple[str, ...]) -> list[tuple[Any, ...]]:
    assert body[:19] == b"PGCOPY\n\xff\r\n\0" + bytes(8)
    at, rows = 19, []
    while (fields := struct.unpack_from(">h", body, at)[0]) != -1:
        assert fields == len(names)
        at += 2
        row: list[Any] = []
        for name in names:
            size = struct.unpack_from(">i", body, at)[0]
            at += 4
            if size == -1:
                row.append(None)
                continue
            row.append(struct.unpack_from(f">{FORMS[name]}", body, at)[0])
            assert size == struct.calcsize(f">{FORMS[name]}")
            at += size
        rows.append(tuple(row))
    assert at + 2 == len(body)
    return rows


def naive(content: Readings, numbers: list[int]) -> list[tuple[Any, ...]]:
    def present(value: np.float32) -> float | None:
        return None if np.isnan(value) else float(value)

    return [
        (
            numbers[content.series[n]],
            int(content.time_us[n]) - 946_684_800_000_000,
            float(content.value[n]),
            present(content.quality[n]),
            present(content.battery_level[n]),
            present(content.signal_strength[n]),
            None if content.seq[n] == SEQ_ABSENT else int(content.seq[n]),
            int(content.flags[n]),
            n,
        )
        for n in range(content.rows)
    ]


@pytest.mark.parametrize("rows", [1, 2, 500, 16_384, 40_000])
def test_the_body_holds_every_row_once(rows):
    content = readings(rows, min(rows, 3))
    numbers = np.array([70, 80, 90], np.int32)

    body = b"".join(row_store.encode_copy(content, numbers, ordinal=True))

    found = rows_of(body, (*row_store.COPY_COLUMNS, row_store.ORDINAL_COLUMN))
    assert sorted(found, key=lambda row: row[-1]) == naive(content, [70, 80, 90])


def test_every_combination_of_absent_values_is_null_where_it_should_be():
    combinations = list(itertools.product([False, True], repeat=4))
    content = readings(len(combinations), 1)
    for name, flags in zip(
        ("quality", "battery_level", "signal_strength"), zip(*combinations, strict=True), strict=False
    ):
        getattr(content, name)[:] = np.where(flags, np.nan, 5)
    content.seq[:] = np.where([c[3] for c in combinations], SEQ_ABSENT, 6)

    body = b"".join(row_store.encode_copy(content, np.array([1], np.int32)))

    found = {
        row[1]: tuple(column is None for column in row[3:7]) for row in rows_of(body, row_store.COPY_COLUMNS)
    }
    assert [found[time] for time in sorted(found)] == combinations


def test_the_earliest_time_fits():
    content = readings(1, 1, start_us=row_store.READING_TIMES_US[0])
    ((_, time, *_),) = rows_of(
        b"".join(row_store.encode_copy(content, np.array([1], np.int32))), row_store.COPY_COLUMNS
    )
    assert time == -211_813_488_000_000_000
