"""Readings as the body of a binary COPY, built column-wise by numpy. Pure.

The form is PostgreSQL's (documentation of COPY, "Binary Format"): a header, then for each row a field count
and for each field its length and big-endian bytes, a length of -1 standing for NULL, then a trailer.
NULLs make rows of different length; rows with the same NULLs are laid out together as one structured array.
Rows therefore leave in another order than they came; `ordinal` numbers them where the order matters.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from cloud_sync.records import SEQ_ABSENT, Readings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

COLUMNS = ("series_no", "time", "value", "quality", "battery_level", "signal_strength", "seq", "flags")
ORDINAL = "ordinal"

SMALLEST_TIME_US = -210_866_803_200_000_000
"""The first microsecond a timestamptz can hold, 4714-11-24 BC, counted from 1970."""

LARGEST_TIME_US = 9_223_371_331_199_999_999
"""The last microsecond a hypertable can hold, at the end of the year 294246, counted from 1970."""
TIMES_US = (SMALLEST_TIME_US, LARGEST_TIME_US)

_POSTGRES_EPOCH_US = 946_684_800_000_000
_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_TRAILER = b"\xff\xff"
_NULLABLE = ("quality", "battery_level", "signal_strength", "seq")
_TYPES = dict(
    zip((*COLUMNS, ORDINAL), (">i4", ">i8", ">f8", ">f4", ">f4", ">f4", ">i8", ">i4", ">i4"), strict=True)
)
_SLICE_ROWS = 1 << 14


def body(readings: Readings, series_no: NDArray[np.int32], *, ordinal: bool = False) -> Iterator[bytearray]:
    """The body of COPY reading (`COLUMNS`) FROM STDIN (FORMAT binary), in pieces of about a megabyte.

    Args:
        readings: with every time from `SMALLEST_TIME_US` to `LARGEST_TIME_US`.
        series_no: of each position that `readings.series` names.
        ordinal: append a column with each row's position in `readings`.
    """
    yield bytearray(_HEADER)
    for start in range(0, readings.rows, _SLICE_ROWS):
        piece = slice(start, start + _SLICE_ROWS)
        columns: dict[str, NDArray[Any]] = {
            "series_no": series_no[readings.series[piece]],
            "time": readings.time_us[piece] - _POSTGRES_EPOCH_US,
            "value": readings.value[piece],
            "quality": readings.quality[piece],
            "battery_level": readings.battery_level[piece],
            "signal_strength": readings.signal_strength[piece],
            "seq": readings.seq[piece],
            "flags": readings.flags[piece],
        }
        if ordinal:
            columns[ORDINAL] = np.arange(start, start + len(columns["time"]), dtype=np.int32)
        yield from _rows(columns)
    yield bytearray(_TRAILER)


def _rows(columns: dict[str, NDArray[Any]]) -> Iterator[bytearray]:
    """Rows of one slice, one piece for each combination of NULLs that occurs."""
    nulls = np.zeros(len(columns["time"]), np.uint8)
    for bit, name in enumerate(_NULLABLE):
        column = columns[name]
        nulls |= (column == SEQ_ABSENT if name == "seq" else np.isnan(column)).astype(np.uint8) << bit
    for pattern in np.flatnonzero(np.bincount(nulls)):
        chosen = slice(None) if (nulls == pattern).all() else np.flatnonzero(nulls == pattern)
        yield _layout(int(pattern), {name: column[chosen] for name, column in columns.items()})


def _layout(pattern: int, columns: dict[str, NDArray[Any]]) -> bytearray:
    """Rows of one form: a template row repeated, then each column written into its place."""
    template = _template(pattern, tuple(columns))
    buffer = bytearray(template.tobytes() * len(columns["time"]))
    rows = np.frombuffer(buffer, template.dtype)
    for name, column in columns.items():
        if name in rows.dtype.fields:  # type: ignore[operator]  # the dtype is structured, so it has fields
            rows[name] = column
    return buffer


@functools.cache
def _template(pattern: int, names: tuple[str, ...]) -> NDArray[Any]:
    """One row with field count and lengths filled in; columns that `pattern` says are NULL have no bytes."""
    fields: list[tuple[str, str]] = [("fields", ">i2")]
    lengths = {}
    for name in names:
        absent = name in _NULLABLE and bool(pattern >> _NULLABLE.index(name) & 1)
        lengths[f"{name} bytes"] = -1 if absent else np.dtype(_TYPES[name]).itemsize
        fields += [(f"{name} bytes", ">i4")] + ([] if absent else [(name, _TYPES[name])])
    row = np.zeros(1, np.dtype(fields))
    row["fields"] = len(names)
    for field, length in lengths.items():
        row[field] = length
    return row
