"""Checks everything a spool promises about itself; every problem is told with its place.

Reads only. Memory is bounded by one segment, the series table and `PROBLEMS_KEPT` problems.
"""

from __future__ import annotations

import sqlite3
from functools import partial
from typing import TYPE_CHECKING
from uuid import UUID

import msgspec
import numpy as np

from cloud_sync.codec import columns
from cloud_sync.model.records import Readings, RecordClass
from gateway.spool import errors
from gateway.spool.database import (
    NO_PROGRESS,
    SQL,
    ProgressListener,
    open_spool_read_only,
    read_meta,
    read_view,
)
from gateway.spool.salvage import SPOOL_TABLES
from gateway.spool.segment_reader import DamagedSegment, SegmentWalk, count_kept_rows, decode_segment
from gateway.spool.segments import first_commit_at, position_span, read_commit_counter, read_pruned_mark

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from gateway.spool.segments import StoredSegment


def check_progress(connection: sqlite3.Connection, add: Callable[[str, str], None]) -> None:
    """Check delivered ranges and open batches against the commits; `add` gets each problem."""
    with read_view(connection):
        newest = {}
        for record_class in RecordClass:
            aside = connection.execute(SQL["damaged_between"], position_span(record_class))
            commit = read_commit_counter(connection, record_class).commit
            newest[record_class] = max([commit, *(last_commit for _, last_commit, _ in aside)])
        known = {name for name, _, _ in connection.execute(SQL["destinations"])}
        delivered = connection.execute(SQL["all_delivered"]).fetchall()
        batches = connection.execute(SQL["all_batches"]).fetchall()
        for kind, rows in (("delivered", delivered), ("open batch", batches)):
            before: tuple[str, int, int] = ("", 0, 0)
            for destination, number, first, last in rows:
                where = f"destination {destination!r}, {kind} {_class_name(number)} {first}..{last}"
                if destination not in known:
                    add(where, "the spool does not know the destination")
                if number not in newest:
                    add(where, f"{number} is no class of records")
                    continue
                if not 0 < first <= last:
                    add(where, "it is no range of commits")
                if last > newest[number]:
                    add(where, f"it reaches beyond the newest commit ever, {newest[number]}")
                if before[:2] == (destination, number) and first <= before[2]:
                    add(where, f"it overlaps the one before it, which ends at {before[2]}")
                before = (destination, number, last)
                for what in _segments_across_edges(connection, RecordClass(number), first, last):
                    add(where, what)
        _check_no_overlap(delivered, batches, add)


def _segments_across_edges(
    connection: sqlite3.Connection, record_class: RecordClass, first: int, last: int
) -> Iterator[str]:
    """No segment may lie across an edge of progress (promise 3)."""
    for outer in (first - 1, last):
        row = connection.execute(SQL["covering"], position_span(record_class, 0, outer)).fetchone()
        if row is not None and row[1] > outer >= first_commit_at(row[0]):
            yield f"the segment {first_commit_at(row[0])}..{row[1]} lies across its edge"


def _check_no_overlap(
    delivered: list[tuple[str, int, int, int]],
    batches: list[tuple[str, int, int, int]],
    add: Callable[[str, str], None],
) -> None:
    """An open batch has not been delivered. Both lists are sorted; batches are few."""
    for destination, number, first, last in batches:
        for other, other_number, done_first, done_last in delivered:
            if (other, other_number) == (destination, number) and done_first <= last and first <= done_last:
                add(
                    f"destination {destination!r}, open batch {_class_name(number)} {first}..{last}",
                    f"{max(first, done_first)}..{min(last, done_last)} of it is delivered already",
                )


def _class_name(number: int) -> str:
    return RecordClass(number).name.lower() if number in set(RecordClass) else f"class {number}"


PROBLEMS_KEPT = 1000
MAX_SEGMENT_ROWS_CHECKED = 1 << 20
"""A segment that claims more rows is not decoded: at most 65,536 are written, and memory is bounded."""
_MAX_PAGES_REPORTED = 100


class Problem(msgspec.Struct):
    """One problem: where, and what."""

    where: str
    what: str


class CheckReport(msgspec.Struct):
    """The result, with the first `PROBLEMS_KEPT` problems; segments set aside before are none."""

    path: str
    segments: int = 0
    decoded_segments: int = 0
    rows: int = 0
    set_aside_segments: int = 0
    set_aside_rows: int = 0
    problem_count: int = 0
    problems: list[Problem] = []

    def add(self, where: str, what: str) -> None:
        """Add a problem."""
        self.problem_count += 1
        if len(self.problems) < PROBLEMS_KEPT:
            self.problems.append(Problem(where, what))


