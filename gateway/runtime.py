"""A running gateway: its components in data-flow order, and the control signals it reacts to."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cloud_sync.delivery.shipper import Shipper
    from cloud_sync.runtime.watchdog import StageProgress
    from gateway.alerts.evaluator import AlertEvaluator
    from gateway.alerts.notifier import AlertNotifier
    from gateway.ingress.committer import Committer
    from gateway.ingress.host_metrics import HostMetricsSource
    from gateway.ingress.http.server import HttpSource
    from gateway.ingress.source import Pausable
    from gateway.mqtt.server import MqttServer
    from gateway.mqtt.subscriber import Subscriber
    from gateway.processing.clock import ClockCorrector
    from gateway.processing.commit_consumer import CommitConsumer
    from gateway.rollups.roller import Roller
    from gateway.settings.gateway_settings import GatewaySettings
    from gateway.spool.retention import Retention
    from gateway.spool.spool import Spool


@dataclass(slots=True, eq=False)
class Control:
    """The orders that have come in.

    Attributes:
        config: the file that a reload reads; None when there is none.
        stop: stop in order.
        wake: an order has come.
        reload_asked: read the configuration again.
        again: after the stop, start again with the configuration that is in force then.
        given_up: a configuration on trial was given up already.
    """

    config: Path | None = None
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    reload_requested: bool = False
    again: bool = False
    given_up: bool = False

    def request_stop(self) -> None:
        """SIGTERM, SIGINT."""
        self.stop.set()
        self.wake.set()

    def reload(self) -> None:
        """SIGHUP."""
        self.reload_requested = True
        self.wake.set()

    def request_restart(self) -> None:
        """SIGUSR1: stop in order and begin anew in the same process, for what a reload cannot change."""
        self.again = True
        self.request_stop()


@dataclass(slots=True)
class Runtime:
    """Everything a gateway consists of, in the order the data flows. `started_at` is monotonic seconds.

    `settings` and `shippers` change when the configuration is reloaded; everything else is there for good.
    """

    settings: GatewaySettings
    version: str
    started_at: float
    listener: MqttServer
    subscribers: tuple[Subscriber, ...]
    host: HostMetricsSource | None
    http: HttpSource | None
    committer: Committer
    clock_corrector: ClockCorrector
    spool: Spool
    commit_consumer: CommitConsumer
    roller: Roller | None
    alerts: AlertEvaluator | None
    notifiers: tuple[AlertNotifier, ...]
    retention: Retention
    shippers: tuple[Shipper, ...]

    def stages(self) -> Iterator[StageProgress]:
        """The progress of everything that runs, in the order the data flows: health and watchdog ask it."""
        for subscriber in self.subscribers:
            yield from subscriber.stages
        if self.host is not None:
            yield from self.host.stages
        yield self.committer.stage
        yield self.clock_corrector.stage
        yield self.commit_consumer.stage
        yield from (notifier.stage for notifier in self.notifiers)
        for shipper in self.shippers:
            yield from shipper.stages
        yield self.spool.compaction.stage
        yield self.retention.stage

    @property
    def gates(self) -> tuple[Pausable, ...]:
        """The ways in that can be told to read no further."""
        sources = (self.listener, *self.subscribers, self.http, self.host)
        return tuple(source for source in sources if source is not None)
