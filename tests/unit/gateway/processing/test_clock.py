"""The gateway's clock: when it is trusted, why, and what is stamped while it is not."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from gateway.processing.clock import (
    RELEASE_TIME_US,
    ClockAnchor,
    ClockSources,
    GatewayClock,
    SyncStatus,
    query_timedatectl,
    read_boot_id,
    read_sync_status,
    read_time_since_boot_us,
)

SECOND = 1_000_000
TRUE_US = RELEASE_TIME_US + 90 * 86_400 * SECOND
YEAR = 365 * 86_400 * SECOND


@dataclass
class World:
    """A machine: what its clocks say."""

    wall_us: int = TRUE_US
    boot_us: int = 40 * SECOND
    sync: SyncStatus = SyncStatus.NO
    said: bool = False
    boot: str = "boot-1"

    def sources(self) -> ClockSources:
        return ClockSources(
            lambda: self.wall_us, lambda: self.boot_us, lambda: self.sync, lambda: self.said, self.boot
        )

    def pass_s(self, seconds: float) -> None:
        self.wall_us += round(seconds * SECOND)
        self.boot_us += round(seconds * SECOND)


def clock(world: World, floor_us: int = 0, trust="auto", wait_max_s: float = 600) -> GatewayClock:
    return GatewayClock(floor_us, trust, wait_max_s=wait_max_s, sources=world.sources())


@pytest.mark.parametrize(
    ("sync", "wall_us", "trust", "trusted", "why"),
    [
        (SyncStatus.YES, TRUE_US, "auto", True, "synchronised"),
        (SyncStatus.NO, TRUE_US, "auto", False, "it is not synchronised yet"),
        (
            SyncStatus.NOBODY,
            TRUE_US,
            "auto",
            True,
            "no time service was found, and no later time is known",
        ),
        (SyncStatus.NOBODY, TRUE_US - YEAR // 12, "auto", False, "has passed"),
        (SyncStatus.NOBODY, TRUE_US, "synchronised", False, "no time service was found"),
        (
            SyncStatus.YES,
            86_400 * SECOND,
            "auto",
            False,
            "1970-01-02 00:00:00Z, before this release",
        ),
        (SyncStatus.NO, 86_400 * SECOND, "always", True, "clock.trust is"),
    ],
)
def test_the_clock_is_trusted_when_it_is_kept_or_past_what_has_been(sync, wall_us, trust, trusted, why):
    found = clock(World(wall_us, sync=sync), TRUE_US - SECOND, trust)
    assert found.trusted is trusted
    assert why in found.why


def test_once_synchronised_it_stays_trusted():
    world = World(sync=SyncStatus.YES)
    found = clock(world)
    world.sync = SyncStatus.NO
    found.evaluate_once()
    assert found.trusted


def test_what_takes_long_to_answer_is_asked_while_in_doubt():
    world = World()
    found = clock(world)
    found.query_sync_once()
    assert (found.evaluate_once(), found.trusted) == (False, False)
    world.said = True
    found.query_sync_once()
    assert (found.evaluate_once(), found.trusted) == (True, True)


def test_in_doubt_time_is_counted_on_whatever_steps_the_clock_makes():
    world = World(wall_us=1000 * SECOND)
    found = clock(world, floor_us=TRUE_US)
    assert found.now_us() == TRUE_US
    world.pass_s(5)
    world.wall_us -= YEAR
    found.evaluate_once()
    assert found.now_us() == TRUE_US + 5 * SECOND


@pytest.mark.parametrize("wrong_by_us", [-40 * YEAR, -3600 * SECOND, 4 * YEAR])
def test_what_was_stamped_in_doubt_gets_its_true_time_once_the_clock_is_right(wrong_by_us):
    world = World(wall_us=TRUE_US + wrong_by_us)
    found = clock(world, floor_us=TRUE_US - 86_400 * SECOND)
    stamped_us, anchor = found.now_us(), found.anchor
    assert found.correction_us(anchor) is None
    world.pass_s(100)
    world.wall_us, world.sync = TRUE_US + 100 * SECOND, SyncStatus.YES
    assert found.evaluate_once()
    difference_us = found.correction_us(anchor)
    assert difference_us is not None
    assert stamped_us + difference_us == TRUE_US
    assert found.now_us() == TRUE_US + 100 * SECOND


def test_what_was_stamped_in_another_boot_has_no_true_time():
    found = clock(World(sync=SyncStatus.YES))
    assert found.correction_us(ClockAnchor("boot-0", 0)) is None
    assert found.correction_us(ClockAnchor("boot-1", 0)) is not None


def test_it_is_worth_waiting_only_so_long():
    world = World()
    found = clock(world, wait_max_s=60)
    assert found.is_waiting
    world.pass_s(60)
    assert (found.is_waiting, found.trusted) == (False, False)


def test_this_machine_answers():
    assert isinstance(read_sync_status(), SyncStatus)
    assert isinstance(query_timedatectl(), bool)
    first = read_time_since_boot_us()
    assert 0 < first <= read_time_since_boot_us()
    assert len(read_boot_id()) == 36
