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
from typing import TYPE_CHECKING, TypeVar

from cloud_sync.model.records import RecordClass, Rollups
from cloud_sync.runtime.waits import sleep_or_stop
from cloud_sync.runtime.watchdog import StageProgress
from gateway.processing.stage import StageInput
from gateway.spool.database import crash_point
from gateway.spool.errors import SpoolError
from gateway.spool.processing_state import PROGRESS_KEY, read_processing_state, write_processing_state
from gateway.spool.segments import encode_segments

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Mapping, Sequence

    from gateway.processing.stage import ProcessingStage, StageOutput
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
    """How often commits are read and state is written; `chunk_rows` is rounded up to whole segments."""

    interval_s: float = 0.5
    checkpoint_s: float = 30.0
    chunk_rows: int = 16_384


@dataclass(slots=True)
class ConsumerCounters:
    """Counts since start; `lag_s` is the age of the oldest commit not processed yet."""

    steps: int = 0
    readings: int = 0
    transactions: int = 0
    damaged_rows: int = 0
    lag_s: float = 0.0
    last_error: str = ""


class CommitConsumer:
    """Processes the commits of one spool; `run` repeats `consume_once`.

    The log, and the connections of the stages, are used in its thread only.
    """

    def __init__(
        self,
        database: Database,
        segments: SegmentWriter,
        log: CommitLogReader,
        stages: Sequence[ProcessingStage],
        options: ConsumerOptions = ConsumerOptions(),
        *,
        clock_us: Callable[[], int] = lambda: time.time_ns() // 1000,
        clock_trusted: Callable[[], bool] = lambda: True,
    ) -> None:
        self._database = database
        self._segments = segments
        self._stages = tuple(stages)
        self._options = options
        self._clock_us = clock_us
        self._clock_trusted = clock_trusted
        self._log = log
        self._thread = ThreadPoolExecutor(1, "processing")
        self._wake = asyncio.Event()
        self._turn = asyncio.Lock()
        self._finishing = False
        self._unwritten_state: dict[str, bytes | None] = {}
        self._durable_at = 0.0
        self._durable_progress = 0
        self.progress = 0
        self.counters = ConsumerCounters()
        self.stage = StageProgress("processing")

    @property
    def lag_commits(self) -> int:
        """Commits of readings not processed yet."""
        return max(0, self._segments.newest_commit(RecordClass.READING) - self.progress)

    async def restore(self) -> None:
        """Restore position and stage state from the spool; raises SpoolError when it cannot be used."""
        state = await self._database.read(read_processing_state)
        progress = state.pop(PROGRESS_KEY, None)
        if progress is None:
            has_rollups = self._segments.newest_commit(RecordClass.ROLLUP) > 0
            self.progress = self._segments.newest_commit(RecordClass.READING) if has_rollups else 0
            if has_rollups:
                _log.error("the processing position is lost: only new readings are processed from now on")
            state = {}
        else:
            self.progress = int(progress)
        for stage in self._stages:
            _restore_stage(stage, state)
        self._durable_progress = self.progress
        self._durable_at = time.monotonic()
        if progress is None:
            await self._database.write(
                lambda c: write_processing_state(c, {PROGRESS_KEY: _encode_position(self.progress)})
            )

    def wake(self) -> None:
        """Signal a new commit."""
        self._wake.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Process until `stop` is set, then up to the newest commit if it is near, with a last checkpoint."""
        watching = asyncio.create_task(self._finish_after(stop), name="processing stop")
        try:
            while not self._finishing:
                rows = await self._try_step(durable=False)
                if rows < self._options.chunk_rows and not self._finishing:
                    await self._pause()
            for _ in range(_SHUTDOWN_STEPS):
                if not await self._try_step(durable=True) or not self.lag_commits:
                    break
        finally:
            watching.cancel()
            self.stage.set_idle()

    async def consume_once(self, *, durable: bool = False) -> int:
        """Process the next chunk of readings, or the passing of time alone; returns its readings.

        After a SpoolError nothing is changed; the same step can be repeated.
        """
        async with self._turn:
            newest = self._segments.newest_commit(RecordClass.READING)
            chunk, outcomes = await self._in_thread(self._run_stages)
            last_commit = chunk.last_commit or newest  # 0: everything is read, set aside or pruned
            await self._settle(max(self.progress, last_commit), outcomes, durable=durable)
            self._count(chunk)
            return chunk.readings.rows

    async def reconfigure(
        self,
        options: ConsumerOptions,
        stages: Sequence[ProcessingStage],
        between: Callable[[], None] = lambda: None,
    ) -> None:
        """Change options and stages between two steps; `between` is called while no step runs.

        New stages restore their state from the spool; when it cannot be read (SpoolError), nothing changes.
        """
        async with self._turn:
            added = [stage for stage in stages if stage.name not in {s.name for s in self._stages}]
            if added:
                newest = {**await self._database.read(read_processing_state), **self._unwritten_state}
                state = {key: value for key, value in newest.items() if value is not None}
                for stage in added:
                    _restore_stage(stage, state)
            between()
            self._options, self._stages = options, tuple(stages)
        self.wake()

    async def catch_up(self) -> None:
        """Process durably up to the newest commit; may be called while `run` is running."""
        newest = self._segments.newest_commit(RecordClass.READING)
        while self._durable_progress < newest:
            await self.consume_once(durable=True)

    async def aclose(self) -> None:
        """Close its connection and its thread."""
        await self._in_thread(self._log.close)
        self._thread.shutdown(wait=False)

    async def _try_step(self, *, durable: bool) -> int:
        """One step; returns its readings, 0 when the spool cannot be used."""
        self.stage.begin_step(_STEP_WITHIN_S)
        try:
            rows = await self.consume_once(durable=durable)
        except SpoolError as fault:
            if not self.counters.last_error:
                _log.warning("processing is paused: %s", fault)
            self.counters.last_error = str(fault)
            if not self._finishing:
                await asyncio.sleep(_RETRY_S)
            return 0
        self.counters.last_error = ""
        return rows

    async def _pause(self) -> None:
        """Wait for a commit for at most `_MAX_PAUSE_S`, and at least for the interval."""
        self.stage.begin_step(_STEP_WITHIN_S)
        began = time.monotonic()
        if not await sleep_or_stop(self._wake, _MAX_PAUSE_S):
            return
        self._wake.clear()
        left_s = self._options.interval_s - (time.monotonic() - began)
        if left_s > 0 and not self._finishing:
            await asyncio.sleep(left_s)

    async def _finish_after(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._finishing = True
        self._wake.set()

    def _run_stages(self) -> tuple[CommitChunk, list[StageOutput]]:
        """Read a chunk and run every stage over it; in the thread."""
        chunk = self._log.read(self.progress, self._options.chunk_rows)
        step = StageInput(chunk.readings, now_us=self._clock_us(), clock_trusted=self._clock_trusted())
        outcomes = []
        for stage in self._stages:
            outcome = stage.step(step)
            outcomes.append(outcome)
            closed = [records for records in outcome.records if isinstance(records, Rollups)]
            if closed:
                step = step._replace(rollups=Rollups.concat([step.rollups, *closed]))
        return chunk, outcomes

    async def _settle(self, through: int, outcomes: Sequence[StageOutput], *, durable: bool) -> None:
        """Write the outputs of a step if required, then accept it."""
        unwritten = dict(self._unwritten_state)
        for outcome in outcomes:
            unwritten |= outcome.state
        moved = bool(unwritten) or through != self._durable_progress
        is_late = time.monotonic() - self._durable_at >= self._options.checkpoint_s
        durable = any(outcome.records or outcome.also for outcome in outcomes) or (
            moved and (durable or is_late)
        )
        if durable:
            await self._write(outcomes, {**unwritten, PROGRESS_KEY: _encode_position(through)})
            unwritten = {}
            self._durable_at, self._durable_progress = time.monotonic(), through
            self.counters.transactions += 1
        for stage, outcome in zip(self._stages, outcomes, strict=True):
            stage.accept(outcome, durable=durable)
        self._unwritten_state = unwritten
        self.progress = through

    async def _write(self, outcomes: Sequence[StageOutput], changes: dict[str, bytes | None]) -> None:
        """Write records, `changes` and snapshots in one transaction."""

        def encode() -> list[EncodedSegment]:
            encoded: list[EncodedSegment] = []
            for outcome in outcomes:
                for records in outcome.records:
                    encoded += encode_segments(records)
                if outcome.snapshot is not None:
                    changes.update(outcome.snapshot())
            return encoded

        def write_state(connection: sqlite3.Connection, _: AppendResult) -> None:
            write_processing_state(connection, changes)
            for outcome in outcomes:
                if outcome.also is not None:
                    outcome.also(connection)
            crash_point("in_processing")

        segments = await self._in_thread(encode)
        crash_point("before_processing")
        await self._segments.append(segments, now_us=self._clock_us(), notes=[write_state])
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


def _restore_stage(stage: ProcessingStage, state: Mapping[str, bytes]) -> None:
    stage.restore({key: value for key, value in state.items() if key.startswith(f"{stage.name}/")})


def _encode_position(commit: int) -> bytes:
    return str(commit).encode()
