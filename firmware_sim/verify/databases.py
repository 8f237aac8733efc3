"""Stored rows from databases, which are only read: PostgreSQL or TimescaleDB, and InfluxDB's v1 API.

PostgreSQL: one binary COPY of fixed-width columns (see `_wire_dtype`); texts become numbers in the database
by a join with the truth's own series. InfluxDB: integer and float fields, grouped by all tags, in
microseconds. InfluxDB shows the fields of a point one by one while it applies a batch, so what differs is
fetched again (`compare_settled`) before it counts.
"""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import httpx
import msgspec
import numpy as np

from firmware_sim.errors import SimError
from firmware_sim.ground_truth import ATTRIBUTES, SeriesState
from firmware_sim.verify.comparison import (
    COMPARED_COLUMNS,
    STORED_DTYPE,
    Differences,
    LossEvidence,
    StoredRows,
    build_stored_rows,
    check_columns,
    compare_readings,
)
from firmware_sim.verify.loss_explanation import EARLIEST_US, LATEST_US, ROLLED_UP_DTYPE, DeclaredLoss

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    import asyncpg
    from numpy.typing import NDArray

    from firmware_sim.ground_truth import GroundTruth

_INFLUX_CHUNK_ROWS = 10_000
_INFLUX_TIMEOUT_S = 60.0
REREAD_EVERY_S = 2.0
_REREADS = 10
_SETTLED_AFTER = 2


class _InfluxSeries(msgspec.Struct):
    name: str
    columns: list[str]
    values: list[list[float | int | str | bool | None]]
    tags: dict[str, str] = {}


class _InfluxResult(msgspec.Struct):
    series: list[_InfluxSeries] = []
    error: str = ""


class _InfluxAnswer(msgspec.Struct):
    results: list[_InfluxResult] = []
    error: str = ""


_influx_decoder = msgspec.json.Decoder(_InfluxAnswer)


def compare_settled(
    fetch: Callable[[], StoredRows],
    truth: GroundTruth,
    evidence: LossEvidence,
    *,
    pause_s: float | None = None,
) -> Differences:
    """Compare the rows of a store that may be applying a batch: fetch again until a difference settles.

    A difference is final once two further fetches in a row show the same, or after ten.
    """
    differences = compare_readings(truth, fetch(), evidence)
    unchanged = 0
    for _ in range(_REREADS):
        if differences.clean or unchanged == _SETTLED_AFTER:
            break
        time.sleep(REREAD_EVERY_S if pause_s is None else pause_s)
        latest = compare_readings(truth, fetch(), evidence)
        unchanged = unchanged + 1 if latest == differences else 0
        differences = latest
    return differences


def fetch_influx_rows(
    url: str, database: str, truth: GroundTruth, *, on_rows: Callable[[int], None], token: str = ""
) -> StoredRows:
    """Read all points in the truth's time range. InfluxDB 2 and 3 have this API too, with a token.

    Raises:
        SimError: the server cannot be reached, or refuses.
    """
    first_us, last_us = truth.time_range_us
    parameters = {
        "db": database,
        "q": f"SELECT * FROM /.*/ WHERE time >= {first_us}u AND time <= {last_us}u GROUP BY *",  # noqa: S608 - integers of ours
        "epoch": "u",
        "chunked": "true",
        "chunk_size": str(_INFLUX_CHUNK_ROWS),
    }
    headers = {"Authorization": f"Token {token}"} if token else {}
    parts: list[NDArray[np.void]] = []
    total = 0
    try:
        with httpx.stream(
            "GET", f"{url.rstrip('/')}/query", params=parameters, headers=headers, timeout=_INFLUX_TIMEOUT_S
        ) as response:
            for line in response.iter_lines():
                if not line.strip():
                    continue
                for series in _unwrap_series(_influx_decoder.decode(line), url):
                    rows = _series_to_rows(series, truth)
                    parts.append(rows)
                    total += len(rows)
                    on_rows(total)
            if response.is_error:
                raise SimError(f"--influx {url}: HTTP {response.status_code}")
    except (httpx.HTTPError, httpx.InvalidURL, msgspec.DecodeError) as fault:
        raise SimError(f"--influx {url}: {str(fault) or type(fault).__name__}") from fault
    return StoredRows.from_parts(parts, idempotent=True)


def _unwrap_series(answer: _InfluxAnswer, url: str) -> list[_InfluxSeries]:
    for error in (answer.error, *(result.error for result in answer.results)):
        if error:
            raise SimError(f"--influx {url}: {error}")
    return [series for result in answer.results for series in result.series]


def _series_to_rows(series: _InfluxSeries, truth: GroundTruth) -> NDArray[np.void]:
    number, state = truth.find_series(series.name, series.tags)
    absent = {"seq": -1, "flags": 0}
    cells = dict(zip(series.columns, zip(*series.values, strict=True), strict=True))
    columns = {
        name: np.array([absent.get(name, np.nan) if cell is None else cell for cell in cells[name]])
        for name in (*COMPARED_COLUMNS, "flags")
        if name in cells and number >= 0
    }
    times_us = np.array(cells["time"], np.int64)
    return build_stored_rows({**columns, "series": number, "state": state, "time_us": times_us})


