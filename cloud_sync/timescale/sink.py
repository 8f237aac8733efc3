"""The TimescaleDB sink: a batch is applied effectively once (promise 4), on plain PostgreSQL too.

One transaction: the gateway's lock, the ledger, the series, the rows, the ledger again. Plain readings
and imported files take the same path with another `Idempotency` in the ledger's place. Every error of
asyncpg is mapped here, once.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import asyncpg
import numpy as np

from cloud_sync.codec import wire
from cloud_sync.destinations import EncodedBatch
from cloud_sync.model.errors import RefusedError, RetryLaterError, UnauthorisedError
from cloud_sync.model.ledger_rules import RangeConflictError
from cloud_sync.model.records import Batch, Readings, Receipt, RecordClass
from cloud_sync.timescale import SQL, ledger, row_store, schema
from cloud_sync.timescale.late_rows import LateRowTracker
from cloud_sync.timescale.series_cache import SeriesCache, newest_time_by_series

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence
    from datetime import timedelta
    from uuid import UUID

    from numpy.typing import NDArray

    from cloud_sync.model.ledger_rules import GatewayProgress
    from cloud_sync.model.records import Series
    from cloud_sync.timescale import Connection
    from cloud_sync.timescale.row_store import ReadingSource

CREDENTIAL_ERRORS = (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InsufficientPrivilegeError)
DATA_ERRORS = (asyncpg.DataError, asyncpg.ProgramLimitExceededError)
CONTENTION_ERRORS = (asyncpg.SerializationError, asyncpg.DeadlockDetectedError)
MISSING_SCHEMA_ERRORS = (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError)
"""The database was replaced by an older copy, or emptied."""


@contextmanager
def map_database_errors() -> Iterator[None]:
    """Turn database errors into delivery errors; only errors in the data refuse a batch."""
    try:
        yield
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as fault:
        text = f"database: {str(fault) or type(fault).__name__}"
        if isinstance(fault, CREDENTIAL_ERRORS):
            raise UnauthorisedError(text) from fault
        if isinstance(fault, DATA_ERRORS) and not isinstance(fault, asyncpg.InterfaceError):
            raise RefusedError(text, "unacceptable_data") from fault
        raise RetryLaterError(text) from fault


T = TypeVar("T")
A = TypeVar("A")
A_co = TypeVar("A_co", covariant=True)

_log = logging.getLogger(__name__)
_CONNECT_TIMEOUT_S = 10.0
_MAX_ATTEMPTS = 3
_SESSION_SETTINGS = {
    "application_name": "tidegate",
    "idle_in_transaction_session_timeout": "60s",
    "timescaledb.max_tuples_decompressed_per_dml_transaction": "0",
}
"""In the start-up packet, so that they outlast the pool's RESET ALL. The last one is for late readings:
TimescaleDB refuses them once they touch 100,000 compressed rows. Plain PostgreSQL ignores it."""


class Idempotency(Protocol[A_co]):
    """What was answered before, looked up and kept in the transaction that stores the readings."""

    async def find_answer(self, connection: Connection) -> A_co | None:
        """The answer given before; when it is None, no other transaction stores the same meanwhile."""

    async def record_answer(self, connection: Connection, receipt: Receipt) -> A_co:
        """Keep what became of the readings; returns the answer."""


class TimescaleSink:
    """Applies batches to one database, over at most `pool_size` connections; lost ones are made again.

    Without `policies`, those that TimescaleDB has are left alone.
    """

    def __init__(
        self,
        dsn: str,
        *,
        name: str = "timescaledb",
        pool_size: int = 4,
        statement_timeout_s: float = 60.0,
        policies: schema.TimescalePolicies | None = None,
    ) -> None:
        self.name = name
        self.schema: schema.SchemaState | None = None
        self._dsn = dsn
        self._pool_size = pool_size
        self._statement_timeout_s = statement_timeout_s
        self._policies = policies
        self._pool: asyncpg.Pool[Any] | None = None
        self._closed = False
        self._preparing = asyncio.Lock()
        self._directory = SeriesCache()
        self._late = LateRowTracker()

    async def prepare(self) -> schema.SchemaState:
        """Connect and bring the database to this release's schema; at once when that has been done.

        SchemaTooNewError for a newer release's database; a DeliveryError when it is away or rejects us.
        """
        async with self._preparing:
            if self.schema is None:
                with map_database_errors():
                    pool = await self._open()
                    async with pool.acquire() as connection:
                        self.schema = await schema.prepare_schema(connection, self._policies)
                _log_schema(self.schema)
            return self.schema

    async def ping(self) -> None:
        """Return when the database answers and is prepared; raise as `prepare` does."""
        await self.prepare()
        assert self._pool is not None
        with map_database_errors():
            async with self._pool.acquire(timeout=_CONNECT_TIMEOUT_S) as connection:
                await connection.execute("SELECT 1", timeout=_CONNECT_TIMEOUT_S)

    async def apply(self, batch: Batch) -> Receipt:
        """Apply a batch, or find that it was applied before.

        RangeConflictError: part of the range was applied, or all of it with other contents. RefusedError:
        nothing was written. Other delivery errors: nothing was settled; applying it again is safe.
        """
        _check_times(batch)
        if isinstance(batch.records, Readings):
            await self._open_late_chunks(batch.records)
        return await self.transact(functools.partial(self._apply_once, batch=batch))

    async def store(
        self, series: Sequence[Series], readings: Readings, source: ReadingSource, idempotency: Idempotency[A]
    ) -> A:
        """Store readings that no gateway's ledger covers, or return the answer recorded before.

        Raises as `apply` does, and whatever `idempotency` raises.
        """

        async def work(connection: Connection) -> A:
            async with connection.transaction():
                earlier = await idempotency.find_answer(connection)
                if earlier is not None:
                    return earlier
                newest_us = newest_time_by_series(readings, len(series))
                resolved = await self._directory.resolve(connection, series, newest_us)
                receipt = await row_store.store_readings(connection, readings, resolved.series_no, source)
                answer = await idempotency.record_answer(connection, receipt)
            self._directory.remember(resolved)
            return answer

        await self._open_late_chunks(readings)
        return await self.transact(work)

    async def progress(
        self, gateway_id: str | None = None, epoch: UUID | None = None
    ) -> list[GatewayProgress]:
        """What has been applied of one gateway or of all, of one epoch or of all."""
        return await self.transact(lambda connection: ledger.load_progress(connection, gateway_id, epoch))

    async def merge_ledger(self, older_than: timedelta) -> int:
        """Merge adjacent entries of the ledger that are that old; returns how many gateways had some."""
        rows = await self.transact(lambda connection: connection.fetch(SQL["gateways_to_merge"], older_than))

        async def merge(connection: Connection, gateway_id: str) -> None:
            async with connection.transaction():
                await ledger.lock_gateway(connection, gateway_id)
                await connection.execute(SQL["merge_ledger"], gateway_id, older_than)

        for row in rows:
            await self.transact(functools.partial(merge, gateway_id=row[0]))
        return len(rows)

    async def transact(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Run `work` with a connection to the prepared database; again when it met contention."""
        await self._prepare_to_apply()
        assert self._pool is not None
        for attempt in range(_MAX_ATTEMPTS):
            try:
                with map_database_errors():
                    async with self._pool.acquire() as connection:
                        return await work(connection)
            except RetryLaterError as fault:
                if isinstance(fault.__cause__, MISSING_SCHEMA_ERRORS):
                    self.schema = None
                if not isinstance(fault.__cause__, CONTENTION_ERRORS) or attempt + 1 == _MAX_ATTEMPTS:
                    raise
        raise AssertionError

    def encode(self, batch: Batch) -> EncodedBatch:
        """The batch in wire form; `send` makes a COPY body of it."""
        return EncodedBatch(batch.range, batch.rows, (wire.encode(batch),))

    async def send(self, encoded_batch: EncodedBatch) -> Receipt:
        """Apply a batch; raises as `apply` does."""
        batch = await asyncio.to_thread(wire.decode, encoded_batch.bodies[0])
        return await self.apply(batch)

    async def aclose(self) -> None:
        """Close the connections when open transactions have ended. Nothing can be applied afterwards."""
        self._closed = True
        if self._pool is not None:
            await self._pool.close()

    async def _open_late_chunks(self, readings: Readings) -> None:
        await self._prepare_to_apply()
        if self.schema is not None and self.schema.timescale_version is not None:
            await self._late.open_chunks(readings, self.transact)

    async def _prepare_to_apply(self) -> None:
        try:
            await self.prepare()
        except schema.SchemaTooNewError as fault:
            raise RetryLaterError(str(fault)) from fault

    async def _open(self) -> asyncpg.Pool[Any]:
        if self._closed:
            raise RetryLaterError("the connection to the database was closed by this program")
        if self._pool is None:
            self._pool = await asyncpg.create_pool(
                self._dsn,
                min_size=0,
                max_size=self._pool_size,
                timeout=_CONNECT_TIMEOUT_S,
                command_timeout=self._statement_timeout_s,
                init=self._on_connect,
                server_settings=_SESSION_SETTINGS
                | {"statement_timeout": f"{round(self._statement_timeout_s * 1000)}ms"},
            )
        return self._pool

    async def _on_connect(self, _connection: Connection) -> None:
        """A new connection may lead to another database: its series may have other numbers."""
        self._directory.forget()

    async def _apply_once(self, connection: Connection, batch: Batch) -> Receipt:
        async with connection.transaction():
            await ledger.lock_gateway(connection, batch.range.gateway_id)
            earlier = await ledger.find_receipt(connection, batch)
            if isinstance(earlier, Receipt):
                return earlier
            newest_us = newest_time_by_series(batch.records, len(batch.series))
            resolved = await self._directory.resolve(connection, batch.series, newest_us)
            if earlier == "covered":
                return await _match_batch(connection, batch, resolved.series_no)
            if isinstance(batch.records, Readings):
                source = row_store.ReadingSource(*batch.range[:2], batch.range.first_commit)
                receipt = await row_store.store_readings(
                    connection, batch.records, resolved.series_no, source
                )
            else:
                receipt = await row_store.store_records(connection, batch, resolved.series_no)
            await ledger.record_batch(connection, batch, receipt)
        self._directory.remember(resolved)
        return receipt


