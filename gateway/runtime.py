"""A running gateway: its components in data-flow order, the tasks that a reload replaces, and its signals."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

from gateway.mqtt.server import MqttServer

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

    from cloud_sync.delivery.shipper import Shipper
    from cloud_sync.runtime.watchdog import StageProgress
    from gateway.alerts.evaluator import AlertEvaluator
    from gateway.alerts.notifier import AlertNotifier
    from gateway.ingress.committer import Committer
    from gateway.ingress.source import Source
    from gateway.processing.clock import ClockCorrector
    from gateway.processing.commit_consumer import CommitConsumer
    from gateway.rollups.roller import Roller
    from gateway.settings.gateway_settings import GatewaySettings
    from gateway.spool.retention import Retention
    from gateway.spool.spool import Spool


class RunningComponent(Protocol):
    """A component with a loop of its own."""

    async def run(self, stop: asyncio.Event) -> None:
        """Run until `stop` is set."""

    async def aclose(self) -> None:
        """Release what it holds."""


C = TypeVar("C", bound=RunningComponent)


class _Running(NamedTuple):
    stop: asyncio.Event
    task: asyncio.Task[None]


class ReplaceableTasks(Generic[C]):
    """Components of one kind by name, each in a task of its own, that can be replaced in a running program.

    Nothing is lost by a replacement: a stopped shipper leaves its open batch in the spool, a stopped notifier
    its messages in the outbox.
    """

    def __init__(self, kind: str, components: Mapping[str, C], *, stop_timeout_s: float) -> None:
        self._kind = kind
        self._components = dict(components)
        self._stop_timeout_s = stop_timeout_s
        self._running: dict[str, _Running] = {}
        self._tasks: asyncio.TaskGroup | None = None

    @property
    def components(self) -> tuple[C, ...]:
        """The components, in the order of the configuration."""
        return tuple(self._components.values())

    def start(self, tasks: asyncio.TaskGroup) -> None:
        """Run every component in a task of the program's own group."""
        self._tasks = tasks
        for name in self._components:
            self._start_one(name)

    def stop(self) -> list[asyncio.Task[None]]:
        """Ask every component to stop; returns the tasks to wait for."""
        for running in self._running.values():
            running.stop.set()
        return [running.task for running in self._running.values()]

    async def replace(self, names: Collection[str], new: Mapping[str, C]) -> None:
        """Have components of exactly these names, with those in `new` in place of the old ones."""
        gone = [name for name in self._components if name in new or name not in names]
        await asyncio.gather(*map(self._stop_one, gone))
        current = self._components | dict(new)
        self._components = {name: current[name] for name in names}
        for name in new:
            self._start_one(name)

    async def aclose(self) -> None:
        """Close every component."""
        for component in self.components:
            await component.aclose()

    def _start_one(self, name: str) -> None:
        assert self._tasks is not None
        stop = asyncio.Event()
        task = self._tasks.create_task(self._components[name].run(stop), name=f"{self._kind} {name}")
        self._running[name] = _Running(stop, task)

    async def _stop_one(self, name: str) -> None:
        running = self._running.pop(name)
        running.stop.set()
        _, late = await asyncio.wait([running.task], timeout=self._stop_timeout_s)
        if late:
            running.task.cancel()
            await asyncio.wait(late)
        await self._components[name].aclose()


@dataclass(slots=True, eq=False)
class Control:
    """Signals to a running gateway: `wake` is set by each, `stop` by those that stop it.

    `config` is the file that a reload reads. With `again` the gateway starts again after the stop, with the
    configuration that is active then.
    """

    config: Path | None = None
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    reload_requested: bool = False
    again: bool = False
    trial_reverted: bool = False

    def request_stop(self) -> None:
        """SIGTERM, SIGINT."""
        self.stop.set()
        self.wake.set()

    def reload(self) -> None:
        """SIGHUP."""
        self.reload_requested = True
        self.wake.set()

    def request_restart(self) -> None:
        """SIGUSR1: stop in order and start again in the same process, for what a reload cannot change."""
        self.again = True
        self.request_stop()


@dataclass(slots=True)
class Runtime:
    """The components of a gateway. `started_at` is monotonic seconds.

    A reload changes `settings`, `alerts` and the members of `shipping` and `notifying`; everything else is
    final.
    """

    settings: GatewaySettings
    version: str
    started_at: float
    sources: tuple[Source, ...]
    committer: Committer
    clock_corrector: ClockCorrector
    spool: Spool
    commit_consumer: CommitConsumer
    roller: Roller | None
    alerts: AlertEvaluator | None
    notifying: ReplaceableTasks[AlertNotifier]
    retention: Retention
    shipping: ReplaceableTasks[Shipper]

    @property
    def listener(self) -> MqttServer:
        """The MQTT server, which every gateway has."""
        return next(source for source in self.sources if isinstance(source, MqttServer))

    @property
    def shippers(self) -> tuple[Shipper, ...]:
        """The shipper of each destination."""
        return self.shipping.components

    @property
    def notifiers(self) -> tuple[AlertNotifier, ...]:
        """The notifier of each alert channel."""
        return self.notifying.components

    def stages(self) -> Iterator[StageProgress]:
        """The progress of everything that runs, in data-flow order, for health checks and the watchdog."""
        for source in self.sources:
            yield from source.stages
        yield self.committer.stage
        yield self.clock_corrector.stage
        yield self.commit_consumer.stage
        yield from (notifier.stage for notifier in self.notifiers)
        for shipper in self.shippers:
            yield from shipper.stages
        yield self.spool.compaction.stage
        yield self.retention.stage
