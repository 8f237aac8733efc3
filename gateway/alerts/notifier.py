"""Groups alert events into messages and sends them, one notifier per channel.

Messages wait in the outbox until they are sent or older than `give_up_s`. Events of one rule are collected
for `group_wait_s` and sent at most once per `group_interval_s`. A message leaves the outbox after it was
sent: a kill in between sends it twice, never not at all. The log channel is here because it is always on.
"""

from __future__ import annotations

import logging
import math
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from cloud_sync.model.records import AlertState, Severity
from cloud_sync.runtime.rates import Backoff
from cloud_sync.runtime.waits import sleep_or_stop
from cloud_sync.runtime.watchdog import StageProgress
from gateway.spool import processing_state
from gateway.spool.errors import SpoolError
from gateway.spool.processing_state import MAX_EXAMPLES, AlertExample, AlertNotice

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator, Sequence

    from gateway.alerts.alert_state import AlertEvent
    from gateway.spool.database import Database
    from gateway.spool.processing_state import QueuedNotice

_SEVERITY_LABELS = {Severity.INFO: "info", Severity.WARNING: "WARNING", Severity.CRITICAL: "CRITICAL"}


class AlertMessage(NamedTuple):
    """The alerts of one rule that began (`firing`) and ended, with the first few of each as examples."""

    gateway_id: str
    rule: str
    severity: Severity
    firing: int
    recovered: int
    examples: tuple[tuple[AlertState, AlertExample], ...]

    @property
    def subject(self) -> str:
        """A summary in one line."""
        names = {f"{e.sensor_id}/{e.sensor_type}" for _, e in self.examples}
        if self.firing + self.recovered == 1 and self.examples:
            (name,) = names
            what = "" if self.firing else " recovered"
            return f"{_SEVERITY_LABELS[self.severity]}{what}: {self.rule} of {name} at {self.gateway_id}"
        counts = [f"{n} {what}" for n, what in ((self.firing, "firing"), (self.recovered, "recovered")) if n]
        return f"{_SEVERITY_LABELS[self.severity]}: {self.rule}, {' and '.join(counts)} at {self.gateway_id}"

    @property
    def text(self) -> str:
        """The subject, and a line for each example."""
        lines = [self.subject]
        for state, example in self.examples:
            mark = "" if state is AlertState.FIRING else "recovered: "
            lines.append(f"{mark}{example.sensor_id}/{example.sensor_type}: {example.detail}")
        more = self.firing + self.recovered - len(self.examples)
        return "\n".join([*lines, f"and {more} more"] if more > 0 else lines)

    def document(self) -> dict[str, object]:
        """The JSON form; times are microseconds since 1970 UTC."""
        return {
            "text": self.text,
            "gateway_id": self.gateway_id,
            "rule": self.rule,
            "severity": self.severity.name.lower(),
            "firing": self.firing,
            "recovered": self.recovered,
            "alerts": [
                {"state": state.name.lower(), **{name: getattr(e, name) for name in e.__struct_fields__}}
                for state, e in self.examples
            ],
        }


def build_notices(
    events: Sequence[AlertEvent], name_of: Callable[[int], tuple[str, str]]
) -> Iterator[tuple[tuple[str, ...], AlertNotice]]:
    """One notice for each rule and state among `events`, with its channels."""
    groups: dict[tuple[str, AlertState], list[AlertEvent]] = {}
    for event in events:
        if event.state is AlertState.FIRING or event.rule.recovery:
            groups.setdefault((event.rule.name, event.state), []).append(event)
    for (rule, state), group in groups.items():
        examples = tuple(
            AlertExample(
                *name_of(event.series),
                event.at_us,
                event.value if math.isfinite(event.value) else None,
                event.threshold if math.isfinite(event.threshold) else None,
                event.findings,
                event.detail,
            )
            for event in group[:MAX_EXAMPLES]
        )
        yield (
            group[0].rule.channels,
            AlertNotice(rule, int(group[0].rule.severity), int(state), len(group), examples),
        )


def build_message(gateway_id: str, notices: Sequence[AlertNotice]) -> AlertMessage:
    """One message from all notices of one rule."""
    examples = [(AlertState(n.state), example) for n in notices for example in n.examples]
    examples.sort(key=lambda pair: pair[0])
    return AlertMessage(
        gateway_id,
        notices[-1].rule,
        Severity(max(n.severity for n in notices)),
        sum(n.series for n in notices if n.state == AlertState.FIRING),
        sum(n.series for n in notices if n.state == AlertState.RECOVERED),
        tuple(examples[:MAX_EXAMPLES]),
    )


_log = logging.getLogger(__name__)
_POLL_S = 1.0
_STEP_WITHIN_S = 120.0
_BACKOFF = Backoff(first_s=2.0, ceiling_s=300.0, floor_s=1.0)


class ChannelError(Exception):
    """A channel did not accept a message; try again. `str()` says why, without secrets."""


class AlertChannel(Protocol):
    """Where alert messages are sent."""

    name: str

    async def send(self, message: AlertMessage) -> None:
        """Send a message; raises ChannelError when it was not accepted."""

    async def aclose(self) -> None:
        """Close its connections."""


@dataclass(frozen=True, slots=True)
class NotifierOptions:
    """How long notices are collected, how often a rule may send, and when a notice is dropped."""

    group_wait_s: float = 5.0
    group_interval_s: float = 60.0
    give_up_s: float = 86_400.0


