"""The first part of every MQTT connection: CONNECT, who it is, whose session it takes over, CONNACK.

awaiting CONNECT ──> (admitting) ──> connected ──> closing
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import secrets
from abc import abstractmethod
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

from gateway.ingress.admission import Identity, Permit, Refusal
from gateway.ingress.encoder import encode
from gateway.ingress.link import Link, Pause
from gateway.ingress.packets import V5, Connack, Connect, Disconnect, Packet, Property, ReasonCode, Will
from gateway.ingress.parser import Item, Parser
from gateway.ingress.sessions import Session
from gateway.ingress.terms import Terms, refusal_of, refusing_connack, terms_of

if TYPE_CHECKING:
    from gateway.ingress.listener import Listener

_log = logging.getLogger(__name__)


class State(Enum):
    """Where a connection is."""

    AWAITING = auto()
    ADMITTING = auto()
    CONNECTED = auto()


class Reception(Link):
    """What a connection knows of its client, and how it came to know it."""

    def __init__(self, listener: Listener) -> None:
        super().__init__(listener)
        self._parser = Parser(
            max_packet_bytes=listener.settings.max_packet_bytes,
            topics=listener.topics,
            topic_alias_maximum=listener.settings.topic_alias_maximum,
        )
        self._state = State.AWAITING
        self._client_id = ""
        self._client_key = ""
        self._identity: Identity | None = None
        self._session = Session()
        self._session_expiry_s = 0
        self._terms = Terms(0, 0, 0, {})
        self._will: Will | None = None
        self._permit: Permit | None = None
        self._deferred: list[Item] = []
        self._admission: asyncio.Task[Identity | Refusal] | None = None

    @abstractmethod
    def end(self, reason_code: ReasonCode, *, with_will: bool = True) -> None:
        """Close from this side."""

    @abstractmethod
    def _take(self, items: list[Item]) -> None:
        """Act on what came while the client was being admitted."""

    def _connect(self, packet: Connect) -> None:
        refusal = refusal_of(packet)
        if refusal is not None:
            self._refuse_connect(refusal)
            return
        self._client_id = packet.client_id or f"tidegate-{secrets.token_hex(8)}"
        outcome = self.listener.authenticator.admit(
            self._client_id,
            packet.username,
            packet.password,
            self.transport.get_extra_info("peercert") or None,
            self._address(),
        )
        if isinstance(outcome, Identity | Refusal):
            self._decide(packet, outcome)
            return
        self._state = State.ADMITTING
        self.since_s = self.listener.now_s
        self.pause(Pause.ADMISSION)
        self._admission = asyncio.get_running_loop().create_task(
            _await(outcome), name=f"admit {self._client_id}"
        )
        self._admission.add_done_callback(lambda task: self._admitted_later(packet, task))

    def _admitted_later(self, packet: Connect, task: asyncio.Task[Identity | Refusal]) -> None:
        if self.closing:
            return
        if task.cancelled() or task.exception() is not None:
            _log.error("the authenticator failed for %r", self._client_id, exc_info=task.exception())
            self._refuse_connect(ReasonCode.SERVER_UNAVAILABLE)
            return
        self._decide(packet, task.result())
        self.resume(Pause.ADMISSION)
        items, self._deferred = self._deferred, []
        if not self.closing:
            self._take(items)

    def forget_permit(self) -> None:
        """What topics carry has changed: ask again about each that is published to."""
        if self._permit is not None:
            self._permit.forget()

    def _decide(self, packet: Connect, outcome: Identity | Refusal) -> None:
        if isinstance(outcome, Refusal):
            self._refuse_connect(outcome.reason_code)
            return
        permit = None if outcome.may_publish is None else Permit(outcome.may_publish)
        if packet.will is not None and permit is not None and not permit.grants(packet.will.topic):
            self._refuse_connect(ReasonCode.NOT_AUTHORIZED)
            return
        self._permit = permit
        self._identity = outcome
        self._client_key = self._client_id
        if outcome.scope:
            self._client_key = f"{outcome.scope}\0{self._client_id}"  # NUL is in no string of MQTT
        self._will = packet.will
        self._terms = terms_of(packet, self._client_id, self.listener.settings)
        self._session_expiry_s = self._terms.session_expiry_s
        present = self._claim_session(packet)
        self._state = State.CONNECTED
        self.since_s = self.listener.now_s
        self.listener.welcomed(self)
        self._send(Connack(0, present, self._terms.announced))

    def _claim_session(self, packet: Connect) -> bool:
        """Take over the client identifier and its session; whether a session was there."""
        listener = self.listener
        session = listener.sessions.claim(self._client_key)
        previous = listener.clients.get(self._client_key)
        if previous is not None:
            session = previous.yield_session()
        listener.clients[self._client_key] = self
        present = session is not None and not packet.clean_start
        if present:
            assert session is not None
            self._session = session
        self._session.connection = self
        return present

    def yield_session(self) -> Session | None:
        """Give way to a new connection of the client: DISCONNECT 0x8E. Returns the session if it lives on."""
        if self._will is not None and self._will.properties.get(Property.WILL_DELAY_INTERVAL):
            self._will = None
        session = self._session if self._session_expiry_s else None
        self._session.connection = None
        self.end(ReasonCode.SESSION_TAKEN_OVER)
        return session

    def _address(self) -> str:
        peer = self.transport.get_extra_info("peername")
        return str(peer[0]) if peer else ""

    def _refuse_connect(self, reason_code: int) -> None:
        self.counters.refused_total[name_of(reason_code)] += 1
        self._state = State.AWAITING
        self._say_goodbye(reason_code)
        self.hang_up()

    def _say_goodbye(self, reason_code: int) -> None:
        """CONNACK or DISCONNECT with the code, as far as the version and the state have one."""
        if self._state is State.CONNECTED:
            if self._version == V5:
                self._send(Disconnect(reason_code))
            return
        refusal = refusing_connack(self._parser.version, reason_code)
        if refusal is not None:
            self._send(refusal)

    @property
    def _version(self) -> int:
        return self._parser.version or V5

    def _send(self, packet: Packet) -> None:
        out = encode(packet, self._version)
        if not 0 < self._terms.client_max_bytes < len(out):
            self.write(out)


def name_of(reason_code: int) -> str:
    """The name of a reason code, in lower case: what counters call it."""
    return ReasonCode(reason_code).name.lower()


async def _await(outcome: Any) -> Identity | Refusal:
    assert inspect.isawaitable(outcome)
    answer = await outcome
    assert isinstance(answer, Identity | Refusal)
    return answer
