"""One MQTT connection at the gateway's own server, from CONNECT (`reception`) to the close.

Publishes go to the `Intake` as they were read, and come back through `acknowledge` once durable. Nothing a
peer sends raises out of `data_received`: a violation gets the specification's answer (a reason code in 5, a
close in 3.1.1) and a count.

Choices where the specification leaves one, beside those in `terms`:

- A will is handed over like a QoS 0 publish when the connection ends without DISCONNECT 0x00. Will Delay
  Interval is honoured in one case: a will with a delay is dropped when its client is back and takes over.
- PUBACK or PUBCOMP for a publish that was never sent is ignored; PUBREC is answered as an unknown identifier.
- QoS 2 counts against Receive Maximum until its PUBREC, not until PUBCOMP.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from gateway.mqtt.codec.packet_codec import PINGRESP, encode_packet, encode_publish_acks
from gateway.mqtt.codec.packets import (
    AT_LEAST_ONCE,
    EXACTLY_ONCE,
    V5,
    V311,
    Auth,
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
)
from gateway.mqtt.codec.properties import protocol_error
from gateway.mqtt.handshake import (
    ConnectHandshake,
    ConnectionState,
    reason_code_name,
    subscription_refusal_codes,
)
from gateway.mqtt.transport import PauseReason

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence

    from gateway.mqtt.codec.parser import ParsedItem
    from gateway.mqtt.server import MqttServer

_log = logging.getLogger(__name__)


class DeviceConnection(ConnectHandshake):
    """Implements `Acknowledger`. Made by the `Listener` for each accepted socket."""

    name = "listen"

    def __init__(self, listener: MqttServer) -> None:
        super().__init__(listener)
        self._intake = listener.intake
        self._received_since_tick = False
        self._in_flight = 0
        self._qos0_counted = 0

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to await CONNECT, or close at once when there are too many connections."""
        super().connection_made(transport)
        if not self.listener.opened(self):
            self.abort()

    def data_received(self, data: bytes) -> None:
        """Parse everything read and act on it."""
        if self.closing:
            return
        self._received_since_tick = True
        self.counters.bytes_in_total += len(data)
        items = self._parser.feed(data)
        if self._state is ConnectionState.AUTHENTICATING:
            self._deferred += items
            return
        self.cork()
        self._take(items)
        self.uncork()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """Settle what the connection leaves behind: its session and its will."""
        self.closing = True
        self.listener.closed(self)
        if self.listener.served:
            self.listener.served.forget(self)
        if self._authentication is not None:
            self._authentication.cancel()
        listener, session, will = self.listener, self._session, self._will
        if session.connection is self:
            session.connection = None
            del listener.clients[self._client_key]
            if self._session_expiry_s:
                expires_at_s = listener.now_s + self._session_expiry_s
                listener.sessions.keep(self._client_key, session, expires_at_s=expires_at_s)
        if will is not None:
            self._will = None
            self.counters.wills_total += 1
            publish = Publish(will.topic, will.payload, retain=will.retain, properties=will.properties)
            self._intake.publishes(self, [publish])

    # What the committer calls

    @property
    def may_publish_sensor(self) -> Callable[[str], bool] | None:
        """Which sensor_ids payloads may name."""
        return None if self._identity is None else self._identity.may_publish_sensor

    def acknowledge(self, publishes: Sequence[Publish]) -> None:
        """Write PUBACK and PUBREC for durable publishes, in order, in one write."""
        once = [publish.packet_id for publish in publishes if publish.qos == AT_LEAST_ONCE]
        out = encode_publish_acks(PacketType.PUBACK, once) if once else b""
        answered = len(once)
        if answered != len(publishes):
            exactly = [publish.packet_id for publish in publishes if publish.qos == EXACTLY_ONCE]
            answered += len(exactly)
            out += self._mark_qos2_durable(exactly)
        self._in_flight -= answered
        if out:
            self.write(out)
        if (
            self.pauses & PauseReason.IN_FLIGHT
            and self._in_flight * 2 <= self.listener.settings.receive_maximum
        ):
            self.resume(PauseReason.IN_FLIGHT)

    def refuse(self, publishes: Sequence[Publish], reason_code: int) -> None:
        """Write PUBACK and PUBREC with a reason code of 0x80 or above; close a 3.1.1 connection."""
        numbered = [publish for publish in publishes if publish.qos]
        self._in_flight -= len(numbered)
        self.counters.refused_total[reason_code_name(reason_code)] += len(publishes)
        self._reject(numbered, reason_code)

    def deliver(self, topic: bytes, payload: bytes) -> None:
        """Send one message of the gateway's own at QoS 0."""
        self._send(Publish(topic, payload))

    # What the listener calls

    def tick(self, now_s: float) -> None:
        """Enforce every time limit of this connection."""
        super().tick(now_s)
        if self.closing:
            return
        still_valid = None if self._identity is None else self._identity.still_valid
        if still_valid is not None and not still_valid():
            self.end(ReasonCode.NOT_AUTHORIZED)
        elif self.pauses & ~PauseReason.AUTHENTICATION:
            self.since_s = now_s  # what we do not read cannot be heard
        elif self._state is not ConnectionState.CONNECTED:
            settings, admitting = self.listener.settings, self._state is ConnectionState.AUTHENTICATING
            if now_s - self.since_s > (
                settings.authentication_timeout_s if admitting else settings.connect_timeout_s
            ):
                self.count_close("admission_timeout" if admitting else "connect_timeout")
                self.hang_up()
        elif self._received_since_tick:
            self._received_since_tick = False
            self.since_s = now_s
        elif 0 < self._terms.keep_alive_timeout_s < now_s - self.since_s:
            self.end(ReasonCode.KEEP_ALIVE_TIMEOUT)

    def end(self, reason_code: ReasonCode, *, with_will: bool = True) -> None:
        """Close from this side: DISCONNECT with the code in MQTT 5, then the close."""
        if self.closing:
            return
        if not with_will:
            self._will = None
        self.count_close(reason_code_name(reason_code))
        self._send_close_reason(reason_code)
        self.hang_up()

    # Packets

    def _take(self, items: list[ParsedItem]) -> None:
        """Act on parsed items, in order; hand over their publishes together."""
        batch: list[Publish] = []
        fault: MqttProtocolError | None = None
        try:
            for position, item in enumerate(items):
                if isinstance(item, list):
                    run = item if self._permissions is None else self._filter_permitted(item)
                    batch = batch + run if batch else run
                else:
                    self._packet(item, batch)
                if self.closing:
                    break
                if self._state is ConnectionState.AUTHENTICATING:
                    self._deferred = items[position + 1 :]
                    break
        except MqttProtocolError as caught:
            fault = caught
        if batch:
            fault = self._submit_publishes(batch) or fault
        if fault is None and self._state is not ConnectionState.AUTHENTICATING:
            fault = self._parser.fault
        if fault is not None and not self.closing:
            self._fail(fault)

    def _submit_publishes(self, batch: list[Publish]) -> MqttProtocolError | None:
        """Give publishes to the intake. Beyond Receive Maximum they are taken, but the connection ends."""
        qos0 = self._parser.qos0_publishes
        self._in_flight += len(batch) - (qos0 - self._qos0_counted)
        self._qos0_counted = qos0
        self.counters.publishes_total += len(batch)
        in_flight = self._in_flight
        self._intake.publishes(self, batch)
        if in_flight <= self.listener.settings.receive_maximum:
            return None
        if self._version == V5:
            return MqttProtocolError(ReasonCode.RECEIVE_MAXIMUM_EXCEEDED, f"{in_flight} publishes in flight")
        if self._in_flight > self.listener.settings.receive_maximum:
            self.pause(PauseReason.IN_FLIGHT)
        return None

    def _packet(self, packet: Packet, batch: list[Publish]) -> None:
        match packet:
            case Publish():
                self._handle_qos2_publish(packet, batch)
            case PublishAck(PacketType.PUBREL, packet_id):
                self._handle_pubrel(packet_id)
            case PublishAck(PacketType.PUBREC, packet_id):
                self._send(PublishAck(PacketType.PUBREL, packet_id, ReasonCode.PACKET_IDENTIFIER_NOT_FOUND))
            case Pingreq():
                self.write(PINGRESP)
            case Connect():
                self._connect(packet)
            case Subscribe():
                self._subscribe(packet)
            case Unsubscribe(packet_id, filters):
                self._send(Unsuback(packet_id, self.listener.served.remove_subscriptions(self, filters)))
            case Disconnect():
                self._disconnected(packet)
            case Auth():
                raise protocol_error("AUTH on a connection without enhanced authentication")
            case _:
                pass

    def _subscribe(self, packet: Subscribe) -> None:
        refusals = subscription_refusal_codes(packet, self._version)
        names = [name for name, _ in packet.filters]
        codes = self.listener.served.answer(self, names, refusals, self.may_publish_sensor)
        self.counters.refused_total["subscribe"] += sum(code != 0 for code in codes)
        if self._version != V5:
            codes = tuple(code and ReasonCode.UNSPECIFIED_ERROR for code in codes)  # all that 3.1.1 can say
        self._send(Suback(packet.packet_id, codes))

    def _handle_qos2_publish(self, publish: Publish, batch: list[Publish]) -> None:
        durable = self._session.unreleased.get(publish.packet_id)
        if durable:
            self.write(encode_publish_acks(PacketType.PUBREC, [publish.packet_id]))
        elif durable is None and self._filter_permitted([publish]):
            self._session.unreleased[publish.packet_id] = False
            batch.append(publish)

    def _mark_qos2_durable(self, packet_ids: list[int]) -> bytes:
        """Mark QoS 2 identifiers durable; returns their PUBRECs, unless another connection sends them."""
        session = self._session
        for packet_id in packet_ids:
            session.unreleased[packet_id] = True
        out = encode_publish_acks(PacketType.PUBREC, packet_ids)
        if session.connection is None or session.connection is self:
            return out
        session.connection.write(out)
        return b""

    def _handle_pubrel(self, packet_id: int) -> None:
        durable = self._session.unreleased.get(packet_id)
        if durable is False:
            raise protocol_error("PUBREL before PUBREC")
        self._session.unreleased.pop(packet_id, None)
        known = ReasonCode.SUCCESS if durable else ReasonCode.PACKET_IDENTIFIER_NOT_FOUND
        self._send(PublishAck(PacketType.PUBCOMP, packet_id, known))

    def _filter_permitted(self, run: list[Publish]) -> list[Publish]:
        """What of `run` may be published; the rest is answered here."""
        if self._permissions is None:
            return run
        granted, denied = self._permissions.split(run)
        if denied:
            self.counters.refused_total[reason_code_name(ReasonCode.NOT_AUTHORIZED)] += len(denied)
            assert self._identity is not None
            self.listener.log_denied_publish(self._identity.name, denied[0].topic)
            self._qos0_counted += sum(not publish.qos for publish in denied)
            self._reject([publish for publish in denied if publish.qos], ReasonCode.NOT_AUTHORIZED)
        return granted

    def _reject(self, numbered: Sequence[Publish], reason_code: int) -> None:
        for publish in numbered:
            if publish.qos == EXACTLY_ONCE:
                self._session.unreleased.pop(publish.packet_id, None)
        if not numbered or self.closing:
            return
        if self._version == V311:
            self.count_close(reason_code_name(reason_code))
            self.hang_up()
            return
        kinds = (PacketType.PUBACK, PacketType.PUBREC)
        self.write(
            b"".join(encode_packet(PublishAck(kinds[p.qos - 1], p.packet_id, reason_code)) for p in numbered)
        )

    def _disconnected(self, packet: Disconnect) -> None:
        expiry_s = packet.properties.get(Property.SESSION_EXPIRY_INTERVAL)
        if isinstance(expiry_s, int):
            if expiry_s and not self._session_expiry_s:
                raise protocol_error("DISCONNECT gives an expiry to a session that had none")
            self._session_expiry_s = min(expiry_s, self.listener.settings.session_expiry_max_s)
        if packet.reason_code == ReasonCode.SUCCESS:
            self._will = None
        self.part()

    # Output

    def _fail(self, fault: MqttProtocolError) -> None:
        self.counters.protocol_faults_total[reason_code_name(fault.reason_code)] += 1
        _log.debug("protocol fault of %r: %s", self._client_id, fault)
        self._send_close_reason(fault.reason_code)
        self.hang_up()
