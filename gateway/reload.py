"""Configuration changes in a running gateway: shippers and notifiers are replaced without a restart.

A reload is all or nothing: if one key needs a restart or a file cannot be used, the old configuration stays
active, with the reasons in the log and at `/config`. A stopped shipper leaves its open batch in the spool, a
stopped notifier its messages in the outbox, so a change loses nothing. An unconfirmed trial is reverted here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

from cloud_sync.model.records import RecordClass
from cloud_sync.runtime.server_sockets import raise_fd_limit
from cloud_sync.runtime.settings_file import InvalidSettingsError
from gateway.build import (
    build_check,
    build_committer_options,
    build_notifiers,
    build_receivers,
    build_retention_policy,
    drop_removed_channels,
    limit_wal_size,
    reconfigure_processing,
)
from gateway.settings import config_changes
from gateway.settings import gateway_settings as given
from gateway.settings.config_changes import diff_settings, find_reload_obstacles, flatten_settings
from gateway.settings.schema import FileRole
from gateway.spool.errors import SpoolError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cloud_sync.delivery.shipper import Shipper
    from cloud_sync.runtime.watchdog import Watchdog
    from gateway.alerts.notifier import AlertNotifier
    from gateway.runtime import Control, Runtime
    from gateway.settings.destinations import AnyDestination
    from gateway.settings.gateway_settings import GatewaySettings
    from gateway.spool.deliveries import Deliveries
    from gateway.status.active_config import ActiveConfig

_log = logging.getLogger(__name__)
_SHIPPER_STOP_TIMEOUT_S = 10.0

_FileStamps = tuple[tuple[int, int, int] | None, ...]


class _RunningShipper(NamedTuple):
    shipper: Shipper
    stop: asyncio.Event
    task: asyncio.Task[None]


async def register_destination(deliveries: Deliveries, d: AnyDestination) -> None:
    """Make a destination known to the spool; one that was known keeps its progress."""
    now_us = time.time_ns() // 1000
    await deliveries.register(d.name, d.kind, now_us=now_us, since_us=d.since_us, classes=d.classes)


class DeliverySupervisor:
    """Owns the shippers' tasks and keeps `parts.shippers` and what retention waits for in line with them."""

    def __init__(self, parts: Runtime) -> None:
        self._parts = parts
        self._group: asyncio.TaskGroup | None = None
        self._running: dict[str, _RunningShipper] = {}
        self._stamps = {d.name: _file_stamps(d) for d in parts.settings.destinations}

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

    def destinations_with_changed_files(self) -> list[str]:
        """Destinations whose token, certificate or key file has changed since it was read."""
        return [
            d.name for d in self._parts.settings.destinations if _file_stamps(d) != self._stamps.get(d.name)
        ]

    def defer_changed_files(self) -> None:
        """Do not name destinations as renewed again until their files change once more."""
        self._stamps = {d.name: _file_stamps(d) for d in self._parts.settings.destinations}

    def made(self, wanted: Sequence[AnyDestination]) -> dict[str, Shipper]:
        """New shippers for the destinations that differ from what runs, by name. Nothing is started.

        Raises:
            OSError: a file that a destination names cannot be used.
        """
        present = {d.name: d for d in self._parts.settings.destinations}
        destinations_with_changed_files = set(self.destinations_with_changed_files())
        return {
            d.name: d.build_shipper(self._parts.spool.deliveries)
            for d in wanted
            if present.get(d.name) != d or d.name in destinations_with_changed_files
        }

    async def change(self, wanted: Sequence[AnyDestination], made: dict[str, Shipper]) -> None:
        """Put shippers in the place of those that differ, and end those that are not wanted any more."""
        stamps = {d.name: _file_stamps(d) for d in wanted}
        for d in wanted:
            await register_destination(self._parts.spool.deliveries, d)
        gone = [name for name in self._running if name in made or name not in stamps]
        await asyncio.gather(*(self._end(name) for name in gone))
        shippers = {s.name: s for s in self._parts.shippers} | made
        self._parts.shippers = tuple(shippers[d.name] for d in wanted)
        retention, receivers = self._parts.retention, build_receivers(wanted)
        retention.reconfigure(
            replace(retention.policy, receivers=receivers, configured=[d.name for d in wanted])
        )
        self._parts.spool.compaction.rollup_receivers = receivers[RecordClass.ROLLUP]
        self._stamps = stamps
        for shipper in made.values():
            self._begin(shipper)

    def _begin(self, shipper: Shipper) -> None:
        assert self._group is not None
        stop = asyncio.Event()
        task = self._group.create_task(shipper.run(stop), name=f"shipper {shipper.name}")
        self._running[shipper.name] = _RunningShipper(shipper, stop, task)

    async def _end(self, name: str) -> None:
        """Let a shipper finish its batch; one that does not within `_LAST_BATCH_S` sends it again later."""
        running = self._running.pop(name)
        running.stop.set()
        await asyncio.wait([running.task], timeout=_SHIPPER_STOP_TIMEOUT_S)
        if not running.task.done():
            running.task.cancel()
            await asyncio.wait([running.task])
        await running.shipper.aclose()


