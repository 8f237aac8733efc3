"""The gateway's own metrics as readings, with its id as sensor_id.

cpu_percent %         memory_percent %      swap_percent %       disk_percent % (of the spool's disk)
load_1m 1             net_received_bytes B  net_sent_bytes B     (counters since boot)
temperature_<chip> degC, one for each chip that the kernel shows
"""

from __future__ import annotations

import asyncio
import re
import time
from typing import TYPE_CHECKING

import psutil

from cloud_sync.runtime.waits import sleep_or_stop
from cloud_sync.runtime.watchdog import StageProgress
from gateway.payloads.measurement import Measurement
from gateway.payloads.topics import SeriesName

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from gateway.ingress.committer import Committer

_SAMPLE_WATCHDOG_S = 60.0
_UNSAFE_CHARACTERS = re.compile(r"[^A-Za-z0-9_.-]+")


def read_host_metrics(disk: Path) -> Iterator[tuple[str, float, str]]:
    """Metrics of this machine now, as (sensor_type, value, unit)."""
    yield "cpu_percent", psutil.cpu_percent(interval=None), "%"
    yield "memory_percent", psutil.virtual_memory().percent, "%"
    yield "swap_percent", psutil.swap_memory().percent, "%"
    yield "disk_percent", psutil.disk_usage(str(disk)).percent, "%"
    yield "load_1m", psutil.getloadavg()[0], "1"
    network = psutil.net_io_counters()
    if network is not None:
        yield "net_received_bytes", network.bytes_recv, "B"
        yield "net_sent_bytes", network.bytes_sent, "B"
    for chip, entries in getattr(psutil, "sensors_temperatures", dict)().items():
        if entries and entries[0].current is not None:
            yield f"temperature_{_UNSAFE_CHARACTERS.sub('_', chip)}", entries[0].current, "degC"


class HostMetricsSource:
    """A `Source` that submits a sample every `period_s`; so little that it goes on under back-pressure."""

    kind = name = "host"

    def __init__(
        self,
        committer: Committer,
        gateway_id: str,
        disk: Path,
        *,
        period_s: float,
        clock_us: Callable[[], int | None] = lambda: time.time_ns() // 1000,
    ) -> None:
        self._committer = committer
        self._gateway_id = gateway_id
        self._disk = disk
        self.period_s = period_s
        self._clock_us = clock_us
        self._seq = 0
        self._paused = False
        self._stop = asyncio.Event()
        self._stage = StageProgress("host ingress")

    @property
    def stages(self) -> Sequence[StageProgress]:
        """Its loop."""
        return (self._stage,)

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Sample from now on."""
        tasks.create_task(self.run(), name="host ingress")

    async def run(self) -> None:
        """Sample until `stop_reading`."""
        while not self._stop.is_set():
            self._stage.begin_step(within_s=self.period_s + _SAMPLE_WATCHDOG_S)
            if not self._paused:
                self.sample_once(self._clock_us())
            await sleep_or_stop(self._stop, self.period_s)
        self._stage.set_idle()

    def sample_once(self, now_us: int | None) -> None:
        """Submit one sample of every metric, stamped `now_us`; None leaves the time to the committer."""
        self._seq += 1
        sample = [
            Measurement(SeriesName(self._gateway_id, sensor_type), value, now_us, unit=unit, seq=self._seq)
            for sensor_type, value, unit in read_host_metrics(self._disk)
        ]
        self._committer.submit_measurements("host", sample)

    def pause(self) -> None:
        """Skip samples, which would only wait in memory."""
        self._paused = True

    def resume(self) -> None:
        """Take samples again."""
        self._paused = False

    def stop_reading(self) -> None:
        """Take no more samples."""
        self._stop.set()

    async def close(self) -> None:
        """Nothing is open."""
        self.stop_reading()

    def status(self) -> None:
        """It has none."""
