"""Rows into their tables, inside the caller's transaction; storing the same rows again changes nothing.

Readings enter by binary COPY, encoded column-wise by numpy (PostgreSQL documentation of COPY, "Binary
Format"). When one exists already, the COPY is rolled back to a savepoint and a staging table separates
duplicates (same value) from conflicts (another value: the first stays, the other goes to
`reading_conflict`). Of rollups the newest revision stays; an existing alert or declaration stays as it
is.
"""

from __future__ import annotations

import functools
import math
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import asyncpg
import numpy as np

from cloud_sync.model.records import SEQ_ABSENT, Alerts, Declarations, Readings, Receipt, Rollups
from cloud_sync.timescale import SQL

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator
    from uuid import UUID

    from numpy.typing import NDArray

    from cloud_sync.model.records import Batch, Column, Records
    from cloud_sync.timescale import Connection

ORDINAL_COLUMN = "ordinal"
_COPY_TYPES = {
    "series_no": ">i4",
    "time": ">i8",
    "value": ">f8",
    "quality": ">f4",
    "battery_level": ">f4",
    "signal_strength": ">f4",
    "seq": ">i8",
    "flags": ">i4",
    ORDINAL_COLUMN: ">i4",
}
COPY_COLUMNS = tuple(_COPY_TYPES)[:-1]

READING_TIMES_US = (-210_866_803_200_000_000, 9_223_371_331_199_999_999)
"""From the first of a timestamptz, 4714-11-24 BC, to the last of a hypertable, the end of 294246."""

_POSTGRES_EPOCH_US = 946_684_800_000_000
_NULLABLE = ("quality", "battery_level", "signal_strength", "seq")
_SLICE_ROWS = 1 << 14


def encode_copy(
    readings: Readings, series_no: NDArray[np.int32], *, ordinal: bool = False
) -> Iterator[bytearray]:
    """The body of COPY reading (`COLUMNS`) FROM STDIN (FORMAT binary), in pieces of about a megabyte."""
    yield bytearray(b"PGCOPY\n\xff\r\n\0" + bytes(8))
    for start in range(0, readings.rows, _SLICE_ROWS):
        piece = slice(start, start + _SLICE_ROWS)
        columns: dict[str, Column] = {
            "series_no": series_no[readings.series[piece]],
            "time": readings.time_us[piece] - _POSTGRES_EPOCH_US,
            **{name: getattr(readings, name)[piece] for name in COPY_COLUMNS[2:]},
        }
        if ordinal:
            columns[ORDINAL_COLUMN] = np.arange(start, start + len(columns["time"]), dtype=np.int32)
        yield from _encode_slice(columns)
    yield bytearray(b"\xff\xff")


def _encode_slice(columns: dict[str, Column]) -> Iterator[bytearray]:
    """Rows of one slice, one piece for each combination of NULLs that occurs."""
    nulls = np.zeros(len(columns["time"]), np.uint8)
    for bit, name in enumerate(_NULLABLE):
        column = columns[name]
        nulls |= (column == SEQ_ABSENT if name == "seq" else np.isnan(column)).astype(np.uint8) << bit
    for pattern in np.flatnonzero(np.bincount(nulls)):
        chosen = slice(None) if (nulls == pattern).all() else np.flatnonzero(nulls == pattern)
        yield _fill_template(int(pattern), {name: column[chosen] for name, column in columns.items()})


def _fill_template(pattern: int, columns: dict[str, Column]) -> bytearray:
    """Rows of one form: a template row repeated, then each column written into its place."""
    template = _row_template(pattern, tuple(columns))
    buffer = bytearray(template.tobytes() * len(columns["time"]))
    rows = np.frombuffer(buffer, template.dtype)
    for name, column in columns.items():
        if name in rows.dtype.fields:  # type: ignore[operator]  # the dtype is structured, so it has fields
            rows[name] = column
    return buffer


@functools.cache
def _row_template(pattern: int, names: tuple[str, ...]) -> Column:
    """One row with field count and lengths filled in; columns that `pattern` says are NULL have no bytes."""
    fields: list[tuple[str, str]] = [("fields", ">i2")]
    lengths = {}
    for name in names:
        absent = name in _NULLABLE and bool(pattern >> _NULLABLE.index(name) & 1)
        lengths[f"{name} bytes"] = -1 if absent else np.dtype(_COPY_TYPES[name]).itemsize
        fields += [(f"{name} bytes", ">i4")] + ([] if absent else [(name, _COPY_TYPES[name])])
    row = np.zeros(1, np.dtype(fields))
    row["fields"] = len(names)
    for field, length in lengths.items():
        row[field] = length
    return row


class ReadingSource(NamedTuple):
    """Who sent the readings, recorded with conflicts; only a gateway has an epoch and commits."""

    name: str
    epoch: UUID | None = None
    first_commit: int | None = None


