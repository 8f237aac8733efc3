"""The TimescaleDB sink: a batch applied once in effect (promise 4), on plain PostgreSQL too.

One transaction: the gateway's lock, the ledger, the series, the readings, the ledger again. Readings enter by
binary COPY. When one of them is there already, the COPY is undone to a savepoint and the batch goes through a
staging table instead, which tells duplicates (same value) from conflicts (another value: the first stays, the
other goes to `reading_conflict`).
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import asyncpg

from cloud_sync import wire
from cloud_sync.database import copying, faults, ledger, schema, statements
from cloud_sync.database.directory import SeriesDirectory, newest_times
from cloud_sync.destinations import Parcel
from cloud_sync.errors import Refused, RetryLater
from cloud_sync.records import Batch, Receipt, RecordClass

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from uuid import UUID

    import numpy as np
    from numpy.typing import NDArray

_log = logging.getLogger(__name__)
_SQL = statements.named("regional.sql")
_CONNECT_WITHIN_S = 10.0
_ATTEMPTS = 3
_SESSION = {
    "application_name": "tidegate",
    "idle_in_transaction_session_timeout": "60s",
    "timescaledb.max_tuples_decompressed_per_dml_transaction": "0",
}
"""In the start-up packet, so that they outlast the pool's RESET ALL. The last one is for late readings:
TimescaleDB refuses them once they touch 100,000 compressed rows. Plain PostgreSQL ignores it."""


class TimescaleSink:
    """Applies batches to one database. Connections are made when needed and made again when lost.

    Args:
        dsn: a PostgreSQL URL.
        name: of the destination.
        pool_size: connections at most, and so batches applied at a time.
        statement_timeout_s: after which a statement is given up and the batch is to be sent again.
        policies: what TimescaleDB is to do with old readings; None leaves what is set there alone.
    """

    def __init__(
        self,
        dsn: str,
        *,
        name: str = "timescaledb",
        pool_size: int = 4,
        statement_timeout_s: float = 60.0,
        policies: schema.Policies | None = None,
    ) -> None:
        self.name = name
        self.schema: schema.Schema | None = None
        self._dsn = dsn
        self._pool_size = pool_size
        self._statement_timeout_s = statement_timeout_s
        self._policies = policies
        self._pool: asyncpg.Pool[Any] | None = None
        self._closed = False
        self._preparing = asyncio.Lock()
        self._directory = SeriesDirectory()

    async def prepare(self) -> schema.Schema:
        """Connect and bring the database to this release's schema; at once when that has been done.

        Raises:
            SchemaTooNewError: the database belongs to a newer release.
            RetryLater, Unauthorised: it is away, or takes our credentials for nothing.
        """
        async with self._preparing:
            if self.schema is None:
                with faults.mapped():
                    pool = await self._open()
                    async with pool.acquire() as connection:
                        self.schema = await schema.prepare(connection, self._policies)
                _report(self.schema)
            return self.schema

    async def ping(self) -> None:
        """Return when the database answers and is prepared; raise as `prepare` does."""
        await self.prepare()
        assert self._pool is not None
        with faults.mapped():
            async with self._pool.acquire(timeout=_CONNECT_WITHIN_S) as connection:
                await connection.execute("SELECT 1", timeout=_CONNECT_WITHIN_S)

    async def apply(self, batch: Batch) -> Receipt:
        """Apply a batch, or find that it was applied before.

        Raises:
            RangeConflict: part of the range was applied, or all of it with other contents.
            Refused: the database cannot hold what the batch says; nothing was written.
            RetryLater, Unauthorised: nothing was settled; applying the batch again is safe.
        """
        _check(batch)
        await self._prepare_to_apply()
        assert self._pool is not None
        for attempt in range(_ATTEMPTS):
            try:
                with faults.mapped():
                    async with self._pool.acquire() as connection:
                        return await self._apply_once(connection, batch)
            except RetryLater as fault:
                if isinstance(fault.__cause__, faults.MISSING):
                    self.schema = None
                if not isinstance(fault.__cause__, faults.CONTENTION) or attempt + 1 == _ATTEMPTS:
                    raise
        raise AssertionError

    async def progress(
        self, gateway_id: str, epoch: UUID | None = None
    ) -> tuple[ledger.Seen | None, list[ledger.AppliedRange]]:
        """What has been applied of a gateway, of one epoch or of all."""
        await self._prepare_to_apply()
        assert self._pool is not None
        with faults.mapped():
            async with self._pool.acquire() as connection:
                return await ledger.applied_ranges(connection, gateway_id, epoch)

    def encode(self, batch: Batch) -> Parcel:
        """The batch in wire form; what goes over the link is the COPY body that `send` makes of it."""
        return Parcel(batch.range, batch.rows, (wire.encode(batch),))

    async def send(self, parcel: Parcel) -> Receipt:
        """Apply a parcel; raises as `apply` does."""
        batch = await asyncio.to_thread(wire.decode, parcel.bodies[0])
        return await self.apply(batch)

    async def aclose(self) -> None:
        """Close the connections when open transactions have ended. Nothing can be applied afterwards."""
        self._closed = True
        if self._pool is not None:
            await self._pool.close()

    async def _prepare_to_apply(self) -> None:
        try:
            await self.prepare()
        except schema.SchemaTooNewError as fault:
            raise RetryLater(str(fault)) from fault

    async def _open(self) -> asyncpg.Pool[Any]:
        if self._closed:
            raise RetryLater("the connection to the database was closed by this program")
        if self._pool is None:
            self._pool = await asyncpg.create_pool(
                self._dsn,
                min_size=0,
                max_size=self._pool_size,
                timeout=_CONNECT_WITHIN_S,
                command_timeout=self._statement_timeout_s,
                init=self._greet,
                server_settings=_SESSION,
            )
        return self._pool

    async def _greet(self, _connection: asyncpg.Connection[Any]) -> None:
        """Behind a new connection may be another database than before: trust no remembered number."""
        self._directory.forget()

    async def _apply_once(self, connection: asyncpg.Connection[Any], batch: Batch) -> Receipt:
        async with connection.transaction():
            await ledger.lock(connection, batch.range.gateway_id)
            earlier = await ledger.earlier_receipt(connection, batch)
            if earlier is not None:
                return earlier
            newest_us = newest_times(batch.readings, len(batch.series))
            resolved = await self._directory.resolve(connection, batch.series, newest_us)
            receipt = await _store(connection, batch, resolved.series_no)
            await ledger.enter(connection, batch, receipt)
        self._directory.remember(resolved)
        return receipt


def _check(batch: Batch) -> None:
    """Refuse what no database of this schema can hold."""
    if batch.range.record_class is not RecordClass.READING:
        raise Refused(f"{batch.range}: this release stores readings only", "unsupported_class")
    times = batch.readings.time_us
    for time_us in (int(times.min()), int(times.max())):
        if not copying.SMALLEST_TIME_US <= time_us <= copying.LARGEST_TIME_US:
            raise Refused(f"{batch.range}: a time of {time_us} us cannot be stored", "time_out_of_range")


async def _store(connection: asyncpg.Connection[Any], batch: Batch, series_no: NDArray[np.int32]) -> Receipt:
    """Write the readings, by COPY if all are new and through the staging table otherwise."""
    try:
        async with connection.transaction():
            body = copying.body(batch.readings, series_no)
            await _copy(connection, "reading", copying.COLUMNS, body)
    except asyncpg.UniqueViolationError:
        return await _store_staged(connection, batch, series_no)
    return Receipt(rows=batch.rows, stored=batch.rows)


async def _store_staged(
    connection: asyncpg.Connection[Any], batch: Batch, series_no: NDArray[np.int32]
) -> Receipt:
    await connection.execute(_SQL["make_staging"])
    body = copying.body(batch.readings, series_no, ordinal=True)
    await _copy(connection, "reading_staging", (*copying.COLUMNS, copying.ORDINAL), body)
    stored = _count(await connection.execute(_SQL["insert_staged"]))
    conflicts = _count(
        await connection.execute(
            _SQL["note_conflicts"], batch.range.gateway_id, batch.range.epoch, batch.range.first_commit
        )
    )
    await connection.execute(_SQL["drop_staging"])
    return Receipt(batch.rows, stored, batch.rows - stored - conflicts, conflicts)


async def _copy(
    connection: asyncpg.Connection[Any], table: str, columns: tuple[str, ...], body: Iterable[bytearray]
) -> None:
    async def pieces() -> AsyncIterator[bytearray]:
        for piece in body:
            yield piece

    await connection.copy_to_table(table, source=pieces(), columns=list(columns), format="binary")


def _count(status: str) -> int:
    """Rows of a command tag, e.g. "INSERT 0 42"."""
    return int(status.rpartition(" ")[2])


def _report(state: schema.Schema) -> None:
    for name in state.applied:
        _log.info("schema migration %s applied", name)
    for note in state.notes:
        _log.warning("%s", note)
    kind = f"TimescaleDB {state.timescale_version}" if state.timescale_version else "plain PostgreSQL"
    _log.info("database ready: schema %d on %s", state.version, kind)