def _file_stamps(d: AnyDestination) -> _FileStamps:
    """What tells whether the files of a destination have changed."""
    files = d.list_files(FileRole.SECRET, FileRole.CERTIFICATE, FileRole.KEY)
    return tuple(_file_stamp(path) for _, _, path in files)


def _file_stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


_NOTIFIER_STOP_TIMEOUT_S: Final = 5.0


class _RunningNotifier(NamedTuple):
    notifier: AlertNotifier
    stop: asyncio.Event
    task: asyncio.Task[None]


class NotifierSupervisor:
    """Owns the desks' tasks, and keeps `parts.desks` in line with them."""

    def __init__(self, parts: Runtime) -> None:
        self._parts = parts
        self._group: asyncio.TaskGroup | None = None
        self._running: list[_RunningNotifier] = []

    def start(self, group: asyncio.TaskGroup) -> None:
        """Begin every desk in the program's own group of tasks."""
        self._group = group
        self._begin()

    def stop(self) -> list[asyncio.Task[None]]:
        """Let messages on their way come to an end; returns the tasks that are to be waited for."""
        for running in self._running:
            running.stop.set()
        return [running.task for running in self._running]

    def made(self, wanted: GatewaySettings) -> tuple[AlertNotifier, ...] | None:
        """New desks, None where those that run will do. Nothing is started.

        Raises:
            OSError: a file that a channel names cannot be used.
        """
        if wanted.alerts == self._parts.settings.alerts:
            return None
        return build_notifiers(wanted, self._parts.spool.database)

    async def change(self, wanted: GatewaySettings, made: tuple[AlertNotifier, ...] | None) -> None:
        """Put desks in the place of those that run."""
        if made is None:
            return
        tasks = self.stop()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=_NOTIFIER_STOP_TIMEOUT_S)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)
        for running in self._running:
            await running.notifier.aclose()
        await drop_removed_channels(wanted, self._parts.spool.database)
        self._parts.notifiers = made
        self._begin()

    def _begin(self) -> None:
        assert self._group is not None
        self._running = []
        for notifier in self._parts.notifiers:
            stop = asyncio.Event()
            task = self._group.create_task(notifier.run(stop), name=f"channel {notifier.channel.name}")
            self._running.append(_RunningNotifier(notifier, stop, task))


_CHECK_INTERVAL_S: Final = 5.0
_TRIAL_CHECK_INTERVAL_S: Final = 0.5


