"""What a spool holds after a crash, held against what the devices were told.

Reads a copy of the files, opened with the code that the gateway itself uses, so that the files are left
as the crash left them for the gateway to recover.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from cloud_sync.codec import columns
from cloud_sync.model.records import RecordClass
from gateway.spool.database import Database
from gateway.spool.deliveries import Deliveries
from gateway.spool.segments import SegmentWriter, first_commit_at, position_span
from gateway.spool.series_catalog import SeriesCatalog
from tests.crash.fleet import TYPE, number_of, value_of

if TYPE_CHECKING:
    from pathlib import Path

    from tests.crash.fleet import Fleet

_SEGMENTS = (
    "SELECT position, last_commit, rows, rows_before, block FROM segment "
    "WHERE position BETWEEN ? AND ? ORDER BY position"
)
_LINE = re.compile(rb"sensor_id=(d\d+)[, ].* (-?\d+)$")


@dataclass
class Account:
    """What is known of one spool from crash to crash; `check` adds to it.

    Attributes:
        rows_through: rows ever committed through commit n, for every n that was seen to end a segment.
    """

    spool: Path
    work: Path
    epoch: object = None
    newest: int = 0
    rows_through: dict[int, int] = field(default_factory=dict)

    async def check(self, fleet: Fleet, *, delivered: Path | None = None) -> None:
        """Hold the spool as it lies on disk against the fleet's record.

        With `delivered`, a directory of the file destination, readings may be there instead.
        """
        counts = {d.name: np.zeros(d.next_reading, np.int32) for d in fleet.devices}
        await self._count_spool(counts)
        in_files = _counts_of_files(delivered, counts) if delivered is not None else None
        for device in fleet.devices:
            there = counts[device.name]
            if in_files is not None:
                there = np.maximum(there, in_files[device.name])
            missing = np.flatnonzero(device.acked[: len(there)] & (there == 0))
            assert not len(missing), f"{device.name}: acknowledged and gone: {missing[:10]}"
            twice = np.flatnonzero(there > 1)
            assert not len(twice), f"{device.name}: stored more than once: {twice[:10]}"

    async def _count_spool(self, counts: dict[str, np.ndarray]) -> None:
        database = await Database.open(self._copied())
        try:
            catalog = await SeriesCatalog.read(database)
            segments = await SegmentWriter.open(database, catalog)
            rows = await database.read(
                lambda c: c.execute(_SEGMENTS, position_span(RecordClass.READING)).fetchall()
            )
            self._check_commits(rows)
            newest = segments.newest_commit(RecordClass.READING)
            assert newest >= self.newest, "a commit that was there is gone"
            self.newest = newest
            if newest:  # a copy of a file that was never finished gets an epoch of its own
                assert self.epoch in (None, database.epoch)
                self.epoch = database.epoch
            deliveries = Deliveries(database, segments, catalog, "g1")
            for (name,) in await database.read(
                lambda c: c.execute("SELECT name FROM destination").fetchall()
            ):
                backlog = await deliveries.backlog(name)
                assert 0 <= backlog.readings <= segments.rows_ever(RecordClass.READING)
            for *_, block in rows:
                _count(columns.decode(block), catalog, counts)
            assert await database.read(lambda c: c.execute("PRAGMA integrity_check").fetchone()[0]) == "ok"
        finally:
            await database.close()

    def _copied(self) -> Path:
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        for suffix in ("", "-wal", "-journal"):
            source = self.spool.with_name(self.spool.name + suffix)
            if source.exists():
                shutil.copyfile(source, self.work / source.name)
        return self.work / self.spool.name

    def _check_commits(self, rows: list[tuple]) -> None:
        """Commits are contiguous, and every number stands for the rows it stood for before."""
        at = None
        for position, last_commit, count, rows_before, _ in rows:
            first = first_commit_at(position)
            assert first <= last_commit
            if at is not None:
                assert (first, rows_before) == at, "commits are not contiguous"
            at = (last_commit + 1, rows_before + count)
            for commit, through in ((first - 1, rows_before), (last_commit, rows_before + count)):
                assert self.rows_through.setdefault(commit, through) == through, f"{commit} was used again"


def _count(readings, catalog: SeriesCatalog, counts: dict[str, np.ndarray]) -> None:
    for number in np.unique(readings.series):
        series = catalog[int(number)]
        assert series.sensor_type == TYPE
        mine = readings.series == number
        n = number_of(readings.time_us[mine])
        assert (readings.value[mine] == value_of(n)).all()
        assert (readings.seq[mine] == n).all()
        np.add.at(counts[series.sensor_id], n, 1)


def _counts_of_files(directory: Path, counts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    found = {name: np.zeros_like(array) for name, array in counts.items()}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        for line in path.read_bytes().splitlines():
            match = _LINE.search(line)
            if match:
                found[match[1].decode()][number_of(int(match[2]) // 1000)] += 1
    return found


def counts_of_files(directory: Path, fleet: Fleet) -> dict[str, np.ndarray]:
    """How often the file destination holds each reading, by device."""
    return _counts_of_files(directory, {d.name: np.zeros(d.next_reading, np.int32) for d in fleet.devices})
