"""Session state (section 4.1), held in memory only.

QoS 2 exchanges outlive connections in both roles. Subscriptions to Sparkplug command topics, the only ones
that the server offers, last as long as their connection.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, Protocol

from gateway.mqtt.codec.packet_codec import encode_publish_acks
from gateway.mqtt.codec.packets import AT_LEAST_ONCE, EXACTLY_ONCE, V5, PacketType, Property, ReasonCode
from gateway.mqtt.codec.properties import protocol_error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gateway.mqtt.codec.packets import Publish, Subscribe
    from gateway.payloads.decoder_registry import RuleSet


class PubrecSender(Protocol):
    """A connection that owes the peer a PUBREC."""

    def send_pubrec(self, packet_id: int) -> None:
        """Write it, if the connection is still there."""


class Qos2Exchange:
    """One message not yet released: whether it is durable, and the connection that carried it last."""

    __slots__ = ("connection", "durable", "publish")

    def __init__(self, publish: Publish, connection: PubrecSender) -> None:
        self.publish: Publish | None = publish
        self.connection: PubrecSender | None = connection
        self.durable = False


class Qos2Exchanges:
    """QoS 2 messages of one session that were received and not yet released, by packet identifier.

    Args:
        compare_content: a message is a repetition only if marked as one and the same as before: a broker that
            has lost the session uses identifiers anew. Durable messages are kept for the comparison.
    """

    def __init__(self, *, compare_content: bool = False) -> None:
        self._compare_content = compare_content
        self._exchanges: dict[int, Qos2Exchange] = {}

    def __len__(self) -> int:
        return len(self._exchanges)

    def receive(self, publish: Publish, connection: PubrecSender) -> Qos2Exchange | None:
        """The exchange that `publish` repeats, now carried by `connection`; None when it begins a new one."""
        known = self._exchanges.get(publish.packet_id)
        if known is not None and (not self._compare_content or _is_repetition(publish, known.publish)):
            if not known.durable:
                known.connection = connection
            return known
        self._exchanges[publish.packet_id] = Qos2Exchange(publish, connection)
        return None

    def mark_durable(self, publish: Publish) -> PubrecSender | None:
        """The connection that owes the PUBREC of a publish that is now durable; None when none does."""
        known = self._find(publish)
        if known is None:
            return None
        known.durable = True
        sender, known.connection = known.connection, None
        if not self._compare_content:
            known.publish = None
        return sender

    def remove(self, publish: Publish) -> None:
        """End the exchange of a publish that was refused."""
        if self._find(publish) is not None:
            del self._exchanges[publish.packet_id]

    def release(self, packet_id: int, *, durable_only: bool = False) -> ReasonCode:
        """End an exchange at PUBREL; the reason code of its PUBCOMP.

        With `durable_only` a PUBREL that precedes its PUBREC is a protocol error.
        """
        known = self._exchanges.get(packet_id)
        if durable_only and known is not None and not known.durable:
            raise protocol_error("PUBREL before PUBREC")
        self._exchanges.pop(packet_id, None)
        if known is not None and known.durable:
            return ReasonCode.SUCCESS
        return ReasonCode.PACKET_IDENTIFIER_NOT_FOUND

    def clear(self) -> None:
        """Begin a new session."""
        self._exchanges.clear()

    def _find(self, publish: Publish) -> Qos2Exchange | None:
        known = self._exchanges.get(publish.packet_id)
        return known if known is not None and known.publish is publish else None


def _is_repetition(publish: Publish, known: Publish | None) -> bool:
    return (
        publish.dup
        and known is not None
        and known.topic == publish.topic
        and known.payload == publish.payload
    )


def encode_acknowledgements(
    publishes: Sequence[Publish], exchanges: Qos2Exchanges, connection: PubrecSender
) -> tuple[bytes, int]:
    """PUBACK and PUBREC for durable publishes, in order, and how many publishes of QoS 1 and 2 there are.

    PUBRECs that another connection of the session owes are sent there.
    """
    once = [publish.packet_id for publish in publishes if publish.qos == AT_LEAST_ONCE]
    out = encode_publish_acks(PacketType.PUBACK, once) if once else b""
    if len(once) == len(publishes):
        return out, len(once)
    exactly = [publish for publish in publishes if publish.qos == EXACTLY_ONCE]
    own = []
    for publish in exactly:
        sender = exchanges.mark_durable(publish)
        if sender is connection:
            own.append(publish.packet_id)
        elif sender is not None:
            sender.send_pubrec(publish.packet_id)
    return out + encode_publish_acks(PacketType.PUBREC, own), len(once) + len(exactly)


class SessionTable:
    """Sessions without a connection, by client key. Beyond `limit` the longest idle is forgotten."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._idle: dict[str, tuple[Qos2Exchanges, float]] = {}

    def __len__(self) -> int:
        return len(self._idle)

    def claim(self, client_key: str) -> Qos2Exchanges | None:
        """Remove and return the session of a client."""
        session, _ = self._idle.pop(client_key, (None, 0.0))
        return session

    def add(self, client_key: str, session: Qos2Exchanges, *, expires_at_s: float) -> None:
        """Keep a session whose connection has ended."""
        self._idle[client_key] = (session, expires_at_s)
        if len(self._idle) > self._limit:
            del self._idle[next(iter(self._idle))]

    def expire(self, *, now_s: float) -> None:
        """Forget what has expired."""
        for client_key in [key for key, (_, expires_at_s) in self._idle.items() if expires_at_s <= now_s]:
            del self._idle[client_key]


