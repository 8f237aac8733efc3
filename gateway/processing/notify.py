"""The notifier: sends what waits in the outbox, each channel by itself, until it is sent or too old.

What a rule has to say is gathered for `group_wait_s` and then said at most once in `group_interval_s`, so
that a flood of one rule is one message, and a long one is a few. A channel that fails is tried again with
backoff; a notice older than `give_up_s` is dropped and counted. A message is taken out of the outbox after it
was sent: a kill in between sends it twice, never not at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from cloud_sync.backoff import Backoff
from cloud_sync.progress import Stage
from gateway.processing.messages import message_of
from gateway.spool import outbox
from gateway.spool.errors import SpoolError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gateway.processing.messages import Message
    from gateway.spool.database import Database
    from gateway.spool.outbox import Waiting

_log = logging.getLogger(__name__)
_LOOK_S = 1.0
_STEP_WITHIN_S = 120.0


class ChannelFault(Exception):  # noqa: N818 - said of the channel
    """A channel did not take a message; it is to be tried again. `str()` says why, without secrets."""


class Channel(Protocol):
    """Somewhere people are told."""

    name: str

    async def send(self, message: Message) -> None:
        """Tell them.

        Raises:
            ChannelFault: they were not told.
        """
        ...

    async def aclose(self) -> None:
        """Give up connections."""
        ...


@dataclass(frozen=True, slots=True)
class NotifyTerms:
    """How long what is alike is gathered, and how long it is tried to be told."""

    group_wait_s: float = 5.0
    group_interval_s: float = 60.0
    give_up_s: float = 86_400.0


@dataclass(slots=True)
class ChannelCounters:
    """What has become of one channel's messages since start."""

    sent: int = 0
    failed: int = 0
    given_up: int = 0
    last_error: str = ""
    last_sent_at_us: int | None = None


class ChannelDesk:
    """Sends for one channel. `send_once` is the step that tests call, `run` the loop."""

    def __init__(
        self,
        channel: Channel,
        database: Database,
        gateway_id: str,
        terms: NotifyTerms = NotifyTerms(),
        *,
        backoff: Backoff = Backoff(first_s=2.0, ceiling_s=300.0, floor_s=1.0),  # noqa: B008 - the same
        clock_us: Callable[[], int] = lambda: time.time_ns() // 1000,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.channel = channel
        self.counters = ChannelCounters()
        self.stage = Stage(f"channel {channel.name}")
        self._database = database
        self._gateway_id = gateway_id
        self._terms = terms
        self._backoff = backoff
        self._clock_us = clock_us
        self._monotonic = monotonic
        self._seen_at: dict[int, float] = {}
        self._age_when_seen_s: dict[int, float] = {}
        self._said_at: dict[str, float] = {}
        self._attempt = 0

    async def run(self, stop: asyncio.Event) -> None:
        """Send until `stop` is set."""
        while not stop.is_set():
            self.stage.works(_STEP_WITHIN_S)
            try:
                wait_s = await self.send_once()
            except SpoolError as fault:
                _log.warning("channel %s waits for the spool: %s", self.channel.name, fault)
                wait_s = _LOOK_S
            self.stage.works(wait_s + _STEP_WITHIN_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await stop.wait()
        self.stage.rests()

    async def send_once(self) -> float:
        """Send what is due; returns how long to wait before the next look, in seconds.

        Raises:
            SpoolError: the outbox cannot be read or written; a message may go out twice.
        """
        found = await self._database.read(lambda c: outbox.waiting(c, self.channel.name))
        found = await self._without_old(found)
        for group in self._due(found):
            message = message_of(self._gateway_id, [w.notice for w in group])
            try:
                await self.channel.send(message)
            except ChannelFault as fault:
                return self._failed(fault)
            self._attempt = 0
            self.counters.sent += 1
            self.counters.last_error = ""
            self.counters.last_sent_at_us = self._clock_us()
            self._said_at[message.rule] = self._monotonic()
            numbers = [w.number for w in group]
            await self._database.write(lambda c, numbers=numbers: outbox.take_away(c, numbers))  # type: ignore[misc]  # bound in the loop
        return _LOOK_S

    async def aclose(self) -> None:
        """Give up the channel's connections."""
        await self.channel.aclose()

    def _failed(self, fault: ChannelFault) -> float:
        self._attempt += 1
        self.counters.failed += 1
        if str(fault) != self.counters.last_error:
            _log.warning("channel %s: %s; it is tried again", self.channel.name, fault)
        self.counters.last_error = str(fault)
        return self._backoff.wait_s(self._attempt)

    async def _without_old(self, found: list[Waiting]) -> list[Waiting]:
        """What is worth sending; the rest is dropped.

        Age is by the clock up to when a notice was first seen, and then by time that passed: a clock that is
        set right after a start in 1970 makes nothing old.
        """
        now, now_us = self._monotonic(), self._clock_us()
        self._seen_at = {w.number: self._seen_at.get(w.number, now) for w in found}
        ages, terms = self._age_when_seen_s, self._terms
        self._age_when_seen_s = {
            w.number: ages.get(w.number, max(0.0, (now_us - w.queued_at_us) / 1e6)) for w in found
        }
        old = [
            w
            for w in found
            if self._age_when_seen_s[w.number] + now - self._seen_at[w.number] > terms.give_up_s
        ]
        if not old:
            return found
        self.counters.given_up += len(old)
        _log.error(
            "channel %s: %d notices were not sent in time and are dropped", self.channel.name, len(old)
        )
        numbers = [w.number for w in old]
        await self._database.write(lambda c: outbox.take_away(c, numbers, dropped=True))
        return [w for w in found if w.number not in set(numbers)]

    def _due(self, found: Sequence[Waiting]) -> list[list[Waiting]]:
        """Groups by rule that were gathered long enough, and whose rule has said nothing for long enough."""
        now = self._monotonic()
        groups: dict[str, list[Waiting]] = {}
        for waiting in found:
            groups.setdefault(waiting.notice.rule, []).append(waiting)
        return [
            group
            for rule, group in groups.items()
            if now - self._seen_at[group[0].number] >= self._terms.group_wait_s
            and now - self._said_at.get(rule, float("-inf")) >= self._terms.group_interval_s
        ]
