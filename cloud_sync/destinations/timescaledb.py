"""The TimescaleDB sink: a batch applied once in effect (promise 4), on plain PostgreSQL too.

One transaction: the gateway's lock, the ledger, the series, the readings (`database.storing`), the ledger
again. What clients and files bring goes the same way, with another `Memory` in the ledger's place.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import asyncpg
import numpy as np

from cloud_sync import wire
from cloud_sync.applied import RangeConflict
from cloud_sync.database import copying, faults, ledger, schema, storing, summaries
from cloud_sync.database.directory import SeriesDirectory, newest_times
from cloud_sync.database.late import LateRows
from cloud_sync.destinations import Parcel
from cloud_sync.errors import Refused, RetryLater
from cloud_sync.records import Batch, Readings, Receipt, RecordClass

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from datetime import timedelta
    from uuid import UUID

    from numpy.typing import NDArray

    from cloud_sync.applied import Progress
    from cloud_sync.database.storing import Source
    from cloud_sync.records import Series

T = TypeVar("T")
A = TypeVar("A")
A_co = TypeVar("A_co", covariant=True)

_log = logging.getLogger(__name__)
_CONNECT_WITHIN_S = 10.0
_ATTEMPTS = 3
_SESSION = {
    "application_name": "tidegate",
    "idle_in_transaction_session_timeout": "60s",
    "timescaledb.max_tuples_decompressed_per_dml_transaction": "0",
}
"""In the start-up packet, so that they outlast the pool's RESET ALL. The last one is for late readings:
TimescaleDB refuses them once they touch 100,000 compressed rows. Plain PostgreSQL ignores it."""


class Memory(Protocol[A_co]):
    """What was answered before, looked up and kept in the transaction that stores the readings."""

    async def earlier(self, connection: asyncpg.Connection[Any]) -> A_co | None:
        """The answer given before; None when there is none, and then nobody else is storing the same."""
        ...

    async def enter(self, connection: asyncpg.Connection[Any], receipt: Receipt) -> A_co:
        """Keep what became of the readings; returns the answer."""
        ...


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
        self._late = LateRows()

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
        if isinstance(batch.records, Readings):
            await self._make_way(batch.records)
        return await self.transact(functools.partial(self._apply_once, batch=batch))

    async def store(
        self, series: Sequence[Series], readings: Readings, source: Source, memory: Memory[A]
    ) -> A:
        """Store readings that no gateway's ledger covers, or answer from memory.

        Args:
            series: what `readings.series` indexes.
            readings: in canonical order, with times that `copying` can write; may be none.
            source: who brought them.
            memory: of earlier answers.

        Raises:
            Refused, RetryLater, Unauthorised: as `apply`; and whatever `memory` raises.
        """

        async def work(connection: asyncpg.Connection[Any]) -> A:
            async with connection.transaction():
                earlier = await memory.earlier(connection)
                if earlier is not None:
                    return earlier
                newest_us = newest_times(readings, len(series))
                resolved = await self._directory.resolve(connection, series, newest_us)
                receipt = await storing.store(connection, readings, resolved.series_no, source)
                answer = await memory.enter(connection, receipt)
            self._directory.remember(resolved)
            return answer

        await self._make_way(readings)
        return await self.transact(work)

    async def progress(self, gateway_id: str | None = None, epoch: UUID | None = None) -> list[Progress]:
        """What has been applied of one gateway or of all, of one epoch or of all."""
        return await self.transact(lambda connection: ledger.progress(connection, gateway_id, epoch))

    async def merge_ledger(self, older_than: timedelta) -> int:
        """Merge adjacent entries of the ledger that are that old; returns how many gateways had some."""
        names = await self.transact(lambda connection: ledger.mergeable(connection, older_than))

        async def merge(connection: asyncpg.Connection[Any], gateway_id: str) -> None:
            async with connection.transaction():
                await ledger.lock(connection, gateway_id)
                await ledger.merge(connection, gateway_id, older_than)

        for name in names:
            await self.transact(functools.partial(merge, gateway_id=name))
        return len(names)

    async def transact(self, work: Callable[[asyncpg.Connection[Any]], Awaitable[T]]) -> T:
        """Run `work` with a connection to the prepared database; again when it met contention.

        Raises:
            DeliveryError: what a fault of the database stands for.
        """
        await self._prepare_to_apply()
        assert self._pool is not None
        for attempt in range(_ATTEMPTS):
            try:
                with faults.mapped():
                    async with self._pool.acquire() as connection:
                        return await work(connection)
            except RetryLater as fault:
                if isinstance(fault.__cause__, faults.MISSING):
                    self.schema = None
                if not isinstance(fault.__cause__, faults.CONTENTION) or attempt + 1 == _ATTEMPTS:
                    raise
        raise AssertionError

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

    async def _make_way(self, readings: Readings) -> None:
        await self._prepare_to_apply()
        if self.schema is not None and self.schema.timescale_version is not None:
            await self._late.make_way(readings, self.transact)

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
                server_settings=_SESSION
                | {"statement_timeout": f"{round(self._statement_timeout_s * 1000)}ms"},
            )
        return self._pool

    async def _greet(self, _connection: asyncpg.Connection[Any]) -> None:
        """Behind a new connection may be another database than before: trust no remembered number."""
        self._directory.forget()

    async def _apply_once(self, connection: asyncpg.Connection[Any], batch: Batch) -> Receipt:
        async with connection.transaction():
            await ledger.lock(connection, batch.range.gateway_id)
            earlier = await ledger.earlier_receipt(connection, batch)
            if isinstance(earlier, Receipt):
                return earlier
            newest_us = newest_times(batch.records, len(batch.series))
            resolved = await self._directory.resolve(connection, batch.series, newest_us)
            if earlier == "covered":
                return await _recognised(connection, batch, resolved.series_no)
            receipt = await _stored(connection, batch, resolved.series_no)
            await ledger.enter(connection, batch, receipt)
        self._directory.remember(resolved)
        return receipt


async def _stored(connection: asyncpg.Connection[Any], batch: Batch, series_no: NDArray[np.int32]) -> Receipt:
    if not isinstance(batch.records, Readings):
        return await summaries.store(connection, batch, series_no)
    source = storing.Source(batch.range.gateway_id, batch.range.epoch, batch.range.first_commit)
    return await storing.store(connection, batch.records, series_no, source)


async def _recognised(
    connection: asyncpg.Connection[Any], batch: Batch, series_no: NDArray[np.int32]
) -> Receipt:
    """The answer to a batch whose range was applied in other pieces: its rows are there, or it is refused.

    What is no reading may be stored again.
    """
    if not isinstance(batch.records, Readings):
        return replace(await summaries.store(connection, batch, series_no), applied_before=True)
    found = await storing.recognise(connection, batch.readings, series_no)
    if found is None:
        raise RangeConflict(f"{batch.range}: was applied before with other readings", "range_overlap")
    return found


def _check(batch: Batch) -> None:
    """Refuse what no database of this schema can hold, naming the rows."""
    readings = batch.range.record_class is RecordClass.READING
    earliest, latest = copying.TIMES_US if readings else summaries.TIMES_US
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
        raise Refused(what, "time_out_of_range", rows=np.flatnonzero(bad).tolist())


def _report(state: schema.Schema) -> None:
    for name in state.applied:
        _log.info("schema migration %s applied", name)
    for note in state.notes:
        _log.warning("%s", note)
    kind = f"TimescaleDB {state.timescale_version}" if state.timescale_version else "plain PostgreSQL"
    _log.info("database ready: schema %d on %s", state.version, kind)
