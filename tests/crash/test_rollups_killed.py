"""The gateway killed under load: what its rollups say is what its readings come to."""

from __future__ import annotations

import random
import signal
from typing import cast

import numpy as np
import pytest

from cloud_sync.codec import columns
from cloud_sync.model.records import Readings, RecordClass, Rollups
from gateway.rollups.open_windows import unpack_windows
from gateway.rollups.rollup import merge_rollups, roll_up_readings
from gateway.spool.database import Database
from gateway.spool.processing_state import PROGRESS_KEY, read_processing_state
from gateway.spool.segment_reader import keep_newest_revisions
from gateway.spool.segments import position_span
from gateway.spool.series_catalog import SeriesCatalog
from tests.crash.fleet import Fleet
from tests.crash.test_kill import Site

_BLOCKS = "SELECT last_commit, block FROM segment WHERE position BETWEEN ? AND ?"
_LEVELS = (60, 300, 3600)
_ROLLUPS = """\
[processing]
interval_s = 0.02
checkpoint_s = 0.1
[rollups]
windows_s = [60, 300, 3600]
lateness_s = 30
close_every_s = 0.05
idle_s = 0.2
"""


async def _read(path):
    """Identified readings up to the durable progress, newest revisions, and the open windows by length."""
    database = await Database.open(path)
    try:
        catalog = await SeriesCatalog.read(database)
        state = await database.read(read_processing_state)
        through = int(state[PROGRESS_KEY])
        blocks = await database.read(
            lambda c: c.execute(_BLOCKS, position_span(RecordClass.READING)).fetchall()
        )
        whole = Readings.concat([columns.decode(block) for last, block in blocks if last <= through])
        blocks = await database.read(
            lambda c: c.execute(_BLOCKS, position_span(RecordClass.ROLLUP)).fetchall()
        )
        rollups = [cast("Rollups", columns.decode_records(b, RecordClass.ROLLUP)) for _, b in blocks]
        assert rollups, "nothing was rolled up"
        every = Rollups.concat(rollups)
        keys = np.stack([every.series, every.time_us, every.window_s, every.revision])
        assert np.unique(keys, axis=1).shape[1] == every.rows, "a revision twice"
        windows = {s: unpack_windows(state[f"roller/{s}"], s)[0] for s in _LEVELS if f"roller/{s}" in state}
        identified = whole.with_series(catalog.identities(whole.series))
        return identified, keep_newest_revisions(every), windows, every
    finally:
        await database.close()


async def assert_whole(path) -> int:
    """Newest revisions with what is open merged in equal the readings; returns how many are no first ones."""
    readings, newest, windows, every = await _read(path)
    pending = Rollups.empty()
    for window_s in _LEVELS:
        if window_s in windows:
            pending = Rollups.concat([pending, windows[window_s].parts])
        parts = [newest.select(newest.window_s == window_s)]
        if pending.rows:
            parts.append(pending)  # what is open below has not come up yet either
        found = merge_rollups(Rollups.concat(parts), window_s)
        expected = roll_up_readings(readings, window_s)
        for name in ("series", "time_us", "count", "minimum", "maximum", "first", "last", "last_at_us"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), f"{name} {window_s}")
        np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-12)
        np.testing.assert_allclose(found.m2, expected.m2, rtol=1e-9, atol=1e-9)
    return int((every.revision > 1).sum())


@pytest.mark.timeout(120)
async def test_rollups_equal_the_readings_wherever_the_gateway_was_killed(tmp_path):
    chance = random.Random(22)
    site = Site.made(tmp_path / "site")
    config = site.folder / "gateway.toml"
    config.write_text(config.read_text() + _ROLLUPS)
    async with Fleet(12) as fleet:
        fleet.port = site.port
        for _ in range(12):
            await site.until_killed_after(chance.uniform(0.5, 1.2))
        for name in ("in_processing", "after_processing"):
            async with site.running(crash_at=f"{name}:3") as process:
                assert await process.wait() == -signal.SIGKILL, site.log()[-2000:]
        async with site.running() as process:
            await fleet.settled(20)
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0, site.log()[-2000:]
    await assert_whole(site.spool)
    readings, *_ = await _read(site.spool)
    assert readings.rows == sum(device.next_reading for device in fleet.devices)
