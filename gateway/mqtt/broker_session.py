"""Our session with an MQTT 5 broker: address, subscribe options, granted limits, errors, counters. Pure.

Subscription options (section 3.8.3.1): Retain Handling 2 (no retained messages: a retained payload without
a timestamp would be stored as if measured now) unless `retained`, then 1 (once, when the subscription is
new); Retain As Published 0 (the flag marks retained messages); No Local 0 (1 is a protocol error on a
shared subscription).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from gateway.mqtt.codec.packets import Connack, Connect, Properties, Property, ReasonCode
from gateway.mqtt.session_state import SESSION_NEVER_EXPIRES

if TYPE_CHECKING:
    from pathlib import Path

MQTT_PORT: Final = 1883
MQTTS_PORT: Final = 8883
RECEIVE_MAXIMUM_MAX: Final = 65_535
DAY_S: Final = 86_400
_FILTER_MAX_BYTES = 65_535
_RETAIN_HANDLING_BITS = {True: 1 << 4, False: 2 << 4}


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """Where a broker is."""

    host: str
    port: int
    tls: bool

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"mqtt{'s' * self.tls}://{host}:{self.port}"


def parse_broker_url(url: str) -> BrokerAddress:
    """The address in `mqtt://HOST[:PORT]` or `mqtts://HOST[:PORT]`.

    Raises:
        ValueError: it is none, or holds more than that.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname:
        raise ValueError("must be mqtt://HOST[:PORT] or mqtts://HOST[:PORT]")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must not hold credentials; there are username and password_file for them")
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError("must end after the port")
    tls = parts.scheme == "mqtts"
    return BrokerAddress(parts.hostname, parts.port or (MQTTS_PORT if tls else MQTT_PORT), tls)


def check_topic_filter(topic_filter: str) -> None:
    """Refuse a topic filter that no broker may accept (sections 4.7.1 and 4.8.2).

    Raises:
        ValueError: says what is wrong with it.
    """
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
        raise ValueError(f"{topic_filter!r}: # stands alone, as the last level")
    if any("+" in level and level != "+" for level in levels):
        raise ValueError(f"{topic_filter!r}: + stands for a whole level")


