"""Devices that mean harm: bytes that no server should take, one attack after the other, over real sockets.

Nothing an attacker sends is a reading, so nothing of it is in the record. A server should close the
connection and go on serving the others; what it answers is not looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random

    from firmware_sim.device import Counters

ATTACKS = (
    "garbage",
    "silence",
    "slow_connect",
    "huge_length",
    "endless_length",
    "publish_first",
    "wrong_protocol",
    "bad_utf8",
    "broken_payloads",
    "wildcard_topic",
    "torn_publish",
)
_LINGER_S = 0.5
_PAUSE_S = (0.05, 0.5)


def _string(text: bytes) -> bytes:
    return len(text).to_bytes(2, "big") + text


def _packet(first: int, body: bytes) -> bytes:
    size, length = len(body), bytearray()
    while True:
        length.append(size & 0x7F | (0x80 if size > 0x7F else 0))  # noqa: PLR2004 - MQTT's variable length
        size >>= 7
        if not size:
            return bytes([first, *length]) + body


def connect_packet(client_id: bytes, *, protocol: bytes = b"MQTT", level: int = 5) -> bytes:
    """A CONNECT with a clean start and a keep-alive of 30 s."""
    properties = b"\x00" if level == 5 else b""  # noqa: PLR2004 - MQTT 5
    return _packet(0x10, _string(protocol) + bytes([level, 2, 0, 30]) + properties + _string(client_id))


def publish_packet(topic: bytes, payload: bytes, *, packet_id: int = 1) -> bytes:
    """An MQTT 5 PUBLISH at QoS 1."""
    return _packet(0x32, _string(topic) + packet_id.to_bytes(2, "big") + b"\x00" + payload)


def pieces_of(attack: str, client_id: bytes, rng: random.Random) -> list[bytes]:
    """What an attack sends, in pieces with a pause between them. Pure."""
    connect = connect_packet(client_id)
    topic = b"sensors/" + client_id + b"/temperature"
    return {
        "garbage": [rng.randbytes(rng.randrange(1, 4096))],
        "silence": [],
        "slow_connect": [connect[:1], connect[1:3], connect[3:7]],
        "huge_length": [connect, b"\x32\xff\xff\xff\x7f" + rng.randbytes(512)],
        "endless_length": [b"\x10\xff\xff\xff\xff\xff\xff"],
        "publish_first": [publish_packet(topic, b'{"value": "x"}')],
        "wrong_protocol": [connect_packet(client_id, protocol=b"MQTX", level=9)],
        "bad_utf8": [connect, publish_packet(b"sensors/\xff\xfe\xc0/t", b"{}")],
        "broken_payloads": [connect]
        + [
            publish_packet(topic, b"{" + rng.randbytes(rng.randrange(300)), packet_id=n + 1)
            for n in range(20)
        ],
        "wildcard_topic": [connect, publish_packet(b"sensors/+/#", b"{}")],
        "torn_publish": [connect, publish_packet(topic, b"{}" * 500)[:-400]],
    }[attack]


async def attack(host: str, port: int, client_id: str, rng: random.Random, counters: Counters) -> None:
    """Attack until cancelled."""
    while True:
        for kind in rng.sample(ATTACKS, len(ATTACKS)):
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(10):
                    await _once(host, port, pieces_of(kind, client_id.encode(), rng))
            counters.attacks += 1
            await asyncio.sleep(rng.uniform(*_PAUSE_S))


async def _once(host: str, port: int, pieces: list[bytes]) -> None:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.02)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                while await reader.read(4096):
                    pass
    finally:
        writer.transport.abort()
