"""What an MQTT 5 broker says of itself: what it grants, what that risks, why it ends a connection. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway.ingress.packets import Connack, Properties, Property, ReasonCode
from gateway.ingress.sessions import NEVER
from gateway.ingress.subscription import RECEIVE_MAXIMUM_MAX

if TYPE_CHECKING:
    from gateway.ingress.subscription import SubscribeSettings

_R = ReasonCode
_FOR_A_PERSON = frozenset(
    {
        *(_R.MALFORMED_PACKET, _R.PROTOCOL_ERROR, _R.UNSUPPORTED_PROTOCOL_VERSION),
        *(_R.CLIENT_IDENTIFIER_NOT_VALID, _R.BAD_USER_NAME_OR_PASSWORD, _R.NOT_AUTHORIZED, _R.BANNED),
        *(_R.BAD_AUTHENTICATION_METHOD, _R.SESSION_TAKEN_OVER, _R.USE_ANOTHER_SERVER, _R.SERVER_MOVED),
    }
)

STOCK_MOSQUITTO = (
    "settings of the broker decide what it loses while this gateway is away or slow; most cannot be seen "
    "from here. In mosquitto: max_queued_messages is 1000 (set 0, or enough for your longest outage), "
    "max_inflight_messages is 20 (set 0), persistence is false (set true, or a restart forgets everything), "
    "autosave_interval is 1800 s (set a few seconds; a crash loses what came since), QoS 0 publishes are not "
    "kept (publish at QoS 1). broker_reviewed = true silences this"
)
"""Said once per start: what no CONNACK tells."""


@dataclass(frozen=True, slots=True)
class Granted:
    """What a CONNACK grants (section 3.2.2.3), what it leaves out filled in."""

    session_present: bool
    session_expiry_s: int
    keep_alive_s: int
    maximum_qos: int
    wildcards: bool
    shared: bool
    receive_maximum: int

    @classmethod
    def of(cls, connack: Connack, settings: SubscribeSettings) -> Granted:
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

    def bars(self, topic_filter: str) -> ReasonCode | None:
        """Why a filter may not even be sent to this broker, or None."""
        if not self.shared and topic_filter.startswith("$share/"):
            return ReasonCode.SHARED_SUBSCRIPTIONS_NOT_SUPPORTED
        if not self.wildcards and ("+" in topic_filter or "#" in topic_filter):
            return ReasonCode.WILDCARD_SUBSCRIPTIONS_NOT_SUPPORTED
        return None


def concerns(settings: SubscribeSettings, granted: Granted) -> list[str]:
    """What the CONNACK shows that may lose messages or slow them down, in words, each with what to do."""
    found = []
    if granted.session_expiry_s < settings.session_expiry_s:
        found.append(
            f"the broker keeps the session for {granted.session_expiry_s} s without us, not "
            f"{_span(settings.session_expiry_s)}: a longer outage loses what it had queued; raise its limit"
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


def _span(seconds: int) -> str:
    return "for ever" if seconds == NEVER else f"{seconds} s"


class BrokerFault(Exception):  # noqa: N818 - it may be nobody's error
    """Why there is no connection (any more).

    Attributes:
        kind: machine-readable, such as refused, closed, keep_alive_timeout or a reason code's name.
        for_a_person: trying again soon cannot help; somebody has to change something.
    """

    def __init__(self, kind: str, message: str, *, for_a_person: bool = False) -> None:
        super().__init__(message)
        self.kind = kind
        self.for_a_person = for_a_person


def coded_fault(said_in: str, code: int, properties: Properties) -> BrokerFault:
    """The fault of a CONNACK or DISCONNECT that carries a reason code."""
    reason = ReasonCode(code)
    name = "normal disconnection" if not code else reason.name.lower().replace("_", " ")
    added = [
        properties[key] for key in (Property.REASON_STRING, Property.SERVER_REFERENCE) if key in properties
    ]
    words = [f"the broker says {name} ({code:#04x}, {said_in})", *map(repr, added)]
    if reason is _R.SESSION_TAKEN_OVER:
        words.append("another client connects under the same client id")
    return BrokerFault(
        "disconnected" if not code else reason.name.lower(),
        ": ".join(words),
        for_a_person=reason in _FOR_A_PERSON,
    )
