"""Session state (section 4.1) of both roles, held in memory only.

Server: sessions of devices outlive connections (a QoS 2 identifier that awaits PUBREL must survive a
reconnect), and subscriptions to Sparkplug command topics, the only ones the gateway serves, last as long
as the connection. Client: QoS 2 messages received from a broker and not yet released.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from gateway.mqtt.codec.packets import ReasonCode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gateway.mqtt.codec.packets import Publish
    from gateway.mqtt.handshake import ConnectHandshake
    from gateway.payloads.decoder_registry import RuleSet

    class CommandSubscriber(Protocol):
        """Whom a command is delivered to."""

        def deliver(self, topic: bytes, payload: bytes) -> None:
            """Send one message at QoS 0."""
            ...


SESSION_NEVER_EXPIRES: Final = 0xFFFF_FFFF
"""Session Expiry Interval of a session that does not expire (section 3.1.2.11.2)."""


class DeviceSession:
    """One client's session.

    Attributes:
        unreleased: QoS 2 packet identifiers awaiting PUBREL; True once durable, False while being committed.
        connection: the connection that holds it now, if any.
        expires_at_s: when it ends without a connection, in the listener's monotonic seconds.
    """

    __slots__ = ("connection", "expires_at_s", "unreleased")

    def __init__(self) -> None:
        self.unreleased: dict[int, bool] = {}
        self.connection: ConnectHandshake | None = None
        self.expires_at_s = 0.0


class SessionTable:
    """Sessions without a connection, by client identifier. Beyond `limit` the longest idle is forgotten."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._idle: dict[str, DeviceSession] = {}

    def __len__(self) -> int:
        return len(self._idle)

    def claim(self, client_id: str) -> DeviceSession | None:
        """Take the idle session of a client out of the table, if there is one."""
        return self._idle.pop(client_id, None)

    def keep(self, client_id: str, session: DeviceSession, *, expires_at_s: float) -> None:
        """Put aside a session whose connection has ended."""
        session.connection = None
        session.expires_at_s = expires_at_s
        self._idle[client_id] = session
        if len(self._idle) > self._limit:
            del self._idle[next(iter(self._idle))]

    def expire(self, *, now_s: float) -> None:
        """Forget what has expired."""
        for client_id in [name for name, session in self._idle.items() if session.expires_at_s <= now_s]:
            del self._idle[client_id]


class PubrecSender(Protocol):
    """A connection that owes the broker a PUBREC."""

    def send_pubrecs(self, packet_ids: Sequence[int]) -> None:
        """Write them, if the connection still is."""
        ...


class Qos2Exchange:
    """One message: whether it is durable, and the connection on which it came last."""

    __slots__ = ("durable", "holder", "publish")

    def __init__(self, publish: Publish, holder: PubrecSender) -> None:
        self.publish = publish
        self.holder = holder
        self.durable = False


class Qos2Exchanges:
    """Exchanges by packet identifier."""

    def __init__(self) -> None:
        self._held: dict[int, Qos2Exchange] = {}

    def __len__(self) -> int:
        return len(self._held)

    def take(self, publish: Publish, holder: PubrecSender) -> Qos2Exchange | None:
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
        self._held[publish.packet_id] = Qos2Exchange(publish, holder)
        return None

    def mark_durable(self, publish: Publish) -> PubrecSender | None:
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

    def _of(self, publish: Publish) -> Qos2Exchange | None:
        known = self._held.get(publish.packet_id)
        return known if known is not None and known.publish is publish else None


_SUBSCRIPTIONS_MAX: Final = 20_000
_NODE_COMMAND_FILTER: Final = re.compile(r"(spBv1\.0)/([^/+#]+)/NCMD/([^/+#]+)(?:/#)?")


class _CommandTopic(NamedTuple):
    topic: bytes
    owner: str


class CommandSubscriptions:
    """Who has subscribed to what the gateway serves. Without `rules` that is nothing."""

    def __init__(self, rules: RuleSet | None = None) -> None:
        self._rules = rules
        self._subscribed: dict[bytes, CommandSubscriber] = {}

    def answer(
        self,
        connection: CommandSubscriber,
        filters: Sequence[str],
        refusals: Sequence[int],
        may_publish_sensor: Callable[[str], bool] | None,
    ) -> tuple[int, ...]:
        """The codes for a SUBSCRIBE: QoS 0 where it is served and the node's own, else the refusal."""
        codes = []
        for name, refusal in zip(filters, refusals, strict=True):
            asked = self._asked(name)
            if asked is None:
                codes.append(refusal)
            elif may_publish_sensor is not None and not may_publish_sensor(asked.owner):
                codes.append(int(ReasonCode.NOT_AUTHORIZED))
            elif len(self._subscribed) >= _SUBSCRIPTIONS_MAX and asked.topic not in self._subscribed:
                codes.append(int(ReasonCode.QUOTA_EXCEEDED))
            else:
                self._subscribed[asked.topic] = connection
                codes.append(0)
        return tuple(codes)

    def remove_subscriptions(self, connection: CommandSubscriber, filters: Sequence[str]) -> tuple[int, ...]:
        """The codes for an UNSUBSCRIBE."""
        codes = []
        for name in filters:
            asked = self._asked(name)
            had = asked is not None and self._subscribed.get(asked.topic) is connection
            if had and asked is not None:
                del self._subscribed[asked.topic]
            codes.append(0 if had else int(ReasonCode.NO_SUBSCRIPTION_EXISTED))
        return tuple(codes)

    def forget(self, connection: CommandSubscriber) -> None:
        """Drop what a connection subscribed to."""
        for topic in [topic for topic, other in self._subscribed.items() if other is connection]:
            del self._subscribed[topic]

    def publish(self, topic: bytes, payload: bytes) -> bool:
        """Deliver a message; whether anyone had subscribed to it."""
        connection = self._subscribed.get(topic)
        if connection is not None:
            connection.deliver(topic, payload)
        return connection is not None

    def __bool__(self) -> bool:
        return bool(self._subscribed)

    def _asked(self, name: str) -> _CommandTopic | None:
        found = _NODE_COMMAND_FILTER.fullmatch(name)
        if found is None or self._rules is None:
            return None
        namespace, group, node = found.groups()
        rule = self._rules.rule_for(f"{namespace}/{group}/NDATA/{node}")
        if rule is None or rule.format != "sparkplug_b":
            return None
        return _CommandTopic(f"{namespace}/{group}/NCMD/{node}".encode(), f"{group}.{node}")