_POSTGRES_EPOCH_US = 946_684_800_000_000  # 2000-01-01
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_COPY_HEAD = b"PGCOPY\n\xff\r\n\x00"
_COPY_HEAD_BYTES = 19
_ABSENT_SQL = {"seq": "-1", "flags": "0"}
_CONNECT_TIMEOUT_S = 10.0
_PLANNER_SETTINGS = (
    "SET LOCAL enable_nestloop = off",
    "SET LOCAL enable_mergejoin = off",
    "SET LOCAL work_mem = '64MB'",
)
"""Every row is looked up once: a hash is right however few rows the planner expects."""
_READING_CLASS = 4
_IS_REGION_SQL = "SELECT to_regclass('ingest_ledger') IS NOT NULL"
_DECLARED_LOSSES_SQL = f"""
    SELECT gateway_id || ': ' || reason || CASE survives WHEN '' THEN '' ELSE ', ' || survives || ' survives'
        END, rows, coalesce((extract(epoch FROM from_time) * 1000000)::int8, {EARLIEST_US}),
        coalesce((extract(epoch FROM to_time) * 1000000)::int8, {LATEST_US}), first_commit, last_commit
    FROM declared_loss WHERE class = {_READING_CLASS} ORDER BY gateway_id, epoch, first_commit"""  # noqa: S608 - a number of ours
_ROLLED_UP_SQL = """
    WITH shortest AS (
        SELECT sensor_id, sensor_type, min(window_s) AS window_s FROM sensor_rollup GROUP BY 1, 2
    )
    SELECT s.series - 1, (extract(epoch FROM r.time) * 1000000)::int8,
        (extract(epoch FROM r.time) * 1000000)::int8 + r.window_s * 1000000, sum(r.suppressed)::int8
    FROM sensor_rollup r
    JOIN shortest USING (sensor_id, sensor_type, window_s)
    JOIN unnest($1::text[], $2::text[]) WITH ORDINALITY AS s (sensor_id, sensor_type, series)
        USING (sensor_id, sensor_type)
    WHERE r.suppressed > 0 GROUP BY 1, 2, 3"""


