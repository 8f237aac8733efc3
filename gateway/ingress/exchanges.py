"""The gateway's side of a session with a broker (section 4.1): QoS 2 messages received and not yet released.

It outlives connections, and is cleared when the broker says that it has no session. A message is known again
when it comes marked as a duplicate, with the identifier, topic and payload of one that is held here: a broker
restored from an older state may use the identifier for something else, and that must not be taken for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.ingress.packets import Publish


class Holder(Protocol):
    """A connection that owes the broker a PUBREC."""

    def send_pubrecs(self, packet_ids: Sequence[int]) -> None:
        """Write them, if the connection still is."""
        ...


class Exchange:
    """One message: whether it is durable, and the connection on which it came last."""

    __slots__ = ("durable", "holder", "publish")

    def __init__(self, publish: Publish, holder: Holder) -> None:
        self.publish = publish
        self.holder = holder
        self.durable = False


class Exchanges:
    """Exchanges by packet identifier."""

    def __init__(self) -> None:
        self._held: dict[int, Exchange] = {}

    def __len__(self) -> int:
        return len(self._held)

    def take(self, publish: Publish, holder: Holder) -> Exchange | None:
        """The exchange that `publish` repeats, now owed by `holder`; None when it is a new one, now held."""
        known = self._held.get(publish.packet_id)
        if (
            known is not None
            and publish.dup
            and known.publish.topic == publish.topic
            and known.publish.payload == publish.payload
        ):
            known.holder = holder
            return known
        self._held[publish.packet_id] = Exchange(publish, holder)
        return None

    def made_durable(self, publish: Publish) -> Holder | None:
        """Mark the exchange of a publish handed over earlier; who owes its PUBREC, None if nobody does."""
        known = self._of(publish)
        if known is None:
            return None
        known.durable = True
        return known.holder

    def forget(self, publish: Publish) -> None:
        """Drop the exchange of a publish that is not taken."""
        if self._of(publish) is not None:
            del self._held[publish.packet_id]

    def release(self, packet_id: int) -> bool:
        """End an exchange; whether it had become durable."""
        known = self._held.pop(packet_id, None)
        return known is not None and known.durable

    def clear(self) -> None:
        """Begin a new session."""
        self._held.clear()

    def _of(self, publish: Publish) -> Exchange | None:
        known = self._held.get(publish.packet_id)
        return known if known is not None and known.publish is publish else None
