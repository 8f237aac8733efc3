"""A new configuration for a running gateway: taken over where that is possible, refused as a whole otherwise.

Reload is all or nothing: when one key cannot be changed without a restart, or a file cannot be used, the old
configuration stays in force, with the reasons in the log and at `/config`. A configuration on trial
(`gateway.settings.pending`) that nobody confirms in time is given up here.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from cloud_sync.settings_file import SettingsFault
from gateway import settings as given
from gateway.checking import check_of
from gateway.following import follow_on
from gateway.ingress.descriptors import connections_affordable
from gateway.keeping import giving_up_of, limit_log
from gateway.settings import pending
from gateway.settings.changes import changes, refusals
from gateway.settings.effective import flat
from gateway.spool.errors import SpoolError

if TYPE_CHECKING:
    from pathlib import Path

    from cloud_sync.watchdog import Watchdog
    from gateway.orders import Orders
    from gateway.parts import Parts
    from gateway.settings import GatewaySettings
    from gateway.shipping import Shipping
    from gateway.telling import Telling

_log = logging.getLogger(__name__)
_LOOK_S: Final = 5.0
_TRIAL_LOOK_S: Final = 0.5


class Reloader:
    """Takes over configurations. `reload_once` is the step, `run` the loop."""

    def __init__(
        self, parts: Parts, shipping: Shipping, telling: Telling, orders: Orders, watchdog: Watchdog
    ) -> None:
        self._parts = parts
        self._shipping = shipping
        self._telling = telling
        self._orders = orders
        self._watchdog = watchdog

    async def run(self) -> None:
        """Reload when it is asked for, look after trials and renewed files, until the gateway is to stop."""
        while not self._orders.stop.is_set():
            on_trial = self._left_s() is not None
            try:
                async with asyncio.timeout(_TRIAL_LOOK_S if on_trial else _LOOK_S):
                    await self._orders.wake.wait()
            except TimeoutError:
                pass
            self._orders.wake.clear()
            if self._orders.stop.is_set():
                return
            if self._orders.reload_asked:
                self._orders.reload_asked = False
                self._watchdog.reloading()
                await self.reload_once()
                self._watchdog.ready()
            await self._look_after_trial()
            await self._take_renewed_files()

    async def reload_once(self) -> list[str]:
        """Read the configuration and take it over; returns why it is refused, nothing when it was not."""
        in_force = self._parts.in_force
        in_force.attempts += 1
        in_force.refused, in_force.changed = [], []
        config = self._orders.config
        if config is None:
            reasons = ["this gateway was not started with a file"]
        else:
            try:
                reasons = await self._take_over(await asyncio.to_thread(given.load, pending.chosen(config)))
            except SettingsFault as fault:
                reasons = [str(each) for each in fault.faults]
            except (OSError, SpoolError) as fault:
                reasons = [str(fault)]
        if reasons:
            in_force.refused, in_force.changed = reasons, []
            _log.error(
                "the configuration was not reloaded, the old one stays in force: %s", "; ".join(reasons)
            )
        return reasons

    async def _take_over(self, new: GatewaySettings) -> list[str]:
        """Bring settings into force, or say why that is impossible.

        Raises:
            OSError: a file that a destination or channel names cannot be used; nothing was changed.
            SpoolError: the spool cannot be read; nothing was changed.
        """
        parts = self._parts
        changed = changes(flat(parts.settings), flat(new))
        refused = refusals(changed)
        if refused:
            return refused
        made, desks = self._shipping.made(new.destinations), self._telling.made(new)
        await follow_on(new, parts)
        tuned = {change.key for change in changed}
        parts.committer.retune(
            interval_s=new.spool.commit_interval_ms / 1000,
            max_pending_bytes=new.spool.max_pending_bytes,
            refuse_when_full=new.spool.on_full == "refuse",
        )
        parts.capacity.retune(new.spool.max_bytes, new.spool.min_free_bytes)
        await limit_log(parts.database, new.spool.max_bytes)
        parts.retention.giving_up = giving_up_of(new, parts.database, parts.segments, parts.capacity)
        parts.retention.keep_s = new.spool.keep_delivered_h * 3600
        for retention in parts.summary_retentions:
            retention.keep_s = new.rollups.keep_d * 86_400
        parts.book.max_series = new.spool.max_series
        listen = new.ingress.listen
        parts.listener.settings = replace(
            parts.listener.settings,
            max_connections=connections_affordable(listen.max_connections),
            max_packet_bytes=listen.max_packet_bytes,
        )
        if parts.host is not None:
            parts.host.period_s = new.ingress.host.period_s
        if any(key.startswith(("checks", "report_by_exception")) for key in tuned):
            parts.committer.check = check_of(new, parts.book, parts.restamper.clock)
        if any(key.startswith("ingress.rule") for key in tuned):
            parts.committer.change_rules(new.ingress.rules.rules)
            parts.listener.forget_permits()
        logging.getLogger().setLevel(new.log_level.upper())
        await self._shipping.change(new.destinations, made)
        await self._telling.change(new, desks)
        parts.settings = new
        parts.in_force.taken(sorted(tuned | {f"destinations[{name}]" for name in made}))
        _log.info("reloaded: %s", ", ".join(parts.in_force.changed) or "nothing differs")
        return []

    async def _take_renewed_files(self) -> None:
        """Give destinations whose token or certificate files were replaced what is in them now."""
        if not self._shipping.renewed():
            return
        wanted = self._parts.settings.destinations
        try:
            made = self._shipping.made(wanted)
        except OSError as fault:
            self._shipping.put_off()
            _log.warning(
                "a file of a destination cannot be used; what was read before stays in force: %s", fault
            )
            return
        await self._shipping.change(wanted, made)
        _log.info("read again: token or certificate of %s", ", ".join(made))

    async def _look_after_trial(self) -> None:
        """Give up a configuration whose trial is over without a confirmation."""
        config, left_s = self._orders.config, self._left_s()
        if config is None or left_s is None or left_s >= 0 or self._orders.given_up:
            return
        self._orders.given_up = True
        _log.error(
            "nobody confirmed the configuration in time; going back to %s", pending.previous_of(config)
        )
        await asyncio.to_thread(give_up, config)
        if await self.reload_once():
            _log.error("that takes a restart: starting again")
            self._orders.start_again()

    def _left_s(self) -> float | None:
        return None if self._orders.config is None else pending.left_s(self._orders.config)


def give_up(config: Path) -> bool:
    """Put the configuration before a trial back in its place; False when its folder cannot be written.

    Even then it is in force from the next start on: the marker stays, and says that the trial is over.
    """
    try:
        pending.roll_back(config)
    except OSError as fault:
        _log.warning("%s cannot be put back, but is in force: %s", pending.previous_of(config), fault)
        return False
    return True