@dataclass(slots=True)
class ChannelCounters:
    """Messages of one channel since start."""

    sent: int = 0
    failed: int = 0
    given_up: int = 0
    last_error: str = ""
    last_sent_at_us: int | None = None


class _NoticeAge(NamedTuple):
    """Monotonic times of when a notice was queued and when it was first seen."""

    queued_at: float
    seen_at: float


class AlertNotifier:
    """Sends the notices of one channel; `run` repeats `send_once`."""

    def __init__(
        self,
        channel: AlertChannel,
        database: Database,
        gateway_id: str,
        options: NotifierOptions = NotifierOptions(),
        *,
        backoff: Backoff = _BACKOFF,
        clock_us: Callable[[], int] = lambda: time.time_ns() // 1000,
        monotonic: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.channel = channel
        self.counters = ChannelCounters()
        self.stage = StageProgress(f"channel {channel.name}")
        self._database = database
        self._gateway_id = gateway_id
        self._options = options
        self._backoff = backoff
        self._clock_us = clock_us
        self._monotonic = monotonic
        self._chance = chance
        self._ages: dict[int, _NoticeAge] = {}
        self._last_sent_at: dict[str, float] = {}
        self._attempt = 0

    async def run(self, stop: asyncio.Event) -> None:
        """Send until `stop` is set."""
        while not stop.is_set():
            self.stage.begin_step(_STEP_WITHIN_S)
            try:
                wait_s = await self.send_once()
            except SpoolError as fault:
                _log.warning("channel %s waits for the spool: %s", self.channel.name, fault)
                wait_s = _POLL_S
            self.stage.begin_step(wait_s + _STEP_WITHIN_S)
            await sleep_or_stop(stop, wait_s)
        self.stage.set_idle()

    async def send_once(self) -> float:
        """Send the messages that are due; returns the seconds to wait until the next call.

        After a SpoolError a message may be sent twice.
        """
        found = await self._database.read(
            lambda c: processing_state.read_queued_notices(c, self.channel.name)
        )
        found = await self._drop_expired(found)
        for group in self._due(found):
            message = build_message(self._gateway_id, [w.notice for w in group])
            try:
                await self.channel.send(message)
            except ChannelError as fault:
                return self._failed(fault)
            self._attempt = 0
            self.counters.sent += 1
            self.counters.last_error = ""
            self.counters.last_sent_at_us = self._clock_us()
            self._last_sent_at[message.rule] = self._monotonic()
            numbers = [w.number for w in group]
            await self._database.write(lambda c, numbers=numbers: processing_state.delete_notices(c, numbers))  # type: ignore[misc]  # bound in the loop
        return _POLL_S

    async def aclose(self) -> None:
        """Close the channel's connections."""
        await self.channel.aclose()

    def _failed(self, fault: ChannelError) -> float:
        self._attempt += 1
        self.counters.failed += 1
        if str(fault) != self.counters.last_error:
            _log.warning("channel %s: %s; will retry", self.channel.name, fault)
        self.counters.last_error = str(fault)
        return self._backoff.wait_s(self._attempt, self._chance())

    async def _drop_expired(self, found: list[QueuedNotice]) -> list[QueuedNotice]:
        """Drop notices that are too old; returns the others.

        The wall clock gives a notice's age when it is first seen, the monotonic clock what is added later, so
        that correcting a clock that started in 1970 makes no notice old.
        """
        now, now_us = self._monotonic(), self._clock_us()
        ages = {}
        for w in found:
            queued_at = now - max(0.0, (now_us - w.queued_at_us) / 1e6)
            ages[w.number] = self._ages.get(w.number, _NoticeAge(queued_at, now))
        self._ages = ages
        old = [w for w in found if now - self._ages[w.number].queued_at > self._options.give_up_s]
        if not old:
            return found
        self.counters.given_up += len(old)
        _log.error(
            "channel %s: dropped %d notices that could not be sent in time", self.channel.name, len(old)
        )
        numbers = [w.number for w in old]
        await self._database.write(lambda c: processing_state.delete_notices(c, numbers, dropped=True))
        return [w for w in found if w.number not in set(numbers)]

    def _due(self, found: Sequence[QueuedNotice]) -> list[list[QueuedNotice]]:
        """The notices by rule, of rules whose collection and sending intervals have passed."""
        now = self._monotonic()
        groups: dict[str, list[QueuedNotice]] = {}
        for waiting in found:
            groups.setdefault(waiting.notice.rule, []).append(waiting)
        return [
            group
            for rule, group in groups.items()
            if now - self._ages[group[0].number].seen_at >= self._options.group_wait_s
            and now - self._last_sent_at.get(rule, float("-inf")) >= self._options.group_interval_s
        ]


_alert_log = logging.getLogger("gateway.alerts")
_LOG_LEVELS = {
    Severity.INFO: logging.INFO,
    Severity.WARNING: logging.WARNING,
    Severity.CRITICAL: logging.ERROR,
}


class LogChannel:
    """Implements `AlertChannel`: one log line a message; recoveries are logged as information."""

    def __init__(self, name: str = "log") -> None:
        self.name = name

    async def send(self, message: AlertMessage) -> None:
        """Log the message."""
        level = _LOG_LEVELS[message.severity] if message.firing else logging.INFO
        _alert_log.log(level, "%s", message.text.replace("\n", " | "))

    async def aclose(self) -> None:
        """Nothing to close."""
