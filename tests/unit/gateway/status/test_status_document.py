"""The parts of the status document that are computed: wear, presence, charts, remarks."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest

from cloud_sync.model.records import Flag, Readings, Series
from gateway.processing.commit_consumer import CommitConsumer, ConsumerOptions
from gateway.query.series_chart import ChartSteps, read_chart, search_series
from gateway.rollups.open_windows import RollupOptions
from gateway.rollups.roller import Roller
from gateway.settings.gateway_settings import GatewaySettings, SpoolSettings
from gateway.spool.appender import Capacity
from gateway.spool.database import open_read_only
from gateway.spool.quarantine_items import QuarantineItem
from gateway.spool.segment_reader import CommitLogReader, StoredRollups
from gateway.status.advice import build_advice
from gateway.status.collector import build_devices_status, read_stopped_status
from gateway.status.document import (
    ChannelStatus,
    ClockStatus,
    DestinationStatus,
    DevicesStatus,
    FlashWearStatus,
    IngressStatus,
    SpoolStatus,
    Status,
)
from gateway.status.samplers import (
    RATE_SAMPLE_INTERVAL_S,
    FlashWear,
    RateHistory,
    WriteCounters,
    compute_flash_wear,
    find_disk,
)
from tests.support.open_spool import NOW_US, open_spool

if TYPE_CHECKING:
    from pathlib import Path

DAY_S = 86_400


def destination(**changes: object) -> DestinationStatus:
    return msgspec.structs.replace(
        DestinationStatus("region", "ingest", "idle", "", 10, 0.0, 0, 0, 0, NOW_US, 0, 0, None, 0.0),
        **changes,
    )


def a_status(**changes: object) -> Status:
    status = Status(
        gateway_id="gw-1",
        version="1",
        running=True,
        at_us=NOW_US,
        uptime_s=60.0,
        ingress=IngressStatus(1, 10, 10, 10, 1.0, 0, 0, None, ""),
        spool=SpoolStatus("spool.db", "e", 10, 1, 1000, 10**9, 100.0, 10**9, 10),
        destinations=[destination()],
    )
    return msgspec.structs.replace(status, **changes)


def test_bytes_written_are_scaled_to_a_day_and_held_against_what_was_encoded():
    then = WriteCounters(at_s=100.0, process_bytes=1000, disk_bytes=50_000, encoded=0)
    now = WriteCounters(at_s=100.0 + DAY_S / 2, process_bytes=9000, disk_bytes=90_000, encoded=2000)
    wear = compute_flash_wear(then, now, disk="mmcblk0", endurance_bytes=80_000 * 365.25 * 3)
    assert (wear.written_bytes_per_day, wear.disk_written_bytes_per_day) == (16_000, 80_000)
    assert wear.amplification == 4
    assert wear.years_left == pytest.approx(3)


def test_a_disk_that_tells_nothing_leaves_the_gateways_own_writes_to_judge_by():
    then, now = WriteCounters(0.0, 0, None, 0), WriteCounters(float(DAY_S), 1000, None, 0)
    wear = compute_flash_wear(then, now, endurance_bytes=365_250.0)
    assert (wear.disk_written_bytes_per_day, wear.amplification) == (None, None)
    assert wear.years_left == pytest.approx(1)


def test_a_few_seconds_say_nothing_of_a_day():
    wear = compute_flash_wear(WriteCounters(0.0, 0, 0, 0), WriteCounters(3.0, 9, 9, 9), endurance_bytes=1.0)
    assert (wear.written_bytes_per_day, wear.amplification, wear.years_left) == (None, None, None)


def test_what_this_process_writes_to_a_disk_is_counted(tmp_path: Path):
    wear = FlashWear(tmp_path, None)
    before = wear.read(0, 0.0)
    with (tmp_path / "file").open("wb") as file:
        file.write(b"x" * (1 << 20))
        file.flush()
    after = wear.read(0, 1.0)
    if before.process_bytes is None or after.process_bytes is None:
        pytest.skip("this kernel does not count")
    assert after.process_bytes - before.process_bytes >= (1 << 20) or find_disk(tmp_path) is None


def test_a_partition_leads_to_its_whole_disk(tmp_path: Path):
    device = tmp_path.stat().st_dev
    whole = tmp_path / "block" / "mmcblk0"
    (whole / "mmcblk0p2").mkdir(parents=True)
    (whole / "mmcblk0p2" / "partition").write_text("2")
    system = tmp_path / "dev"
    system.mkdir()
    (system / f"{device >> 8 & 0xFFF}:{device & 0xFF}").symlink_to(whole / "mmcblk0p2")
    assert find_disk(tmp_path, system) == whole


def test_the_last_hour_begins_anew_after_the_machine_slept():
    recent = RateHistory()
    for step in range(3):
        recent.add(step, {"region": step}, now_us=step, now_s=step * RATE_SAMPLE_INTERVAL_S)
    assert not recent.is_due(2 * RATE_SAMPLE_INTERVAL_S + 1)
    assert recent.status().backlog == {"region": [0, 1, 2]}
    recent.add(9, {"region": 9, "new": 1}, now_us=9, now_s=1000.0)
    assert (recent.status().readings_per_s, recent.status().backlog) == ([9.0], {"region": [9], "new": [1]})


async def test_a_device_is_heard_when_it_sends_and_silent_when_it_does_not(tmp_path: Path):
    async with open_spool(tmp_path / "spool.db") as spool:
        old_us = NOW_US - 3_600_000_000
        await spool.append([("a", NOW_US - 5, 1.0), ("b", old_us, 1.0)])
        heard = spool.appender.device_activity.last_received(spool.duplicates, NOW_US)
        both = build_devices_status(heard, NOW_US + 60_000_000, silent_after_s=300)
        assert (both.known, both.heard, both.silent) == (2, 2, 0)
        later = build_devices_status(heard, NOW_US + 301_000_000, silent_after_s=300)
        assert [d.sensor_id for d in later.silent_devices] == ["a", "b"]
        await spool.append([("b", old_us, 1.0)])  # a duplicate: the device speaks all the same
        assert spool.appender.device_activity.last_received(
            spool.duplicates, NOW_US
        ).received_us.tolist() == [
            NOW_US,
            NOW_US,
        ]
    async with open_spool(tmp_path / "spool.db") as spool:
        heard = spool.appender.device_activity.last_received(spool.duplicates, NOW_US)
        assert heard.sensor_ids == ["a", "b"]
        assert heard.received_us.tolist() == [NOW_US - 5, old_us], (
            "of before the restart the times of readings"
        )


async def test_a_device_with_several_series_and_attributes_is_one_device(tmp_path: Path):
    async with open_spool(tmp_path / "spool.db") as spool:
        for series in (
            Series("a", "t"),
            Series("a", "t", (("unit", "K"),)),
            Series("a", "h"),
            Series("b", "t"),
        ):
            assert spool.catalog.assign_number(series)
        heard = spool.appender.device_activity.last_received(spool.duplicates, NOW_US)
        assert (heard.sensor_ids, heard.series.tolist()) == (["a", "b"], [2, 1])
        silent = build_devices_status(heard, NOW_US, silent_after_s=300)
        assert [d.heard_at_us for d in silent.silent_devices] == [0, 0], "known, and never heard"


async def test_a_chart_agrees_with_the_readings_one_by_one(tmp_path: Path):
    rng = np.random.default_rng(7)
    times = NOW_US - rng.choice(7200, 3000, replace=False).astype(np.int64) * 1_000_000
    values = rng.normal(20, 3, 3000).round(2)
    flags = np.where(rng.random(3000) < 0.1, int(Flag.SPIKE), 0).astype(np.int32)
    async with open_spool(tmp_path / "spool.db") as spool:
        first, second, other = (
            spool.catalog.assign_number(series) or 0
            for series in (Series("a", "t"), Series("a", "t", (("unit", "K"),)), Series("b", "t"))
        )
        for part in np.array_split(rng.permutation(3000), 5):
            n = len(part)
            absent = np.full(n, np.nan, np.float32)
            readings = Readings(
                np.where(rng.random(n) < 0.5, first, second).astype(np.int32),
                times[part],
                values[part],
                absent,
                absent,
                absent,
                np.full(n, -1, np.int64),
                flags[part],
            )
            await spool.appender.append(readings, [], now_us=NOW_US)
            noise = replace(readings, series=np.full(n, other, np.int32))
            await spool.appender.append(noise, [], now_us=NOW_US)
            await spool.compaction.compact_once()
        known = spool.catalog.find("a", "t")
        assert known is not None
        steps = ChartSteps(NOW_US - 3_600_000_000, NOW_US, 60)
        chart = read_chart(tmp_path / "spool.db", known, steps)
        none = read_chart(tmp_path / "spool.db", known, ChartSteps(0, 10, 5), within_s=10)
    assert (chart.complete, chart.unit, none.at_us) == (True, "K", [])
    expected: dict[int, list[tuple[float, int]]] = {}
    for t, v, f in zip(times.tolist(), values.tolist(), flags.tolist(), strict=True):
        if chart.since_us <= t < chart.until_us:
            expected.setdefault((t - chart.since_us) // chart.step_us, []).append((v, f))
    assert chart.at_us == [chart.since_us + at * chart.step_us for at in sorted(expected)]
    for row, at in enumerate(sorted(expected)):
        of_step = [v for v, _ in expected[at]]
        assert chart.mean[row] == pytest.approx(sum(of_step) / len(of_step))
        assert (chart.least[row], chart.greatest[row]) == (min(of_step), max(of_step))
        assert (chart.count[row], chart.flagged[row]) == (len(of_step), sum(f != 0 for _, f in expected[at]))


async def test_a_chart_that_runs_out_of_time_has_the_newest_and_says_so(tmp_path: Path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await spool.append([("a", NOW_US, 1.0)])
        known = spool.catalog.find("a", "t")
        assert known is not None
        chart = read_chart(
            tmp_path / "spool.db", known, ChartSteps(NOW_US - 100, NOW_US + 1, 10), within_s=-1
        )
    assert (chart.complete, chart.readings) == (False, 0)


async def test_a_chart_of_more_than_can_be_read_comes_from_rollups(tmp_path: Path):
    path = tmp_path / "spool.db"
    start_us = NOW_US // 3_600_000_000 * 3_600_000_000
    async with open_spool(path) as spool:
        connection = open_read_only(path)
        commit_consumer = CommitConsumer(
            spool.database,
            spool.segments,
            CommitLogReader(connection, spool.catalog),
            [Roller(StoredRollups(connection), RollupOptions(windows_s=(60, 300), close_every_s=0))],
            ConsumerOptions(),
            clock_us=lambda: NOW_US,
        )
        try:
            await commit_consumer.restore()
            rows = [("a", start_us + n * 10_000_000, float(n)) for n in range(360)]
            await spool.append(rows)
            await commit_consumer.consume_once()
            await spool.compaction.compact_once(everything=True)
            known = spool.catalog.find("a", "t")
            assert known is not None
            chart = read_chart(path, known, ChartSteps(start_us, start_us + 3_600_000_000, 12), within_s=-1)
        finally:
            await commit_consumer.aclose()
    assert (chart.complete, chart.step_us, chart.readings) == (True, 300_000_000, 360)
    assert chart.at_us == [start_us + n * 300_000_000 for n in range(12)]
    assert (chart.least[1], chart.mean[1], chart.greatest[1]) == (30.0, 44.5, 59.0)


async def test_series_are_found_by_any_part_of_their_name(tmp_path: Path):
    async with open_spool(tmp_path / "spool.db") as spool:
        for series in (
            Series("Stall-2", "temp"),
            Series("stall-1", "temp", (("unit", "K"),)),
            Series("x", "hum"),
        ):
            spool.catalog.assign_number(series)
        named, total = search_series(spool.catalog, "STALL", 1)
        assert ([n.sensor_id for n in named], total) == (["Stall-2"], 2)
        assert search_series(spool.catalog, "1/te", 9)[0][0].unit == "K"


def test_all_is_well_is_said_only_when_it_is():
    assert [r.severity for r in build_advice(a_status())] == ["good"]
    away = a_status(destinations=[destination(last_error="refused connection", backlog_readings=5)])
    assert [r.severity for r in build_advice(away)] == ["warning"]
    held = a_status(destinations=[destination(state="held", last_error="401"), destination(name="b")])
    assert [(r.severity, "401" in r.text) for r in build_advice(held)] == [("critical", True)]


@pytest.mark.parametrize(
    ("changes", "severity", "said"),
    [
        ({"ingress": IngressStatus(1, 1, 0, 0, 0.0, 0, 0, 1, "no room on the disk")}, "critical", "no room"),
        ({"running": False}, "critical", "not running"),
        (
            {"clock": ClockStatus(False, "it is not synchronised yet", 3, 0, 0)},
            "warning",
            "clock is not trusted: it is not synchronised yet. 3 readings wait for the correct time.",
        ),
        (
            {"channels": [ChannelStatus("ops", 0, 4, 0, 2, "it answered 503", None)]},
            "warning",
            "channel ops is failing (it answered 503): 2 notices wait.",
        ),
        (
            {"wear": FlashWearStatus("sda", 1e5, 1.0, 1.0, 1.0, 1.0, 0.5)},
            "warning",
            "the flash lasts another 182 d 12 h",
        ),
        (
            {
                "spool": SpoolStatus("s", "e", 1, 1, 1, 1, 0.5, 1, 1),
                "destinations": [destination(last_error="away", backlog_oldest_s=9e9, backlog_readings=7)],
            },
            "critical",
            "the spool is full in 12 h 0 min",
        ),
        (
            {"spool": SpoolStatus("s", "e", 1, 1, 1, 1, 100.0, 1, 1, 42)},
            "warning",
            "42 readings are in damaged",
        ),
    ],
)
def test_what_is_wrong_is_said_first(changes: dict[str, object], severity: str, said: str):
    remarks = build_advice(a_status(**changes))
    assert remarks[0].severity == severity
    assert any(said in remark.text for remark in remarks), remarks


def test_a_failing_channel_is_one_advice():
    away = a_status(channels=[ChannelStatus("ops", 0, 4, 0, 2, "it answered 503", None)])
    assert len(build_advice(away)) == 1


def test_a_short_time_of_silence_is_not_rounded_to_nothing():
    advice = build_advice(a_status(devices=DevicesStatus(3, 1, 2, 0.25, [])))
    assert any("silent for more than 0.2 s" in entry.text for entry in advice), advice


def test_little_room_is_no_alarm_while_everything_is_delivered():
    full = a_status(spool=SpoolStatus("s", "e", 1, 1, 1, 1, 0.1, 1, 1))
    assert [r.severity for r in build_advice(full)] == ["good"]


async def test_a_stopped_gateway_is_read_from_its_spool(tmp_path: Path):
    path = tmp_path / "spool.db"
    async with open_spool(path) as spool:
        await spool.deliveries.register("region", "ingest", now_us=NOW_US)
        items = [
            QuarantineItem.from_payload(
                received_at_us=NOW_US + n,
                source="listen",
                topic=f"<b>{n}</b>",
                reason="not_json",
                detail="d",
                payload=b"x",
            )
            for n in range(3)
        ]
        await spool.appender.append(spool.readings([("a", NOW_US, 1.0)]), items, now_us=NOW_US)
    status = read_stopped_status(GatewaySettings(gateway_id="gw-1", spool=SpoolSettings(path=path)))
    assert status.quarantine is not None
    assert (status.quarantine.items, status.quarantine.ever) == (3, 3)
    assert status.quarantine.reasons[0].topic == "<b>2</b>"
    assert (status.spool.readings_kept, status.destinations[0].backlog_readings) == (1, 1)
    assert status.remarks[0].severity == "critical"
    assert msgspec.json.decode(msgspec.json.encode(status), type=Status) == status


async def test_room_ends_at_whatever_limit_comes_first(tmp_path: Path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await spool.append([("a", NOW_US, 1.0)])
        used, _ = await spool.database.used_and_spare_bytes()
        assert (await Capacity(used + 1000).measure(spool.database)).room == 1000
        assert (await Capacity(used - 1).measure(spool.database)).room == 0
        assert (await Capacity(min_free_bytes=1 << 60).measure(spool.database)).room == 0