@dataclass(frozen=True, slots=True, kw_only=True)
class SubscriberOptions:
    """One broker to subscribe to.

    Attributes:
        name: what the status and the log call it.
        url: mqtt://HOST[:PORT] or mqtts://HOST[:PORT].
        client_id: names the session at the broker; must stay the same, and be this gateway's alone.
        filters: topic filters, `$share/GROUP/FILTER` included.
        unsubscribe: filters given up: a persistent session goes on with them until told.
        qos: highest QoS asked for.
        retained: also take what the broker keeps as retained, once, when a subscription is new.
        username, password_file: credentials; the file's first line, read anew at each connection.
        ca_file: private authority instead of the system's; cert_file, key_file: client certificate.
        server_name: name the broker's certificate is checked for, if it is not the URL's host.
        receive_maximum: QoS 1 and 2 messages the broker may send before the first is acknowledged: about what
            one group commit takes.
        session_expiry_s: how long the broker is to keep the session without us; 4294967295 for ever.
        keep_alive_s: a broker silent for so long is given up; 0 for never.
        max_packet_bytes: the broker silently discards messages that are larger (MQTT-3.1.2-25).
        topic_alias_maximum: topic aliases the broker may use.
        connect_timeout_s: from the name look-up to the SUBACK.
        broker_reviewed: the broker's own limits are known to be right: do not warn of what cannot be seen.

    Raises:
        ValueError: the url, or a filter, is none.
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
        """Where the broker is."""
        return parse_broker_url(self.url)


def build_connect(settings: SubscriberOptions, password: bytes | None) -> Connect:
    """The CONNECT that resumes the session, or begins it."""
    return Connect(
        settings.client_id,
        clean_start=False,
        keep_alive_s=settings.keep_alive_s,
        username=settings.username,
        password=password,
        properties={
            Property.SESSION_EXPIRY_INTERVAL: settings.session_expiry_s,
            Property.RECEIVE_MAXIMUM: settings.receive_maximum,
            Property.MAXIMUM_PACKET_SIZE: settings.max_packet_bytes,
            Property.TOPIC_ALIAS_MAXIMUM: settings.topic_alias_maximum,
        },
    )


def build_subscription_options(settings: SubscriberOptions) -> int:
    """The options byte of every filter."""
    return settings.qos | _RETAIN_HANDLING_BITS[settings.retained]


@dataclass(slots=True)
class SubscriberCounters:
    """What has happened since the start, and how it is now.

    Attributes:
        state: connecting, connected, waiting (to connect again) or stopped.
        connects_total: connections on which the broker accepted us.
        sessions_lost_total: how often the broker had forgotten a session it had before.
        again_total: publishes that the broker marked as sent again.
        protocol_faults_total: violations by the broker, by reason code name in lower case.
        faults_total: ends of connections and failed attempts, by kind.
        last_fault: the newest of them in words; stays after it has passed.
        refused_filters: the filters that the broker does not serve now, with its reason.
        concerns: what the broker has shown to put messages at risk.
    """

    state: str = "connecting"
    connects_total: int = 0
    sessions_lost_total: int = 0
    publishes_total: int = 0
    redelivered_total: int = 0
    acknowledged_total: int = 0
    refused_total: Counter[str] = field(default_factory=Counter)
    bytes_in_total: int = 0
    protocol_faults_total: Counter[str] = field(default_factory=Counter)
    faults_total: Counter[str] = field(default_factory=Counter)
    last_fault: str = ""
    refused_filters: dict[str, str] = field(default_factory=dict)
    concerns: tuple[str, ...] = ()

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
"""Said once per start: what no CONNACK tells."""


@dataclass(frozen=True, slots=True)
class BrokerLimits:
    """What a CONNACK grants (section 3.2.2.3), what it leaves out filled in."""

    session_present: bool
    session_expiry_s: int
    keep_alive_s: int
    maximum_qos: int
    wildcards: bool
    shared: bool
    receive_maximum: int

    @classmethod
    def of(cls, connack: Connack, settings: SubscriberOptions) -> BrokerLimits:
        """Read a CONNACK in the light of what was asked."""

        def number(key: Property, otherwise: int) -> int:
            value = connack.properties.get(key, otherwise)
            assert isinstance(value, int)
            return value

        return cls(
            session_present=connack.session_present,
            session_expiry_s=number(Property.SESSION_EXPIRY_INTERVAL, settings.session_expiry_s),
            keep_alive_s=number(Property.SERVER_KEEP_ALIVE, settings.keep_alive_s),
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


def find_broker_concerns(settings: SubscriberOptions, granted: BrokerLimits) -> list[str]:
    """What the CONNACK shows that may lose messages or slow them down, in words, each with what to do."""
    found = []
    if granted.session_expiry_s < settings.session_expiry_s:
        found.append(
            f"the broker keeps the session for {granted.session_expiry_s} s without us, not "
            f"{_format_expiry(settings.session_expiry_s)}: a longer outage loses what it had queued; "
            "raise its limit"
        )
    if granted.maximum_qos < min(settings.qos, 1):
        found.append(
            "the broker delivers at QoS 0 only: it does not wait for acknowledgements, so what is on its way "
            "when a connection or this gateway fails is lost; allow QoS 1"
        )
    if granted.receive_maximum < settings.receive_maximum:
        found.append(
            f"the broker announces a Receive Maximum of {granted.receive_maximum}: a sign of small limits "
            "(20 is mosquitto's default, and so is then a queue of 1000); some brokers send only so many "
            "before an acknowledgement, and the rest has to fit their queue"
        )
    return found


def _format_expiry(seconds: int) -> str:
    return "for ever" if seconds == SESSION_NEVER_EXPIRES else f"{seconds} s"


class BrokerError(Exception):
    """Why there is no connection (any more).

    Attributes:
        kind: machine-readable, such as refused, closed, keep_alive_timeout or a reason code's name.
        for_a_person: trying again soon cannot help; somebody has to change something.
    """

    def __init__(self, kind: str, message: str, *, needs_operator: bool = False) -> None:
        super().__init__(message)
        self.kind = kind
        self.needs_operator = needs_operator


def build_broker_error(said_in: str, code: int, properties: Properties) -> BrokerError:
    """The fault of a CONNACK or DISCONNECT that carries a reason code."""
    reason = ReasonCode(code)
    name = "normal disconnection" if not code else reason.name.lower().replace("_", " ")
    added = [
        properties[key] for key in (Property.REASON_STRING, Property.SERVER_REFERENCE) if key in properties
    ]
    words = [f"the broker says {name} ({code:#04x}, {said_in})", *map(repr, added)]
    if reason is _R.SESSION_TAKEN_OVER:
        words.append("another client connects under the same client id")
    return BrokerError(
        "disconnected" if not code else reason.name.lower(),
        ": ".join(words),
        needs_operator=reason in _OPERATOR_REASON_CODES,
    )
