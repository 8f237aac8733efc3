"""Batches read from the spool: the segments of a claimed range as one self-contained batch.

A segment whose bytes cannot be read is set aside, with its bytes where they can be had, so that everything
else goes on (promise 10). The batches it was a part of travel whole again: their parts are counted in rows.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from cloud_sync.codec import columns
from cloud_sync.model.errors import StoreError
from cloud_sync.model.records import Batch, BatchRange, Declarations, Flag, Readings
from gateway.spool import delivery_ranges
from gateway.spool.database import SQL
from gateway.spool.delivery_ranges import WHOLE_BATCH, BatchPart, DeliveryQueue
from gateway.spool.errors import SpoolAccessError, SpoolError
from gateway.spool.salvage import is_damage_error
from gateway.spool.segment_reader import DamagedSegment, decode_segment, read_block
from gateway.spool.segments import first_commit_at, position_span, record_class_at, save_pruned_mark

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from cloud_sync.model.records import Records
    from gateway.spool.database import Database
    from gateway.spool.series_catalog import SeriesCatalog

_log = logging.getLogger(__name__)
_LOCAL_FLAG = np.int32(Flag.PROCESSED)
_UNREADABLE = "unreadable"
"""Reason of a segment whose pages SQLite cannot read, so that its bytes cannot be kept either."""


class BatchReader:
    """Reads the batches of one spool."""

    def __init__(self, database: Database, catalog: SeriesCatalog) -> None:
        self._database = database
        self._catalog = catalog

    async def read(self, claimed: BatchRange, destination: str | None = None) -> Batch | None:
        """The batch of a claimed range or part: in canonical order, without rows that `destination` refused.

        A segment that cannot be read is set aside; None when none is left.
        """
        blocks, part = await self._database.read(lambda c: _read_batch_blocks(c, claimed, destination))
        kind = columns.RECORD_TYPES[claimed.record_class]
        readable: list[Records] = []
        for position, block in blocks:
            records = await self._decode(position, block, kind)
            if isinstance(records, DamagedSegment):
                await self._set_aside(position, records)
            else:
                readable.append(records)
        if len(readable) < len(blocks) and claimed.parts > 1:
            raise StoreError(f"{claimed}: a segment of it is damaged; it will travel whole")
        if not readable:
            return None
        return await asyncio.get_running_loop().run_in_executor(
            None, self._assemble, claimed, readable, part.refused, destination
        )

    async def _decode(
        self, position: int, block: bytes | None, kind: type[Records]
    ) -> Records | DamagedSegment:
        if block is None:
            try:
                block = await self._database.read(lambda c: read_block(c, position)) or b""
            except SpoolAccessError as fault:
                if not _is_caused_by_damage(fault):
                    raise
                return DamagedSegment(_UNREADABLE, str(fault))
        return decode_segment(block, kind, knows=self._catalog.knows)

    async def _set_aside(self, position: int, damage: DamagedSegment) -> None:
        reason = f"{damage.reason}: {damage.detail}"
        _log.error("commit %d is damaged and set aside: %s", first_commit_at(position), reason)
        now_us = time.time_ns() // 1000

        def record_damage(connection: sqlite3.Connection) -> None:
            save_pruned_mark(connection, position)
            lacking = json.dumps(delivery_ranges.destinations_lacking(connection, position))
            connection.execute(SQL["set_aside"], (now_us, reason, lacking, position))
            connection.execute(
                SQL["travel_whole_around"], (record_class_at(position), first_commit_at(position))
            )

        def work(connection: sqlite3.Connection) -> None:
            record_damage(connection)
            if damage.reason != _UNREADABLE:
                connection.execute(SQL["keep_damaged_block"], (position,))
            connection.execute(SQL["delete_segment"], (position,))

        try:
            await self._database.write(work)
        except SpoolAccessError as fault:
            if not _is_caused_by_damage(fault):
                raise
            # Its pages cannot even be freed: it stays, and is passed over.
            await self._database.write(record_damage)

    def _assemble(
        self, claimed: BatchRange, parts: list[Records], refused: Sequence[int], destination: str | None
    ) -> Batch:
        merged = parts[0].concat(parts)
        if isinstance(merged, Readings):
            merged = replace(merged, flags=merged.flags & ~_LOCAL_FLAG)
        if not merged.has_series:
            return _select_part(Batch(claimed, (), merged.in_order()), refused, destination)
        numbers, index = np.unique(merged.series, return_inverse=True)
        series = [self._catalog[int(number)] for number in numbers]
        order = sorted(range(len(series)), key=series.__getitem__)
        rank = np.empty(len(order), np.int32)
        rank[order] = np.arange(len(order), dtype=np.int32)
        records = merged.with_series(rank[index]).in_order()
        return _select_part(Batch(claimed, tuple(series[i] for i in order), records), refused, destination)


def _read_batch_blocks(
    connection: sqlite3.Connection, claimed: BatchRange, destination: str | None
) -> tuple[Sequence[tuple[int, bytes | None]], BatchPart]:
    """Position and block of every segment; without blocks when not all of them can be read at once."""
    part = WHOLE_BATCH
    if destination is not None:
        queue = DeliveryQueue(destination, claimed.record_class)
        part = delivery_ranges.find_open_part(connection, queue, claimed) or WHOLE_BATCH
    span = position_span(claimed.record_class, claimed.first_commit, claimed.last_commit)
    try:
        return connection.execute(SQL["blocks_between"], span).fetchall(), part
    except sqlite3.Error as fault:
        if not is_damage_error(fault):
            raise
    positions = connection.execute(SQL["positions_between"], span).fetchall()
    return [
        (p, None) for (p,) in positions if connection.execute(SQL["is_damaged"], (p,)).fetchone() is None
    ], part


def _select_part(batch: Batch, refused: Sequence[int], destination: str | None) -> Batch:
    """The rows of a part, less the refused and the withheld ones, and only the series they name."""
    for_destination = _rows_for_destination(batch.records, destination)
    if batch.range.parts == 1 and not refused and for_destination is None:
        return batch
    of_part = batch.range.rows_of_part(batch.rows)
    keep = np.zeros(batch.rows, np.bool_)
    keep[of_part] = True
    keep[list(refused)] = False
    accepted = int(keep.sum())
    if for_destination is not None:
        keep &= for_destination
    positions = np.flatnonzero(keep)
    records, series = batch.records.select(positions), batch.series
    if records.has_series:
        used, index = np.unique(records.series, return_inverse=True)
        records = records.with_series(index.astype(np.int32))
        series = tuple(batch.series[number] for number in used)
    return Batch(
        batch.range,
        series,
        records,
        refused=of_part.stop - of_part.start - accepted,
        withheld=accepted - records.rows,
        positions=positions,
    )


def _rows_for_destination(records: Records, destination: str | None) -> NDArray[np.bool_] | None:
    """Which rows are for the destination; None for all."""
    if destination is None:
        return None
    if isinstance(records, Readings):
        rows = (records.flags & Flag.SUPPRESSED) == 0
    elif isinstance(records, Declarations):
        rows = np.array([name == destination for name in records.destination], np.bool_)
    else:
        return None
    return None if rows.all() else rows


def _is_caused_by_damage(fault: SpoolError) -> bool:
    cause = fault.__cause__
    return isinstance(cause, sqlite3.Error) and is_damage_error(cause)
