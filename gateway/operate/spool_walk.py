"""A walk over the segments of one class, in commit order or against it, on a live or a stopped spool.

A reader that keeps one view of a live spool keeps its write-ahead log from being folded in. So the walk
takes a new view each time the log has grown by `_LOG_GROWTH_BYTES`, and goes on where it was. Between two
views compaction may have merged segments that were seen with ones that were not: such a head `overlaps`.
"""

from __future__ import annotations

import sqlite3
from contextlib import suppress
from typing import TYPE_CHECKING

from cloud_sync import statements
from cloud_sync.records import RecordClass
from gateway.operate.spool_file import wal_size_bytes
from gateway.spool.database import SQL as SPOOL_SQL
from gateway.spool.errors import SpoolFailed
from gateway.spool.segments import Stored, newest_of, span_of

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from pathlib import Path

SQL = statements.load("gateway.operate", "sql", "spool_tools.sql")

_AT_ONCE = 256
_LOG_GROWTH_BYTES = 16 << 20


class Head(Stored):
    """A segment without its block, with a name to call it by."""

    __slots__ = ()

    @property
    def record_class(self) -> RecordClass:
        """The class of its records."""
        return RecordClass(self.position >> 56)

    def __str__(self) -> str:
        name = self.record_class.name.lower()
        if self.first_commit == self.last_commit:
            return f"{name} segment {self.first_commit}"
        return f"{name} segment {self.first_commit}..{self.last_commit}"


def kept_rows(connection: sqlite3.Connection, record_class: RecordClass = RecordClass.READING) -> int:
    """Records of a class between its oldest segment and its newest, without counting them."""
    oldest = connection.execute(SPOOL_SQL["first_segment_from"], span_of(record_class)).fetchone()
    return 0 if oldest is None else newest_of(connection, record_class).rows - int(oldest[1])


class Walk:
    """Iterate it once for heads; `block` and `overlaps` speak of the head last given."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        path: Path,
        record_class: RecordClass = RecordClass.READING,
        *,
        newest_first: bool = False,
    ) -> None:
        self._connection = connection
        self._path = path
        self._span = span_of(record_class)
        self._newest_first = newest_first
        self._class = record_class
        self._seen_first = self._seen_last = 0
        self._before: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[Head]:
        at_end = False
        while not at_end:
            log_bytes = wal_size_bytes(self._path)
            self._before = (self._seen_first, self._seen_last) if self._seen_last else None
            self._connection.execute("BEGIN")
            try:
                at_end = yield from self._one_view(log_bytes)
            finally:
                with suppress(sqlite3.ProgrammingError):  # closed before a walk that was broken off
                    self._connection.execute("COMMIT")

    def block(self, head: Head) -> bytes:
        """The block of the head last given, of the same view."""
        row = self._connection.execute(SPOOL_SQL["block_at"], (head.position,)).fetchone()
        return bytes(row[0])

    def overlaps(self, head: Head) -> bool:
        """Whether the head last given covers commits of heads of an earlier view."""
        if self._before is None:
            return False
        first, last = self._before
        return head.first_commit <= last and head.last_commit >= first

    def _one_view(self, log_bytes: int) -> Generator[Head, None, bool]:
        """Heads until there are none (True), or the log has grown too much under this view (False)."""
        while heads := self._heads():
            for head in heads:
                yield head
                self._note(head)
                if wal_size_bytes(self._path) - log_bytes > _LOG_GROWTH_BYTES:
                    return False
        return True

    def _note(self, head: Head) -> None:
        first, last = head.first_commit, max(head.first_commit, head.last_commit)
        self._seen_first = min(self._seen_first or first, first)
        self._seen_last = max(self._seen_last, last)

    def _heads(self) -> list[Head]:
        """The next heads: those that reach beyond what was seen."""
        lowest, highest = self._span
        if self._newest_first:
            if self._seen_last:
                highest = span_of(self._class, 0, self._seen_first - 1)[1]
            return self._fetch("segments_back_from", lowest, highest)
        if self._seen_last:
            lowest = span_of(self._class, self._seen_last + 1)[0]
            straddling = self._fetch("segments_back_from", self._span[0], lowest - 1, limit=1)
            if straddling and straddling[0].last_commit > self._seen_last:
                return straddling
        return self._fetch("segments_between", lowest, highest)

    def _fetch(self, statement: str, lowest: int, highest: int, limit: int = _AT_ONCE) -> list[Head]:
        heads = [
            Head(*row) for row in self._connection.execute(SPOOL_SQL[statement], (lowest, highest, limit))
        ]
        for head in heads:
            if not all(isinstance(member, int) for member in head):
                raise SpoolFailed(f"{self._path}: the row of the segment at {head.position} is damaged")
        return heads
