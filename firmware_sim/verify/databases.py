"""Stored rows from databases, which are only read: PostgreSQL or TimescaleDB, and InfluxDB's v1 API.

PostgreSQL: one COPY to a temporary CSV file, read like an export. InfluxDB: integer and float fields,
grouped by all tags, in microseconds. InfluxDB shows the fields of a point one by one while it applies a
batch, so what differs is fetched again (`compare_settled`) before it counts.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import msgspec
import numpy as np

from firmware_sim.errors import SimError
from firmware_sim.ground_truth import ATTRIBUTES
from firmware_sim.verify.comparison import (
    COMPARED_COLUMNS,
    Differences,
    LossEvidence,
    StoredRows,
    build_stored_rows,
    check_columns,
    compare_readings,
)
from firmware_sim.verify.loss_explanation import EARLIEST_US, LATEST_US, ROLLED_UP_DTYPE, DeclaredLoss
from firmware_sim.verify.stored_files import read_export_files

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
        faults = (differences.lost, differences.duplicated, differences.altered)
        if not any(faults) or unchanged == _SETTLED_AFTER:
            break
        time.sleep(REREAD_EVERY_S if pause_s is None else pause_s)
        differences = compare_readings(truth, fetch(), evidence)
        latest = (differences.lost, differences.duplicated, differences.altered)
        unchanged = unchanged + 1 if latest == faults else 0
    return differences


def fetch_influx_rows(
    url: str, database: str, truth: GroundTruth, *, on_rows: Callable[[int], None], token: str = ""
) -> StoredRows:
    """Read all points in the truth's time range. InfluxDB 2 and 3 have this API too, with a token."""
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
                answer = _influx_decoder.decode(line)
                for error in (answer.error, *(result.error for result in answer.results)):
                    if error:
                        raise SimError(f"--influx {url}: {error}")
                for series in chain.from_iterable(result.series for result in answer.results):
                    rows = _series_to_rows(series, truth)
                    parts.append(rows)
                    total += len(rows)
                    on_rows(total)
            if response.is_error:
                raise SimError(f"--influx {url}: HTTP {response.status_code}")
    except (httpx.HTTPError, httpx.InvalidURL, msgspec.DecodeError) as fault:
        raise SimError(f"--influx {url}: {str(fault) or type(fault).__name__}") from fault
    return StoredRows.from_parts(parts, idempotent=True)


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


_CONNECT_TIMEOUT_S = 10.0
_READ_COLUMNS = ("sensor_id", "sensor_type", *COMPARED_COLUMNS, "flags", *ATTRIBUTES)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
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
    """Read every row in the truth's time range from a table or view."""
    relation = ".".join(f'"{part}"' for part in table.replace('"', "").split("."))
    times = [_EPOCH + timedelta(microseconds=time_us) for time_us in truth.time_range_us]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.csv"
        async with _open_connection(dsn, table) as connection, connection.transaction(readonly=True):
            shape = await connection.prepare(f"SELECT * FROM {relation} LIMIT 0")  # noqa: S608 - quoted; values are arguments
            columns = {attribute.name for attribute in shape.get_attributes()}
            check_columns(f"--table {table}", columns)
            newest = columns.issuperset(ATTRIBUTES) and await connection.fetchval(_IS_REGION_SQL)
            await connection.execute("SET LOCAL TimeZone = 'UTC'")
            names = [name for name in _READ_COLUMNS if name in columns]
            listed = ", ".join(names)
            query = f"SELECT time::timestamptz, {listed} FROM {relation} WHERE time BETWEEN $1 AND $2"  # noqa: S608 - as above
            await connection.copy_from_query(query, *times, output=path, format="csv", header=True)
        known = _add_newest_states(truth) if newest else truth
        stored = read_export_files([path], known, on_rows=on_rows)
    stored.states, stored.newest = known.states, newest
    stored.notes = [f"{table} has no {n}: it is not compared" for n in COMPARED_COLUMNS if n not in columns]
    if not stored.attributes:
        missing = ", ".join(ATTRIBUTES)
        stored.notes.append(f"{table} does not have all of {missing}: attributes are not compared")
    return stored


def _add_newest_states(truth: GroundTruth) -> GroundTruth:
    """The truth with all attributes of a sensor as states of each of its types."""
    by_sensor: dict[str, set[tuple[str | None, ...]]] = {}
    for state in truth.states:
        by_sensor.setdefault(state.sensor_id, set()).add(state.attributes[1:])
    states = dict.fromkeys(truth.states)
    for state in truth.states:
        for attributes in by_sensor[state.sensor_id]:
            states.setdefault(state._replace(attributes=(state.attributes[0], *attributes)))
    return replace(truth, states=tuple(states))


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
