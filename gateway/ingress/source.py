"""The seam between sources of readings and the committer.

A `Source` enters readings: it submits publishes in batches to the `PublishSink` and continues. The committer
answers each publish exactly once after the fsync (promise 1) through the `Acknowledger` it came from. The
agent starts, pauses and stops every source in the same way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence

    import msgspec

    from cloud_sync.runtime.watchdog import StageProgress
    from gateway.mqtt.codec.packets import Publish


class Source(Protocol):
    """One way in for readings.

    `kind` is its key under `[ingress]`; `name` is what quarantine rows, logs and the status call it.
    """

    kind: str
    name: str

    @property
    def stages(self) -> Sequence[StageProgress]:
        """Progress of what runs by itself, for the watchdog; may be empty."""
        ...

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Bind, connect or schedule; what runs by itself becomes a task. OSError: cannot be bound."""
        ...

    def pause(self) -> None:
        """Read no further for now: senders wait (back-pressure)."""
        ...

    def resume(self) -> None:
        """Read again."""
        ...

    def stop_reading(self) -> None:
        """Read no further for good; what was read may still be acknowledged."""
        ...

    async def close(self) -> None:
        """Close, after the last acknowledgement. Safe to call twice and before `start`."""
        ...

    def status(self) -> msgspec.Struct | None:
        """Its part of the status document; None when it has none."""
        ...


class PublishSink(Protocol):
    """Makes publishes durable."""

    def submit_publishes(self, source: Acknowledger, batch: list[Publish]) -> None:
        """Submit all publishes of one read of one connection, in order. Must not block.

        Each is answered once, by `source.acknowledge` or `source.refuse`, QoS 0 too: the source bounds what
        is in flight by what has not been answered.
        """
        ...


class PublishSource(Protocol):
    """Where a publish came from, as far as decoding goes."""

    @property
    def name(self) -> str:
        """What quarantine rows call it: `listen`, or a broker's name."""
        ...

    @property
    def may_publish_sensor(self) -> Callable[[str], bool] | None:
        """Asked about each sensor_id that a payload names by itself; None allows every one."""
        ...


class Acknowledger(PublishSource, Protocol):
    """Where publishes came from. Both methods are safe to call after the connection is closed."""

    def acknowledge(self, publishes: Sequence[Publish]) -> None:
        """Send PUBACK or PUBREC for each in order, in one write; none for QoS 0."""
        ...

    def refuse(self, publishes: Sequence[Publish], reason_code: int) -> None:
        """Reject them with a reason code that PUBACK may carry, 0x80 or above.

        MQTT 5 tells the device to discard them; 3.1.1 has no such answer, so the connection is closed.
        """
        ...
