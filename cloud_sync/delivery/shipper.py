"""The shipper of one destination: its lanes, when each may send, and what happens after errors.

Live goes first, backfill fills the gaps behind it with the rest of the budget (`lanes`). A batch that was
not settled is sent again, the same one, until the destination answers for it; retries drop nothing.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, NamedTuple

from cloud_sync.delivery.batch_sender import BatchSender, DeliveryState
from cloud_sync.delivery.lanes import Lane
from cloud_sync.model.errors import DeliveryError, RetryLaterError, StoreError, UnauthorisedError
from cloud_sync.model.records import RecordClass
from cloud_sync.runtime.waits import sleep_or_stop
from cloud_sync.runtime.watchdog import StageProgress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cloud_sync.delivery.batch_sender import DeliveryResult

_log = logging.getLogger(__name__)
_MAX_LANE_WAIT_S = 5.0
_BACKFILL_RECHECK_S = 0.5
_MIN_WAIT_S = 0.01
_STEP_TIMEOUT_S = 1800.0  # a large batch on a very slow link; every request has a timeout of its own


class _SenderFault(NamedTuple):
    """Why a sender makes no progress; `of_endpoint` when the destination does not answer as it should."""

    state: str
    message: str
    of_endpoint: bool


class Shipper:
    """Delivers one destination's backlog. `ship_once` is the step, `run` the loop."""

    def __init__(self, delivery_state: DeliveryState) -> None:
        self.name = delivery_state.destination.name
        self.kind = delivery_state.options.kind
        self.counters = delivery_state.counters
        self._state = delivery_state
        self._options = delivery_state.options
        if self._options.concurrency == 1 or self._options.in_order:
            self.senders = [BatchSender(delivery_state, self._options.lanes)]
        else:
            backfill = self._options.concurrency - 1
            self.senders = [
                BatchSender(delivery_state, [lane]) for lane in (Lane.LIVE, *[Lane.BACKFILL] * backfill)
            ]
        self._stages = {
            sender: StageProgress(f"shipper {self.name}" + (f", sender {number}" if number else ""))
            for number, sender in enumerate(self.senders)
        }
        self._faults: dict[BatchSender, _SenderFault] = {}
        self._sending = 0
        self._store_failures = 0
        self._live_due = 0.0
        self._live_retries = False

    @property
    def stages(self) -> tuple[StageProgress, ...]:
        """The progress of every sender."""
        return tuple(self._stages.values())

    async def aclose(self) -> None:
        """Release the destination's connections."""
        await self._state.destination.aclose()

    async def run(self, stop: asyncio.Event) -> None:
        """Ship until `stop` is set, every sender in a task of its own."""
        async with asyncio.TaskGroup() as tasks:
            for number, sender in enumerate(self.senders):
                tasks.create_task(self._run(sender, stop), name=f"sender {number} of {self.name}")

    async def ship_once(
        self, sender: BatchSender, lanes: Sequence[Lane | None] | None = None
    ) -> float | None:
        """Send one batch; returns seconds to wait: 0 when more may be ready, None when all is delivered."""
        self._sending += 1
        self._update_state()
        try:
            result = await sender.send_once(lanes)
        finally:
            self._sending -= 1
        wait_s = (
            self._wait_after_success(sender, result)
            if result.error is None
            else self._wait_after_error(sender, result.lane, result.error)
        )
        self._update_state()
        return wait_s

    async def _run(self, sender: BatchSender, stop: asyncio.Event) -> None:
        stage, clock = self._stages[sender], self._state.clock
        while not stop.is_set():
            stage.begin_step(within_s=_STEP_TIMEOUT_S)
            started = clock()
            waits = {lane: self._lane_wait_s(lane, started) for lane in sender.lanes}
            open_lanes = [lane for lane, wait_s in waits.items() if wait_s <= 0]
            if open_lanes:
                wait_after = await self.ship_once(sender, open_lanes)
                idle_s = max(_MIN_WAIT_S, started + self._options.flush_s - clock())
                wait_s = idle_s if wait_after is None else wait_after
            else:
                wait_s = max(_MIN_WAIT_S, min(waits.values()))
            stage.begin_step(within_s=wait_s + _STEP_TIMEOUT_S)
            await sleep_or_stop(stop, wait_s)
        stage.set_idle()

    def _lane_wait_s(self, lane: Lane | None, at: float) -> float:
        """Seconds until a lane may send; 0 for now."""
        state, health = self._state, self._state.health
        if state.is_closed(lane) and (lane is Lane.BACKFILL or not self._options.urgent):
            return _MAX_LANE_WAIT_S
        if health.is_down and at < health.retry_at:
            return min(_MAX_LANE_WAIT_S, health.retry_at - at)
        if lane is Lane.LIVE and len(self.senders) == 1 and at < self._live_due:
            return self._live_due - at
        if lane is Lane.BACKFILL:
            if health.is_down and self._live_retries:
                return _BACKFILL_RECHECK_S
            if at < health.backfill_from:
                return min(_MAX_LANE_WAIT_S, health.backfill_from - at)
        return min(_MAX_LANE_WAIT_S, state.budget.wait_s(lane, at))

    def _wait_after_success(self, sender: BatchSender, result: DeliveryResult) -> float | None:
        answers = not self._state.health.is_down
        if result.claimed is not None or answers:
            self._faults.pop(sender, None)
            self._store_failures = 0
        if Lane.LIVE in sender.lanes:
            self._live_retries = False
        if answers:
            self._faults = {s: fault for s, fault in self._faults.items() if not fault.of_endpoint}
        if result.claimed is None:
            return None
        if result.claimed.record_class is not RecordClass.READING:
            return 0.0
        full = result.claimed.parts > 1 or self._state.is_full(result.lane, result.rows)
        if result.lane is Lane.LIVE and not full:
            self._live_due = self._state.clock() + self._options.flush_s
            return 0.0 if len(sender.lanes) > 1 else None
        return 0.0 if full or result.lane is Lane.BACKFILL else None

    def _wait_after_error(self, sender: BatchSender, lane: Lane | None, error: DeliveryError) -> float:
        state = self._state
        if isinstance(error, StoreError):
            self._store_failures += 1
            self._record_fault(sender, _SenderFault("waiting", f"the spool: {error}", of_endpoint=False))
            return self._options.backoff.wait_s(self._store_failures, state.chance())
        if isinstance(error, RetryLaterError | UnauthorisedError):
            held = isinstance(error, UnauthorisedError)
            self._record_fault(
                sender, _SenderFault("held" if held else "waiting", str(error), of_endpoint=True)
            )
            failures = state.health.record_failure(state.clock())
            retry_after_s = error.retry_after_s if isinstance(error, RetryLaterError) else None
            wait_s = self._options.backoff.wait_s(failures, state.chance(), retry_after_s)
            if held:
                wait_s = max(self._options.hold_s, wait_s)
            state.health.retry_at = state.clock() + wait_s
            self._live_retries = self._live_retries or lane is Lane.LIVE
            return wait_s
        self._record_fault(sender, _SenderFault("held", str(error), of_endpoint=False))
        return self._options.hold_s

    def _record_fault(self, sender: BatchSender, fault: _SenderFault) -> None:
        self.counters.failures += 1
        self._faults[sender] = fault
        if self.counters.last_error != fault.message:
            level = logging.ERROR if fault.state == "held" else logging.WARNING
            _log.log(level, "%s: %s (%s; the backlog is kept)", self.name, fault.message, fault.state)

    def _update_state(self) -> None:
        """State and newest error for people, of all senders together."""
        states = [fault.state for fault in self._faults.values()]
        worst = next((state for state in ("held", "waiting") if state in states), None)
        self.counters.state = worst or ("sending" if self._sending else "idle")
        self.counters.last_error = list(self._faults.values())[-1].message if self._faults else ""