async def _match_batch(connection: Connection, batch: Batch, series_no: NDArray[np.int32]) -> Receipt:
    """The answer to a batch whose range was applied in other pieces: its rows are there, or it is refused.

    What is no reading may be stored again.
    """
    if not isinstance(batch.records, Readings):
        return replace(await row_store.store_records(connection, batch, series_no), applied_before=True)
    found = await row_store.match_readings(connection, batch.readings, series_no)
    if found is None:
        raise RangeConflictError(f"{batch.range}: was applied before with other readings", "range_overlap")
    return found


def _check_times(batch: Batch) -> None:
    """Refuse what no database of this schema can hold, naming the rows."""
    readings = batch.range.record_class is RecordClass.READING
    earliest, latest = row_store.READING_TIMES_US if readings else row_store.RECORD_TIMES_US
    bad = np.zeros(batch.rows, np.bool_)
    example = 0
    for name in batch.records.columns:
        if batch.rows and name.endswith("_us"):
            times = getattr(batch.records, name)
            outside = (times < earliest) | (times > latest)
            if outside.any():
                bad |= outside
                example = int(times[outside.argmax()])
    if bad.any():
        what = f"{batch.range}: a time of {example} us cannot be stored"
        raise RefusedError(what, "time_out_of_range", rows=np.flatnonzero(bad).tolist())


def _log_schema(state: schema.SchemaState) -> None:
    for name in state.applied:
        _log.info("schema migration %s applied", name)
    for note in state.notes:
        _log.warning("%s", note)
    kind = f"TimescaleDB {state.timescale_version}" if state.timescale_version else "plain PostgreSQL"
    _log.info("database ready: schema %d on %s", state.version, kind)
