"""The shipper of one destination: its lanes, when each may go, and what becomes of faults.

Live goes first, backfill fills the gaps behind it with the rest of the budget (`lanes`). The steps
of a batch are the courier's; here is the loop around them. A batch that was not settled is sent again, the
same one, until the destination answers for it; nothing is dropped because of retries.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from typing import TYPE_CHECKING, Literal, NamedTuple

from cloud_sync.delivery.batch_sender import BatchSender, DeliveryState, ShipperCounters, Spool
from cloud_sync.delivery.lanes import BatchSizer, Lane, Schedule, SendBudget
from cloud_sync.model.errors import (
    DeliveryError,
    RefusedError,
    RetryLaterError,
    StoreDeliveryError,
    TooLargeError,
    UnauthorisedError,
)
from cloud_sync.model.records import RecordClass
from cloud_sync.runtime.rates import Backoff
from cloud_sync.runtime.waits import sleep_or_stop
from cloud_sync.runtime.watchdog import StageProgress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cloud_sync.destinations import Destination

__all__ = ["Shipper", "ShipperCounters", "Spool"]

_log = logging.getLogger(__name__)
_MAX_LANE_WAIT_S = 5.0
_BACKFILL_RECHECK_S = 0.5
_MIN_WAIT_S = 0.01
_LIVE_TARGET_S = 0.5
_STEP_TIMEOUT_S = 1800.0  # a large batch on a very slow link; every request has a timeout of its own


class _SenderFault(NamedTuple):
    """Why a courier does not get on; `of_link` when the destination does not answer it as it should."""

    state: str
    words: str
    of_endpoint: bool


class Shipper:
    """Delivers one destination's backlog. `ship_once` is the step, `run` the loop.

    Args:
        spool: the durable store.
        destination: what to send to.
        kind: of the destination, for people.
        concurrency: batches on their way at a time; the first is live, the others backfill. With 1 they take
            turns.
        in_order: one lane only, the oldest first.
        keeps_ledger: the destination notes ranges of commits.
        max_batch_rows, max_batch_bytes: ceiling of a batch.
        target_s: how long one request of backfill should take; batches are sized by it.
        flush_s: how long live readings may wait for company.
        max_bytes_per_s: budget of the link, None for no limit.
        schedule: when the lanes that it applies to may send.
        schedule_for: the backfill lane, or everything.
        urgent: whether alerts and declarations go whatever the schedule says.
        backoff: of retries.
        hold_s: how often at most to ask again where a person is needed.
        clock_us: wall clock, microseconds since 1970.
        chance: from 0 to 1.
    """

    def __init__(
        self,
        spool: Spool,
        destination: Destination,
        *,
        kind: str = "",
        concurrency: int = 2,
        in_order: bool = False,
        keeps_ledger: bool = False,
        max_batch_rows: int = 50_000,
        max_batch_bytes: int = 4 << 20,
        target_s: float = 0.5,
        flush_s: float = 0.8,
        max_bytes_per_s: float | None = None,
        schedule: Schedule = Schedule(),  # noqa: B008 - an immutable value
        schedule_for: Literal["backfill", "everything"] = "backfill",
        urgent: bool = True,
        backoff: Backoff = Backoff(),  # noqa: B008 - as above
        hold_s: float = 30.0,
        clock_us: Callable[[], int] = lambda: time.time_ns() // 1000,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.name = destination.name
        self.kind = kind
        self._destination = destination
        self._flush_s = flush_s
        self._schedule = schedule
        self._schedule_for = schedule_for
        self._urgent = urgent
        self._backoff = backoff
        self._hold_s = hold_s
        lanes: tuple[Lane | None, ...] = (None,) if in_order else (Lane.LIVE, Lane.BACKFILL)
        self._delivery_state = DeliveryState(
            spool,
            destination,
            {
                lane: BatchSizer(
                    max_batch_rows,
                    max_batch_bytes,
                    min(target_s, _LIVE_TARGET_S) if lane is Lane.LIVE else target_s,
                )
                for lane in lanes
            },
            budget=SendBudget(max_bytes_per_s),
            keeps_ledger=keeps_ledger,
            urgent_only=self._is_closed,
            clock_us=clock_us,
            chance=chance,
        )
        self._any_lane_sender = BatchSender(self._delivery_state, lanes)
        self._senders = [self._any_lane_sender]
        if concurrency > 1 and not in_order:
            back = [BatchSender(self._delivery_state, [Lane.BACKFILL]) for _ in range(concurrency - 1)]
            self._senders = [BatchSender(self._delivery_state, [Lane.LIVE]), *back]
        self._stages = {
            batch_sender: StageProgress(f"shipper {self.name}" + (f", courier {number}" if number else ""))
            for number, batch_sender in enumerate(self._senders)
        }
        self._faults_by_sender: dict[BatchSender, _SenderFault] = {}
        self._sending = 0
        self._store_attempts = 0
        self._live_due = 0.0
        self._live_retries = False
        self.counters = self._delivery_state.counters

    @property
    def stages(self) -> tuple[StageProgress, ...]:
        """The progress of every courier."""
        return tuple(self._stages.values())

    async def aclose(self) -> None:
        """Release the destination's connections."""
        await self._destination.aclose()

    async def run(self, stop: asyncio.Event) -> None:
        """Ship until `stop` is set, every courier on its own."""
        async with asyncio.TaskGroup() as senders:
            for number, batch_sender in enumerate(self._senders):
                senders.create_task(self._run(batch_sender, stop), name=f"courier {number} of {self.name}")

    async def ship_once(self) -> int:
        """Carry one batch, whatever its lane; returns its rows, 0 when there was nothing to send.

        Raises:
            DeliveryError: the batch stays claimed and will be sent again.
        """
        return await self._any_lane_sender.ship_once()

    async def ship_or_wait(
        self, batch_sender: BatchSender | None = None, lanes: Sequence[Lane | None] | None = None
    ) -> float | None:
        """Ship one batch; returns seconds to wait: 0 when more may be ready, None when all is delivered."""
        batch_sender = batch_sender or self._any_lane_sender
        self._sending += 1
        self._tell()
        try:
            rows = await batch_sender.ship_once(lanes)
        except StoreDeliveryError as fault:
            self._store_attempts += 1
            self._failed(batch_sender, "waiting", fault)
            return self._wait_s(self._store_attempts)
        except RetryLaterError as fault:
            self._failed(batch_sender, "waiting", fault)
            return self._schedule_retry(batch_sender, self._wait_s(self._attempt(), fault.retry_after_s))
        except UnauthorisedError as fault:
            self._failed(batch_sender, "held", fault)
            return self._schedule_retry(batch_sender, max(self._hold_s, self._wait_s(self._attempt())))
        except (RefusedError, TooLargeError) as fault:
            self._failed(batch_sender, "held", fault)
            return self._hold_s
        finally:
            self._sending -= 1
            self._tell()
        return self._after_success(batch_sender, rows)

    async def _run(self, batch_sender: BatchSender, stop: asyncio.Event) -> None:
        stage = self._stages[batch_sender]
        while not stop.is_set():
            stage.works(within_s=_STEP_TIMEOUT_S)
            started = time.monotonic()
            lanes, wait_s = self._open_lanes(batch_sender, started)
            if lanes:
                shipped = await self.ship_or_wait(batch_sender, lanes)
                idle_s = max(_MIN_WAIT_S, started + self._flush_s - time.monotonic())
                wait_s = idle_s if shipped is None else shipped
            stage.works(within_s=wait_s + _STEP_TIMEOUT_S)
            await sleep_or_stop(stop, wait_s)
        stage.rests()

    def _open_lanes(self, batch_sender: BatchSender, at: float) -> tuple[list[Lane | None], float]:
        """The lanes of a courier that may go now, and how long to wait when none may."""
        waits = {lane: self._lane_wait_s(lane, at) for lane in batch_sender.lanes}
        return [lane for lane, wait_s in waits.items() if wait_s <= 0], max(_MIN_WAIT_S, min(waits.values()))

    def _lane_wait_s(self, lane: Lane | None, at: float) -> float:
        delivery_state, link = self._delivery_state, self._delivery_state.link
        if self._is_closed(lane) and (lane is Lane.BACKFILL or not self._urgent):
            return _MAX_LANE_WAIT_S
        if link.is_down and at < link.retry_at:
            return min(_MAX_LANE_WAIT_S, link.retry_at - at)
        if lane is Lane.LIVE and len(self._senders) == 1 and at < self._live_due:
            return self._live_due - at
        if lane is Lane.BACKFILL:
            if link.is_down and self._live_retries:
                return _BACKFILL_RECHECK_S
            if at < link.backfill_from:
                return min(_MAX_LANE_WAIT_S, link.backfill_from - at)
        return min(_MAX_LANE_WAIT_S, delivery_state.budget.wait_s(lane, at))

    def _is_closed(self, lane: Lane | None) -> bool:
        """Whether the schedule holds a lane up now."""
        scheduled = self._schedule_for == "everything" or lane is not Lane.LIVE
        return scheduled and not self._schedule.is_open(self._delivery_state.clock_us())

    def _after_success(self, batch_sender: BatchSender, rows: int) -> float | None:
        lane = batch_sender.carried
        link_is_up = not self._delivery_state.link.is_down
        if rows or link_is_up:
            self._faults_by_sender.pop(batch_sender, None)
            self._store_attempts = 0
        if Lane.LIVE in batch_sender.lanes:
            self._live_retries = False
        if link_is_up:
            self._faults_by_sender = {c: t for c, t in self._faults_by_sender.items() if not t.of_endpoint}
        self._tell()
        if not rows:
            return None
        if batch_sender.sent_class is not RecordClass.READING:
            return 0.0
        full = batch_sender.sent_part or rows >= self._delivery_state.sizing[lane].rows // 2
        if lane is Lane.LIVE and not full:
            self._live_due = time.monotonic() + self._flush_s
            return 0.0 if len(batch_sender.lanes) > 1 else None
        return 0.0 if full or lane is Lane.BACKFILL else None

    def _wait_s(self, attempt: int, retry_after_s: float | None = None) -> float:
        return self._backoff.wait_s(attempt, self._delivery_state.chance(), retry_after_s)

    def _attempt(self) -> int:
        return self._delivery_state.link.failed(self._delivery_state.clock())

    def _schedule_retry(self, batch_sender: BatchSender, wait_s: float) -> float:
        """Note when to ask the destination again."""
        self._delivery_state.link.retry_at = self._delivery_state.clock() + wait_s
        if batch_sender.carried is Lane.LIVE:
            self._live_retries = True
        return wait_s

    def _failed(self, batch_sender: BatchSender, state: str, fault: DeliveryError) -> None:
        of_endpoint = isinstance(fault, RetryLaterError | UnauthorisedError) and not isinstance(
            fault, StoreDeliveryError
        )
        self.counters.failures += 1
        self._faults_by_sender[batch_sender] = _SenderFault(state, str(fault), of_endpoint)
        if self.counters.last_error != str(fault):
            level = logging.ERROR if state == "held" else logging.WARNING
            _log.log(level, "%s: %s (%s; the backlog is kept)", self.name, fault, state)
        self._tell()

    def _tell(self) -> None:
        """State and newest fault for people, of all couriers together."""
        states = [trouble.state for trouble in self._faults_by_sender.values()]
        trouble = next((s for s in ("held", "waiting") if s in states), None)
        self.counters.state = trouble or ("sending" if self._sending else "idle")
        self.counters.last_error = (
            list(self._faults_by_sender.values())[-1].words if self._faults_by_sender else ""
        )
