"""Stored rows from PostgreSQL or TimescaleDB, as `verify.Stored`.

One COPY in binary form of fixed-width columns: texts are turned into numbers by the database, by joining the
truth's own series, so that the answer is one array of records (see `_wire_dtype`) however many rows it has.
The database is only read.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import asyncpg
import numpy as np

from firmware_sim.errors import SimError
from firmware_sim.explained import EARLIEST_US, KEPT, LATEST_US, Declaration
from firmware_sim.truth import ATTRIBUTES, State
from firmware_sim.verify import NUMBERS, STORED, Stored, Witness

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from firmware_sim.truth import Truth

_REQUIRED = ("time", "sensor_id", "sensor_type", "value")
_POSTGRES_EPOCH_US = 946_684_800_000_000  # 2000-01-01
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_COPY_HEAD = b"PGCOPY\n\xff\r\n\x00"
_COPY_HEAD_BYTES = 19
_ABSENT = {"seq": "-1", "flags": "0"}
_CONNECT_TIMEOUT_S = 10.0
_PLANNING = (
    "SET LOCAL enable_nestloop = off",
    "SET LOCAL enable_mergejoin = off",
    "SET LOCAL work_mem = '64MB'",
)
"""Every row is looked up once: a hash is right however few rows the planner expects."""
_READING = 4
_IS_REGION = "SELECT to_regclass('ingest_ledger') IS NOT NULL"
_DECLARED = f"""
    SELECT gateway_id || ': ' || reason || CASE survives WHEN '' THEN '' ELSE ', ' || survives || ' survives'
    END
           AS who, rows, from_time, to_time, first_commit, last_commit
    FROM declared_loss WHERE class = {_READING} ORDER BY gateway_id, epoch, first_commit"""  # noqa: S608 - a number of ours
_KEPT = """
    WITH shortest AS (
        SELECT sensor_id, sensor_type, min(window_s) AS window_s FROM sensor_rollup GROUP BY 1, 2
    )
    SELECT s.series - 1 AS series, r.time, r.window_s, sum(r.suppressed)::int8 AS rows
    FROM sensor_rollup r
    JOIN shortest USING (sensor_id, sensor_type, window_s)
    JOIN unnest($1::text[], $2::text[]) WITH ORDINALITY AS s (sensor_id, sensor_type, series)
        USING (sensor_id, sensor_type)
    WHERE r.suppressed > 0 GROUP BY 1, 2, 3"""
_SQL_TYPES = {
    "value": ("float8", ">f8"),
    "quality": ("float4", ">f4"),
    "battery_level": ("float4", ">f4"),
    "signal_strength": ("float4", ">f4"),
    "seq": ("int8", ">i8"),
    "flags": ("int4", ">i4"),
}


async def fetch(dsn: str, table: str, truth: Truth, *, on_rows: Callable[[int], None]) -> Stored:
    """Read every row of the truth's series within its time range.

    Args:
        dsn: of the database.
        table: table or view with at least time, sensor_id, sensor_type and value.
        truth: names the series and the time range.
        on_rows: called with the number of rows read so far.

    Raises:
        SimError: the database cannot be reached or does not have that table.
    """
    try:
        connection = await asyncpg.connect(dsn, timeout=_CONNECT_TIMEOUT_S)
    except (OSError, TimeoutError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError) as fault:
        raise SimError(f"--postgres: cannot connect: {str(fault) or type(fault).__name__}") from fault
    try:
        async with connection.transaction(readonly=True):
            for setting in _PLANNING:
                await connection.execute(setting)
            return await _fetch(connection, table, truth, on_rows)
    except asyncpg.PostgresError as fault:
        raise SimError(f"--postgres: {table}: {fault}") from fault
    finally:
        await connection.close()


async def _fetch(connection: Any, table: str, truth: Truth, on_rows: Callable[[int], None]) -> Stored:
    relation = ".".join(f'"{part}"' for part in table.replace('"', "").split("."))
    shape = await connection.prepare(f"SELECT * FROM {relation} LIMIT 0")  # noqa: S608 - quoted; values are arguments
    columns = {attribute.name for attribute in shape.get_attributes()}
    missing = [name for name in _REQUIRED if name not in columns]
    if missing:
        raise SimError(f"--table {table}: has no column {', '.join(missing)}")
    compared = tuple(name for name in NUMBERS if name in columns)
    attributes = ATTRIBUTES if columns.issuperset(ATTRIBUTES) else ()
    extra = ("flags",) if "flags" in columns else ()
    newest = bool(attributes) and await connection.fetchval(_IS_REGION)
    notes = [f"{table} has no {name}: it is not compared" for name in NUMBERS if name not in columns]
    if not attributes:
        notes.append(f"{table} does not have all of {', '.join(ATTRIBUTES)}: attributes are not compared")
    if not truth.rows:
        return Stored(np.empty(0, STORED), notes=notes)
    states = _states(truth, attributes, newest=newest)
    arguments = _arguments(truth, states, attributes)
    parts: list[NDArray[Any]] = []
    reader = _CopyReader(_wire_dtype((*compared, *extra)))
    total = 0

    async def take(chunk: bytes) -> None:
        nonlocal total
        rows = reader.feed(chunk)
        if len(rows):
            parts.append(_as_stored(rows, (*compared, *extra)))
            total += len(rows)
            on_rows(total)

    await connection.copy_from_query(
        _query(relation, (*compared, *extra), attributes), *arguments, output=take, format="binary"
    )
    rows = np.concatenate(parts) if parts else np.empty(0, STORED)
    ours = rows[rows["series"] >= 0]
    return Stored(
        ours,
        foreign=len(rows) - len(ours),
        compared=compared,
        attributes=bool(attributes),
        states=tuple(states),
        newest=newest,
        flags=bool(extra),
        notes=notes,
    )


async def fetch_witness(dsn: str, truth: Truth) -> Witness:
    """What a region knows of readings that it does not have: declared losses, and what rollups count of the
    truth's series that was not delivered one by one. Nothing where there are no such tables.

    Raises:
        SimError: the database cannot be reached.
    """
    try:
        connection = await asyncpg.connect(dsn, timeout=_CONNECT_TIMEOUT_S)
    except (OSError, TimeoutError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError) as fault:
        raise SimError(f"--postgres: cannot connect: {str(fault) or type(fault).__name__}") from fault
    try:
        declared = await connection.fetch(_DECLARED)
        names = ([sensor_id for sensor_id, _ in truth.names], [sensor_type for _, sensor_type in truth.names])
        windows = await connection.fetch(_KEPT, *names)
    except (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError):
        return Witness()
    finally:
        await connection.close()
    kept = np.zeros(len(windows), KEPT)
    for number, row in enumerate(windows):
        from_us = _time_us(row["time"])
        kept[number] = (row["series"], from_us, from_us + row["window_s"] * 1_000_000, row["rows"])
    return Witness(
        kept=kept,
        declared=[
            Declaration(
                row["who"],
                row["rows"],
                EARLIEST_US if row["from_time"] is None else _time_us(row["from_time"]),
                LATEST_US if row["to_time"] is None else _time_us(row["to_time"]),
                row["first_commit"],
                row["last_commit"],
            )
            for row in declared
        ],
    )


def _time_us(time: datetime) -> int:
    return (time - _EPOCH) // timedelta(microseconds=1)


def _query(relation: str, compared: tuple[str, ...], attributes: tuple[str, ...]) -> str:
    """One row per stored row. $1-$3: series; $4 and on: states; the last two: the time range."""
    numbers = ""
    for name in compared:
        kind = _SQL_TYPES[name][0]
        numbers += f", coalesce(d.{name}::{kind}, '{_ABSENT.get(name, 'NaN')}'::{kind})"
    names = ["series", "state", *(f"a_{name}" for name in attributes)]
    kinds = ["int4", "int4", *("text" for _ in attributes)]
    arrays = ", ".join(f"${n}::{kind}[]" for n, kind in enumerate(kinds, 4))
    match = " AND ".join(
        ["k.series = s.series", *(f"k.a_{n} = coalesce(d.{n}::text, '')" for n in attributes)]
    )
    end = 4 + len(kinds)
    return f"""
        WITH s AS MATERIALIZED (
            SELECT * FROM unnest($1::int4[], $2::text[], $3::text[]) AS u (series, sensor_id, sensor_type)
        ), k AS MATERIALIZED (
            SELECT * FROM unnest({arrays}) AS u ({", ".join(names)})
        )
        SELECT coalesce(s.series, -1)::int4, coalesce(k.state, -1)::int4, d.time{numbers}
        FROM {relation} d
        LEFT JOIN s ON s.sensor_id = d.sensor_id::text AND s.sensor_type = d.sensor_type::text
        LEFT JOIN k ON {match}
        WHERE d.time >= ${end}::timestamptz AND d.time <= ${end + 1}::timestamptz"""  # noqa: S608 - as above


def _states(truth: Truth, attributes: tuple[str, ...], *, newest: bool) -> list[State]:
    """The states to look for: those produced, and where only the newest attributes of a sensor are kept,
    every one of its attributes with every one of its types.
    """
    states = list(truth.states)
    if not attributes or not newest:
        return states
    of_sensor: dict[str, dict[tuple[str | None, ...], None]] = {}
    units: dict[tuple[str, str], dict[str | None, None]] = {}
    for state in truth.states:
        of_sensor.setdefault(state.sensor_id, {})[state.attributes[1:]] = None
        units.setdefault(state[:2], {})[state.attributes[0]] = None
    known = set(states)
    for (sensor_id, sensor_type), named in units.items():
        for unit in named:
            for rest in of_sensor[sensor_id]:
                state = State(sensor_id, sensor_type, (unit, *rest))
                if state not in known:
                    known.add(state)
                    states.append(state)
    return states


def _arguments(truth: Truth, states: list[State], attributes: tuple[str, ...]) -> list[Any]:
    """The query's arguments. Without attributes each series has one state, its first."""
    series_of = {name: number for number, name in enumerate(truth.names)}
    numbers: dict[tuple[int, tuple[str, ...]], int] = {}
    for number, state in enumerate(states):
        key = (series_of[state[:2]], tuple(value or "" for value in state.attributes[: len(attributes)]))
        numbers.setdefault(key, number)
    times = truth.produced["time_us"]
    return [
        list(range(len(truth.names))),
        [sensor_id for sensor_id, _ in truth.names],
        [sensor_type for _, sensor_type in truth.names],
        [series for series, _ in numbers],
        list(numbers.values()),
        *([values[i] for _, values in numbers] for i in range(len(attributes))),
        *(_EPOCH + timedelta(microseconds=int(t)) for t in (times.min(), times.max())),
    ]


