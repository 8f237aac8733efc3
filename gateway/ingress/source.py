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
        """Bind, connect or schedule; what runs by itself becomes a task of `tasks`.

        Raises:
            OSError: an address cannot be bound.
        """
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
    """What takes publishes to make them durable."""

    def submit_publishes(self, source: Acknowledger, batch: list[Publish]) -> None:
        """Take over `batch`, all publishes of one read of one connection, in order. Must not block.

        Every one of them is to be answered once, by `source.acknowledge` or `source.refuse`, QoS 0 too: the
        source bounds what is in flight by what has not been answered.
        """
        ...


class Acknowledger(Protocol):
    """Where publishes came from. Both methods are safe to call after the connection has gone.

    `name` is what quarantine rows call it: `listen`, or a broker's name. `owns` is asked about each sensor_id
    that a payload names by itself; None allows every one.
    """

    name: str

    @property
    def may_publish_sensor(self) -> Callable[[str], bool] | None:
        """Which sensor_ids payloads may name."""
        ...

    def acknowledge(self, publishes: Sequence[Publish]) -> None:
        """Say that these are durable: PUBACK and PUBREC, in order, in one write. QoS 0 is passed over."""
        ...

    def refuse(self, publishes: Sequence[Publish], reason_code: int) -> None:
        """Say that these will not be taken, with a reason code of 0x80 or above, one that PUBACK may carry.

        MQTT 5 tells the device to forget them; 3.1.1 has no word for it and closes the connection.
        """
        ...


class Pausable(Protocol):
    """An ingress that can be told to read no further, so that its senders wait."""

    def pause(self) -> None:
        """Stop reading for now."""
        ...

    def resume(self) -> None:
        """Read again."""
        ...

    def stop_reading(self) -> None:
        """Stop reading for good; what was read may still be acknowledged."""
        ...
