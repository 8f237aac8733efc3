"""The committer: decodes publishes into a commit group, commits groups, acknowledges what is fsynced.

While one commit is in flight the next group fills. A publish is acknowledged only after the transaction
with its readings or quarantine rows has returned (promise 1). Memory is bounded: above `max_pending_bytes`
sources stop reading (promise 7). When the spool cannot be written, the group is kept, acknowledgements are
withheld and the append is retried until it succeeds. With `refuse_when_full` publishes to a full spool are
rejected with quota exceeded.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from cloud_sync.model.records import Readings
from cloud_sync.runtime.rates import RateMeter
from cloud_sync.runtime.watchdog import StageProgress
from gateway.ingress.commit_group import CommitGroup
from gateway.ingress.publish_decoder import InternalSource
from gateway.spool.appender import Submission
from gateway.spool.database import crash_point
from gateway.spool.errors import SpoolError, SpoolFullError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gateway.ingress.publish_decoder import PublishDecoder
    from gateway.ingress.source import Acknowledger
    from gateway.mqtt.codec.packets import Publish
    from gateway.payloads.measurement import Measurement
    from gateway.processing.clock import HeldReadings
    from gateway.spool.appender import Appender
    from gateway.spool.quarantine_items import QuarantineItem
    from gateway.spool.segments import AppendResult, CommitNote

_log = logging.getLogger(__name__)
QUOTA_EXCEEDED = 0x97  # MQTT 5 section 3.4.2.1
_RETRY_S = 1.0
_COMMIT_WATCHDOG_S = 120.0  # storage that needs longer counts as dead
_INLINE_CHECK_ROWS_MAX = 4096
_PUBLISH_OVERHEAD_BYTES = 256  # what one waiting publish costs beside its payload
_ROW_BYTES = 48  # of a reading in columns


@dataclass(frozen=True, slots=True)
class CommitterOptions:
    """Limits that a reload may change: `interval_s` is the least time between two commits.

    Sources pause above `max_pending_bytes` and resume below half of it. With `refuse_when_full` publishes to
    a full spool are rejected, instead of withholding their acknowledgements.
    """

    interval_s: float = 0.005
    max_pending_bytes: int = 32 << 20
    refuse_when_full: bool = False


@dataclass(frozen=True, slots=True)
class CommitterHooks:
    """What a committer calls; `on_pressure` with True when sources are to pause.

    `check` sets the flags of a group's readings, given the time now, of large groups in a worker thread.
    `hold` removes readings that wait for the clock, from the given row on; None when nothing waits.
    """

    check: Callable[[Readings, int], Readings] = lambda readings, _: readings
    hold: Callable[[Readings, int], HeldReadings | None] = lambda *_: None
    on_pressure: Callable[[bool], None] = lambda _: None
    on_commit: Callable[[], None] = lambda: None


@dataclass(slots=True)
class CommitterCounters:
    """What has happened since start."""

    publishes: int = 0
    readings: int = 0
    duplicates: int = 0
    conflicts: int = 0
    quarantined: int = 0
    commits: int = 0
    acknowledged_publishes: int = 0
    refused_publishes: int = 0
    holding_since_us: int | None = None
    holding_reason: str = ""
    commit_s: float = 0.0
    commits_s: float = 0.0
    rate: RateMeter = field(default_factory=RateMeter)

    def committed(self, group: CommitGroup, appended: AppendResult, publishes: int, commit_s: float) -> None:
        """Count one group commit."""
        self.commits += 1
        self.acknowledged_publishes += publishes
        self.readings += appended.stored
        self.duplicates += appended.duplicates
        self.conflicts += appended.conflicts
        self.quarantined += len(group.items) + appended.conflicts
        self.commit_s = commit_s
        self.commits_s += commit_s
        self.rate.add(appended.stored, time.monotonic())


class Committer:
    """Implements `PublishSink`. Other `options` or another `check` may be set, for the next commit on."""

    def __init__(
        self,
        appender: Appender,
        decoder: PublishDecoder,
        options: CommitterOptions,
        hooks: CommitterHooks | None = None,
        *,
        clock_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        hooks = hooks or CommitterHooks()
        self._appender = appender
        self.decoder = decoder
        self.options = options
        self.check = hooks.check
        self._hooks = hooks
        self._clock_us = clock_us
        self._group = CommitGroup()
        self._unacknowledged: list[tuple[Acknowledger, list[Publish]]] = []
        self._submission_futures: list[asyncio.Future[AppendResult]] = []
        self._wake = asyncio.Event()
        self._over_pending_limit = False
        self._pending_bytes = 0
        self._finishing = False
        self._last_commit_at = 0.0
        self.counters = CommitterCounters()
        self.stage = StageProgress("committer")

    def submit_publishes(self, source: Acknowledger, batch: list[Publish]) -> None:
        """Decode all publishes of one read of a connection. Never blocks, never raises for their content."""
        now_us, size, group, decode_into = self._clock_us(), 0, self._group, self.decoder.decode_into
        for publish in batch:
            payload, publish.payload = publish.payload, b""  # only its packet identifier is needed from here
            size += len(payload) + _PUBLISH_OVERHEAD_BYTES
            decode_into(group, source, publish.topic, payload, now_us)
        self.counters.publishes += len(batch)
        self._unacknowledged.append((source, batch))
        self._add_pending(size)

    def submit_payload(self, source: str, topic: bytes, payload: bytes) -> None:
        """Decode one payload that needs no acknowledgement, such as one out of the quarantine."""
        self.decoder.decode_into(self._group, InternalSource(source), topic, payload, self._clock_us())
        self._add_pending(len(payload))

    def submit_measurements(self, source: str, measurements: Sequence[Measurement]) -> None:
        """Store measurements that need no acknowledgement, such as the gateway's own metrics."""
        self.decoder.add_measurements(self._group, InternalSource(source), measurements, self._clock_us())
        self._add_pending(len(measurements) * _PUBLISH_OVERHEAD_BYTES)

    def submit_readings(
        self,
        readings: Readings,
        items: Sequence[QuarantineItem] = (),
        note: CommitNote | None = None,
        *,
        checked: bool = False,
    ) -> asyncio.Future[AppendResult]:
        """Store the readings of one request; the future has the result once they are durable.

        `note` writes what else belongs to the request, in the same transaction; `checked` are readings whose
        flags another gateway has set. They are committed whether or not anyone waits; on SpoolFullError in
        the future nothing was stored.
        """
        future: asyncio.Future[AppendResult] = asyncio.get_running_loop().create_future()
        future.add_done_callback(retrieve_exception)
        self._group.add_submission(readings, note, checked=checked)
        self._group.items += items
        self._submission_futures.append(future)
        self._add_pending(readings.rows * _ROW_BYTES + len(items) * _PUBLISH_OVERHEAD_BYTES)
        return future

    async def run(self) -> None:
        """Commit groups until `finish` is called and nothing is left to commit."""
        while True:
            if not self._wake.is_set():
                self.stage.set_idle()
            await self._wake.wait()
            await self.commit_once()
            if self._finishing and not self._pending():
                self.stage.set_idle()
                return

    def finish(self) -> None:
        """Let `run` end once everything submitted is committed and acknowledged."""
        self._finishing = True
        self._wake.set()

    async def commit_once(self) -> int:
        """Commit the current group and acknowledge it; returns how many readings were stored.

        Waits for as long as the spool cannot be written.
        """
        self._wake.clear()
        if not self._pending():
            return 0
        self.stage.begin_step(within_s=self.options.interval_s + _COMMIT_WATCHDOG_S)
        wait_s = self._last_commit_at + self.options.interval_s - time.monotonic()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        self._last_commit_at = time.monotonic()
        group, batches, futures = self._group, self._unacknowledged, self._submission_futures
        self._group, self._unacknowledged, self._submission_futures = CommitGroup(), [], []
        pending_bytes = self._pending_bytes
        started = time.perf_counter()
        try:
            appended = await self._append(group)
        except SpoolFullError as fault:
            for source, batch in batches:
                source.refuse(batch, QUOTA_EXCEEDED)
                self.counters.refused_publishes += len(batch)
            for future in futures:
                if not future.done():
                    future.set_exception(fault)
            self._remove_pending(pending_bytes)
            return 0
        for source, batch in batches:
            source.acknowledge(batch)
        for future, result in zip(
            futures, appended.submissions, strict=False
        ):  # one more may be of held readings
            if not future.done():  # its request was cancelled
                future.set_result(result)
        crash_point("after_ack")
        self.counters.committed(
            group, appended, sum(len(batch) for _, batch in batches), time.perf_counter() - started
        )
        self._remove_pending(pending_bytes)
        self._hooks.on_commit()
        return appended.stored

    async def _append(self, group: CommitGroup) -> AppendResult:
        """Check, then append for as long as it takes."""
        readings, submissions = None, group.submissions()
        if group.rows:
            readings, held = await self._check_group(group)
            if held is not None:
                note = held.note
                submissions.append(Submission(slice(0, 0), lambda connection, _: note(connection)))
        while True:
            self.stage.begin_step(within_s=_RETRY_S + _COMMIT_WATCHDOG_S)
            try:
                appended = await self._appender.append(
                    readings, group.items, now_us=self._clock_us(), submissions=submissions
                )
            except SpoolError as fault:
                if not self.counters.holding_reason:
                    _log.error(
                        "holding: acknowledgements are withheld until the spool can be written: %s", fault
                    )
                    self.counters.holding_since_us = self._clock_us()
                self.counters.holding_reason = str(fault)
                if self.options.refuse_when_full and isinstance(fault, SpoolFullError):
                    raise
                await asyncio.sleep(_RETRY_S)
            else:
                break
        if self.counters.holding_reason:
            _log.warning("the spool can be written again")
            self.counters.holding_since_us, self.counters.holding_reason = None, ""
        return appended

    async def _check_group(self, group: CommitGroup) -> tuple[Readings, HeldReadings | None]:
        """The readings of a group with their flags, without those that wait for the clock.

        Runs once per group, however often the append is retried.
        """
        checked, readings = group.checked(), group.unchecked()
        held = self._hooks.hold(readings, readings.rows - group.single_rows)
        if held is not None:
            readings = readings.select(~held.rows)
        if not readings.rows:
            return checked, held
        check = partial(self.check, readings, self._clock_us())
        if readings.rows <= _INLINE_CHECK_ROWS_MAX:
            readings = check()
        else:
            readings = await asyncio.get_running_loop().run_in_executor(None, check)
        return (Readings.concat([checked, readings]) if checked.rows else readings), held

    def _pending(self) -> bool:
        return bool(self._group.rows or self._group.items or self._unacknowledged or self._submission_futures)

    def _add_pending(self, size: int) -> None:
        self._pending_bytes += size
        self._wake.set()
        if not self._over_pending_limit and self._pending_bytes > self.options.max_pending_bytes:
            self._over_pending_limit = True
            self._hooks.on_pressure(True)

    def _remove_pending(self, size: int) -> None:
        self._pending_bytes -= size
        if self._over_pending_limit and self._pending_bytes <= self.options.max_pending_bytes // 2:
            self._over_pending_limit = False
            self._hooks.on_pressure(False)


def retrieve_exception(future: asyncio.Future[AppendResult]) -> None:
    """Keep asyncio from reporting an exception that nobody waits for any more."""
    if not future.cancelled():
        future.exception()
