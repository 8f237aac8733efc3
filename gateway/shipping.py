"""The shippers of a running gateway, each with its task: destinations come, change and go without a restart.

A shipper that is replaced is stopped first, and only when it has ended does its successor begin. What it had
claimed is in the spool and is sent again, the same; so a change costs no progress and no reading.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, NamedTuple

from cloud_sync.records import RecordClass
from gateway.destinations import shipper_of
from gateway.keeping import pruned_for
from gateway.settings import HttpDestination, InfluxDestination, IngestDestination

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cloud_sync.shipper import Shipper
    from gateway.parts import Parts
    from gateway.settings import AnyDestination
    from gateway.spool.deliveries import Deliveries

_log = logging.getLogger(__name__)
_LAST_BATCH_S = 10.0

_Stamps = tuple[tuple[int, int, int] | None, ...]


class _Running(NamedTuple):
    shipper: Shipper
    stop: asyncio.Event
    task: asyncio.Task[None]


async def register(deliveries: Deliveries, d: AnyDestination) -> None:
    """Make a destination known to the spool; one that was known keeps its progress."""
    now_us = time.time_ns() // 1000
    await deliveries.register(d.name, d.kind, now_us=now_us, since_us=d.since_us, classes=d.classes)


class Shipping:
    """Owns the shippers' tasks and keeps `parts.shippers` and what retention waits for in line with them."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._group: asyncio.TaskGroup | None = None
        self._running: dict[str, _Running] = {}
        self._stamps = {d.name: _stamps(d) for d in parts.settings.destinations}

    def start(self, group: asyncio.TaskGroup) -> None:
        """Begin every shipper in the program's own group of tasks."""
        self._group = group
        for shipper in self._parts.shippers:
            self._begin(shipper)

    def stop(self) -> list[asyncio.Task[None]]:
        """Let batches on their way come to an end; returns the tasks that are to be waited for."""
        for running in self._running.values():
            running.stop.set()
        return [running.task for running in self._running.values()]

    def renewed(self) -> list[str]:
        """Destinations whose token, certificate or key file has changed since it was read."""
        return [d.name for d in self._parts.settings.destinations if _stamps(d) != self._stamps.get(d.name)]

    def put_off(self) -> None:
        """Do not name destinations as renewed again until their files change once more."""
        self._stamps = {d.name: _stamps(d) for d in self._parts.settings.destinations}

    def made(self, wanted: Sequence[AnyDestination]) -> dict[str, Shipper]:
        """New shippers for the destinations that differ from what runs, by name. Nothing is started.

        Raises:
            OSError: a file that a destination names cannot be used.
        """
        present = {d.name: d for d in self._parts.settings.destinations}
        renewed = set(self.renewed())
        return {
            d.name: shipper_of(d, self._parts.deliveries)
            for d in wanted
            if present.get(d.name) != d or d.name in renewed
        }

    async def change(self, wanted: Sequence[AnyDestination], made: dict[str, Shipper]) -> None:
        """Put shippers in the place of those that differ, and end those that are not wanted any more."""
        stamps = {d.name: _stamps(d) for d in wanted}
        for d in wanted:
            await register(self._parts.deliveries, d)
        gone = [name for name in self._running if name in made or name not in stamps]
        await asyncio.gather(*(self._end(name) for name in gone))
        shippers = {s.name: s for s in self._parts.shippers} | made
        self._parts.shippers = tuple(shippers[d.name] for d in wanted)
        self._parts.retention.destinations = pruned_for(wanted)
        self._parts.retention.configured = [d.name for d in wanted]
        self._parts.compaction.rollups_wanted_by = pruned_for(wanted, RecordClass.ROLLUP)
        for retention in self._parts.summary_retentions:
            retention.destinations = pruned_for(wanted, retention.record_class)
        self._stamps = stamps
        for shipper in made.values():
            self._begin(shipper)

    def _begin(self, shipper: Shipper) -> None:
        assert self._group is not None
        stop = asyncio.Event()
        task = self._group.create_task(shipper.run(stop), name=f"shipper {shipper.name}")
        self._running[shipper.name] = _Running(shipper, stop, task)

    async def _end(self, name: str) -> None:
        """Let a shipper finish its batch; one that does not within `_LAST_BATCH_S` sends it again later."""
        running = self._running.pop(name)
        running.stop.set()
        await asyncio.wait([running.task], timeout=_LAST_BATCH_S)
        if not running.task.done():
            running.task.cancel()
            await asyncio.wait([running.task])
        await running.shipper.aclose()


def _stamps(d: AnyDestination) -> _Stamps:
    """What tells whether the files of a destination have changed."""
    files: list[Path | None] = []
    if isinstance(d, HttpDestination):
        files += [d.ca_file, d.cert_file, d.key_file]
    if isinstance(d, IngestDestination | InfluxDestination):
        files.append(d.token_file)
    if isinstance(d, InfluxDestination):
        files.append(d.password_file)
    return tuple(_stamp(path) for path in files if path is not None)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
