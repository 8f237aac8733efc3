"""What the gateway asks of an MQTT 5 broker: where, as whom, and for what. Pure.

Choices in the subscription options (section 3.8.3.1):

- Retain Handling 2, no retained messages: a retained payload without a time of its own would be stored as if
  it had been measured now. `retained = true` asks for 1: once, when the subscription is new.
- Retain As Published 0: the retain flag of what arrives then says that the broker kept it.
- No Local 0: it is a protocol error on a shared subscription, and the gateway publishes nothing there.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from gateway.ingress.packets import Connect, Property

if TYPE_CHECKING:
    from pathlib import Path

PORT: Final = 1883
TLS_PORT: Final = 8883
RECEIVE_MAXIMUM_MAX: Final = 65_535
DAY_S: Final = 86_400
_FILTER_MAX_BYTES = 65_535
_RETAIN_HANDLING = {True: 1 << 4, False: 2 << 4}


@dataclass(frozen=True, slots=True)
class Address:
    """Where a broker is."""

    host: str
    port: int
    tls: bool

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"mqtt{'s' * self.tls}://{host}:{self.port}"


def address_of(url: str) -> Address:
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
    return Address(parts.hostname, parts.port or (TLS_PORT if tls else PORT), tls)


def check_filter(topic_filter: str) -> None:
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
class SubscribeSettings:
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
        address_of(self.url)
        for topic_filter in (*self.filters, *self.unsubscribe):
            check_filter(topic_filter)

    @property
    def address(self) -> Address:
        """Where the broker is."""
        return address_of(self.url)


def connect_packet(settings: SubscribeSettings, password: bytes | None) -> Connect:
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


def subscription_options(settings: SubscribeSettings) -> int:
    """The options byte of every filter."""
    return settings.qos | _RETAIN_HANDLING[settings.retained]


@dataclass(slots=True)
class SubscribeCounters:
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
    again_total: int = 0
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
