"""The built-in alert table over a recording: the records in the spool and the messages, to the last word.

The recording comes as it would: each second of it is committed, followed, and the outbox looked at. The time
is the recording's own. What is expected was worked out by hand from the table: temperature above 35 or below
-10, critical, 5 minutes; battery below 20, warning, an hour; quality below 80, warning, half an hour; no data
for 300 s, critical, 10 minutes.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from cloud_sync.codec import columns
from cloud_sync.model.records import AlertState, Readings, RecordClass, Series
from gateway.alerts.notifier import AlertNotifier
from gateway.build import build_alert_stage
from gateway.processing.commit_consumer import CommitConsumer, ConsumerOptions
from gateway.settings.alerts import AlertSettings
from gateway.settings.gateway_settings import GatewaySettings
from gateway.spool.database import open_read_only
from gateway.spool.segment_reader import CommitLogReader
from gateway.spool.segments import position_span
from tests.support.open_spool import OpenSpool, open_spool

if TYPE_CHECKING:
    from gateway.alerts.notifier import AlertMessage

RECORDING = Path(__file__).parents[1] / "golden" / "alert_table.csv"
SECOND = 1_000_000
START = 1_790_000_000 * SECOND
END_S = 1000

EXPECTED_RECORDS = [
    (60, "kiln/temperature", "temperature", "FIRING", 1, "value 35.5 is above 35"),
    (60, "yard/temperature", "temperature", "FIRING", 1, "value -10.5 is below -10"),
    (60, "tank/level", "battery", "FIRING", 1, "battery level 19 is below 20"),
    (60, "door/humidity", "quality", "FIRING", 1, "quality 79 is below 80"),
    (120, "kiln/temperature", "temperature", "RECOVERED", 1, "value is back at 34"),
    (120, "door/humidity", "quality", "RECOVERED", 1, "quality is back at 81"),
    (300, "tank/level", "battery", "RECOVERED", 2, "battery level is back at 22"),
    (360, "kiln/temperature", "temperature", "FIRING", 4, "value 36.5 is above 35"),
    (390, "kiln/temperature", "temperature", "RECOVERED", 1, "value is back at 20"),
    (400, "yard/temperature", "temperature", "RECOVERED", 1, "value is back at -5"),
    (421, "door/humidity", "silence", "FIRING", 1, "no data for 301 s"),
    (880, "door/humidity", "silence", "RECOVERED", 1, "data again, 459 s after the alert"),
]
"""At which second, of what, by which rule, what, for how many findings, in words."""

EXPECTED_MESSAGES = [
    (65, "CRITICAL: temperature, 2 firing at barn-1"),
    (65, "WARNING: battery of tank/level at barn-1"),
    (65, "WARNING: quality of door/humidity at barn-1"),
    (125, "CRITICAL recovered: temperature of kiln/temperature at barn-1"),
    (125, "WARNING recovered: quality of door/humidity at barn-1"),
    (305, "WARNING recovered: battery of tank/level at barn-1"),
    (365, "CRITICAL: temperature of kiln/temperature at barn-1"),
    (425, "CRITICAL: temperature, 2 recovered at barn-1"),
    (426, "CRITICAL: silence of door/humidity at barn-1"),
    (885, "CRITICAL recovered: silence of door/humidity at barn-1"),
]


@dataclass
class Listener:
    """A channel that keeps what it is told, with the second at which it was."""

    name: str = "log"
    clock: Clock | None = None
    told: list[tuple[int, AlertMessage]] = field(default_factory=list)

    async def send(self, message: AlertMessage) -> None:
        assert self.clock is not None
        self.told.append((self.clock.second, message))

    async def aclose(self) -> None:
        pass


@dataclass
class Clock:
    second: int = 0

    def us(self) -> int:
        return START + self.second * SECOND

    def monotonic(self) -> float:
        return float(self.second)


def recorded() -> dict[int, list[dict[str, str]]]:
    by_second: dict[int, list[dict[str, str]]] = {}
    with RECORDING.open() as lines:
        for row in csv.DictReader(lines):
            by_second.setdefault(int(row["second"]), []).append(row)
    return by_second


async def commit(spool: OpenSpool, rows: list[dict[str, str]], now_us: int) -> None:
    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([float(row[name]) for row in rows], dtype)

    names = [row["series"].partition("/") for row in rows]
    numbers = [spool.catalog.assign_number(Series(name, sensor_type)) for name, _, sensor_type in names]
    readings = Readings(
        np.array(numbers, np.int32),
        np.full(len(rows), now_us, np.int64),
        column("value", np.float64),
        column("quality", np.float32),
        column("battery_level", np.float32),
        np.full(len(rows), np.nan, np.float32),
        np.full(len(rows), -1, np.int64),
        np.zeros(len(rows), np.int32),
    )
    await spool.appender.append(readings, [], now_us=now_us)


async def alert_records(spool: OpenSpool) -> list[tuple[int, str, str, str, int, str]]:
    blocks = await spool.database.read(
        lambda c: c.execute(
            "SELECT block FROM segment WHERE position BETWEEN ? AND ? ORDER BY position",
            position_span(RecordClass.ALERT),
        ).fetchall()
    )
    found = []
    for (block,) in blocks:
        alerts = columns.decode_records(block, RecordClass.ALERT)
        for series, at, state, count, rule, detail in zip(
            *(getattr(alerts, n).tolist() for n in ("series", "time_us", "state", "count", "rule", "detail")),
            strict=True,
        ):
            name = "/".join(spool.catalog[series][:2])
            found.append(((at - START) // SECOND, name, rule, AlertState(state).name, count, detail))
    return found


@pytest.mark.parametrize("restart_every_s", [None, 7, 61])
async def test_the_built_in_alerts_of_a_recording_are_exactly_these(tmp_path, restart_every_s) -> None:
    settings = GatewaySettings.model_construct(gateway_id="barn-1", alerts=AlertSettings())
    by_second, clock = recorded(), Clock()
    listener = Listener(clock=clock)
    async with open_spool(tmp_path / "spool.db") as spool:

        def made() -> CommitConsumer:
            stage = build_alert_stage(settings, spool.catalog)
            assert stage is not None
            log = CommitLogReader(open_read_only(spool.database.path), spool.catalog)
            terms = ConsumerOptions(interval_s=0, checkpoint_s=3600)
            return CommitConsumer(spool.database, spool.segments, log, [stage], terms, clock_us=clock.us)

        commit_consumer = made()
        await commit_consumer.restore()
        notifier = AlertNotifier(
            listener,
            spool.database,
            "barn-1",
            settings.alerts.notifier_options,
            clock_us=clock.us,
            monotonic=clock.monotonic,
        )
        for second in range(END_S):
            clock.second = second
            if second in by_second:
                await commit(spool, by_second[second], clock.us())
            await commit_consumer.consume_once()
            await notifier.send_once()
            if restart_every_s and second % restart_every_s == 0:  # killed: nothing but the file is left
                await commit_consumer.aclose()
                commit_consumer = made()
                await commit_consumer.restore()
        await commit_consumer.aclose()
        records = await alert_records(spool)
    expected, messages = EXPECTED_RECORDS, EXPECTED_MESSAGES
    if restart_every_s:  # silence counts while the gateway is at work, findings may be lost
        records = [(*r[:4], 1, r[5]) for r in records if r[2] != "silence"]
        expected = [(*r[:4], 1, r[5]) for r in expected if r[2] != "silence"]
        listener.told = [(s, m) for s, m in listener.told if m.rule != "silence"]
        messages = [m for m in messages if "silence" not in m[1]]
    assert records == expected
    assert [(second, message.subject) for second, message in listener.told] == messages


async def test_a_message_says_of_each_series_what_was_seen(tmp_path) -> None:
    settings = GatewaySettings.model_construct(gateway_id="barn-1", alerts=AlertSettings(group_wait_s=0))
    clock = Clock()
    listener = Listener(clock=clock)
    async with open_spool(tmp_path / "spool.db") as spool:
        stage = build_alert_stage(settings, spool.catalog)
        assert stage is not None
        log = CommitLogReader(open_read_only(spool.database.path), spool.catalog)
        commit_consumer = CommitConsumer(spool.database, spool.segments, log, [stage], clock_us=clock.us)
        await commit_consumer.restore()
        await commit(spool, recorded()[60], clock.us())
        await commit_consumer.consume_once()
        notifier = AlertNotifier(
            listener, spool.database, "barn-1", settings.alerts.notifier_options, clock_us=clock.us
        )
        await notifier.send_once()
        await commit_consumer.aclose()
    assert listener.told[0][1].text.splitlines() == [
        "CRITICAL: temperature, 2 firing at barn-1",
        "kiln/temperature: value 35.5 is above 35",
        "yard/temperature: value -10.5 is below -10",
    ]
