"""One MQTT connection of a simulated device, and the address of its broker.

Four things it does that plain aiomqtt 2.5 does not, each needed for an exact record:

- the reason code of a PUBACK is reported (aiomqtt counts a refused publish as delivered);
- the server's Receive Maximum is known (paho ignores it);
- a connection closed before its CONNACK fails at once, not after the timeout, and its socket is closed;
- a socket is registered for writing at once, never after it was closed and its number given to another.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import aiomqtt
from paho.mqtt.client import MQTT_ERR_SUCCESS

from firmware_sim.errors import SimError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import paho.mqtt.client as paho
    from paho.mqtt.properties import Properties
    from paho.mqtt.reasoncodes import ReasonCode

    from firmware_sim.devices.payloads import MqttMessage

DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883}
CONNECT_TIMEOUT_S = 5.0
MQTT_VERSIONS = {"5": aiomqtt.ProtocolVersion.V5, "3.1.1": aiomqtt.ProtocolVersion.V311}

# paho logs each lost connection as an error; `closed` returns the reason
_silent_logger = logging.getLogger(__name__)
_silent_logger.setLevel(logging.CRITICAL)


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """Where devices publish to. `{device}` in user name or password becomes the device's id."""

    host: str
    port: int
    username: str | None = None
    password: str | None = None
    tls: ssl.SSLContext | None = None

    def __str__(self) -> str:
        return f"{'mqtts' if self.tls else 'mqtt'}://{self.host}:{self.port}"


def parse_broker(url: str, *, ca_file: Path | None = None) -> BrokerAddress:
    """Parse a URL like mqtt://user:password@host:1883; `ca_file` is for mqtts://."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as fault:
        raise SimError(f"--broker {url}: {fault}; expected mqtt://HOST[:PORT]") from fault
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname or parts.path.strip("/") or parts.query:
        raise SimError(f"--broker {url}: expected mqtt://HOST[:PORT] or mqtts://HOST[:PORT]")
    tls = None
    if parts.scheme == "mqtts":
        try:
            tls = ssl.create_default_context(cafile=ca_file)
        except OSError as fault:
            raise SimError(f"--ca-file {ca_file}: {fault}; expected a PEM file of certificates") from fault
    return BrokerAddress(
        parts.hostname,
        port or DEFAULT_PORTS[parts.scheme],
        unquote(parts.username) if parts.username else None,
        unquote(parts.password) if parts.password else None,
        tls,
    )


class MqttConnection(aiomqtt.Client):
    """One MQTT connection. Enter it to connect; `closed` returns when it is gone. Each acknowledgement calls
    `on_ack` with its packet identifier and reason code.
    """

    def __init__(
        self,
        broker: BrokerAddress,
        *,
        device: str,
        keepalive_s: int,
        on_ack: Callable[[int, int], None],
        mqtt: str = "5",
        will: MqttMessage | None = None,
    ) -> None:
        def fill(text: str | None) -> str | None:
            return None if text is None else text.replace("{device}", device)

        super().__init__(
            broker.host,
            broker.port,
            identifier=device,
            username=fill(broker.username),
            password=fill(broker.password),
            protocol=MQTT_VERSIONS[mqtt],
            will=aiomqtt.Will(*will, qos=1) if will else None,
            keepalive=keepalive_s,
            timeout=CONNECT_TIMEOUT_S,
            tls_context=broker.tls,
            logger=_silent_logger,
        )
        self._client.max_inflight_messages_set(0)  # 0 is unlimited: the window is the device's
        self._on_ack = on_ack
        self._loop_thread = threading.get_ident()
        self.receive_maximum = 65_535

    def send(self, topic: str, payload: bytes, qos: int) -> int | None:
        """Queue a publish; its packet identifier, or None if the connection is gone."""
        info = self._client.publish(topic, payload, qos)
        return info.mid if info.rc == MQTT_ERR_SUCCESS else None

    async def closed(self) -> str:
        """Wait until the connection has ended; the reason as text."""
        await asyncio.wait({self._disconnected})
        fault = self._disconnected.exception()
        return str(fault) if fault else "closed"

    def drop(self, why: str) -> None:
        """Close without a DISCONNECT, as a lost network does; `closed` returns `why`."""
        if not self._disconnected.done():
            self._disconnected.set_exception(aiomqtt.MqttError(why))
        self.release()

    def leave(self) -> None:
        """Send DISCONNECT and close."""
        self._client.disconnect()

    def release(self) -> None:
        """Close the socket if it is still open. Nothing is sent."""
        if self._misc_task is not None:
            self._misc_task.cancel()
        self._client._reset_sockets()  # noqa: SLF001 - paho has no public way to drop a half-made connection

    def _on_connect(self, *arguments: Any) -> None:
        self.receive_maximum = getattr(arguments[-1], "ReceiveMaximum", 65_535)  # the last are the properties
        super()._on_connect(*arguments)

    def _on_disconnect(self, *arguments: Any) -> None:
        if not self._connected.done():
            self._connected.set_exception(
                aiomqtt.MqttError("the server closed the connection before its CONNACK")
            )
        super()._on_disconnect(*arguments)

    def _on_publish(
        self,
        _client: paho.Client,
        _userdata: object,
        mid: int,
        reason_code: ReasonCode,
        _properties: Properties,
    ) -> None:
        self._on_ack(mid, reason_code.value)

    def _on_socket_register_write(self, client: paho.Client, userdata: object, sock: paho.SocketLike) -> None:
        if threading.get_ident() == self._loop_thread:
            self._loop.add_writer(sock.fileno(), self._write, client)
        else:
            super()._on_socket_register_write(client, userdata, sock)

    def _write(self, client: paho.Client) -> None:
        try:
            client.loop_write()
        except OSError as fault:
            if not self._disconnected.done():
                self._disconnected.set_exception(fault)