async def store_readings(
    connection: Connection, readings: Readings, series_no: NDArray[np.int32], source: ReadingSource
) -> Receipt:
    """Write the readings, by COPY if all are new and through the staging table otherwise."""
    if readings.rows == 0:
        return Receipt(0, 0)
    try:
        async with connection.transaction():
            await _copy_into(connection, "reading", COPY_COLUMNS, encode_copy(readings, series_no))
    except asyncpg.UniqueViolationError:
        pass
    else:
        return Receipt(rows=readings.rows, stored=readings.rows)
    await _stage_readings(connection, readings, series_no)
    stored = _affected_rows(await connection.execute(SQL["insert_staged"]))
    conflicts = _affected_rows(await connection.execute(SQL["note_conflicts"], *source))
    await connection.execute(SQL["drop_staging"])
    return Receipt(readings.rows, stored, readings.rows - stored - conflicts, conflicts)


async def match_readings(
    connection: Connection, readings: Readings, series_no: NDArray[np.int32]
) -> Receipt | None:
    """The receipt of readings that were stored before; None when one of them was not. Nothing is written."""
    if readings.rows == 0:
        return Receipt(0, 0, applied_before=True)
    await _stage_readings(connection, readings, series_no)
    present, conflicts = await connection.fetchrow(SQL["count_staged_in_reading"])
    await connection.execute(SQL["drop_staging"])
    if present < readings.rows:
        return None
    return Receipt(readings.rows, 0, readings.rows - conflicts, conflicts, applied_before=True)


async def _stage_readings(connection: Connection, readings: Readings, series_no: NDArray[np.int32]) -> None:
    await connection.execute(SQL["make_staging"])
    body = encode_copy(readings, series_no, ordinal=True)
    await _copy_into(connection, "reading_staging", (*COPY_COLUMNS, ORDINAL_COLUMN), body)


async def _copy_into(
    connection: Connection, table: str, columns: tuple[str, ...], body: Iterable[bytearray]
) -> None:
    async def pieces() -> AsyncIterator[bytearray]:
        for piece in body:
            yield piece

    await connection.copy_to_table(table, source=pieces(), columns=list(columns), format="binary")


def _affected_rows(status: str) -> int:
    """Rows of a command tag, e.g. "INSERT 0 42"."""
    return int(status.rpartition(" ")[2])


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
RECORD_TIMES_US = (-62_135_596_800_000_000, 253_402_300_799_999_999)
"""Of rollups and alerts: the years 1 to 9999, which every client can read."""
_ROLLUP_COLUMNS = ["series_no", *(name.removesuffix("_us") for name in list(Rollups.columns)[1:])]
_ALERT_COLUMNS = ("rule", "time_us", "state", "severity", "value", "threshold", "count", "detail")
_DECLARATION_COLUMNS = (
    *("of_class", "first_commit", "last_commit", "lost", "reason", "survives"),
    *("time_us", "from_us", "to_us"),
)


async def store_records(connection: Connection, batch: Batch, series_no: NDArray[np.int32]) -> Receipt:
    """Write the records of a batch that is not of readings."""
    records = batch.records
    if records.rows == 0:
        return Receipt(0, 0)
    if isinstance(records, Declarations):
        columns = (_to_column(records, name) for name in _DECLARATION_COLUMNS)
        status = await connection.execute(SQL["store_declarations"], *batch.range[:2], *columns)
        stored = _affected_rows(status)
    else:
        gateway_no = await connection.fetchval(SQL["gateway_no"], batch.range.gateway_id)
        numbers = series_no[records.series].tolist()
        if isinstance(records, Rollups):
            stored = await _store_rollups(connection, records, numbers, gateway_no)
        else:
            assert isinstance(records, Alerts)
            columns = (_to_column(records, name) for name in _ALERT_COLUMNS)
            status = await connection.execute(SQL["store_alerts"], gateway_no, numbers, *columns)
            stored = _affected_rows(status)
    return Receipt(records.rows, stored, records.rows - stored)


async def delete_old_rollups(connection: Connection, window_s: int, older_than: timedelta) -> None:
    """Delete rollups of windows of one length that began that long ago."""
    await connection.execute(SQL["forget_rollups"], window_s, older_than)


async def _store_rollups(
    connection: Connection, rollups: Rollups, numbers: list[int], gateway_no: int
) -> int:
    columns = (numbers, *(_to_column(rollups, name) for name in list(Rollups.columns)[1:]))
    await connection.execute(SQL["make_rollup_staging"])
    await connection.copy_records_to_table(
        "rollup_staging", records=zip(*columns, strict=True), columns=_ROLLUP_COLUMNS
    )
    stored = _affected_rows(await connection.execute(SQL["store_rollups"], gateway_no))
    await connection.execute(SQL["drop_rollup_staging"])
    return stored


def _to_column(records: Records, name: str) -> list[Any]:
    """A column as asyncpg takes it; times were checked, so that PostgreSQL and datetime can hold them."""
    column = getattr(records, name)
    if name.endswith("_us"):
        return [_EPOCH + timedelta(microseconds=int(time_us)) for time_us in column]
    if column.dtype.kind == "f":
        return [None if math.isnan(value) else value for value in column.tolist()]
    return list(column.tolist())
