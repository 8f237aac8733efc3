"""Progress of every destination: ranges delivered, batches open, and what is claimed next.

Invariants:
- The range of a batch is fsynced in `batch` before `claim` returns it (promise 3). After a restart the
  open batches are handed out again, unchanged, before anything new of their lane.
- `settle` moves a range from `batch` to `delivered` in one transaction. A crash before it means the batch
  is sent again and the destination's ledger answers with the same receipt (promise 4).
- Only an answer that nothing was applied (too large, refused) changes how an open batch travels: it is
  halved, first between segments, then into parts of its rows; a refused row is left out and is in quarantine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from cloud_sync.codec.wire import MAX_PARTS
from cloud_sync.delivery.lanes import ClaimRequest, Lane
from cloud_sync.model.records import SEQ_ABSENT, Batch, BatchRange, Readings, RecordClass
from gateway.spool import delivery_ranges
from gateway.spool.batch_reader import BatchReader
from gateway.spool.database import SQL, Database, crash_point
from gateway.spool.delivery_ranges import Claim, CommitRange, DeliveryQueue
from gateway.spool.quarantine_items import QuarantineItem, write_quarantine_items
from gateway.spool.segments import SegmentWriter, first_commit_at, position_span

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Collection, Iterator, Sequence

    from cloud_sync.model.errors import RefusedRow
    from cloud_sync.model.records import Series
    from gateway.spool.series_catalog import SeriesCatalog

URGENT_CLASSES = (RecordClass.ALERT, RecordClass.DECLARATION)
"""Sent first, oldest first, by the lane that does not fill gaps."""
_MAX_SUMMARY_ROWS = 10_000  # a rollup or an alert takes more bytes than a reading
_MAX_ITEMS_PER_BATCH = 1000
FROM_NOW_ON = 1 << 62
"""A `since_us` later than everything: a new destination gets nothing of what is there already."""


@dataclass(frozen=True, slots=True)
class Backlog:
    """What one destination has no receipt for: `readings`, in `gaps` separate ranges of commits."""

    readings: int
    oldest_written_at_us: int | None
    gaps: int = 0


class Deliveries:
    """Claims, reads and settles the batches of all destinations of one spool."""

    def __init__(
        self, database: Database, segments: SegmentWriter, catalog: SeriesCatalog, gateway_id: str
    ) -> None:
        self._database = database
        self._segments = segments
        self._gateway_id = gateway_id
        self._batch_reader = BatchReader(database, catalog)
        self._classes: dict[str, frozenset[RecordClass]] = {}

    async def register(
        self,
        destination: str,
        kind: str,
        *,
        now_us: int,
        since_us: int | None = None,
        classes: Collection[RecordClass] = tuple(RecordClass),
    ) -> None:
        """Add a destination for some classes of records; a known one keeps its progress.

        A new one gets what was committed since `since_us`, in whole segments; everything without it.
        """
        self._classes[destination] = frozenset(classes)

        def work(connection: sqlite3.Connection) -> None:
            known = connection.execute(SQL["destination_known"], (destination,)).fetchone()
            connection.execute(SQL["add_destination"], (destination, kind, now_us))
            if known is not None or since_us is None:
                return
            for record_class in RecordClass:
                queue = DeliveryQueue(destination, record_class)
                last = self._last_before(connection, record_class, since_us)
                if last > 0:
                    delivery_ranges.add_delivered(connection, queue, CommitRange(1, last))

        await self._database.write(work)

    def _last_before(self, connection: sqlite3.Connection, record_class: RecordClass, since_us: int) -> int:
        """The last commit that a destination starting at `since_us` does not get; 0 for none."""
        if since_us >= FROM_NOW_ON:
            return self._segments.newest_commit(record_class)
        row = connection.execute(
            SQL["newest_written_before"], (*position_span(record_class), since_us)
        ).fetchone()
        return 0 if row is None else first_commit_at(row[0]) - 1

    async def drop(self, destination: str) -> bool:
        """Delete a destination and its progress; False when it was not known."""

        def work(connection: sqlite3.Connection) -> bool:
            known = connection.execute(SQL["destination_known"], (destination,)).fetchone()
            for name in (
                "drop_destination",
                "drop_delivered_of",
                "drop_batches_of",
                "drop_parts_of",
                "drop_losses_of",
            ):
                connection.execute(SQL[name], (destination,))
            return known is not None

        return await self._database.write(work)

    async def claim(self, destination: str, request: ClaimRequest) -> BatchRange | None:
        """The batch to send next: an open one from before, else a new one; None when there is nothing.

        Alerts first, then declarations, rollups, readings; whole segments only, of which the first may exceed
        `max_rows`. The rules of the lanes are in `gateway.spool.delivery_ranges`.
        """
        found = await self._database.read(lambda c: self._find_next(c, destination, request))
        if found is None:
            return None
        queue, _, batch = found
        if isinstance(batch, Claim):
            return self._named(queue, batch)
        claimed = await self._database.write(lambda c: self._open_next_batch(c, destination, request))
        crash_point("after_claim")
        return claimed

    async def read_batch(self, claimed: BatchRange, destination: str | None = None) -> Batch | None:
        """The claimed batch or part; see `BatchReader.read`."""
        return await self._batch_reader.read(claimed, destination)

    async def settle(
        self, destination: str, claimed: BatchRange, *, then: ClaimRequest | None = None
    ) -> BatchRange | None:
        """Record a receipt: the range, or this part of it, is delivered and no longer open.

        With `then`, claim what that lane sends next in the same transaction, and return it.
        """
        queue = DeliveryQueue(destination, claimed.record_class)
        crash_point("before_settle")

        def work(connection: sqlite3.Connection) -> BatchRange | None:
            if delivery_ranges.close_part(connection, queue, claimed):
                delivery_ranges.add_delivered(
                    connection, queue, CommitRange(claimed.first_commit, claimed.last_commit)
                )
            return None if then is None else self._open_next_batch(connection, destination, then)

        return await self._database.write(work)

    async def renew_epoch(self) -> None:
        """Start a new epoch: a destination has ranges of this one that this spool does not know.

        Batches travel whole again: their parts were counted in the old epoch.
        """
        await self._database.write(lambda c: c.execute(SQL["travel_whole"]))
        await self._database.renew_epoch()

    async def split_segments(self, destination: str, claimed: BatchRange) -> bool:
        """Halve an open batch between two of its segments; False when it has one, or travels in parts."""
        record_class, first, last = claimed.record_class, claimed.first_commit, claimed.last_commit
        queue = DeliveryQueue(destination, record_class)

        def work(connection: sqlite3.Connection) -> bool:
            sizes = connection.execute(
                SQL["segment_sizes_from"], (*position_span(record_class, first, last), last - first + 1)
            ).fetchall()
            in_parts = delivery_ranges.read_open_parts(connection, queue, first)
            if len(sizes) <= 1 or in_parts:
                return False
            middle = first_commit_at(sizes[len(sizes) // 2][0])
            connection.execute(SQL["delete_batch"], (*queue, first, last))
            for half in (CommitRange(first, middle - 1), CommitRange(middle, last)):
                connection.execute(SQL["add_batch"], (*queue, *half, 0))
            return True

        return await self._database.write(work)

    async def split_rows(self, destination: str, claimed: BatchRange) -> bool:
        """Halve the rows of an open batch, or of a part of one; False when it has a single row."""
        queue = DeliveryQueue(destination, claimed.record_class)

        def work(connection: sqlite3.Connection) -> bool:
            rows = _count_batch_rows(connection, claimed)
            of_part = claimed.rows_of_part(rows)
            if of_part.stop - of_part.start <= 1 or 2 * claimed.parts > MAX_PARTS:
                return False
            delivery_ranges.split_part(connection, queue, claimed, rows)
            return True

        return await self._database.write(work)

    async def refuse(self, destination: str, batch: Batch, bad: Sequence[RefusedRow], *, now_us: int) -> None:
        """Quarantine rows of an open batch that its destination refused, and leave them out from now on."""
        queue = DeliveryQueue(destination, batch.range.record_class)
        items = _build_refused_items(destination, batch, bad, now_us)

        def work(connection: sqlite3.Connection) -> None:
            part = delivery_ranges.require_open_part(connection, queue, batch.range)
            if batch.positions is None:
                of_part = batch.range.rows_of_part(_count_batch_rows(connection, batch.range))
                sent = sorted({*range(of_part.start, of_part.stop)} - {*part.refused})
            else:
                sent = batch.positions.tolist()
            refused = tuple(sorted({*part.refused, *(sent[row.row] for row in bad)}))
            delivery_ranges.save_part(
                connection, queue, batch.range.first_commit, part._replace(refused=refused)
            )
            write_quarantine_items(connection, items)

        await self._database.write(work)

    async def backlog(self, destination: str, record_class: RecordClass = RecordClass.READING) -> Backlog:
        """What `destination` lacks of a class, in time that grows with its gaps, not with their size."""
        if record_class not in self._classes.get(destination, RecordClass):
            return Backlog(0, None)
        newest = self._segments.newest_commit(record_class)
        return await self._database.read(lambda c: read_backlog(c, destination, record_class, newest))

    def _turns(self, destination: str, request: ClaimRequest) -> Iterator[tuple[DeliveryQueue, ClaimRequest]]:
        """The classes that a lane sends, the most urgent first, with what it asks of each."""
        for record_class in sorted(self._classes.get(destination, RecordClass)):
            queue = DeliveryQueue(destination, record_class)
            if self._segments.newest_commit(record_class) == 0:
                continue
            if record_class is RecordClass.READING:
                if not request.urgent_only:
                    yield queue, request
                continue
            of_class = request._replace(max_rows=min(request.max_rows, _MAX_SUMMARY_ROWS))
            if record_class not in URGENT_CLASSES:
                if not request.urgent_only:
                    yield queue, of_class
            elif request.lane is not Lane.BACKFILL:
                yield queue, of_class._replace(lane=None)

    def _find_next(
        self, connection: sqlite3.Connection, destination: str, request: ClaimRequest
    ) -> tuple[DeliveryQueue, ClaimRequest, Claim | CommitRange] | None:
        """An open batch to send again, or the commits that a new one would have."""
        for queue, of_class in self._turns(destination, request):
            found = delivery_ranges.find_open_batch(
                connection, queue, of_class
            ) or delivery_ranges.find_next_range(
                connection,
                queue,
                of_class,
                newest=self._segments.newest_commit(queue.record_class),
                rows_ever=self._segments.rows_ever(queue.record_class),
            )
            if found is not None:
                return queue, of_class, found
        return None

    def _open_next_batch(
        self, connection: sqlite3.Connection, destination: str, request: ClaimRequest
    ) -> BatchRange | None:
        """Inside a transaction: an open batch, or a new one that it fixes."""
        found = self._find_next(connection, destination, request)
        if found is None:
            return None
        queue, of_class, batch = found
        if not isinstance(batch, Claim):
            batch = delivery_ranges.open_batch(connection, queue, batch, of_class)
        return self._named(queue, batch)

    def _named(self, queue: DeliveryQueue, claim: Claim) -> BatchRange:
        return BatchRange(
            self._gateway_id,
            self._database.epoch,
            queue.record_class,
            *claim.range,
            claim.part.part,
            claim.part.parts,
        )


def _count_batch_rows(connection: sqlite3.Connection, batch: BatchRange) -> int:
    return delivery_ranges.count_rows(
        connection, batch.record_class, CommitRange(batch.first_commit, batch.last_commit)
    )


def _build_refused_items(
    destination: str, batch: Batch, bad: Sequence[RefusedRow], now_us: int
) -> list[QuarantineItem]:
    """An item for each row; beyond a limit one for all the rest."""
    items = [_build_refused_item(destination, batch, row, now_us) for row in bad[:_MAX_ITEMS_PER_BATCH]]
    rest = bad[_MAX_ITEMS_PER_BATCH:]
    if rest:
        items.append(
            QuarantineItem.from_payload(
                received_at_us=now_us,
                source=destination,
                topic="",
                reason=rest[0].reason,
                detail=f"{len(rest)} more rows of {batch.range} were refused: {rest[0].words}",
                payload=b"",
            )
        )
    return items


def _build_refused_item(destination: str, batch: Batch, bad: RefusedRow, now_us: int) -> QuarantineItem:
    records = batch.records
    payload = {
        name: getattr(records, name)[bad.row : bad.row + 1].tolist()[0]
        for name in records.columns
        if name != "series"
    }
    topic = ""
    if records.has_series:
        series = batch.series[int(records.series[bad.row])]
        topic = f"{series.sensor_id}/{series.sensor_type}"
        if isinstance(records, Readings):
            payload = _to_reading_payload(payload, series)
    return QuarantineItem.from_payload(
        received_at_us=now_us,
        source=destination,
        topic=topic,
        reason=bad.reason,
        detail=bad.words,
        payload=msgspec.json.encode(payload),
    )


def _to_reading_payload(columns: dict[str, Any], series: Series) -> dict[str, Any]:
    """A reading with everything needed to send it again; `ts` counts microseconds."""
    present = {name: v for name, v in columns.items() if not (isinstance(v, float) and math.isnan(v))}
    reading = {"value": present.pop("value"), "ts": present.pop("time_us")}
    if present["seq"] == SEQ_ABSENT:
        del present["seq"]
    reading |= {"sensor_id": series.sensor_id, "sensor_type": series.sensor_type}
    return reading | present | dict(series.attributes)


def read_backlog(
    connection: sqlite3.Connection, destination: str, record_class: RecordClass, newest: int
) -> Backlog:
    """The backlog from cumulative row counts: each gap costs two look-ups."""
    readings, oldest, count = 0, None, 0
    delivered = delivery_ranges.read_delivered(connection, DeliveryQueue(destination, record_class))
    for gap in delivery_ranges.find_gaps(delivered, 1, newest):
        span = position_span(record_class, gap.first, gap.last)
        first = connection.execute(SQL["first_segment_from"], span).fetchone()
        if first is None:
            continue
        *_, rows, rows_before = connection.execute(SQL["newest_segment"], span).fetchone()
        readings += rows_before + rows - first[1]
        oldest = first[2] if oldest is None else min(oldest, first[2])
        count += 1
    return Backlog(readings, oldest, count)
