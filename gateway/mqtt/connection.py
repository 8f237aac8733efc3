"""One connection at the gateway's own server, from CONNECT to the close.

awaiting CONNECT ──> authenticating ──> connected ──> closing

Publishes go to the sink as they were read, and come back through `acknowledge` once durable. Nothing a peer
sends raises out of `data_received`: a violation gets the specification's answer (a reason code in 5, a close
in 3.1.1) and a count. Choices where the specification leaves one:

- A will is submitted like a QoS 0 publish when the connection ends without DISCONNECT 0x00. Will Delay
  Interval is honoured in one case: a will with a delay is dropped when its client is back and takes over.
- PUBACK or PUBCOMP for a publish that was never sent is ignored; PUBREC is answered as an unknown identifier.
- QoS 2 counts against Receive Maximum until its PUBREC, not until PUBCOMP.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from functools import partial
from typing import TYPE_CHECKING

from gateway.auth.authenticator import Credentials, Identity, Refusal
from gateway.mqtt.codec.packet_codec import PINGRESP, encode_packet, encode_publish_acks, encode_refusals
from gateway.mqtt.codec.packets import (
    V5,
    V311,
    Auth,
    Connack,
    Connect,
    Disconnect,
    MqttProtocolError,
    Packet,
    PacketType,
    Pingreq,
    Property,
    Publish,
    PublishAck,
    ReasonCode,
    Suback,
    Subscribe,
    Unsuback,
    Unsubscribe,
    Will,
    reason_code_name,
)
from gateway.mqtt.codec.parser import PacketParser, ParsedItem
from gateway.mqtt.codec.properties import protocol_error
from gateway.mqtt.handshake import (
    SessionParameters,
    build_refusal_connack,
    decide_connect,
    find_connect_refusal,
)
from gateway.mqtt.session_state import Qos2Exchanges, encode_acknowledgements
from gateway.mqtt.transport import InFlightWindow, MqttTransport, PauseReason

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gateway.mqtt.context import ServerContext

_log = logging.getLogger(__name__)


class DeviceConnection:
    """Implements `Acknowledger`, and `TransportOwner` for its transport."""

    name = "listen"

    def __init__(self, context: ServerContext) -> None:
        options = context.options
        self.transport = MqttTransport(self, options.write_limits, lambda: context.now_s)
        self._context = context
        self._counters = context.counters
        self._parser = PacketParser(
            max_packet_bytes=options.max_packet_bytes,
            topics=context.topics,
            topic_alias_maximum=options.topic_alias_maximum,
        )
        self._window = InFlightWindow(options.receive_maximum, self.transport, self._parser)
        self._parameters: SessionParameters | None = None  # None until connected
        self._exchanges = Qos2Exchanges()
        self._session_expiry_s = 0
        self._will: Will | None = None
        self._authentication: asyncio.Future[Identity | Refusal] | None = None  # not None: authenticating
        self._deferred: list[ParsedItem] = []
        self._silent_since_s = context.now_s  # before it is connected: since when it is in its state
        self._received_since_tick = False

    # What the transport calls

    def connection_made(self) -> None:
        """Await CONNECT, or close at once when there are too many connections."""
        if self._context.paused:
            self.transport.pause(PauseReason.BACKPRESSURE)
        if not self._context.add_connection(self):
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Parse everything read and act on it."""
        self._received_since_tick = True
        self._counters.bytes_in += len(data)
        items = self._parser.feed(data)
        if self._authentication is not None:
            self._deferred += items
            return
        self.transport.cork()
        self._process_items(items)
        self.transport.flush()

    def connection_lost(self) -> None:
        """Settle what the connection leaves behind: its session and its will."""
        context, parameters, will = self._context, self._parameters, self._will
        context.remove_connection(self)
        context.commands.remove_connection(self)
        if self._authentication is not None:
            self._authentication.cancel()
        if parameters is not None and context.clients.get(parameters.client_key) is self:
            del context.clients[parameters.client_key]
            if self._session_expiry_s:
                expires_at_s = context.now_s + self._session_expiry_s
                context.sessions.add(parameters.client_key, self._exchanges, expires_at_s=expires_at_s)
        if will is not None:
            self._will = None
            self._counters.wills += 1
            publish = Publish(will.topic, will.payload, retain=will.retain, properties=will.properties)
            context.sink.submit_publishes(self, [publish])

    def write_limit_exceeded(self, limit: str) -> None:
        """The peer does not read its answers."""
        self._counters.closed[limit] += 1

    # What the committer calls

    @property
    def may_publish_sensor(self) -> Callable[[str], bool] | None:
        """Which sensor_ids payloads may name."""
        return None if self._parameters is None else self._parameters.identity.may_publish_sensor

    def acknowledge(self, publishes: Sequence[Publish]) -> None:
        """Write PUBACK and PUBREC for durable publishes, in order, in one write."""
        out, answered = encode_acknowledgements(publishes, self._exchanges, self)
        self.transport.write(out)
        self._window.remove(answered)

    def refuse(self, publishes: Sequence[Publish], reason_code: int) -> None:
        """Write PUBACK and PUBREC with a reason code of 0x80 or above; close a 3.1.1 connection."""
        numbered = [publish for publish in publishes if publish.qos]
        self._window.remove(len(numbered))
        self._counters.refused[reason_code_name(reason_code)] += len(publishes)
        self._reject(numbered, reason_code)

    # What other connections and the server call

    def publish(self, topic: bytes, payload: bytes) -> None:
        """Send one message at QoS 0."""
        self._send(Publish(topic, payload))

    def send_pubrec(self, packet_id: int) -> None:
        """Acknowledge a QoS 2 publish that is durable."""
        self.transport.write(encode_publish_acks(PacketType.PUBREC, [packet_id]))

    def release_session(self) -> Qos2Exchanges | None:
        """Give way to a new connection of the client: DISCONNECT 0x8E. Returns the session if it lives on."""
        if self._will is not None and self._will.properties.get(Property.WILL_DELAY_INTERVAL):
            self._will = None
        self.end(ReasonCode.SESSION_TAKEN_OVER)
        return self._exchanges if self._session_expiry_s else None

    def clear_permission_cache(self) -> None:
        """Ask again whether each topic may be published to: the rules for topics have changed."""
        if self._parameters is not None and self._parameters.permissions is not None:
            self._parameters.permissions.clear_cache()

    def tick(self, now_s: float) -> None:
        """Enforce every time limit of this connection."""
        self.transport.tick(now_s)
        if self.transport.closing:
            return
        parameters, options = self._parameters, self._context.options
        silent_s = now_s - self._silent_since_s
        if parameters is not None and not parameters.identity.still_valid():
            self.end(ReasonCode.NOT_AUTHORIZED)
        elif self.transport.pauses & ~PauseReason.AUTHENTICATION:
            self._silent_since_s = now_s  # nothing can be received from a socket that is not read
        elif self._authentication is not None:
            if silent_s > options.authentication_timeout_s:
                self._close("admission_timeout")
        elif parameters is None:
            if silent_s > options.connect_timeout_s:
                self._close("connect_timeout")
        elif self._received_since_tick:
            self._received_since_tick = False
            self._silent_since_s = now_s
        elif 0 < parameters.keep_alive_timeout_s < silent_s:
            self.end(ReasonCode.KEEP_ALIVE_TIMEOUT)

    def end(self, reason_code: ReasonCode, *, with_will: bool = True) -> None:
        """Close from this side: DISCONNECT with the code in MQTT 5, then the close."""
        if self.transport.closing:
            return
        if not with_will:
            self._will = None
        self._send_close_reason(reason_code)
        self._close(reason_code_name(reason_code))

    def _close(self, reason: str) -> None:
        self._counters.closed[reason] += 1
        self.transport.close()

    # CONNECT

    def _connect(self, connect: Connect) -> None:
        refusal = find_connect_refusal(connect)
        if refusal is not None:
            self._refuse_connect(refusal)
            return
        client_id = connect.client_id or f"tidegate-{secrets.token_hex(8)}"
        stream = self.transport.stream
        peer = stream.get_extra_info("peername")
        outcome = self._context.authenticator.authenticate(
            Credentials(
                client_id,
                connect.username,
                connect.password,
                stream.get_extra_info("peercert") or None,
                str(peer[0]) if peer else "",
            )
        )
        if isinstance(outcome, Identity | Refusal):
            self._finish_connect(connect, client_id, outcome)
            return
        self._silent_since_s = self._context.now_s
        self.transport.pause(PauseReason.AUTHENTICATION)
        self._authentication = asyncio.ensure_future(outcome)
        self._authentication.add_done_callback(partial(self._authentication_done, connect, client_id))

    def _authentication_done(
        self, connect: Connect, client_id: str, task: asyncio.Future[Identity | Refusal]
    ) -> None:
        self._authentication = None
        if self.transport.closing:
            return
        if task.cancelled() or task.exception() is not None:
            _log.error("authentication of client %r failed", client_id, exc_info=task.exception())
            self._refuse_connect(ReasonCode.SERVER_UNAVAILABLE)
            return
        self._finish_connect(connect, client_id, task.result())
        self.transport.resume(PauseReason.AUTHENTICATION)
        items, self._deferred = self._deferred, []
        if not self.transport.closing:
            self._process_items(items)

    def _finish_connect(self, connect: Connect, client_id: str, outcome: Identity | Refusal) -> None:
        context = self._context
        decision = decide_connect(connect, client_id, outcome, context.options)
        if isinstance(decision, Refusal):
            self._refuse_connect(decision.reason_code)
            return
        self._parameters = decision
        self._session_expiry_s = decision.session_expiry_s
        self._will = connect.will
        session = context.claim_session(decision.client_key, self)
        present = session is not None and not connect.clean_start
        if session is not None and present:
            self._exchanges = session
        self._silent_since_s = context.now_s
        self._send(Connack(0, present, decision.announced))

    def _refuse_connect(self, reason_code: int) -> None:
        self._counters.refused[reason_code_name(reason_code)] += 1
        self._send_close_reason(reason_code)
        self.transport.close()

    # Packets

    def _process_items(self, items: list[ParsedItem]) -> None:
        """Act on parsed items, in order; submit their publishes together."""
        batch: list[Publish] = []
        fault: MqttProtocolError | None = None
        try:
            for position, item in enumerate(items):
                if isinstance(item, list):
                    permitted = self._filter_permitted(item)
                    batch = batch + permitted if batch else permitted
                else:
                    self._process_packet(item, batch)
                if self.transport.closing:
                    break
                if self._authentication is not None:
                    self._deferred = items[position + 1 :]
                    break
        except MqttProtocolError as caught:
            fault = caught
        if batch:
            fault = self._submit_publishes(batch) or fault
        if fault is None and self._authentication is None:
            fault = self._parser.fault
        if fault is not None and not self.transport.closing:
            name = reason_code_name(fault.reason_code)
            self._counters.protocol_faults[name] += 1
            _log.debug("protocol fault of %r: %s", self._parameters and self._parameters.client_key, fault)
            self._send_close_reason(fault.reason_code)
            self.transport.close()

    def _submit_publishes(self, batch: list[Publish]) -> MqttProtocolError | None:
        """Give publishes to the sink. Beyond Receive Maximum they are accepted, but the connection ends."""
        window = self._window
        window.add(len(batch))
        self._counters.publishes += len(batch)
        exceeded, in_flight = window.exceeded, window.count
        self._context.sink.submit_publishes(self, batch)
        if not exceeded:
            return None
        if self._version == V5:
            return MqttProtocolError(ReasonCode.RECEIVE_MAXIMUM_EXCEEDED, f"{in_flight} publishes in flight")
        window.pause_if_full()
        return None

    def _process_packet(self, packet: Packet, batch: list[Publish]) -> None:
        match packet:
            case Publish():
                self._receive_qos2_publish(packet, batch)
            case PublishAck(PacketType.PUBREL, packet_id):
                code = self._exchanges.release(packet_id, durable_only=True)
                self._send(PublishAck(PacketType.PUBCOMP, packet_id, code))
            case PublishAck(PacketType.PUBREC, packet_id):
                self._send(PublishAck(PacketType.PUBREL, packet_id, ReasonCode.PACKET_IDENTIFIER_NOT_FOUND))
            case Pingreq():
                self.transport.write(PINGRESP)
            case Connect():
                self._connect(packet)
            case Subscribe():
                self._subscribe(packet)
            case Unsubscribe(packet_id, filters):
                self._send(Unsuback(packet_id, self._context.commands.unsubscribe(self, filters)))
            case Disconnect():
                self._process_disconnect(packet)
            case Auth():
                raise protocol_error("AUTH on a connection without enhanced authentication")
            case _:
                pass

    def _subscribe(self, packet: Subscribe) -> None:
        codes = self._context.commands.subscribe(self, packet, self._version, self.may_publish_sensor)
        self._counters.refused["subscribe"] += sum(code != 0 for code in codes)
        self._send(Suback(packet.packet_id, codes))

    def _receive_qos2_publish(self, publish: Publish, batch: list[Publish]) -> None:
        repeated = self._exchanges.receive(publish, self)
        if repeated is None:
            batch += self._filter_permitted([publish])
        elif repeated.durable:
            self.send_pubrec(publish.packet_id)

    def _filter_permitted(self, publishes: list[Publish]) -> list[Publish]:
        """Those that may be published; the rest is answered here."""
        parameters = self._parameters
        if parameters is None or parameters.permissions is None:
            return publishes
        allowed, denied = parameters.permissions.split(publishes)
        if denied:
            self._counters.refused[reason_code_name(ReasonCode.NOT_AUTHORIZED)] += len(denied)
            self._context.log_denied_publish(parameters.identity.name, denied[0].topic)
            numbered = [publish for publish in denied if publish.qos]
            self._window.skip_qos0(len(denied) - len(numbered))
            self._reject(numbered, ReasonCode.NOT_AUTHORIZED)
        return allowed

    def _reject(self, numbered: Sequence[Publish], reason_code: int) -> None:
        """Answer publishes of QoS 1 and 2 with a reason code: MQTT 3.1.1 has none, and closes."""
        for publish in numbered:
            self._exchanges.remove(publish)
        if not numbered or self.transport.closing:
            return
        if self._version == V311:
            self._close(reason_code_name(reason_code))
        else:
            self.transport.write(encode_refusals(numbered, reason_code))

    def _process_disconnect(self, packet: Disconnect) -> None:
        expiry_s = packet.properties.get(Property.SESSION_EXPIRY_INTERVAL)
        if isinstance(expiry_s, int):
            if expiry_s and not self._session_expiry_s:
                raise protocol_error("DISCONNECT gives an expiry to a session that had none")
            self._session_expiry_s = min(expiry_s, self._context.options.session_expiry_max_s)
        if packet.reason_code == ReasonCode.SUCCESS:
            self._will = None
        self.transport.close_after_peer()

    # Output

    @property
    def _version(self) -> int:
        return self._parser.version or V5

    def _send_close_reason(self, reason_code: int) -> None:
        """CONNACK or DISCONNECT with the code, as far as the version and the state have one."""
        if self._parameters is None:
            refusal = build_refusal_connack(self._parser.version, reason_code)
            if refusal is not None:
                self._send(refusal)
        elif self._version == V5:
            self._send(Disconnect(reason_code))

    def _send(self, packet: Packet) -> None:
        out = encode_packet(packet, self._version)
        if self._parameters is None or not 0 < self._parameters.client_max_packet_bytes < len(out):
            self.transport.write(out)
