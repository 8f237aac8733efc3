"""One connection to an MQTT 5 broker, from CONNECT to its end, whoever ends it.

Publishes go to the sink as they were read; PUBACK and PUBREC are written when it acknowledges them, in the
order in which they came (MQTT-4.6.0-2, -3). They are written to the connection that carried the publish, or
to none: a broker sends again on the next connection what it had no acknowledgement for.

Choices where the specification leaves one:

- A refusal that will pass (quota exceeded) is not sent: PUBACK with an error makes a broker forget the
  message. The client disconnects instead; the session keeps what was not acknowledged.
- More messages in flight than Receive Maximum are accepted, and counted, and the socket is not read until
  half of it is free. The specification would have us disconnect; mosquitto 2.0.11 exceeds it as soon as it
  gets acknowledgements in order, and would do so again.
- PUBREL for an identifier that is unknown is answered so (0x92), which after a restart of ours is usual.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

from gateway.mqtt.broker_session import BrokerError, build_broker_error
from gateway.mqtt.codec.packet_codec import PINGREQ, encode_packet, encode_publish_acks, encode_refusals
from gateway.mqtt.codec.packets import (
    V5,
    Connack,
    Connect,
    Disconnect,
    MqttProtocolError,
    Packet,
    PacketType,
    Publish,
    PublishAck,
    ReasonCode,
    Suback,
    Subscribe,
    TopicCache,
    Unsubscribe,
    reason_code_name,
)
from gateway.mqtt.codec.parser import PacketParser
from gateway.mqtt.codec.properties import protocol_error
from gateway.mqtt.session_state import encode_acknowledgements
from gateway.mqtt.transport import InFlightWindow, MqttTransport, PauseReason, WriteLimits

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gateway.ingress.source import PublishSink
    from gateway.mqtt.broker_session import SubscriberOptions, SubscribeStatus
    from gateway.mqtt.session_state import Qos2Exchanges

_T = TypeVar("_T")

_TRANSIENT_REASON_CODES = frozenset(
    {ReasonCode.QUOTA_EXCEEDED, ReasonCode.UNSPECIFIED_ERROR, ReasonCode.IMPLEMENTATION_SPECIFIC_ERROR}
)


class MqttClient:
    """Implements `Acknowledger`, and `TransportOwner` for its transport.

    `accepted` is the successful CONNACK, `ended` why the connection has ended; `keep_alive_s` is in force.
    """

    may_publish_sensor: Callable[[str], bool] | None = None  # that is for the broker to decide

    def __init__(
        self,
        options: SubscriberOptions,
        connect: Connect,
        sink: PublishSink,
        exchanges: Qos2Exchanges,
        counters: SubscribeStatus,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.name = f"subscribe:{options.name}"
        self.accepted: asyncio.Future[Connack] = loop.create_future()
        self.ended: asyncio.Future[BrokerError] = loop.create_future()
        self.closed: asyncio.Future[None] = loop.create_future()
        self.keep_alive_s = float(options.keep_alive_s)
        self.transport = MqttTransport(self, WriteLimits(), loop.time)
        self._loop = loop
        self._connect = connect
        self._sink = sink
        self._exchanges = exchanges
        self._counters = counters
        self._parser = PacketParser(
            max_packet_bytes=options.max_packet_bytes,
            topics=TopicCache(),
            topic_alias_maximum=options.topic_alias_maximum,
            client=True,
            version=V5,
        )
        self.window = InFlightWindow(options.receive_maximum, self.transport, self._parser)
        self._exceeded = False
        self._subacks: dict[int, asyncio.Future[Suback]] = {}
        self._packet_id = 0
        self._last_received_s = loop.time()
        self._ping_sent_s: float | None = None

    # What the transport calls

    def connection_made(self) -> None:
        """Send CONNECT."""
        self._send(self._connect)

    def data_received(self, data: bytes) -> None:
        """Parse everything read, act on it, submit its publishes together."""
        self._last_received_s = self._loop.time()
        self._ping_sent_s = None
        self._counters.bytes_in += len(data)
        batch: list[Publish] = []
        fault: MqttProtocolError | None = None
        self.transport.cork()
        try:
            for item in self._parser.feed(data):
                if isinstance(item, list):
                    batch = batch + item if batch else item
                else:
                    self._process_packet(item, batch)
        except MqttProtocolError as caught:
            fault = caught
        if batch:
            if self.accepted.done():
                self._submit_publishes(batch)
            else:
                fault = protocol_error("PUBLISH before CONNACK")
        self.transport.flush()
        fault = fault or self._parser.fault
        if fault is not None:
            name = reason_code_name(fault.reason_code)
            self._counters.protocol_faults[name] += 1
            hint = "" if self.accepted.done() else "; is it a broker that speaks MQTT 5?"
            error = BrokerError(name, f"the broker violates the protocol: {fault}{hint}")
            self.disconnect(error, ReasonCode(fault.reason_code))

    def connection_lost(self) -> None:
        """Report why, unless that is known already."""
        error = BrokerError("broken", f"the connection broke: {self.transport.error}")
        if not self.transport.error:
            hint = f"does another client use the id {self._connect.client_id!r}?"
            error = BrokerError("closed", f"the broker closed the connection; {hint}")
        self._end(error)
        if not self.closed.done():
            self.closed.set_result(None)

    def write_limit_exceeded(self, limit: str) -> None:
        """The broker does not read its acknowledgements."""
        self._end(BrokerError(limit, "the broker does not read what it is sent"))

    # What the committer calls, and another connection of the session

    def acknowledge(self, publishes: Sequence[Publish]) -> None:
        """Write PUBACK and PUBREC for durable publishes, in order, in one write."""
        out, answered = encode_acknowledgements(publishes, self._exchanges, self)
        self._counters.acknowledged += answered
        self.transport.write(out)
        self.window.remove(answered)

    def refuse(self, publishes: Sequence[Publish], reason_code: int) -> None:
        """Disconnect for a while when the reason will pass; otherwise tell the broker to forget them."""
        name = reason_code_name(reason_code)
        self._counters.refused[name] += len(publishes)
        numbered = [publish for publish in publishes if publish.qos]
        for publish in numbered:
            self._exchanges.remove(publish)
        if reason_code in _TRANSIENT_REASON_CODES:
            reason = f"disconnected; the broker keeps what was not accepted: {name.replace('_', ' ')}"
            self.disconnect(BrokerError(name, reason), ReasonCode(reason_code))
        self.transport.write(encode_refusals(numbered, reason_code))
        self.window.remove(len(numbered))

    def publish(self, topic: bytes, payload: bytes) -> None:
        """Send one message at QoS 0."""
        self._send(Publish(topic, payload))

    def send_pubrec(self, packet_id: int) -> None:
        """Acknowledge a QoS 2 publish that is durable."""
        self.transport.write(encode_publish_acks(PacketType.PUBREC, [packet_id]))

    # What the subscriber calls

    async def wait_for(self, answer: asyncio.Future[_T]) -> _T:
        """What the broker answers; BrokerError when the connection ended first."""
        either: set[asyncio.Future[Any]] = {answer, self.ended}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise self.ended.result()
        return answer.result()

    def subscribe(self, filters: Sequence[str], options: int) -> asyncio.Future[Suback]:
        """Send SUBSCRIBE; the future is its SUBACK."""
        packet_id = self._next_packet_id()
        self._subacks[packet_id] = self._loop.create_future()
        self._send(Subscribe(packet_id, tuple((name, options) for name in filters)))
        return self._subacks[packet_id]

    def unsubscribe(self, filters: Sequence[str]) -> None:
        """Send UNSUBSCRIBE. Its answer does not matter: a filter that was not there is gone as well."""
        self._send(Unsubscribe(self._next_packet_id(), tuple(filters)))

    def tick(self, now_s: float) -> None:
        """Keep the connection alive, and find out when it no longer is. Called about once a second.

        Idle for half the keep alive, in either direction, it sends PINGREQ; whatever arrives is an answer.
        While reading is paused nothing can be received, so only the sending goes on.
        """
        transport, period_s = self.transport, self.keep_alive_s / 2
        transport.tick(now_s)
        if transport.closing or not period_s:
            return
        if transport.pauses & (PauseReason.BACKPRESSURE | PauseReason.IN_FLIGHT):
            self._last_received_s, self._ping_sent_s = now_s, None
        if self._ping_sent_s is not None:
            if now_s - self._ping_sent_s > period_s:
                silence = f"nothing received from the broker for {now_s - self._last_received_s:.0f} s"
                self._end(BrokerError("keep_alive_timeout", silence))
                transport.abort()
        elif now_s - min(transport.last_write_s, self._last_received_s) >= period_s:
            transport.write(PINGREQ)
            self._ping_sent_s = now_s

    def disconnect(self, error: BrokerError, code: ReasonCode = ReasonCode.SUCCESS) -> None:
        """DISCONNECT, then the close; `error` is why."""
        if not self.transport.closing:
            self._send(Disconnect(code))
            self._end(error)
            self.transport.close()

    async def wait_until_closed(self, within_s: float) -> None:
        """Wait for the socket to close after `disconnect`, and abort it at the end of that time."""
        await asyncio.wait({self.closed}, timeout=within_s)
        if not self.closed.done():
            self.transport.abort()
            await asyncio.wait({self.closed}, timeout=1)

    # Packets

    def _process_packet(self, packet: Packet, batch: list[Publish]) -> None:
        if not self.accepted.done() and not isinstance(packet, Connack):
            raise protocol_error(f"{type(packet).__name__.upper()} before CONNACK")
        match packet:
            case Publish():
                self._receive_qos2_publish(packet, batch)
            case PublishAck(PacketType.PUBREL, packet_id):
                self._send(PublishAck(PacketType.PUBCOMP, packet_id, self._exchanges.release(packet_id)))
            case Suback(packet_id):
                waiting = self._subacks.pop(packet_id, None)
                if waiting is not None:
                    waiting.set_result(packet)
            case Disconnect(code, properties):
                self._end(build_broker_error("DISCONNECT", code, properties))
            case Connack():
                self._process_connack(packet)
            case _:
                pass

    def _process_connack(self, packet: Connack) -> None:
        if self.accepted.done():
            raise protocol_error("a second CONNACK")
        if packet.code:
            self._end(build_broker_error("CONNACK", packet.code, packet.properties))
            return
        if not packet.session_present:
            self._exchanges.clear()
        self.accepted.set_result(packet)

    def _submit_publishes(self, batch: list[Publish]) -> None:
        self.window.add(len(batch))
        self._counters.publishes += len(batch)
        self._counters.again += sum(publish.dup for publish in batch)
        exceeded = self.window.exceeded
        self._sink.submit_publishes(self, batch)
        if exceeded and not self._exceeded:
            self._exceeded = True
            self._counters.protocol_faults[reason_code_name(ReasonCode.RECEIVE_MAXIMUM_EXCEEDED)] += 1
        self.window.pause_if_full()

    def _receive_qos2_publish(self, publish: Publish, batch: list[Publish]) -> None:
        repeated = self._exchanges.receive(publish, self)
        if repeated is None:
            batch.append(publish)
            return
        self._counters.again += 1
        if repeated.durable:
            self.send_pubrec(publish.packet_id)

    def _end(self, error: BrokerError) -> None:
        if not self.ended.done():
            self.ended.set_result(error)

    def _next_packet_id(self) -> int:
        self._packet_id = self._packet_id % 0xFFFF + 1
        return self._packet_id

    def _send(self, packet: Packet) -> None:
        self.transport.write(encode_packet(packet))
