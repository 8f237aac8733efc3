"""Readings stamped without knowing the time: acknowledged, parked, committed with their true times, once."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import asynccontextmanager

import pytest

from cloud_sync.delivery.lanes import ClaimRequest
from cloud_sync.model.records import Flag, RecordClass
from gateway.ingress.committer import CommitterHooks
from gateway.processing.checks import ReadingChecker
from gateway.processing.clock import ClockCorrector, SyncStatus, read_clock_floor
from gateway.spool.processing_state import count_pending_rows
from tests.support.committers import build_committer
from tests.support.open_spool import OpenSpool, open_spool
from tests.unit.gateway.ingress.test_committer import Device, publish
from tests.unit.gateway.processing.test_clock import SECOND, TRUE_US, YEAR, World, clock


class Gateway:
    """Committer, checks and restamper on a spool, in a world of its own."""

    def __init__(self, spool: OpenSpool, world: World, wait_max_s: float = 600) -> None:
        self.spool, self.world = spool, world
        self.clock = clock(world, wait_max_s=wait_max_s)
        checks = ReadingChecker(lambda n: spool.catalog[n][:2], spool.catalog.identities)
        self.clock_corrector = ClockCorrector(
            self.clock,
            spool.database,
            lambda readings, note: self.committer.submit_readings(readings, note=lambda c, _: note(c)),
            lambda: world.boot_us,
            wait_max_s=wait_max_s,
        )
        self.committer = build_committer(
            spool,
            clock_us=self.clock.now_us,
            hooks=CommitterHooks(
                check=lambda r, now_us: checks.check(r, now_us if self.clock.trusted else None),
                hold=self.clock_corrector.park,
            ),
        )

    async def publish(self, *payloads: bytes) -> None:
        device, sent = Device(), [publish(p) for p in payloads]
        self.committer.submit_publishes(device, sent)
        await self.committer.commit_once()
        assert device.acknowledged == sent

    async def release(self) -> int:
        self.clock.evaluate_once()
        committing = asyncio.create_task(self.committer.run())
        try:
            total = 0
            while released := await self.clock_corrector.release_once():
                total += released
            return total
        finally:
            committing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await committing

    async def waiting(self) -> int:
        return await self.spool.database.read(count_pending_rows)

    async def stored(self) -> list[tuple[int, float, Flag]]:
        """Time, value and flags of every reading that is committed."""
        await self.spool.deliveries.register("all", "file", now_us=1)
        found = []
        while (claimed := await self.spool.deliveries.claim("all", ClaimRequest(now_us=1))) is not None:
            batch = await self.spool.deliveries.read_batch(claimed)
            assert batch is not None
            r = batch.readings
            columns = zip(r.time_us.tolist(), r.value.tolist(), map(Flag, r.flags.tolist()), strict=True)
            found += list(columns)
            await self.spool.deliveries.settle("all", claimed)
        return sorted(found)


@asynccontextmanager
async def gateway(path, world: World, **options):
    async with open_spool(path / "spool.db") as spool:
        yield Gateway(spool, world, **options)


ASSIGNED = Flag.TIME_ASSIGNED
RESTAMPED = ASSIGNED | Flag.RESTAMPED
IN_DOUBT = ASSIGNED | Flag.CLOCK_IN_DOUBT


def becomes_right(world: World) -> None:
    world.wall_us, world.sync = TRUE_US + world.boot_us, SyncStatus.YES


@pytest.mark.parametrize("wrong_by_us", [-40 * YEAR, -3600 * SECOND, 4 * YEAR])
async def test_readings_without_a_time_wait_for_the_clock_and_get_their_true_times(tmp_path, wrong_by_us):
    world = World(wall_us=TRUE_US + wrong_by_us, boot_us=0)
    async with gateway(tmp_path, world) as g:
        for second in range(3):
            await g.publish(
                b'{"value": %d}' % second, b'{"value": 9%d, "ts": %d}' % (second, TRUE_US + 500 + second)
            )
            world.pass_s(1)
        assert await g.waiting() == 3
        assert await g.release() == 0
        assert g.spool.segments.newest_commit(RecordClass.READING) == 3  # of those with a time
        becomes_right(world)
        assert await g.release() == 3
        assert await g.waiting() == 0
        assert await g.stored() == sorted(
            [(TRUE_US + n * SECOND, float(n), RESTAMPED) for n in range(3)]
            + [(TRUE_US + 500 + n, 90.0 + n, Flag(0)) for n in range(3)]
        )


async def test_what_waits_survives_a_restart_of_the_program(tmp_path):
    world = World(wall_us=1000, boot_us=0)
    async with gateway(tmp_path, world) as g:
        await g.publish(b'{"value": 1}')
    world.pass_s(30)
    becomes_right(world)
    async with gateway(tmp_path, world) as g:
        assert await g.release() == 1
        assert await g.stored() == [(TRUE_US, 1.0, RESTAMPED)]
        assert await g.release() == 0


async def test_what_was_stamped_in_an_earlier_boot_is_committed_as_it_is_in_doubt(tmp_path):
    world = World(wall_us=1000, boot_us=0)
    async with gateway(tmp_path, world) as g:
        stamped_us = g.clock.now_us()
        await g.publish(b'{"value": 1}')
    world.boot = "boot-2"
    async with gateway(tmp_path, world) as g:
        assert await g.release() == 1
        assert await g.stored() == [(stamped_us, 1.0, IN_DOUBT)]


async def test_what_has_waited_long_enough_is_committed_as_it_is_and_what_comes_then_too(tmp_path):
    world = World(wall_us=1000, boot_us=0)
    async with gateway(tmp_path, world, wait_max_s=60) as g:
        stamped_us = g.clock.now_us()
        await g.publish(b'{"value": 1}')
        world.pass_s(61)
        await g.publish(b'{"value": 2}')
        assert await g.waiting() == 1
        assert await g.release() == 1
        assert await g.stored() == [
            (stamped_us, 1.0, IN_DOUBT | Flag.LATE),  # committed after the other
            (stamped_us + 61 * SECOND, 2.0, IN_DOUBT),
        ]


async def test_while_the_clock_is_right_nothing_waits(tmp_path):
    async with gateway(tmp_path, World(sync=SyncStatus.YES)) as g:
        await g.publish(b'{"value": 1}')
        assert (await g.waiting(), await g.stored()) == (0, [(TRUE_US, 1.0, ASSIGNED)])


async def test_device_times_are_not_judged_by_a_clock_in_doubt(tmp_path):
    world = World(wall_us=1000)
    async with gateway(tmp_path, world) as g:
        await g.publish(
            b'{"value": 1, "ts": %d}' % (TRUE_US + YEAR), b'{"value": 1, "ts": %d}' % (TRUE_US - YEAR)
        )
        assert [flags for *_, flags in await g.stored()] == [Flag.LATE, Flag(0)]


async def test_what_requests_bring_is_not_parked_and_they_are_told_what_became_of_it(tmp_path):
    world = World(wall_us=1000)
    async with gateway(tmp_path, world) as g:
        brought = g.spool.readings([("b", TRUE_US, 5.0), ("b", TRUE_US + 1, 6.0)])
        brought.flags[:] = ASSIGNED
        promised = g.committer.submit_readings(brought)
        await g.publish(b'{"value": 1}')
        told = await promised
        assert (told.stored, told.duplicates, await g.waiting()) == (2, 0, 1)
        assert [flags for *_, flags in await g.stored()] == [IN_DOUBT, IN_DOUBT]


async def test_a_clock_that_steps_back_is_followed_by_what_is_stamped(tmp_path):
    world = World(wall_us=TRUE_US + 4 * YEAR, sync=SyncStatus.YES)
    async with gateway(tmp_path, world) as g:
        await g.publish(b'{"value": 1}')
        world.wall_us = TRUE_US
        await g.publish(b'{"value": 2}', b'{"value": 3}')
        assert [at for at, *_ in await g.stored()] == [TRUE_US, TRUE_US + 1, TRUE_US + 4 * YEAR]


async def test_a_damaged_parked_row_does_not_stop_the_others(tmp_path):
    world = World(wall_us=1000, boot_us=0)
    async with gateway(tmp_path, world) as g:
        await g.publish(b'{"value": 1}')
        await g.publish(b'{"value": 2}')
        await g.spool.database.write(
            lambda c: c.execute(
                "UPDATE parked SET block = x'00' WHERE parked_no = (SELECT min(parked_no) FROM parked)"
            )
        )
        becomes_right(world)
        await g.release()
        assert [value for _, value, _ in await g.stored()] == [2.0]
        assert g.clock_corrector.counters.damaged == 1


async def test_the_spool_remembers_that_a_time_has_been(tmp_path):
    async with gateway(tmp_path, World(sync=SyncStatus.YES)) as g:
        stop = asyncio.Event()
        stop.set()
        await g.clock_corrector.run(stop)
        assert await g.spool.database.read(read_clock_floor) == 0
        running = asyncio.create_task(g.clock_corrector.run(unset := asyncio.Event()))
        async with asyncio.timeout(10):
            while not await g.spool.database.read(read_clock_floor):  # noqa: ASYNC110 - the file is what is watched
                await asyncio.sleep(0.01)
        unset.set()
        await running
        assert await g.spool.database.read(read_clock_floor) == TRUE_US
