"""Configuration changes in a running gateway, without a restart.

A reload is all or nothing: if one key needs a restart or a file cannot be used, the old configuration stays
active, with the reasons in the log and at `/config`. A trial that nobody confirmed is reverted here.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from cloud_sync.model.records import RecordClass
from cloud_sync.runtime.server_sockets import raise_fd_limit
from cloud_sync.runtime.settings_file import InvalidSettingsError
from cloud_sync.runtime.waits import sleep_or_stop
from cloud_sync.runtime.watched_file import file_stamp
from gateway.build import (
    build_alert_stage,
    build_check,
    build_notifiers,
    build_retention_policy,
    drop_removed_channels,
    limit_wal_size,
    register_destinations,
)
from gateway.ingress.host_metrics import HostMetricsSource
from gateway.settings import config_changes
from gateway.settings.config_changes import diff_settings, find_reload_obstacles, flatten_settings
from gateway.settings.gateway_settings import load_settings
from gateway.settings.schema import FileRole
from gateway.spool.errors import SpoolError

if TYPE_CHECKING:
    from pathlib import Path

    from cloud_sync.delivery.shipper import Shipper
    from cloud_sync.runtime.watchdog import Watchdog
    from cloud_sync.runtime.watched_file import FileStamp
    from gateway.runtime import Control, Runtime
    from gateway.settings.gateway_settings import GatewaySettings
    from gateway.status.active_config import ActiveConfig

_log = logging.getLogger(__name__)
_CHECK_INTERVAL_S: Final = 5.0
_TRIAL_CHECK_INTERVAL_S: Final = 0.5


class Reloader:
    """Applies configurations. `reload_once` is the step, `run` the loop."""

    def __init__(
        self, runtime: Runtime, control: Control, watchdog: Watchdog, active_config: ActiveConfig
    ) -> None:
        self._runtime = runtime
        self._control = control
        self._watchdog = watchdog
        self._active_config = active_config
        self._stamps = _destination_stamps(runtime.settings)

    async def run(self) -> None:
        """Reload on request, watch trials and replaced files, until the gateway is to stop."""
        control = self._control
        while not control.stop.is_set():
            on_trial = self._trial_time_left_s() is not None
            await sleep_or_stop(control.wake, _TRIAL_CHECK_INTERVAL_S if on_trial else _CHECK_INTERVAL_S)
            control.wake.clear()
            if control.stop.is_set():
                return
            if control.reload_requested:
                control.reload_requested = False
                self._watchdog.reloading()
                await self.reload_once()
                self._watchdog.ready()
            await self._check_trial()
            await self._reload_changed_files()

    async def reload_once(self) -> list[str]:
        """Read the configuration and apply it; returns why it is refused, nothing if it is not."""
        active_config, config = self._active_config, self._control.config
        active_config.attempts += 1
        active_config.refused, active_config.changed = [], []
        if config is None:
            reasons = ["this gateway was not started with a file"]
        else:
            try:
                path = config_changes.active_config_path(config)
                reasons = await self._apply_settings(await asyncio.to_thread(load_settings, path))
            except InvalidSettingsError as invalid:
                reasons = list(map(str, invalid.faults))
            except (OSError, SpoolError) as fault:
                reasons = [str(fault)]
        if reasons:
            active_config.refused, active_config.changed = reasons, []
            _log.error("the configuration was not reloaded, the old one stays active: %s", "; ".join(reasons))
        return reasons

    async def _apply_settings(self, new: GatewaySettings) -> list[str]:
        """Apply settings, or return why that is impossible.

        After an OSError (a file cannot be used) or SpoolError nothing was changed.
        """
        runtime, old = self._runtime, self._runtime.settings
        changes = diff_settings(flatten_settings(old), flatten_settings(new))
        if obstacles := find_reload_obstacles(changes):
            return obstacles
        database = runtime.spool.database
        shippers = self._build_shippers(new)
        notifiers = build_notifiers(new, database) if new.alerts != old.alerts else None
        await self._reconfigure_processing(new)
        self._reconfigure_ingress(new, {change.key for change in changes})
        runtime.spool.capacity.reconfigure(new.spool.max_bytes, new.spool.min_free_bytes)
        runtime.spool.catalog.max_series = new.spool.max_series
        await limit_wal_size(database, new.spool.max_bytes)
        logging.getLogger().setLevel(new.log_level.upper())
        await self._replace_shippers(new, shippers)
        if notifiers is not None:
            await drop_removed_channels(new, database)
            await runtime.notifying.replace(list(notifiers), notifiers)
        runtime.settings = new
        self._active_config.activate(
            sorted({change.key for change in changes} | {f"destinations[{name}]" for name in shippers})
        )
        _log.info("reloaded: %s", ", ".join(self._active_config.changed) or "nothing differs")
        return []

    def _reconfigure_ingress(self, new: GatewaySettings, changed_keys: set[str]) -> None:
        runtime, listen = self._runtime, new.ingress.listen
        runtime.committer.options = new.spool.committer_options
        runtime.listener.reconfigure(
            max_connections=raise_fd_limit(listen.max_connections), max_packet_bytes=listen.max_packet_bytes
        )
        for source in runtime.sources:
            if isinstance(source, HostMetricsSource):
                source.period_s = new.ingress.host.period_s
        if any(key.startswith(("checks", "report_by_exception")) for key in changed_keys):
            check = build_check(new, runtime.spool.catalog, runtime.clock_corrector.clock)
            runtime.committer.check = check
        if any(key.startswith("ingress.rule") for key in changed_keys):
            runtime.committer.decoder.replace_rules(new.ingress.rules.rules)
            runtime.listener.clear_permission_caches()

    async def _reconfigure_processing(self, new: GatewaySettings) -> None:
        """Change the stages of processing between two steps; their state stays."""
        runtime = self._runtime
        roller, before, after = runtime.roller, runtime.alerts, runtime.alerts
        if new.alerts != runtime.settings.alerts:
            after = build_alert_stage(new, runtime.spool.catalog)

        def hand_over() -> None:
            if roller is not None:
                roller.reconfigure(new.rollups.roller_options)
            if after is not None and before is not None and after is not before:
                after.take_over(before)

        stages = [stage for stage in (roller, after) if stage is not None]
        await runtime.commit_consumer.reconfigure(new.processing.consumer_options, stages, hand_over)
        runtime.alerts = after

    def _build_shippers(self, new: GatewaySettings) -> dict[str, Shipper]:
        """New shippers for destinations that differ, or whose files do; OSError if a file cannot be used."""
        old = {d.name: d for d in self._runtime.settings.destinations}
        return {
            d.name: d.build_shipper(self._runtime.spool.deliveries)
            for d in new.destinations
            if old.get(d.name) != d or d.name in self._changed_files()
        }

    async def _replace_shippers(self, new: GatewaySettings, shippers: dict[str, Shipper]) -> None:
        runtime, stamps = self._runtime, _destination_stamps(new)
        await register_destinations(runtime.spool.deliveries, new.destinations)
        policy = build_retention_policy(new)
        runtime.retention.reconfigure(policy)
        runtime.spool.compaction.rollup_receivers = policy.receivers[RecordClass.ROLLUP]
        await runtime.shipping.replace([d.name for d in new.destinations], shippers)
        self._stamps = stamps

    def _changed_files(self) -> set[str]:
        """Destinations whose token, certificate or key file has changed since it was read."""
        now = _destination_stamps(self._runtime.settings)
        return {name for name, stamps in now.items() if stamps != self._stamps.get(name)}

    async def _reload_changed_files(self) -> None:
        """Replace the shippers of destinations whose token or certificate files were replaced."""
        if not self._changed_files():
            return
        settings = self._runtime.settings
        try:
            shippers = self._build_shippers(settings)
        except OSError as fault:
            self._stamps = _destination_stamps(settings)  # try again after the next change only
            _log.warning("a destination's file cannot be used; its old content stays in use: %s", fault)
            return
        await self._replace_shippers(settings, shippers)
        _log.info("read again: token or certificate of %s", ", ".join(shippers))

    async def _check_trial(self) -> None:
        """Revert a configuration whose trial ended without a confirmation."""
        config, left_s = self._control.config, self._trial_time_left_s()
        if config is None or left_s is None or left_s >= 0 or self._control.trial_reverted:
            return
        self._control.trial_reverted = True
        previous = config_changes.previous_config_path(config)
        _log.error("nobody confirmed the configuration in time; going back to %s", previous)
        await asyncio.to_thread(revert_trial, config)
        if await self.reload_once():
            _log.error("that needs a restart: starting again")
            self._control.request_restart()

    def _trial_time_left_s(self) -> float | None:
        config = self._control.config
        return None if config is None else config_changes.trial_time_left_s(config)


def _destination_stamps(settings: GatewaySettings) -> dict[str, list[FileStamp]]:
    """What identifies the content of each destination's files."""
    roles = (FileRole.SECRET, FileRole.CERTIFICATE, FileRole.KEY)
    return {d.name: [file_stamp(path) for *_, path in d.list_files(*roles)] for d in settings.destinations}


def revert_trial(config: Path) -> bool:
    """Put the configuration before a trial back; False if its folder cannot be written.

    Even then it is used from the next start on: the marker stays, and says that the trial has ended.
    """
    try:
        config_changes.restore_previous_config(config)
    except OSError as fault:
        previous = config_changes.previous_config_path(config)
        _log.warning("%s cannot be put back, but is used: %s", previous, fault)
        return False
    return True