def _wire_dtype(compared: tuple[str, ...]) -> np.dtype[Any]:
    """A row of the binary COPY: field count, then each field's length and value, all of fixed width."""
    kinds = [
        ("series", ">i4"),
        ("state", ">i4"),
        ("time_us", ">i8"),
        *((n, _SQL_TYPES[n][1]) for n in compared),
    ]
    layout = [("fields", ">i2")]
    for name, kind in kinds:
        layout += [(f"{name}_bytes", ">i4"), (name, kind)]
    return np.dtype(layout)


def _as_stored(rows: NDArray[Any], compared: tuple[str, ...]) -> NDArray[Any]:
    stored = np.zeros(len(rows), STORED)
    for name in ("series", "state", *compared):
        stored[name] = rows[name]
    stored["time_us"] = rows["time_us"].astype(np.int64) + _POSTGRES_EPOCH_US
    return stored


class _CopyReader:
    """Turns the chunks of a binary COPY into records, whatever the chunks' borders."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self._pending = bytearray()
        self._head_seen = False

    def feed(self, chunk: bytes) -> NDArray[Any]:
        """The whole records that have arrived; the trailer (field count -1) is left over at the end."""
        self._pending += chunk
        if not self._head_seen:
            if len(self._pending) < _COPY_HEAD_BYTES:
                return np.empty(0, self._dtype)
            assert self._pending.startswith(_COPY_HEAD)
            del self._pending[:_COPY_HEAD_BYTES]
            self._head_seen = True
        whole = len(self._pending) // self._dtype.itemsize
        records = np.frombuffer(bytes(self._pending[: whole * self._dtype.itemsize]), self._dtype)
        del self._pending[: whole * self._dtype.itemsize]
        return records