def check_spool(
    path: Path, *, decode: bool = True, full: bool = False, progress: ProgressListener = NO_PROGRESS
) -> CheckReport:
    """Check the spool at `path`, live or stopped; without `decode` only its structure.

    `full` runs SQLite's integrity_check, which also checks indexes, not quick_check. Raises SpoolError.
    """
    result = CheckReport(str(path))
    if not path.is_file():
        raise errors.SpoolAccessError(f"{path}: there is no spool here")
    try:
        with open_spool_read_only(path) as connection:
            progress.name("SQLite pages")
            _check_pages_and_tables(connection, result, full=full)
            progress.name("series and quarantine")
            known = _check_series(connection, result)
            for (number,) in connection.execute(SQL["overlong_quarantine"]):
                result.add(f"quarantine {number}", "it keeps more bytes than it says there were")
            aside = connection.execute(SQL["damaged_totals"]).fetchone()
            result.set_aside_segments, result.set_aside_rows = aside
            progress.total(sum(count_kept_rows(connection, k) for k in RecordClass))
            for record_class in RecordClass:
                progress.name(f"{record_class.name.lower()} segments")
                _check_class(
                    connection, path, record_class, result, known=known if decode else None, progress=progress
                )
            progress.name("progress of the destinations")
            check_progress(connection, result.add)
    except errors.SpoolTooNewError:
        raise
    except errors.SpoolAccessError as fault:
        result.add("file", f"{fault}; what lies behind it was not looked at")
    return result


def _check_pages_and_tables(connection: sqlite3.Connection, result: CheckReport, *, full: bool) -> None:
    pragma = "integrity_check" if full else "quick_check"
    try:
        for (line,) in connection.execute(f"PRAGMA {pragma}({_MAX_PAGES_REPORTED})"):
            if line != "ok":
                result.add(f"SQLite {pragma}", str(line).replace("\n", "; "))
    except sqlite3.DatabaseError as fault:
        result.add(f"SQLite {pragma}", str(fault))
    stored = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    for name in SPOOL_TABLES:
        if name not in stored:
            result.add(f"table {name}", "it is missing")


def _check_series(connection: sqlite3.Connection, result: CheckReport) -> NDArray[np.bool_]:
    """Which series numbers are known, as an array of shape (largest number + 1,)."""
    epoch = read_meta(connection, "epoch", "")
    try:
        UUID(str(epoch))
    except ValueError:
        result.add("meta", f"the epoch {epoch!r} is no UUID")
    numbers: list[int] = []
    for number, sensor_id, sensor_type, attributes in connection.execute(SQL["all_series"]):
        numbers.append(number)
        if not 0 < number < 1 << 31:
            result.add(f"series {number}", "its number does not fit a segment's series column")
        if not sensor_id or not sensor_type:
            result.add(f"series {number}", "it has no sensor_id or no sensor_type")
        try:
            msgspec.json.decode(attributes, type=dict[str, str])
        except (msgspec.DecodeError, TypeError) as fault:
            result.add(f"series {number}", f"its attributes are no JSON object of texts: {fault}")
    usable = [number for number in numbers if 0 < number < 1 << 31]
    known = np.zeros(max(usable, default=0) + 1, np.bool_)
    known[usable] = True
    return known