class Reloader:
    """Takes over configurations. `reload_once` is the step, `run` the loop."""

    def __init__(
        self,
        parts: Runtime,
        shipping: DeliverySupervisor,
        notifier_supervisor: NotifierSupervisor,
        control: Control,
        watchdog: Watchdog,
        *,
        active_config: ActiveConfig,
    ) -> None:
        self._parts = parts
        self._active_config = active_config
        self._delivery_supervisor = shipping
        self._notifier_supervisor = notifier_supervisor
        self._control = control
        self._watchdog = watchdog

    async def run(self) -> None:
        """Reload when it is asked for, look after trials and renewed files, until the gateway is to stop."""
        while not self._control.stop.is_set():
            on_trial = self._trial_time_left_s() is not None
            try:
                async with asyncio.timeout(_TRIAL_CHECK_INTERVAL_S if on_trial else _CHECK_INTERVAL_S):
                    await self._control.wake.wait()
            except TimeoutError:
                pass
            self._control.wake.clear()
            if self._control.stop.is_set():
                return
            if self._control.reload_requested:
                self._control.reload_requested = False
                self._watchdog.reloading()
                await self.reload_once()
                self._watchdog.ready()
            await self._check_trial()
            await self._reload_changed_files()

    async def reload_once(self) -> list[str]:
        """Read the configuration and take it over; returns why it is refused, nothing when it was not."""
        active_config = self._active_config
        active_config.attempts += 1
        active_config.refused, active_config.changed = [], []
        config = self._control.config
        if config is None:
            reasons = ["this gateway was not started with a file"]
        else:
            try:
                reasons = await self._apply_settings(
                    await asyncio.to_thread(given.load_settings, config_changes.active_config_path(config))
                )
            except InvalidSettingsError as fault:
                reasons = [str(each) for each in fault.faults]
            except (OSError, SpoolError) as fault:
                reasons = [str(fault)]
        if reasons:
            active_config.refused, active_config.changed = reasons, []
            _log.error(
                "the configuration was not reloaded, the old one stays in force: %s", "; ".join(reasons)
            )
        return reasons

    async def _apply_settings(self, new: GatewaySettings) -> list[str]:
        """Bring settings into force, or say why that is impossible.

        Raises:
            OSError: a file that a destination or channel names cannot be used; nothing was changed.
            SpoolError: the spool cannot be read; nothing was changed.
        """
        parts = self._parts
        changed = diff_settings(flatten_settings(parts.settings), flatten_settings(new))
        refused = find_reload_obstacles(changed)
        if refused:
            return refused
        made, notifiers = (
            self._delivery_supervisor.made(new.destinations),
            self._notifier_supervisor.made(new),
        )
        await reconfigure_processing(new, parts)
        tuned = {change.key for change in changed}
        parts.committer.reconfigure(build_committer_options(new.spool))
        parts.spool.capacity.reconfigure(new.spool.max_bytes, new.spool.min_free_bytes)
        await limit_wal_size(parts.spool.database, new.spool.max_bytes)
        parts.retention.reconfigure(build_retention_policy(new))
        parts.spool.catalog.max_series = new.spool.max_series
        listen = new.ingress.listen
        parts.listener.reconfigure(
            max_connections=raise_fd_limit(listen.max_connections),
            max_packet_bytes=listen.max_packet_bytes,
        )
        if parts.host is not None:
            parts.host.period_s = new.ingress.host.period_s
        if any(key.startswith(("checks", "report_by_exception")) for key in tuned):
            parts.committer.replace_check(build_check(new, parts.spool.catalog, parts.clock_corrector.clock))
        if any(key.startswith("ingress.rule") for key in tuned):
            parts.committer.decoder.replace_rules(new.ingress.rules.rules)
            parts.listener.clear_permission_caches()
        logging.getLogger().setLevel(new.log_level.upper())
        await self._delivery_supervisor.change(new.destinations, made)
        await self._notifier_supervisor.change(new, notifiers)
        parts.settings = new
        self._active_config.activate(sorted(tuned | {f"destinations[{name}]" for name in made}))
        _log.info("reloaded: %s", ", ".join(self._active_config.changed) or "nothing differs")
        return []

    async def _reload_changed_files(self) -> None:
        """Give destinations whose token or certificate files were replaced what is in them now."""
        if not self._delivery_supervisor.destinations_with_changed_files():
            return
        wanted = self._parts.settings.destinations
        try:
            made = self._delivery_supervisor.made(wanted)
        except OSError as fault:
            self._delivery_supervisor.defer_changed_files()
            _log.warning(
                "a file of a destination cannot be used; what was read before stays in force: %s", fault
            )
            return
        await self._delivery_supervisor.change(wanted, made)
        _log.info("read again: token or certificate of %s", ", ".join(made))

    async def _check_trial(self) -> None:
        """Give up a configuration whose trial is over without a confirmation."""
        config, left_s = self._control.config, self._trial_time_left_s()
        if config is None or left_s is None or left_s >= 0 or self._control.given_up:
            return
        self._control.given_up = True
        _log.error(
            "nobody confirmed the configuration in time; going back to %s",
            config_changes.previous_config_path(config),
        )
        await asyncio.to_thread(revert_trial, config)
        if await self.reload_once():
            _log.error("that takes a restart: starting again")
            self._control.request_restart()

    def _trial_time_left_s(self) -> float | None:
        return (
            None if self._control.config is None else config_changes.trial_time_left_s(self._control.config)
        )


def revert_trial(config: Path) -> bool:
    """Put the configuration before a trial back in its place; False when its folder cannot be written.

    Even then it is in force from the next start on: the marker stays, and says that the trial is over.
    """
    try:
        config_changes.restore_previous_config(config)
    except OSError as fault:
        _log.warning(
            "%s cannot be put back, but is in force: %s", config_changes.previous_config_path(config), fault
        )
        return False
    return True