class CommandSubscriber(Protocol):
    """A connection that commands are delivered to."""

    def publish(self, topic: bytes, payload: bytes) -> None:
        """Send one message at QoS 0."""


_SUBSCRIPTIONS_MAX: Final = 20_000
_NODE_COMMAND_FILTER: Final = re.compile(r"(spBv1\.0)/([^/+#]+)/NCMD/([^/+#]+)(?:/#)?")


class CommandSubscriptions:
    """Which connection has subscribed to which Sparkplug command topic; without `rules` none may.

    Other filters get 0x83: 0x87 would say that other credentials help. What is not offered gets its own code
    (0xA2, 0x9E, 0xA1) instead of a disconnect, so that such a device can still publish.
    """

    def __init__(self, rules: RuleSet | None = None) -> None:
        self._rules = rules
        self._subscribers: dict[bytes, CommandSubscriber] = {}

    def __bool__(self) -> bool:
        return bool(self._subscribers)

    def subscribe(
        self,
        connection: CommandSubscriber,
        subscribe: Subscribe,
        version: int,
        may_publish_sensor: Callable[[str], bool] | None,
    ) -> tuple[int, ...]:
        """The SUBACK codes: QoS 0 for the command topic of a node that the client may publish for."""
        codes = []
        for name, _ in subscribe.filters:
            code: int = ReasonCode.SUCCESS
            topic, node = self._parse_command_topic(name)
            if not topic:
                code = _subscription_refusal_code(name, subscribe)
            elif may_publish_sensor is not None and not may_publish_sensor(node):
                code = ReasonCode.NOT_AUTHORIZED
            elif len(self._subscribers) >= _SUBSCRIPTIONS_MAX and topic not in self._subscribers:
                code = ReasonCode.QUOTA_EXCEEDED
            else:
                self._subscribers[topic] = connection
            codes.append(code if version == V5 else code and ReasonCode.UNSPECIFIED_ERROR)
        return tuple(codes)

    def unsubscribe(self, connection: CommandSubscriber, filters: Sequence[str]) -> tuple[int, ...]:
        """The UNSUBACK codes."""
        codes = []
        for name in filters:
            topic, _ = self._parse_command_topic(name)
            if self._subscribers.get(topic) is connection:
                del self._subscribers[topic]
                codes.append(int(ReasonCode.SUCCESS))
            else:
                codes.append(int(ReasonCode.NO_SUBSCRIPTION_EXISTED))
        return tuple(codes)

    def remove_connection(self, connection: CommandSubscriber) -> None:
        """End the subscriptions of a connection."""
        for topic in [topic for topic, other in self._subscribers.items() if other is connection]:
            del self._subscribers[topic]

    def publish(self, topic: bytes, payload: bytes) -> bool:
        """Deliver a message; whether there was a subscription to its topic."""
        connection = self._subscribers.get(topic)
        if connection is not None:
            connection.publish(topic, payload)
        return connection is not None

    def _parse_command_topic(self, name: str) -> tuple[bytes, str]:
        """The topic of a filter and the node that it belongs to; an empty topic when it is not offered."""
        found = _NODE_COMMAND_FILTER.fullmatch(name)
        if found is None or self._rules is None:
            return b"", ""
        namespace, group, node = found.groups()
        rule = self._rules.rule_for(f"{namespace}/{group}/NDATA/{node}")
        if rule is None or rule.format != "sparkplug_b":
            return b"", ""
        return f"{namespace}/{group}/NCMD/{node}".encode(), f"{group}.{node}"


def _subscription_refusal_code(name: str, subscribe: Subscribe) -> ReasonCode:
    if not name:
        return ReasonCode.TOPIC_FILTER_INVALID
    if name.startswith("$share/"):
        return ReasonCode.SHARED_SUBSCRIPTIONS_NOT_SUPPORTED
    if Property.SUBSCRIPTION_IDENTIFIER in subscribe.properties:
        return ReasonCode.SUBSCRIPTION_IDENTIFIERS_NOT_SUPPORTED
    if "+" in name or "#" in name:
        return ReasonCode.WILDCARD_SUBSCRIPTIONS_NOT_SUPPORTED
    return ReasonCode.IMPLEMENTATION_SPECIFIC_ERROR
