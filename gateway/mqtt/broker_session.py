"""Our session with an MQTT 5 broker: address, options, granted limits, errors, status. Pure.

Subscription options (section 3.8.3.1): Retain Handling 2 (no retained messages: a retained payload without
a timestamp would be stored as if measured now) unless `retained`, then 1 (once, when the subscription is
new); Retain As Published 0 (the flag marks retained messages); No Local 0 (1 is a protocol error on a
shared subscription).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import msgspec

from gateway.mqtt.codec.packets import (
    SESSION_NEVER_EXPIRES,
    Connack,
    Connect,
    Properties,
    Property,
    ReasonCode,
    int_property,
    reason_code_name,
)

if TYPE_CHECKING:
    from pathlib import Path

DEFAULT_PORTS: Final = {"mqtt": 1883, "mqtts": 8883}
RECEIVE_MAXIMUM_MAX: Final = 65_535
DAY_S: Final = 86_400
_FILTER_MAX_BYTES = 65_535
_RETAIN_HANDLING_BITS = {True: 1 << 4, False: 2 << 4}


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """Host, port, and whether the connection uses TLS."""

    host: str
    port: int
    tls: bool

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"mqtt{'s' * self.tls}://{host}:{self.port}"


def parse_broker_url(url: str) -> BrokerAddress:
    """The address in `mqtt://HOST[:PORT]` or `mqtts://HOST[:PORT]`; ValueError for anything else."""
    parts = urlsplit(url)
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname:
        raise ValueError("must be mqtt://HOST[:PORT] or mqtts://HOST[:PORT]")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must not contain credentials: use username and password_file")
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError("must end after the port")
    return BrokerAddress(parts.hostname, parts.port or DEFAULT_PORTS[parts.scheme], parts.scheme == "mqtts")


def check_topic_filter(topic_filter: str) -> None:
    """Raise ValueError for a topic filter that no broker may accept (sections 4.7.1 and 4.8.2)."""
    plain = topic_filter
    if topic_filter.startswith("$share/"):
        _, group, plain = (*topic_filter.split("/", 2), "")[:3]
        if not group or "+" in group or "#" in group:
            raise ValueError(f"{topic_filter!r}: a shared subscription is $share/GROUP/FILTER")
    if not plain or "\0" in plain or len(topic_filter.encode()) > _FILTER_MAX_BYTES:
        raise ValueError(
            f"{topic_filter!r}: a topic filter has 1 to {_FILTER_MAX_BYTES} bytes, none of them NUL"
        )
    levels = plain.split("/")
    if any("#" in level for level in levels[:-1]) or ("#" in levels[-1] and levels[-1] != "#"):
        raise ValueError(f"{topic_filter!r}: # must be the whole last level")
    if any("+" in level and level != "+" for level in levels):
        raise ValueError(f"{topic_filter!r}: + must be a whole level")


@dataclass(frozen=True, slots=True, kw_only=True)
class SubscriberOptions:
    """One broker to subscribe to; ValueError when the url or a filter is invalid.

    Attributes:
        client_id: names the session at the broker; must stay the same, and be this gateway's alone.
        unsubscribe: former filters, which a persistent session keeps until they are unsubscribed.
        server_name: name the broker's certificate is checked for, if it is not the URL's host.
        receive_maximum: QoS 1 and 2 messages the broker may send before the first is acknowledged: about the
            size of a group commit.
        max_packet_bytes: the broker silently discards messages that are larger (MQTT-3.1.2-25).
        connect_timeout_s: from the name look-up to the SUBACK.
        broker_reviewed: do not warn of broker settings that cannot be seen from here.
    """

    url: str
    client_id: str
    filters: tuple[str, ...]
    name: str = "broker"
    unsubscribe: tuple[str, ...] = ()
    qos: int = 1
    retained: bool = False
    username: str | None = None
    password_file: Path | None = None
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    server_name: str | None = None
    receive_maximum: int = 5000
    session_expiry_s: int = 30 * DAY_S
    keep_alive_s: int = 60
    max_packet_bytes: int = 8 << 20
    topic_alias_maximum: int = 64
    connect_timeout_s: float = 15.0
    broker_reviewed: bool = False

    def __post_init__(self) -> None:
        parse_broker_url(self.url)
        for topic_filter in (*self.filters, *self.unsubscribe):
            check_topic_filter(topic_filter)

    @property
    def address(self) -> BrokerAddress:
        """The parsed `url`."""
        return parse_broker_url(self.url)


def build_connect(
    options: SubscriberOptions, password: bytes | None, *, clean_start: bool = False
) -> Connect:
    """The CONNECT that resumes the session, or begins it."""
    return Connect(
        options.client_id,
        clean_start=clean_start,
        keep_alive_s=options.keep_alive_s,
        username=options.username,
        password=password,
        properties={
            Property.SESSION_EXPIRY_INTERVAL: options.session_expiry_s,
            Property.RECEIVE_MAXIMUM: options.receive_maximum,
            Property.MAXIMUM_PACKET_SIZE: options.max_packet_bytes,
            Property.TOPIC_ALIAS_MAXIMUM: options.topic_alias_maximum,
        },
    )


def build_subscription_options(options: SubscriberOptions) -> int:
    """The options byte of each filter in SUBSCRIBE."""
    return options.qos | _RETAIN_HANDLING_BITS[options.retained]


class SubscribeStatus(msgspec.Struct, kw_only=True):
    """One broker in the status document: how it is now, and what has happened since the start.

    Attributes:
        state: connecting, connected, waiting (to connect again) or stopped.
        again: publishes that the broker marked as sent again.
        faults: ends of connections and failed attempts, by kind.
        refused_filters: those not served now, with the reason.
    """

    name: str
    state: str = "connecting"
    connects: int = 0
    sessions_lost: int = 0
    publishes: int = 0
    again: int = 0
    acknowledged: int = 0
    bytes_in: int = 0
    refused: dict[str, int] = msgspec.field(default_factory=Counter)
    protocol_faults: dict[str, int] = msgspec.field(default_factory=Counter)
    faults: dict[str, int] = msgspec.field(default_factory=Counter)
    last_fault: str = ""
    refused_filters: dict[str, str] = msgspec.field(default_factory=dict)
    concerns: list[str] = msgspec.field(default_factory=list)

    @property
    def connected(self) -> bool:
        """Whether the broker is connected and has answered the subscription."""
        return self.state == "connected"


_R = ReasonCode
_OPERATOR_REASON_CODES = frozenset(
    {
        *(_R.MALFORMED_PACKET, _R.PROTOCOL_ERROR, _R.UNSUPPORTED_PROTOCOL_VERSION),
        *(_R.CLIENT_IDENTIFIER_NOT_VALID, _R.BAD_USER_NAME_OR_PASSWORD, _R.NOT_AUTHORIZED, _R.BANNED),
        *(_R.BAD_AUTHENTICATION_METHOD, _R.SESSION_TAKEN_OVER, _R.USE_ANOTHER_SERVER, _R.SERVER_MOVED),
    }
)

BROKER_DEFAULTS_WARNING = (
    "settings of the broker decide what it loses while this gateway is away or slow; most cannot be seen "
    "from here. In mosquitto: max_queued_messages is 1000 (set 0, or enough for your longest outage), "
    "max_inflight_messages is 20 (set 0), persistence is false (set true, or a restart forgets everything), "
    "autosave_interval is 1800 s (set a few seconds; a crash loses what came since), QoS 0 publishes are not "
    "kept (publish at QoS 1). broker_reviewed = true silences this"
)
"""Logged once per start: what no CONNACK shows."""


@dataclass(frozen=True, slots=True)
class BrokerLimits:
    """What a CONNACK grants (section 3.2.2.3), with the defaults of what it leaves out."""

    session_present: bool
    session_expiry_s: int
    keep_alive_s: int
    maximum_qos: int
    wildcards: bool
    shared: bool
    receive_maximum: int

    @classmethod
    def from_connack(cls, connack: Connack, options: SubscriberOptions) -> BrokerLimits:
        """`options` holds what was asked for."""
        number = partial(int_property, connack.properties)
        return cls(
            session_present=connack.session_present,
            session_expiry_s=number(Property.SESSION_EXPIRY_INTERVAL, options.session_expiry_s),
            keep_alive_s=number(Property.SERVER_KEEP_ALIVE, options.keep_alive_s),
            maximum_qos=number(Property.MAXIMUM_QOS, 2),
            wildcards=bool(number(Property.WILDCARD_SUBSCRIPTION_AVAILABLE, 1)),
            shared=bool(number(Property.SHARED_SUBSCRIPTION_AVAILABLE, 1)),
            receive_maximum=number(Property.RECEIVE_MAXIMUM, RECEIVE_MAXIMUM_MAX),
        )

    def refusal_for(self, topic_filter: str) -> ReasonCode | None:
        """Why a filter may not even be sent to this broker, or None."""
        if not self.shared and topic_filter.startswith("$share/"):
            return ReasonCode.SHARED_SUBSCRIPTIONS_NOT_SUPPORTED
        if not self.wildcards and ("+" in topic_filter or "#" in topic_filter):
            return ReasonCode.WILDCARD_SUBSCRIPTIONS_NOT_SUPPORTED
        return None


def find_broker_concerns(options: SubscriberOptions, granted: BrokerLimits) -> list[str]:
    """Granted limits that may lose messages or slow them down, each with what to do."""
    found, asked_s = [], options.session_expiry_s
    if granted.session_expiry_s < asked_s:
        asked = "for ever" if asked_s == SESSION_NEVER_EXPIRES else f"{asked_s} s"
        found.append(
            f"the broker keeps the session for {granted.session_expiry_s} s without us, not "
            f"{asked}: a longer outage loses what it had queued; raise its limit"
        )
    if granted.maximum_qos < min(options.qos, 1):
        found.append(
            "the broker delivers at QoS 0 only: it does not wait for acknowledgements, so what is on its way "
            "when a connection or this gateway fails is lost; allow QoS 1"
        )
    if granted.receive_maximum < options.receive_maximum:
        found.append(
            f"the broker announces a Receive Maximum of {granted.receive_maximum}: a sign of small limits "
            "(20 is mosquitto's default, and so is then a queue of 1000); some brokers send only so many "
            "before an acknowledgement, and the rest has to fit their queue"
        )
    return found


class BrokerError(Exception):
    """Why a connection failed or ended; `needs_operator`: trying again soon cannot help.

    `kind` is machine-readable: refused, closed, keep_alive_timeout, the name of a reason code, and so on.
    """

    def __init__(self, kind: str, message: str, *, needs_operator: bool = False) -> None:
        super().__init__(message)
        self.kind = kind
        self.needs_operator = needs_operator


def build_broker_error(packet: str, code: int, properties: Properties) -> BrokerError:
    """The error of a CONNACK or DISCONNECT with a reason code."""
    reason = ReasonCode(code)
    name = "normal disconnection" if not code else reason_code_name(code).replace("_", " ")
    added = [
        properties[key] for key in (Property.REASON_STRING, Property.SERVER_REFERENCE) if key in properties
    ]
    words = [f"the broker says {name} ({code:#04x}, {packet})", *map(repr, added)]
    if reason is _R.SESSION_TAKEN_OVER:
        words.append("another client uses the same client id")
    return BrokerError(
        "disconnected" if not code else reason_code_name(code),
        ": ".join(words),
        needs_operator=reason in _OPERATOR_REASON_CODES,
    )
