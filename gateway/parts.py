"""The open parts of one running gateway: made by `agent`, read by `operate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gateway.operate.in_force import InForce

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cloud_sync.progress import Stage
    from cloud_sync.shipper import Shipper
    from gateway.ingress.committer import Committer
    from gateway.ingress.host import HostIngress
    from gateway.ingress.http.server import HttpIngress
    from gateway.ingress.intake import Gate
    from gateway.ingress.listener import Listener
    from gateway.ingress.subscriber import Subscriber
    from gateway.operate.expiry import ExpiryWatch
    from gateway.processing.alerts import AlertStage
    from gateway.processing.follower import Follower
    from gateway.processing.notify import ChannelDesk
    from gateway.processing.restamp import Restamper
    from gateway.processing.roller import Roller
    from gateway.settings import GatewaySettings
    from gateway.spool.appender import Appender
    from gateway.spool.capacity import Capacity
    from gateway.spool.compaction import Compaction
    from gateway.spool.database import Database
    from gateway.spool.deliveries import Deliveries
    from gateway.spool.duplicates import Duplicates
    from gateway.spool.retention import Retention
    from gateway.spool.segments import Segments
    from gateway.spool.series import SeriesBook


@dataclass(slots=True)
class Parts:
    """Everything a gateway consists of, in the order the data flows. `started_at` is monotonic seconds.

    `settings` and `shippers` change when the configuration is reloaded; everything else is there for good.
    """

    settings: GatewaySettings
    version: str
    started_at: float
    listener: Listener
    subscribers: tuple[Subscriber, ...]
    host: HostIngress | None
    http: HttpIngress | None
    committer: Committer
    restamper: Restamper
    book: SeriesBook
    duplicates: Duplicates
    appender: Appender
    capacity: Capacity
    database: Database
    segments: Segments
    follower: Follower
    roller: Roller | None
    alerts: AlertStage | None
    desks: tuple[ChannelDesk, ...]
    compaction: Compaction
    retention: Retention
    summary_retentions: tuple[Retention, ...]
    deliveries: Deliveries
    shippers: tuple[Shipper, ...]
    in_force: InForce = field(default_factory=InForce)
    expiry: ExpiryWatch | None = None

    def stages(self) -> Iterator[Stage]:
        """The progress of everything that runs, in the order the data flows: health and watchdog ask it."""
        yield from (subscriber.stage for subscriber in self.subscribers)
        if self.host is not None:
            yield self.host.stage
        yield self.committer.stage
        yield self.restamper.stage
        yield self.follower.stage
        yield from (desk.stage for desk in self.desks)
        for shipper in self.shippers:
            yield from shipper.stages
        yield self.compaction.stage
        yield self.retention.stage
        yield from (retention.stage for retention in self.summary_retentions)

    @property
    def gates(self) -> tuple[Gate, ...]:
        """The ways in that can be told to read no further."""
        return (self.listener, *self.subscribers, *(() if self.http is None else (self.http,)))
