"""One connection to an MQTT 5 broker, from CONNECT to its end, whoever ends it.

Publishes go to the `Intake` as they were read; PUBACK and PUBREC are written when it says that they are
durable, in the order it says so, which is the order in which they came (MQTT-4.6.0-2, -3). They are written
to the connection on which the publish came, or to none: a broker sends again on the next connection what it
had no acknowledgement for, and what that connection has not carried it does not acknowledge.

Choices where the specification leaves one:

- A refusal that will pass (quota exceeded) is not sent: PUBACK with an error makes a broker forget the
  message. The connection is left instead; the session keeps what was not acknowledged.
- More messages in flight than Receive Maximum are taken, and counted, and the socket is not read until half
  of it is free. The specification would have us leave; mosquitto 2.0.11 exceeds it as soon as it gets
  acknowledgements in order, and would do so again.
- PUBREL for an identifier that is unknown is answered so (0x92), which after a restart of ours is usual.
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from gateway.mqtt.broker_session import BrokerError, build_broker_error
from gateway.mqtt.codec.packet_codec import encode_packet, encode_pubacks, encode_publish_acks
from gateway.mqtt.codec.packets import (
    AT_LEAST_ONCE,
    EXACTLY_ONCE,
    V5,
    Connack,
    Connect,
    Disconnect,
    MqttProtocolError,
    Packet,
    PacketType,
    Pingreq,
    Publish,
    PublishAck,
    ReasonCode,
    Suback,
    Subscribe,
    TopicCache,
    Unsubscribe,
)
from gateway.mqtt.codec.parser import PacketParser
from gateway.mqtt.codec.properties import protocol_error
from gateway.mqtt.transport import PauseReason

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gateway.ingress.source import PublishSink
    from gateway.mqtt.broker_session import SubscriberCounters, SubscriberOptions
    from gateway.mqtt.session_state import Qos2Exchanges

_T = TypeVar("_T")

_R = ReasonCode
_TRANSIENT_REASON_CODES = frozenset(
    {_R.QUOTA_EXCEEDED, _R.UNSPECIFIED_ERROR, _R.IMPLEMENTATION_SPECIFIC_ERROR}
)
_WRITE_HIGH_BYTES: Final = 1 << 16


class MqttClient(asyncio.Protocol):
    """Implements `Acknowledger`; who may publish what is the broker's to say.

    Attributes:
        name: the settings' name, for whoever labels what it handed over.
        accepted: CONNACK with success, once it has come.
        lost: why the connection has ended, once it has.
        gone: done when the socket is closed.
        in_flight: QoS 1 and 2 publishes handed over and not answered.
        keep_alive_s: in force; the broker's wish replaces our own.
        closing: nothing is written or taken any more.
    """

    may_publish_sensor: Callable[[str], bool] | None = None

    def __init__(
        self,
        settings: SubscriberOptions,
        connect: Connect,
        intake: PublishSink,
        exchanges: Qos2Exchanges,
        counters: SubscriberCounters,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.name = f"subscribe:{settings.name}"
        self.accepted: asyncio.Future[Connack] = self._loop.create_future()
        self.lost: asyncio.Future[BrokerError] = self._loop.create_future()
        self.gone: asyncio.Future[None] = self._loop.create_future()
        self.in_flight = 0
        self.keep_alive_s = float(settings.keep_alive_s)
        self.closing = False
        self._connect = connect
        self._intake = intake
        self._qos2_exchanges = exchanges
        self._counters = counters
        self._receive_maximum = settings.receive_maximum
        self._exceeded = False
        self._parser = PacketParser(
            max_packet_bytes=settings.max_packet_bytes,
            topics=TopicCache(),
            topic_alias_maximum=settings.topic_alias_maximum,
            client=True,
            version=V5,
        )
        self._qos0_counted = 0
        self._subacks: dict[int, asyncio.Future[Suback]] = {}
        self._packet_id = 0
        self._pauses = PauseReason(0)
        self._last_received_s = self._last_sent_s = self._loop.time()
        self._ping_sent_s: float | None = None
        self._corked: bytearray | None = None

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send CONNECT."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own class does not derive from it
        peer = transport.get_extra_info("socket")
        if peer is not None:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._transport.set_write_buffer_limits(high=_WRITE_HIGH_BYTES)
        self._write(encode_packet(self._connect))

    def data_received(self, data: bytes) -> None:
        """Parse everything read, act on it, hand over its publishes together."""
        if self.closing:
            return
        self._last_received_s = self._loop.time()
        self._ping_sent_s = None
        self._counters.bytes_in_total += len(data)
        batch: list[Publish] = []
        fault: MqttProtocolError | None = None
        self._corked = bytearray()
        try:
            for item in self._parser.feed(data):
                if isinstance(item, list):
                    batch = batch + item if batch else item
                else:
                    self._packet(item, batch)
        except MqttProtocolError as caught:
            fault = caught
        if batch:
            if self.accepted.done():
                self._submit_publishes(batch)
            else:
                fault = protocol_error("PUBLISH before CONNACK")
        self._uncork()
        fault = fault or self._parser.fault
        if fault is not None:
            self._fail(fault)

    def connection_lost(self, exc: Exception | None) -> None:
        """Say why, unless that is known already."""
        self.closing = True
        closed = (
            f"the broker closed the connection; does another client use the id {self._connect.client_id!r}?"
        )
        why = f"the connection broke: {exc}" if exc else closed
        self._settle(BrokerError("broken" if exc else "closed", why))
        if not self.gone.done():
            self.gone.set_result(None)

    def pause_writing(self) -> None:
        """The broker does not read what it is sent: stop reading it, too."""
        self.pause(PauseReason.WRITE_BUFFER)

    def resume_writing(self) -> None:
        """The broker has read enough."""
        self.resume(PauseReason.WRITE_BUFFER)

    # What the committer calls, and another connection of the session

    def acknowledge(self, publishes: Sequence[Publish]) -> None:
        """Write PUBACK and PUBREC for durable publishes, in order, in one write."""
        once = [publish.packet_id for publish in publishes if publish.qos == AT_LEAST_ONCE]
        out = encode_pubacks(once) if once else b""
        answered = len(once)
        if answered != len(publishes):
            exactly = [publish for publish in publishes if publish.qos == EXACTLY_ONCE]
            answered += len(exactly)
            out += self._mark_qos2_durable(exactly)
        self.in_flight -= answered
        self._counters.acknowledged_total += answered
        self._write(out)
        self._resume_if_acknowledged()

    def refuse(self, publishes: Sequence[Publish], reason_code: int) -> None:
        """Leave the broker for a while when the reason will pass; otherwise tell it to forget them."""
        self._counters.refused_total[ReasonCode(reason_code).name.lower()] += len(publishes)
        numbered = [publish for publish in publishes if publish.qos]
        self.in_flight -= len(numbered)
        for publish in numbered:
            self._qos2_exchanges.forget(publish)
        if reason_code in _TRANSIENT_REASON_CODES:
            name = ReasonCode(reason_code).name.lower()
            self.leave(
                BrokerError(
                    name, f"left the broker, which keeps what was not taken: {name.replace('_', ' ')}"
                ),
                ReasonCode(reason_code),
            )
            return
        kinds = (PacketType.PUBACK, PacketType.PUBREC)
        self._write(
            b"".join(encode_packet(PublishAck(kinds[p.qos - 1], p.packet_id, reason_code)) for p in numbered)
        )
        self._resume_if_acknowledged()

    def publish(self, topic: bytes, payload: bytes) -> None:
        """Send one message at QoS 0."""
        self._write(encode_packet(Publish(topic, payload)))

    def send_pubrecs(self, packet_ids: Sequence[int]) -> None:
        """Write PUBRECs that are due on this connection."""
        self._write(encode_publish_acks(PacketType.PUBREC, packet_ids))

    # What the subscriber calls

    async def answer(self, awaited: asyncio.Future[_T]) -> _T:
        """What the broker answers.

        Raises:
            BrokerFault: the connection ended first.
        """
        either: set[asyncio.Future[Any]] = {awaited, self.lost}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not awaited.done():
            raise self.lost.result()
        return awaited.result()

    def subscribe(self, filters: Sequence[str], options: int) -> asyncio.Future[Suback]:
        """Send SUBSCRIBE; the future is its SUBACK."""
        packet_id = self._next_packet_id()
        self._subacks[packet_id] = self._loop.create_future()
        self._write(encode_packet(Subscribe(packet_id, tuple((name, options) for name in filters))))
        return self._subacks[packet_id]

    def unsubscribe(self, filters: Sequence[str]) -> None:
        """Send UNSUBSCRIBE. Nobody waits for the answer: a filter that was not there is gone as well."""
        self._write(encode_packet(Unsubscribe(self._next_packet_id(), tuple(filters))))

    def pause(self, reason: PauseReason = PauseReason.BACKPRESSURE) -> None:
        """Stop reading the socket; TCP and Receive Maximum push back. PINGREQ goes on."""
        if not self._pauses and not self.closing:
            self._transport.pause_reading()
        self._pauses |= reason

    def resume(self, reason: PauseReason = PauseReason.BACKPRESSURE) -> None:
        """Drop one reason, and read again when it was the last."""
        was, self._pauses = self._pauses, self._pauses & ~reason
        if was and not self._pauses and not self.closing:
            self._last_received_s = self._loop.time()
            self._transport.resume_reading()

    def tick(self, now_s: float) -> None:
        """Keep the connection alive, and find out when it no longer is. Called about once a second.

        Idle for half the keep alive, in either direction, it sends PINGREQ; whatever arrives is an answer.
        While reading is paused nothing can be heard, so only the sending goes on.
        """
        period_s = self.keep_alive_s / 2
        if self.closing or not period_s:
            return
        if self._pauses & (PauseReason.BACKPRESSURE | PauseReason.IN_FLIGHT):
            self._last_received_s, self._ping_sent_s = now_s, None
        if self._ping_sent_s is not None:
            if now_s - self._ping_sent_s > period_s:
                silence = f"nothing heard of the broker for {now_s - self._last_received_s:.0f} s"
                self._settle(BrokerError("keep_alive_timeout", silence))
                self.abort()
        elif now_s - min(self._last_sent_s, self._last_received_s) >= period_s:
            self._write(encode_packet(Pingreq()))
            self._ping_sent_s = now_s

    def leave(self, fault: BrokerError, code: ReasonCode = _R.SUCCESS) -> None:
        """DISCONNECT, then the close.

        What is still read is dropped: a close with unread bytes would reset the connection, and the broker
        could miss the last acknowledgements.
        """
        if self.closing:
            return
        self._write(encode_packet(Disconnect(code)))
        self._uncork()
        self.closing = True
        self._settle(fault)
        if self._pauses:
            self._transport.resume_reading()
        if self._transport.can_write_eof():
            self._transport.write_eof()

    def abort(self) -> None:
        """Close without sending what is still to be sent."""
        self.closing = True
        self._transport.abort()

    async def wait_until_closed(self, within_s: float) -> None:
        """Wait for the socket to close after `leave`, and close it hard at the end of that time."""
        await asyncio.wait({self.gone}, timeout=within_s)
        if not self.gone.done():
            self.abort()
            await asyncio.wait({self.gone}, timeout=1)

    # Packets

    def _packet(self, packet: Packet, batch: list[Publish]) -> None:
        if isinstance(packet, Connack):
            self._answered(packet)
            return
        if not self.accepted.done():
            raise protocol_error(f"{type(packet).__name__.upper()} before CONNACK")
        match packet:
            case Publish():
                self._handle_qos2_publish(packet, batch)
            case PublishAck(PacketType.PUBREL, packet_id):
                known = self._qos2_exchanges.release(packet_id)
                code = ReasonCode.SUCCESS if known else ReasonCode.PACKET_IDENTIFIER_NOT_FOUND
                self._write(encode_packet(PublishAck(PacketType.PUBCOMP, packet_id, code)))
            case Suback(packet_id):
                waiting = self._subacks.pop(packet_id, None)
                if waiting is not None:
                    waiting.set_result(packet)
            case Disconnect(code, properties):
                self._settle(build_broker_error("DISCONNECT", code, properties))
            case _:
                pass

    def _answered(self, packet: Connack) -> None:
        if self.accepted.done():
            raise protocol_error("a second CONNACK")
        if packet.code:
            self._settle(build_broker_error("CONNACK", packet.code, packet.properties))
            return
        if not packet.session_present:
            self._qos2_exchanges.clear()
        self.accepted.set_result(packet)

    def _submit_publishes(self, batch: list[Publish]) -> None:
        qos0 = self._parser.qos0_publishes
        self.in_flight += len(batch) - (qos0 - self._qos0_counted)
        self._qos0_counted = qos0
        self._counters.publishes_total += len(batch)
        self._counters.redelivered_total += sum(publish.dup for publish in batch)
        exceeds = self.in_flight > self._receive_maximum
        self._intake.publishes(self, batch)
        if exceeds and not self._exceeded:
            self._exceeded = True
            self._counters.protocol_faults_total[_R.RECEIVE_MAXIMUM_EXCEEDED.name.lower()] += 1
        if self.in_flight > self._receive_maximum:
            self.pause(PauseReason.IN_FLIGHT)

    def _resume_if_acknowledged(self) -> None:
        if self._pauses & PauseReason.IN_FLIGHT and self.in_flight * 2 <= self._receive_maximum:
            self.resume(PauseReason.IN_FLIGHT)

    def _handle_qos2_publish(self, publish: Publish, batch: list[Publish]) -> None:
        repeated = self._qos2_exchanges.take(publish, self)
        if repeated is None:
            batch.append(publish)
            return
        self._counters.redelivered_total += 1
        if repeated.durable:
            self.send_pubrecs([publish.packet_id])

    def _mark_qos2_durable(self, publishes: Sequence[Publish]) -> bytes:
        """Mark QoS 2 messages durable; their PUBRECs, but for those another connection owes and sends."""
        own = []
        for publish in publishes:
            holder = self._qos2_exchanges.mark_durable(publish)
            if holder is self:
                own.append(publish.packet_id)
            elif holder is not None:
                holder.send_pubrecs([publish.packet_id])
        return encode_publish_acks(PacketType.PUBREC, own) if own else b""

    # The end, and output

    def _fail(self, fault: MqttProtocolError) -> None:
        name = ReasonCode(fault.reason_code).name.lower()
        self._counters.protocol_faults_total[name] += 1
        hint = "" if self.accepted.done() else "; is it a broker that speaks MQTT 5?"
        self.leave(
            BrokerError(name, f"the broker breaks the protocol: {fault}{hint}"), ReasonCode(fault.reason_code)
        )

    def _settle(self, fault: BrokerError) -> None:
        if not self.lost.done():
            self.lost.set_result(fault)

    def _next_packet_id(self) -> int:
        self._packet_id = self._packet_id % 0xFFFF + 1
        return self._packet_id

    def _uncork(self) -> None:
        gathered, self._corked = self._corked, None
        if gathered:
            self._write(bytes(gathered))

    def _write(self, out: bytes) -> None:
        if self.closing or not out:
            return
        if self._corked is not None:
            self._corked += out
            return
        self._last_sent_s = self._loop.time()
        self._transport.write(out)
