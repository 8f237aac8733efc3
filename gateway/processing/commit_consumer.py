"""Reads committed readings in commit order and runs the processing stages over them.

Output records, stage state and the consumer's position are written in one transaction (promise 9). A step
without output is kept in memory until the next checkpoint; after a kill its readings are processed again,
with the same result. Reading, stages and encoding run in a thread of their own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from cloud_sync.model.records import RecordClass, Rollups
from cloud_sync.runtime.watchdog import StageProgress as Progress
from gateway.processing.stage import StageInput, StageOutput
from gateway.spool.database import crash_point
from gateway.spool.errors import SpoolError
from gateway.spool.processing_state import PROGRESS_KEY, read_processing_state, write_processing_state
from gateway.spool.segments import encode_segments

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Sequence

    from gateway.processing.stage import ProcessingStage
    from gateway.spool.database import Database
    from gateway.spool.segment_reader import CommitChunk, CommitLogReader
    from gateway.spool.segments import AppendResult, EncodedSegment, SegmentWriter

T = TypeVar("T")

_log = logging.getLogger(__name__)
_MAX_PAUSE_S = 1.0
_RETRY_S = 1.0
_STEP_WITHIN_S = 300.0  # late readings may have to look through many rollups
_SHUTDOWN_STEPS = 20  # what is left after so many is read at the next start


@dataclass(frozen=True, slots=True)
class ConsumerOptions:
    """How processing follows.

    Attributes:
        interval_s: it looks at new commits at most so often.
        checkpoint_s: what it has to remember is written at least so often while something changes.
        chunk_rows: readings that are taken at once, rounded up to whole segments.
    """

    interval_s: float = 0.5
    checkpoint_s: float = 30.0
    chunk_rows: int = 16_384


@dataclass(slots=True)
class ConsumerCounters:
    """What has happened since start; `lag_s` is the age of the oldest commit not read yet."""

    steps: int = 0
    readings: int = 0
    transactions: int = 0
    damaged_rows: int = 0
    lag_s: float = 0.0
    last_error: str = ""


class _PendingStep(NamedTuple):
    """What a step has come to, not accepted yet."""

    chunk: CommitChunk
    outcomes: tuple[StageOutput, ...]


class CommitConsumer:
    """Follows one spool. `follow_once` is the step that tests call, `run` the loop.

    The log, and whatever the stages read by themselves, belong to its thread.
    """

    def __init__(
        self,
        database: Database,
        segments: SegmentWriter,
        log: CommitLogReader,
        stages: Sequence[ProcessingStage],
        terms: ConsumerOptions = ConsumerOptions(),
        *,
        clock_us: Callable[[], int] = lambda: time.time_ns() // 1000,
        clock_trusted: Callable[[], bool] = lambda: True,
    ) -> None:
        self._database = database
        self._segments = segments
        self._stages = tuple(stages)
        self._terms = terms
        self._clock_us = clock_us
        self._clock_trusted = clock_trusted
        self._log = log
        self._thread = ThreadPoolExecutor(1, "processing")
        self._wake = asyncio.Event()
        self._turn = asyncio.Lock()
        self._finishing = False
        self._remembered: dict[str, bytes | None] = {}
        self._durable_at = 0.0
        self._durable_progress = 0
        self.progress = 0
        self.counters = ConsumerCounters()
        self.stage = Progress("processing")

    @property
    def lag_commits(self) -> int:
        """Commits of readings that have not been looked at."""
        return max(0, self._segments.newest_commit(RecordClass.READING) - self.progress)

    async def load(self) -> None:
        """Take up where the spool says that processing was.

        Raises:
            SpoolError: the spool cannot be read or written.
        """
        state = await self._database.read(read_processing_state)
        progress = state.pop(PROGRESS_KEY, None)
        if progress is None:
            summarised = self._segments.newest_commit(RecordClass.ROLLUP) > 0
            self.progress = self._segments.newest_commit(RecordClass.READING) if summarised else 0
            if summarised:
                _log.error("how far processing was is lost: it goes on with what comes in from now on")
            state = {}
        else:
            self.progress = int(progress)
        for stage in self._stages:
            own = {key: value for key, value in state.items() if key.startswith(f"{stage.name}/")}
            stage.load(own)
        self._durable_progress = self.progress
        self._durable_at = time.monotonic()
        if progress is None:
            await self._database.write(
                lambda c: write_processing_state(c, {PROGRESS_KEY: _encode_position(self.progress)})
            )

    def wake(self) -> None:
        """Something was committed."""
        self._wake.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Follow until `stop` is set, then to the newest commit if it is not far, with a last checkpoint."""
        watching = asyncio.create_task(self._finish_after(stop), name="processing stop")
        try:
            while not self._finishing:
                rows = await self._follow(durable=False)
                if rows < self._terms.chunk_rows and not self._finishing:
                    await self._pause()
            for _ in range(_SHUTDOWN_STEPS):
                if not await self._follow(durable=True) or not self.lag_commits:
                    break
        finally:
            watching.cancel()
            self.stage.set_idle()

    async def consume_once(self, *, durable: bool = False) -> int:
        """One step over the next chunk of readings, or over time alone; returns how many readings it took.

        Raises:
            SpoolError: nothing of the step has happened; the same one may be made again.
        """
        async with self._turn:
            newest = self._segments.newest_commit(RecordClass.READING)
            made = await self._in_thread(self._make)
            if made.chunk.last_commit == 0:  # what there was is read, or set aside, or pruned
                made = made._replace(chunk=made.chunk._replace(last_commit=newest))
            await self._settle(made, durable=durable)
            self._count(made.chunk)
            return made.chunk.readings.rows

    async def change(
        self,
        terms: ConsumerOptions,
        stages: Sequence[ProcessingStage],
        between: Callable[[], None] = lambda: None,
    ) -> None:
        """Go on by other terms and with other stages, between two steps.

        A stage that was not among the stages before takes up what the spool remembers of its name.

        Args:
            terms: from the next step on.
            stages: those from now on, in order.
            between: what else is to change while no step is under way.

        Raises:
            SpoolError: the spool cannot be read; nothing was changed.
        """
        async with self._turn:
            strangers = [stage for stage in stages if stage.name not in {s.name for s in self._stages}]
            if strangers:
                state = await self._database.read(read_processing_state)
                for key, value in self._remembered.items():
                    state.pop(key, None)
                    if value is not None:
                        state[key] = value
                for stage in strangers:
                    stage.load({k: v for k, v in state.items() if k.startswith(f"{stage.name}/")})
            between()
            self._terms, self._stages = terms, tuple(stages)
        self.wake()

    async def catch_up(self) -> None:
        """Follow to what is the newest commit now, durably; may be called while `run` is running.

        Raises:
            SpoolError: as `follow_once`.
        """
        newest = self._segments.newest_commit(RecordClass.READING)
        while self._durable_progress < newest:
            await self.consume_once(durable=True)

    async def aclose(self) -> None:
        """Close its connection and its thread."""
        await self._in_thread(self._log.close)
        self._thread.shutdown(wait=False)

    async def _follow(self, *, durable: bool) -> int:
        """One step; how many readings it took, 0 when the spool cannot be used."""
        self.stage.begin_step(_STEP_WITHIN_S)
        try:
            rows = await self.consume_once(durable=durable)
        except SpoolError as fault:
            if not self.counters.last_error:
                _log.warning("processing waits: %s", fault)
            self.counters.last_error = str(fault)
            if not self._finishing:
                await asyncio.sleep(_RETRY_S)
            return 0
        self.counters.last_error = ""
        return rows

    async def _pause(self) -> None:
        """Until something was committed, but not too soon; at most a tick."""
        self.stage.begin_step(_STEP_WITHIN_S)
        began = time.monotonic()
        try:
            async with asyncio.timeout(_MAX_PAUSE_S):
                await self._wake.wait()
        except TimeoutError:
            return
        self._wake.clear()
        left_s = self._terms.interval_s - (time.monotonic() - began)
        if left_s > 0 and not self._finishing:
            await asyncio.sleep(left_s)

    async def _finish_after(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._finishing = True
        self._wake.set()

    def _make(self) -> _PendingStep:
        """Read a chunk and ask every stage; in the thread."""
        chunk = self._log.read(self.progress, self._terms.chunk_rows)
        step = StageInput(chunk.readings, now_us=self._clock_us(), clock_trusted=self._clock_trusted())
        outcomes = []
        for stage in self._stages:
            outcome = stage.step(step)
            outcomes.append(outcome)
            closed = [records for records in outcome.records if isinstance(records, Rollups)]
            if closed:
                step = step._replace(rollups=Rollups.concat([step.rollups, *closed]))
        return _PendingStep(chunk, tuple(outcomes))

    async def _settle(self, made: _PendingStep, *, durable: bool) -> None:
        """Make a step durable if need be, then let it be so."""
        through = max(self.progress, made.chunk.last_commit)
        remembered = dict(self._remembered)
        for outcome in made.outcomes:
            remembered |= outcome.state
        moved = bool(remembered) or through != self._durable_progress
        late = time.monotonic() - self._durable_at >= self._terms.checkpoint_s
        if any(outcome.records or outcome.also for outcome in made.outcomes) or (moved and (durable or late)):
            sealed, snapshots = await self._in_thread(lambda: _encode_outputs(made.outcomes))
            changes = {**remembered, **snapshots, PROGRESS_KEY: _encode_position(through)}
            await self._append(made, sealed, changes)
            remembered = {}
            self._durable_at, self._durable_progress = time.monotonic(), through
            self.counters.transactions += 1
        for stage, outcome in zip(self._stages, made.outcomes, strict=True):
            stage.accept(outcome)
        self._remembered = remembered
        self.progress = through

    async def _append(
        self, made: _PendingStep, sealed: Sequence[EncodedSegment], changes: dict[str, bytes | None]
    ) -> None:
        def note(connection: sqlite3.Connection, _: AppendResult) -> None:
            write_processing_state(connection, changes)
            for outcome in made.outcomes:
                if outcome.also is not None:
                    outcome.also(connection)
            crash_point("in_processing")

        crash_point("before_processing")
        await self._segments.append(sealed, now_us=self._clock_us(), notes=[note])
        crash_point("after_processing")

    def _count(self, chunk: CommitChunk) -> None:
        self.counters.steps += 1
        self.counters.readings += chunk.readings.rows
        self.counters.damaged_rows += chunk.damaged_rows
        behind = self.lag_commits > 0 and chunk.written_at_us is not None
        age_us = self._clock_us() - (chunk.written_at_us or 0)
        self.counters.lag_s = max(0.0, age_us / 1e6) if behind else 0.0

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _encode_outputs(outcomes: Sequence[StageOutput]) -> tuple[list[EncodedSegment], dict[str, bytes | None]]:
    """The records of a step as segments, and the large state of its stages."""
    sealed: list[EncodedSegment] = []
    snapshots: dict[str, bytes | None] = {}
    for outcome in outcomes:
        for records in outcome.records:
            sealed += encode_segments(records)
        if outcome.snapshot is not None:
            snapshots |= outcome.snapshot()
    return sealed, snapshots


def _encode_position(commit: int) -> bytes:
    return str(commit).encode()
