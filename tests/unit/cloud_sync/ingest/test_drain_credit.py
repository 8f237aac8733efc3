"""A fleet that requeue from one outage: the queue at the database stays short and nobody starves."""

from __future__ import annotations

import asyncio
import heapq
from itertools import count

import pytest

from cloud_sync.ingest.apply_queue import ApplyQueue, DrainCredit, fair_share

PLACES = 4
ROWS_PER_S = 200_000
BATCH_ROWS = 20_000


class Fleet:
    """Gateways with a backlog and two requests in flight each, in simulated time; the database is a rate."""

    def __init__(self, gateways: int, backlog_rows: int, *, obey: bool = True) -> None:
        self.left = dict.fromkeys(range(gateways), backlog_rows)
        self.obey = obey
        self.fairness = DrainCredit()
        self.line: list[int] = []
        self.serving = 0
        self.queue_over_time: list[tuple[float, int]] = []
        self.done_at: dict[int, float] = {}
        self.spread: list[tuple[int, int]] = []
        self._events: list[tuple[float, int, str, int]] = []
        self._number = count()

    def at(self, moment: float, what: str, gateway: int) -> None:
        heapq.heappush(self._events, (moment, next(self._number), what, gateway))

    def run(self) -> float:
        for gateway in self.left:
            for _ in range(2):
                self.at(gateway / 1000, "send", gateway)
        now = 0.0
        while self._events:
            now, _, what, gateway = heapq.heappop(self._events)
            if what == "send":
                if self.left[gateway] <= 0:
                    continue
                self.left[gateway] -= BATCH_ROWS
                self.line.append(gateway)
            else:
                self.serving -= 1
                self.fairness.end(str(gateway), BATCH_ROWS, now)
                credit = self.fairness.credit(now)
                pause = 2 * BATCH_ROWS / credit.rows_per_s if credit and self.obey else 0.0
                self.at(now + pause, "send", gateway)
                self.done_at[gateway] = now
            while self.line and self.serving < PLACES:
                self.fairness.begin(now, len(self.line) - 1)
                self.serving += 1
                self.at(now + PLACES * BATCH_ROWS / ROWS_PER_S, "applied", self.line.pop(0))
            self.queue_over_time.append((now, len(self.line)))
            self.spread.append((min(self.left.values()), max(self.left.values())))
        return now


def test_fifty_returning_gateways_keep_the_queue_short_and_end_together():
    fleet = Fleet(50, 400_000)

    ended_at = fleet.run()

    ideal_s = 50 * 400_000 / ROWS_PER_S
    assert ended_at < 1.6 * ideal_s
    later = [waiting for at, waiting in fleet.queue_over_time if at > 0.3 * ideal_s]
    assert sum(later) / len(later) < 10
    assert max(later) < 50
    assert all(most - least <= 6 * BATCH_ROWS for least, most in fleet.spread)
    assert min(fleet.done_at.values()) > 0.7 * ended_at


def test_without_obeying_the_queue_stays_as_long_as_the_fleet():
    fleet = Fleet(50, 400_000, obey=False)
    ended_at = fleet.run()

    middle = [waiting for at, waiting in fleet.queue_over_time if 0.3 * ended_at < at < 0.7 * ended_at]
    assert min(middle) > 80


def test_a_single_gateway_is_never_held_back():
    fleet = Fleet(1, 2_000_000)
    ended_at = fleet.run()

    assert ended_at == pytest.approx(2_000_000 / (ROWS_PER_S / 2), rel=0.1)
    assert fleet.fairness.credit(ended_at) is None


def test_gateways_that_send_little_are_not_counted_against_those_that_send_much():
    assert fair_share([10, 10, 10_000, 10_000], 1000) == pytest.approx(490)
    assert fair_share([500, 500], 1000) == 500
    assert fair_share([], 1000) == 1000
    assert fair_share([1, 1], 1000) == 998


def test_a_credit_ends_when_nobody_waits_any_more():
    fairness = DrainCredit()
    fairness.begin(0, 3)
    fairness.end("a", 1000, 1)
    fairness.begin(1, 2)
    fairness.end("b", 1000, 2)

    credit = fairness.credit(2)
    assert credit is not None
    assert credit.rows_per_s == pytest.approx(1000 * 0.85 / 2, rel=0.05)
    assert fairness.credit(11.5) is None
    assert fairness.wait_s(5000) == 6


async def test_gateways_take_queue_and_one_of_them_cannot_take_every_place():
    queue = ApplyQueue(2)
    order: list[str] = []
    at_once: list[int] = []
    serving: set[str] = set()

    async def apply(name: str) -> None:
        async with queue.turn(name, 10):
            assert name not in serving
            serving.add(name)
            at_once.append(len(serving))
            order.append(name)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            serving.discard(name)

    await asyncio.gather(*(apply(name) for name in ["greedy"] * 6 + ["b", "c", "d"]))

    assert max(at_once) == 2
    assert max(order.index(name) for name in "bcd") <= 5
    assert queue.waiting == queue.waiting_rows == queue.waiting_gateways == 0


async def test_batches_of_one_gateway_that_wait_for_each_other_are_no_crowd():
    queue = ApplyQueue(1)
    crowds: list[tuple[int, int]] = []

    async def apply(name: str) -> None:
        async with queue.turn(name, 10):
            await asyncio.sleep(0)
            crowds.append((queue.waiting, queue.waiting_gateways))

    await asyncio.gather(apply("a"), apply("a"), apply("a"))
    assert crowds == [(2, 0), (1, 0), (0, 0)]
    crowds.clear()
    await asyncio.gather(apply("a"), apply("a"), apply("b"))
    assert crowds == [(2, 1), (1, 1), (0, 0)]


async def test_a_request_that_gives_up_leaves_its_place_to_others():
    queue = ApplyQueue(1)
    release = asyncio.Event()

    async def hold() -> None:
        async with queue.turn("a", 1):
            await release.wait()

    async def pass_by(name: str) -> str:
        async with queue.turn(name, 1):
            return name

    holding = asyncio.create_task(hold())
    await asyncio.sleep(0)
    given_up, next_one = asyncio.create_task(pass_by("b")), asyncio.create_task(pass_by("c"))
    await asyncio.sleep(0)
    assert (queue.waiting, queue.waiting_rows) == (2, 2)
    given_up.cancel()
    await asyncio.sleep(0)
    assert queue.waiting == 1
    release.set()

    assert await next_one == "c"
    await holding
    async with asyncio.timeout(1), queue.turn("a", 1):
        pass