@asynccontextmanager
async def _open_connection(dsn: str, subject: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection to read from; errors of the server become a SimError about `subject`."""
    import asyncpg  # noqa: PLC0415 - comes with an extra, and is needed for PostgreSQL only

    try:
        connection = await asyncpg.connect(dsn, timeout=_CONNECT_TIMEOUT_S)
    except (OSError, TimeoutError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError) as fault:
        raise SimError(f"--postgres: cannot connect: {str(fault) or type(fault).__name__}") from fault
    try:
        yield connection
    except asyncpg.PostgresError as fault:
        raise SimError(f"--postgres: {subject}: {fault}") from fault
    finally:
        await connection.close()


async def fetch_postgres_rows(
    dsn: str, table: str, truth: GroundTruth, *, on_rows: Callable[[int], None]
) -> StoredRows:
    """Read every row of the truth's series in its time range from a table or view.

    Raises:
        SimError: the database cannot be reached or does not have that table.
    """
    async with _open_connection(dsn, table) as connection, connection.transaction(readonly=True):
        for setting in _PLANNER_SETTINGS:
            await connection.execute(setting)
        return await _copy_rows(connection, table, truth, on_rows)


async def _copy_rows(
    connection: asyncpg.Connection, table: str, truth: GroundTruth, on_rows: Callable[[int], None]
) -> StoredRows:
    relation = ".".join(f'"{part}"' for part in table.replace('"', "").split("."))
    shape = await connection.prepare(f"SELECT * FROM {relation} LIMIT 0")  # noqa: S608 - quoted; values are arguments
    columns = {attribute.name for attribute in shape.get_attributes()}
    check_columns(f"--table {table}", columns)
    attributes = ATTRIBUTES if columns.issuperset(ATTRIBUTES) else ()
    numbers = tuple(name for name in (*COMPARED_COLUMNS, "flags") if name in columns)
    newest = bool(attributes) and await connection.fetchval(_IS_REGION_SQL)
    notes = [f"{table} has no {name}: it is not compared" for name in COMPARED_COLUMNS if name not in columns]
    if not attributes:
        notes.append(f"{table} does not have all of {', '.join(ATTRIBUTES)}: attributes are not compared")
    if not truth.rows:
        return StoredRows(np.empty(0, STORED_DTYPE), notes=notes)
    states = _list_states(truth, attributes, newest=newest)
    arguments = _build_arguments(truth, states, attributes)
    parts: list[NDArray[np.void]] = []
    reader = _CopyReader(_wire_dtype(numbers))
    total = 0

    async def collect(chunk: bytes) -> None:
        nonlocal total
        rows = reader.feed(chunk)
        if len(rows):
            times_us = rows["time_us"].astype(np.int64) + _POSTGRES_EPOCH_US
            parts.append(
                build_stored_rows({n: rows[n] for n in ("series", "state", *numbers)} | {"time_us": times_us})
            )
            total += len(rows)
            on_rows(total)

    query = _build_query(relation, numbers, attributes)
    await connection.copy_from_query(query, *arguments, output=collect, format="binary")
    stored = StoredRows.from_parts(parts, columns)
    stored.states, stored.newest, stored.notes = tuple(states), newest, notes
    return stored


async def fetch_loss_evidence(dsn: str, truth: GroundTruth) -> LossEvidence:
    """Declared losses of a region, and the readings of the truth's series that only its rollups count.

    Empty where there are no such tables.
    """
    import asyncpg  # noqa: PLC0415 - as above

    names = ([sensor_id for sensor_id, _ in truth.names], [sensor_type for _, sensor_type in truth.names])
    async with _open_connection(dsn, "declared losses") as connection:
        try:
            declared = await connection.fetch(_DECLARED_LOSSES_SQL)
            windows = await connection.fetch(_ROLLED_UP_SQL, *names)
        except (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError):
            return LossEvidence()
    return LossEvidence(
        rolled_up=np.array([tuple(window) for window in windows], ROLLED_UP_DTYPE),
        declared=[DeclaredLoss(*loss) for loss in declared],
    )


def _build_query(relation: str, numbers: tuple[str, ...], attributes: tuple[str, ...]) -> str:
    """One row per stored row. $1-$3: series; $4 and on: states; the last two: the time range."""
    columns = ""
    for name in numbers:
        kind = f"{'float' if STORED_DTYPE[name].kind == 'f' else 'int'}{STORED_DTYPE[name].itemsize}"
        columns += f", coalesce(d.{name}::{kind}, '{_ABSENT_SQL.get(name, 'NaN')}'::{kind})"
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
        SELECT coalesce(s.series, -1)::int4, coalesce(k.state, -1)::int4, d.time{columns}
        FROM {relation} d
        LEFT JOIN s ON s.sensor_id = d.sensor_id::text AND s.sensor_type = d.sensor_type::text
        LEFT JOIN k ON {match}
        WHERE d.time >= ${end}::timestamptz AND d.time <= ${end + 1}::timestamptz"""  # noqa: S608 - as above


def _list_states(truth: GroundTruth, attributes: tuple[str, ...], *, newest: bool) -> list[SeriesState]:
    """The states to look for: those produced, and with `newest` all attributes of a sensor with each type."""
    states = list(truth.states)
    if not attributes or not newest:
        return states
    by_sensor: dict[str, dict[tuple[str | None, ...], None]] = {}
    units: dict[tuple[str, str], dict[str | None, None]] = {}
    for state in truth.states:
        by_sensor.setdefault(state.sensor_id, {})[state.attributes[1:]] = None
        units.setdefault(state[:2], {})[state.attributes[0]] = None
    known = set(states)
    for (sensor_id, sensor_type), named in units.items():
        for unit in named:
            for rest in by_sensor[sensor_id]:
                state = SeriesState(sensor_id, sensor_type, (unit, *rest))
                if state not in known:
                    known.add(state)
                    states.append(state)
    return states


def _build_arguments(
    truth: GroundTruth, states: list[SeriesState], attributes: tuple[str, ...]
) -> list[list[int] | list[str] | datetime]:
    """The query's arguments. Without attributes each series has one state, its first."""
    series_numbers = {name: number for number, name in enumerate(truth.names)}
    numbers: dict[tuple[int, tuple[str, ...]], int] = {}
    for number, state in enumerate(states):
        values = tuple(value or "" for value in state.attributes[: len(attributes)])
        numbers.setdefault((series_numbers[state.sensor_id, state.sensor_type], values), number)
    return [
        list(range(len(truth.names))),
        [sensor_id for sensor_id, _ in truth.names],
        [sensor_type for _, sensor_type in truth.names],
        [series for series, _ in numbers],
        list(numbers.values()),
        *([values[i] for _, values in numbers] for i in range(len(attributes))),
        *(_EPOCH + timedelta(microseconds=time_us) for time_us in truth.time_range_us),
    ]


def _wire_dtype(numbers: tuple[str, ...]) -> np.dtype[np.void]:
    """A row of the binary COPY: field count, then each field's length and value, all of fixed width."""
    layout: list[tuple[str, np.dtype[np.generic] | str]] = [("fields", ">i2")]
    for name in ("series", "state", "time_us", *numbers):
        layout += [(f"{name}_bytes", ">i4"), (name, STORED_DTYPE[name].newbyteorder(">"))]
    return np.dtype(layout)


class _CopyReader:
    """Turns the chunks of a binary COPY into records, whatever the chunks' borders."""

    def __init__(self, dtype: np.dtype[np.void]) -> None:
        self._dtype = dtype
        self._pending = bytearray()
        self._head_seen = False

    def feed(self, chunk: bytes) -> NDArray[np.void]:
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
