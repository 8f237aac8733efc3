"""The watchdog is fed while every stage keeps its word, and no longer."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from cloud_sync.runtime.watchdog import (
    STATUS_EVERY_S,
    FailedStarts,
    StageProgress,
    Watchdog,
    find_late_stages,
    watchdog_period_s,
)
from gateway.ingress.committer import Committer, CommitterOptions
from gateway.mqtt.codec.packets import Publish
from tests.support.committers import build_committer
from tests.support.open_spool import build_retention, open_spool


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Systemd:
    """Stands where the notify socket would."""

    heard: list[str] = field(default_factory=list)

    @property
    def fed(self) -> int:
        return sum("WATCHDOG=1" in words for words in self.heard)


def ready(stages: list[StageProgress], text: str = "fine") -> tuple[Watchdog, Systemd]:
    systemd = Systemd()
    watchdog = Watchdog(lambda: stages, lambda: text, notify=systemd.heard.append)
    watchdog.ready()
    return watchdog, systemd


def test_a_stage_that_keeps_its_word_is_not_late():
    clock = Clock()
    stage = StageProgress("committer", clock)
    stage.begin_step(within_s=10)
    clock.now += 9
    assert find_late_stages([stage]) == []
    stage.begin_step(within_s=10)
    clock.now += 9
    assert find_late_stages([stage]) == []


def test_a_stage_without_work_may_rest_for_ever():
    clock = Clock()
    stage = StageProgress("committer", clock)
    stage.begin_step(within_s=10)
    stage.set_idle()
    clock.now += 1e9
    assert find_late_stages([stage]) == []


def test_a_stage_that_hangs_starves_the_watchdog_until_it_moves_again(caplog):
    clock = Clock()
    hanging, well = StageProgress("shipper regional", clock), StageProgress("committer", clock)
    watchdog, systemd = ready([well, hanging])
    hanging.begin_step(within_s=10)
    watchdog.feed_once()
    assert systemd.fed == 1
    clock.now += 11
    assert [str(late) for late in watchdog.feed_once()] == [
        "shipper regional has been silent for 11 s, 10 s are allowed"
    ]
    watchdog.feed_once()
    assert systemd.fed == 1
    assert systemd.heard[-1].startswith("STATUS=stuck: shipper regional")
    assert len(caplog.records) == 1, "said once, not at every look"
    hanging.begin_step(within_s=10)
    assert watchdog.feed_once() == []
    assert systemd.fed == 2


def test_a_status_text_stays_one_assignment_whatever_an_error_says():
    _, systemd = ready([], "regional waiting (no\nWATCHDOG=1\nanswer)")
    assert systemd.heard == ["READY=1\nSTATUS=regional waiting (no WATCHDOG=1 answer)"]


def test_a_start_is_given_more_time_while_it_works_and_none_while_it_does_nothing():
    systemd = Systemd()
    watchdog = Watchdog(list, lambda: "", notify=systemd.heard.append, period_s=5)
    watchdog.feed_once()
    before = len(systemd.heard)
    sum(n * n for n in range(4_000_000))
    watchdog.feed_once()
    assert systemd.heard[before:] == ["EXTEND_TIMEOUT_USEC=65000000"]
    watchdog._work = (1e9, 1 << 60, 0)
    watchdog.feed_once()
    at_rest = len(systemd.heard)
    watchdog.feed_once()
    assert len(systemd.heard) == at_rest


@pytest.mark.parametrize(
    ("environ", "period_s"),
    [
        ({}, STATUS_EVERY_S),
        ({"WATCHDOG_USEC": "6000000"}, 2),
        ({"WATCHDOG_USEC": "6000000", "WATCHDOG_PID": "7"}, 2),
        ({"WATCHDOG_USEC": "6000000", "WATCHDOG_PID": "8"}, STATUS_EVERY_S),
        ({"WATCHDOG_USEC": "600000000"}, STATUS_EVERY_S),
        ({"WATCHDOG_USEC": "soon"}, STATUS_EVERY_S),
    ],
)
def test_the_watchdog_is_fed_three_times_within_what_systemd_allows(environ, period_s):
    assert watchdog_period_s(environ, pid=7) == period_s


async def test_a_commit_that_never_ends_makes_the_committer_late_and_waiting_for_readings_does_not(tmp_path):
    never = asyncio.Event()

    class Stuck:
        async def append(self, *_args, **_options):
            await never.wait()

    class Device:
        name = "listen"

        def acknowledge(self, *_publishes):
            raise AssertionError("nothing was committed")

    async with open_spool(tmp_path / "spool.db") as spool:
        committer = Committer(Stuck(), build_committer(spool).decoder, CommitterOptions())  # type: ignore[arg-type]  # hangs as a dead disk does
        clock = Clock()
        committer.stage.clock = clock
        running = asyncio.create_task(committer.run())
        await asyncio.sleep(0)
        clock.now += 1e6
        assert find_late_stages([committer.stage]) == []
        committer.submit_publishes(Device(), [Publish(b"sensors/a/t", b"1", 1, 1)])  # type: ignore[arg-type]  # as above
        for _ in range(10):
            await asyncio.sleep(0.002)
        assert find_late_stages([committer.stage]) == []
        clock.now += 200
        assert [late.name for late in find_late_stages([committer.stage])] == ["committer"]
        running.cancel()


async def test_upkeep_that_has_been_stopped_is_not_late(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        retention = build_retention(spool.database, spool.segments)
        clock = Clock()
        retention.stage.clock = clock
        stop = asyncio.Event()
        running = asyncio.create_task(retention.run(stop))
        await asyncio.sleep(0)
        clock.now += 1e6
        assert find_late_stages([retention.stage]) != []
        stop.set()
        await running
        assert find_late_stages([retention.stage]) == []


def test_failed_starts_in_a_row_wait_longer_and_longer_and_a_good_one_ends_the_row(tmp_path):
    waits: list[float] = []
    restarts = FailedStarts({"RUNTIME_DIRECTORY": str(tmp_path)})
    for _ in range(9):
        restarts.begin(waits.append)
    assert waits == [2, 4, 8, 16, 32, 60, 60]
    restarts.succeeded()
    assert [restarts.begin(waits.append), restarts.begin(waits.append)] == [0, 0]
    assert FailedStarts({}).begin(waits.append) == 0
    assert len(waits) == 7


def test_an_orderly_stop_is_no_failed_start(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    FailedStarts().begin()
    watchdog = Watchdog(list, lambda: "", notify=lambda _: None)
    watchdog._restarts = FailedStarts({"RUNTIME_DIRECTORY": str(tmp_path)})
    watchdog.ready()
    assert list(tmp_path.iterdir())
    watchdog.stopping()
    assert list(tmp_path.iterdir()) == []
