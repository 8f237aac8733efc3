"""What simulated devices send: publishes pre-encoded as numpy byte matrices, and the readings in them.

Each device is one connection with `SERIES_PER_DEVICE` series. Reading i of a series: one second after reading
i - 1, jittered by 5 ms, read off a clock of 1 ms; a random walk rounded to two decimals; a slowly falling
battery; a noisy signal; its own seq.
Everything is derived from (series, i), so that stored readings can be checked against acknowledged ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]

SERIES_PER_DEVICE = 10
FIRST_SEQ = 1_000_000
"""JSON numbers have no leading zeros: the first seq already has all its digits."""

ORIGIN_US = 1_750_000_000_000_000
"""A time for reading 0 where it does not matter which: well inside sixteen digits."""

_PERIOD_US = 1_000_000
_JITTER_US = 5_000
_PACKET_IDS = 60_000
_READING = (
    b'{"value":vv.vv,"ts":tttttttttttttttt,"quality":qq,"battery_level":bb,"signal_strength":-ss,'
    b'"seq":nnnnnnn,"location":"hall-07","unit":"degC"}'
)
_FIELDS = ("v", "t", "q", "b", "s", "n")


class DrawnReadings(NamedTuple):
    """Readings as integers, arrays of one shape: value in hundredths, signal without its sign."""

    value_hundredths: Ints
    time_us: Ints
    quality: Ints
    battery_level: Ints
    signal: Ints
    seq: Ints


@dataclass(frozen=True, slots=True)
class Stream:
    """All publishes of one device, one after the other.

    Attributes:
        packets: uint8, shape (publishes, bytes of a publish).
        acknowledgements: the PUBACKs that a server sends for them, in order, four bytes each.
        seqs: int64, shape (publishes, readings of a publish).
    """

    packets: NDArray[np.uint8]
    acknowledgements: bytes
    seqs: Ints


def draw(series: Ints, first: int, count: int, *, origin_us: int, tick_us: int = 1_000) -> DrawnReadings:
    """Readings `first` .. `first + count - 1` of each of `series`; arrays of shape (series, count).

    `tick_us` is the resolution of the devices' clocks.
    """
    rng = np.random.default_rng((int(series[0]), first))
    shape = (len(series), count)
    index = np.arange(first, first + count)[None, :]
    steps = np.cumsum(np.rint(rng.normal(0, 5, shape)).astype(np.int64), axis=1)
    walk = 1000 + np.abs((steps + 97 * series[:, None]) % 16_000 - 8_000)
    phase_us = series[:, None] * 317_011 % _PERIOD_US
    jitter_us = np.rint(rng.normal(0, _JITTER_US, shape)).astype(np.int64)
    time_us = origin_us + index * _PERIOD_US + phase_us + jitter_us
    return DrawnReadings(
        walk,
        time_us // tick_us * tick_us,
        np.where(rng.random(shape) < 0.02, 91, 98),
        np.maximum(10, 99 - (index // 3600 + series[:, None]) % 80),
        np.clip(np.rint(rng.normal(62, 3, shape)), 10, 99).astype(np.int64),
        np.broadcast_to(FIRST_SEQ + index, shape).copy(),
    )


def series_topic(series: int) -> bytes:
    """The topic of a series; all are equally long."""
    return b"sensors/bench-%05d/temp-%d" % (series // SERIES_PER_DEVICE, series % SERIES_PER_DEVICE)


def build_stream(device: int, *, publishes: int, per_publish: int, first: int, origin_us: int) -> Stream:
    """The publishes of `device`, QoS 1, MQTT 5, which go round its series; `publishes` is made a multiple.

    Args:
        device: from 0.
        publishes: how many, at least.
        per_publish: readings in each; more than one are sent as an array.
        first: number of the first reading of each series.
        origin_us: time of reading 0.
    """
    rounds = -(-publishes // SERIES_PER_DEVICE)
    series = np.arange(SERIES_PER_DEVICE) + device * SERIES_PER_DEVICE
    drawn = DrawnReadings(
        *(
            part.reshape(SERIES_PER_DEVICE, rounds, per_publish).swapaxes(0, 1)
            for part in draw(series, first, rounds * per_publish, origin_us=origin_us)
        )
    )
    payload_bytes = len(_READING) if per_publish == 1 else per_publish * (len(_READING) + 1) + 1
    heads = [_head(series_topic(int(s)), payload_bytes) for s in series]
    head_bytes = len(heads[0])
    packets = np.empty((rounds, SERIES_PER_DEVICE, head_bytes + payload_bytes), np.uint8)
    packets[:, :, :head_bytes] = np.frombuffer(b"".join(heads), np.uint8).reshape(1, SERIES_PER_DEVICE, -1)
    _fill(packets[:, :, head_bytes:], drawn, per_publish)
    flat = packets.reshape(rounds * SERIES_PER_DEVICE, -1)
    ids = np.arange(len(flat)) % _PACKET_IDS + 1
    flat[:, head_bytes - 3] = ids >> 8
    flat[:, head_bytes - 2] = ids & 0xFF
    replies = np.zeros((len(flat), 4), np.uint8)
    replies[:, 0], replies[:, 1] = 0x40, 2
    replies[:, 2:] = flat[:, head_bytes - 3 : head_bytes - 1]
    return Stream(flat, replies.tobytes(), drawn.seq.reshape(len(flat), per_publish))


def publish_bytes(per_publish: int) -> int:
    """Bytes of one publish."""
    return len(build_stream(0, publishes=1, per_publish=per_publish, first=0, origin_us=ORIGIN_US).packets[0])


def _head(topic: bytes, payload_bytes: int) -> bytes:
    """Fixed and variable header of a PUBLISH; its packet identifier is filled in later."""
    size = 2 + len(topic) + 3 + payload_bytes
    length = bytearray()
    while size >= 0x80:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    length.append(size)
    return b"\x32" + bytes(length) + len(topic).to_bytes(2, "big") + topic + b"\0\0\0"


def _fill(payloads: NDArray[np.uint8], drawn: DrawnReadings, per_publish: int) -> None:
    if per_publish == 1:
        readings = payloads[:, :, None, :]
    else:
        payloads[:, :, 0] = ord("[")
        readings = payloads[:, :, 1:].reshape(*payloads.shape[:2], per_publish, len(_READING) + 1)
        assert np.shares_memory(readings, payloads)
        readings[:, :, :, -1] = ord(",")
        readings[:, :, -1, -1] = ord("]")
    readings[..., : len(_READING)] = np.frombuffer(_READING, np.uint8)
    for letter, numbers in zip(_FIELDS, drawn, strict=True):
        _digits(readings, letter, numbers)


def _digits(readings: NDArray[np.uint8], letter: str, numbers: Ints) -> None:
    """Write numbers over the placeholder made of `letter` (a run of them, a point may be among them)."""
    member = {"v": b'"value":', "t": b'"ts":', "q": b'"quality":', "b": b'"battery_level":'}
    member |= {"s": b'"signal_strength":-', "n": b'"seq":'}
    at = _READING.index(member[letter]) + len(member[letter])
    end = min(_READING.find(mark, at) for mark in (b",", b"}") if _READING.find(mark, at) > 0)
    rest = numbers
    for position in range(end - 1, at - 1, -1):
        if _READING[position] != ord("."):
            rest, digit = np.divmod(rest, 10)
            readings[..., position] = digit + ord("0")
