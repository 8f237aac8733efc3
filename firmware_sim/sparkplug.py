"""Sparkplug B payloads (Eclipse Sparkplug 3.0, section 6.4.1), written as protobuf bytes by hand.

A simulated device is an edge node of the group `sim`: on every connection a birth that gives its metrics
aliases, then data by alias with a sequence number, and a death as its last will. Times are whole ms.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from firmware_sim.waveforms import WAVEFORMS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from firmware_sim.payloads import Sample

GROUP = "sim"
_ALIASES = {name: number for number, name in enumerate(WAVEFORMS, start=1)}
_INT64, _DOUBLE, _BOOLEAN, _STRING = 4, 10, 11, 12
_VARINT, _FIXED64, _BYTES = 0, 1, 2
_SEQ_END = 256


def topic(kind: str, device_id: str) -> str:
    """The topic of a message: NBIRTH, NDATA, NDEATH."""
    return f"spBv1.0/{GROUP}/{kind}/{device_id}"


def data(sensor_type: str, samples: Iterable[Sample]) -> bytes:
    """Samples of one metric, without the sequence number: it depends on the connection, see `Session`."""
    samples = list(samples)
    return _whole(1, samples[-1].ts // 1000) + b"".join(
        _part(
            2,
            _whole(2, _ALIASES[sensor_type])
            + _whole(3, sample.ts // 1000)
            + _whole(4, _DOUBLE)
            + _double(13, sample.value),
        )
        for sample in samples
    )


class Session:
    """What one device says on each of its connections beside its data.

    Args:
        device_id: the node.
        metrics: (sensor_type, unit) of everything it measures.
    """

    def __init__(self, device_id: str, metrics: Iterable[tuple[str, str]]) -> None:
        self._device_id = device_id
        self._metrics = tuple(metrics)
        self._number = -1
        self._seq = 0

    def begin(self) -> Message:
        """The last will of the connection that is to be made: its number is in the birth as well."""
        self._number = (self._number + 1) % _SEQ_END
        return Message(topic("NDEATH", self._device_id), self._birth_number())

    def birth(self, now_ms: int) -> Message:
        """The first message of a connection. Metrics are there without a value."""
        self._seq = 0
        rebirth = _text(1, "Node Control/Rebirth") + _whole(4, _BOOLEAN) + _whole(14, 0)
        named = b"".join(
            _part(
                2,
                _text(1, name)
                + _whole(2, _ALIASES[name])
                + _whole(3, now_ms)
                + _whole(4, _DOUBLE)
                + _whole(7, 1)
                + _part(9, _text(1, "engUnit") + _part(2, _whole(1, _STRING) + _text(8, unit))),
            )
            for name, unit in self._metrics
        )
        payload = _whole(1, now_ms) + self._birth_number() + _part(2, rebirth) + named
        return Message(topic("NBIRTH", self._device_id), payload + _whole(3, 0))

    def numbered(self, payload: bytes) -> bytes:
        """Data with the next sequence number of this connection."""
        self._seq = (self._seq + 1) % _SEQ_END
        return payload + _whole(3, self._seq)

    def _birth_number(self) -> bytes:
        return _part(2, _text(1, "bdSeq") + _whole(4, _INT64) + _whole(11, self._number))


class Message(NamedTuple):
    """A topic and a payload."""

    topic: str
    payload: bytes


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:  # noqa: PLR2004 - seven bits a byte
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _whole(field: int, number: int) -> bytes:
    return _varint(field << 3 | _VARINT) + _varint(number)


def _double(field: int, number: float) -> bytes:
    return _varint(field << 3 | _FIXED64) + struct.pack("<d", number)


def _part(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | _BYTES) + _varint(len(content)) + content


def _text(field: int, text: str) -> bytes:
    return _part(field, text.encode())
