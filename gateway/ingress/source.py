"""The seam between sources of publishes and the committer.

A source submits publishes in batches and continues; the committer answers each exactly once after the fsync
(promise 1) through the `Acknowledger` it came from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gateway.mqtt.codec.packets import Publish


class PublishSink(Protocol):
    """What takes publishes to make them durable."""

    def publishes(self, source: Acknowledger, batch: list[Publish]) -> None:
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