def _check_class(
    connection: sqlite3.Connection,
    path: Path,
    record_class: RecordClass,
    result: CheckReport,
    *,
    known: NDArray[np.bool_] | None,
    progress: ProgressListener,
) -> None:
    if record_class is RecordClass.ALERT:  # once, for all classes
        lowest, highest = position_span(RecordClass.ALERT)[0], position_span(max(RecordClass))[1]
        for (position,) in connection.execute(SQL["strange_positions"], (lowest, highest)):
            result.add(f"segment at {position}", "its position names no class of records")
    walk = SegmentWalk(connection, path, record_class)
    pruned = read_pruned_mark(connection, record_class)
    next_commit, next_rows = pruned.commit + 1, pruned.rows
    gone_through = 0
    if record_class in (RecordClass.ROLLUP, RecordClass.READING):  # some stay when what follows is given up
        gone_through, next_commit, next_rows = next_commit - 1, 1, 0
    for head in walk:
        result.segments += 1
        result.rows += head.rows
        if not walk.overlaps(head):
            next_commit, next_rows = _skip_set_aside(connection, head, next_commit, next_rows)
            if next_commit < head.first_commit <= gone_through + 1:
                next_commit, next_rows = head.first_commit, head.rows_before
            _check_position(head, next_commit, next_rows, result)
        elif head.rows_before + head.rows < next_rows:
            result.add(
                str(head), "it was merged meanwhile, and holds fewer rows than what it was merged from"
            )
        span = position_span(record_class, head.first_commit, head.last_commit)
        if result.set_aside_segments and connection.execute(SQL["damaged_between"], span).fetchone():
            result.add(str(head), "its commits were those of a segment that was set aside (promise 2)")
        next_commit = max(head.first_commit, head.last_commit) + 1
        next_rows = head.rows_before + head.rows
        if known is not None:
            known = _check_block(connection, walk, head, known, result)
        progress.advance(head.rows)


def _skip_set_aside(
    connection: sqlite3.Connection, head: StoredSegment, next_commit: int, next_rows: int
) -> tuple[int, int]:
    """Where a segment must begin when those set aside before it are counted in."""
    if head.first_commit > next_commit:
        span = position_span(head.record_class, next_commit, head.first_commit - 1)
        for position, last_commit, rows in connection.execute(SQL["damaged_between"], span):
            if first_commit_at(position) == next_commit:
                next_commit, next_rows = last_commit + 1, next_rows + rows
    return next_commit, next_rows


def _check_position(head: StoredSegment, next_commit: int, next_rows: int, result: CheckReport) -> None:
    add = partial(result.add, str(head))
    first, last = head.first_commit, head.last_commit
    if not 0 < first <= last:
        add(f"{first}..{last} is no range of commits")
    if head.rows < 1:
        add(f"it has {head.rows} rows; at least one is expected")
    if head.min_time_us > head.max_time_us:
        add("its smallest time is later than its largest")
    if first > next_commit:
        add(f"commits {next_commit}..{first - 1} before it are missing, and no prune is noted")
    elif first < next_commit:
        add(f"it overlaps what came before it, which ends at commit {next_commit - 1}")
    if head.rows_before != next_rows:
        add(f"it says {head.rows_before} rows came before it; {next_rows} did")


def _check_block(
    connection: sqlite3.Connection,
    walk: SegmentWalk,
    head: StoredSegment,
    known: NDArray[np.bool_],
    result: CheckReport,
) -> NDArray[np.bool_]:
    """Decode one segment and check it against its row; returns the series known by now."""
    add = partial(result.add, str(head))
    try:
        block = walk.block(head)
    except (sqlite3.DatabaseError, TypeError) as fault:
        add(f"SQLite cannot read its block: {fault}")
        return known
    kind = columns.RECORD_TYPES[head.record_class]
    records = decode_segment(block, kind, max_rows=MAX_SEGMENT_ROWS_CHECKED)
    if isinstance(records, DamagedSegment):
        add(f"{records.detail} ({records.reason})")
        return known
    result.decoded_segments += 1
    if records.rows != head.rows:
        add(f"its block holds {records.rows} rows, its row says {head.rows}")
    times = int(records.time_us.min()), int(records.time_us.max())
    if times != (head.min_time_us, head.max_time_us):
        add(f"its times are {times[0]}..{times[1]} us, its row says {head.min_time_us}..{head.max_time_us}")
    if times != columns.time_range_us(block):
        add("the head of its block gives other times than its rows have")
    order = np.lexsort([getattr(records, name) for name in reversed(records.order)])
    if not (order == np.arange(records.rows)).all():
        add(f"its rows are not in order of {' and '.join(records.order)}")
    if isinstance(records, Readings) and not np.isfinite(records.value).all():
        add("it holds a value that is no finite number")
    if records.has_series and (lost := _find_unknown_series(records.series, known)).size:
        known = _check_series(connection, CheckReport(""))  # a live gateway has added some since
        if (lost := _find_unknown_series(records.series, known)).size:
            add(f"it names series that the spool does not know, such as {lost[0]}")
    return known


def _find_unknown_series(series: NDArray[np.int32], known: NDArray[np.bool_]) -> NDArray[np.int32]:
    inside = (series >= 0) & (series < len(known))
    inside[inside] = known[series[inside]]
    return np.unique(series[~inside])
