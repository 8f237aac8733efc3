"""A kill before and after each step of a batch: nothing is lost, nothing is applied twice."""

from __future__ import annotations

import shutil

import pytest

from tests.support.memory_region import MemoryRegion
from tests.support.open_spool import NOW_US, open_spool
from tests.support.shipping import one_sender, send_one

STEPS = ("claim", "read_batch", "encode", "send", "settle", "refuse", "split_rows", "split_segments")


class Killed(BaseException):
    """No `except Exception` sees it."""


class KilledAt:
    """What it stands in front of, until a step is reached for the n-th time: then the process is gone."""

    def __init__(self, within, step: str, when: str, nth: int = 2) -> None:
        self._within, self._step, self._when, self._left = within, step, when, nth
        self.name = getattr(within, "name", "")

    def __getattr__(self, name):
        method = getattr(self._within, name)
        if name != self._step:
            return method
        return self._sync(method) if name == "encode" else self._async(method)

    def _strike(self, when: str) -> None:
        if when == self._when:
            self._left -= 1
            if self._left == 0:
                raise Killed

    def _sync(self, method):
        def call(*arguments, **options):
            self._strike("before")
            result = method(*arguments, **options)
            self._strike("after")
            return result

        return call

    def _async(self, method):
        async def call(*arguments, **options):
            self._strike("before")
            result = await method(*arguments, **options)
            self._strike("after")
            return result

        return call


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("in_order", [False, True])
async def test_a_kill_at_any_step_costs_and_doubles_nothing(tmp_path, step, when, in_order):
    path = tmp_path / "spool.db"
    truth = []
    async with open_spool(path) as spool:
        for commit in range(40):
            rows = [(f"s{n}", commit * 1000 + n, float(n)) for n in range(10)]
            await spool.appender.append(spool.readings(rows), [], now_us=NOW_US + commit * 1_000_000)
            truth += rows
    bad = {truth[3], truth[222]}
    region = MemoryRegion(is_bad=lambda row: row in bad, most_rows=45)
    options = {"keeps_ledger": True, "max_batch_rows": 60, "in_order": in_order, "chance": lambda: 0.0}
    killed = False
    async with open_spool(path) as spool:
        struck = KilledAt(spool.deliveries, step, when), KilledAt(region, step, when)
        shipper = one_sender(*struck, **options)
        try:
            while await send_one(shipper):
                pass
        except Killed:
            killed = True
        for suffix in ("", "-wal"):  # what lies on the disk at this moment
            shutil.copyfile(f"{path}{suffix}", tmp_path / f"after.db{suffix}")
    assert killed, "the step was reached"
    async with open_spool(tmp_path / "after.db") as spool:
        shipper = one_sender(spool.deliveries, region, **options)
        while await send_one(shipper):
            pass
        assert set(region.applied) == set(truth) - bad
        assert set(region.applied.values()) == {1}
        assert (await spool.deliveries.backlog("region")).readings == 0
        complete = region.commits(spool.database.epoch)
        assert sum(last - first + 1 for first, last in complete) == 40
