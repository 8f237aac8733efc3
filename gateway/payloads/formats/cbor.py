"""CBOR (RFC 8949) as far as measurements need it: arrays, maps and tags here, everything else by cbor2. Pure.

Maps are built here because keys must be checked before they are hashed: hashes of arrays and big numbers can
be made to collide, and a map of such keys takes quadratic time. Tags 2 to 5 are numbers; other tags leave
their content as it is, so shared references and dates are never resolved.
"""

from __future__ import annotations

import math
from io import BytesIO
from typing import TYPE_CHECKING, Final

import cbor2

if TYPE_CHECKING:
    from collections.abc import Iterator

DEPTH_MAX: Final = 32
_UNSIGNED, _NEGATIVE, _TEXT, _ARRAY, _MAP, _TAG = 0, 1, 3, 4, 5, 6
_INDEFINITE: Final = 31
_POSITIVE_TAG, _NUMBER_TAGS = 2, range(2, 6)
_BIG_NUMBER_MAX_BYTES, _EXPONENT_MAX = 128, 5_000


class CborDecodeError(ValueError):
    """Bytes that are not CBOR, or beyond what is decoded."""


def looks_like_cbor(payload: bytes) -> bool:
    """Whether a payload begins as a CBOR array does, perhaps with a tag; no JSON text does."""
    return payload[:1] != b"" and payload[0] >> 5 in (_ARRAY, _TAG)


def decode_cbor(data: bytes) -> object:
    """The one item in `data`: numbers, texts, bytes, lists, dicts, booleans and None."""
    reader = _ItemReader(data)
    try:
        item = reader.read_item(0)
    except cbor2.CBORError as fault:
        what = "cut short" if isinstance(fault, cbor2.CBORDecodeEOF) else fault.__cause__ or fault
        raise CborDecodeError(f"{what} at byte {reader.stream.tell()}") from None
    if reader.stream.tell() != len(data):
        raise CborDecodeError(f"more bytes after the end at byte {reader.stream.tell()}")
    return item


class _ItemReader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self.stream = BytesIO(data)
        self._decode_next = cbor2.CBORDecoder(self.stream, read_size=1).decode

    def read_item(self, depth: int) -> object:
        start = self.stream.tell()
        major = self._data[start] >> 5 if start < len(self._data) else _UNSIGNED
        if major not in (_ARRAY, _MAP, _TAG):
            item: object = self._decode_next()
            if isinstance(item, cbor2.CBORSimpleValue):
                raise CborDecodeError(f"simple value {item.value} at byte {start} has no meaning here")
            return None if item is cbor2.undefined else item
        if depth >= DEPTH_MAX:
            raise CborDecodeError(f"nested more than {DEPTH_MAX} deep at byte {start}")
        if major == _TAG:
            return _apply_tag(self._read_argument(start), self.read_item(depth + 1))
        positions = self._iter_items(start)
        if major == _ARRAY:
            return [self.read_item(depth + 1) for _ in positions]
        members: dict[object, object] = {}
        for position in positions:
            if position < len(self._data) and self._data[position] >> 5 not in (_UNSIGNED, _NEGATIVE, _TEXT):
                raise CborDecodeError(f"a map key is neither text nor an integer at byte {position}")
            key = self._decode_next()
            if key in members:
                raise CborDecodeError(f"duplicate map key: {key!r:.64} at byte {position}")
            members[key] = self.read_item(depth + 1)
        return members

    def _iter_items(self, start: int) -> Iterator[int]:
        """The position of each item, or pair, of the array or map at `start`, once those before are read."""
        if self._data[start] & 31 != _INDEFINITE:
            for _ in range(self._read_argument(start)):
                yield self.stream.tell()
            return
        position = self.stream.seek(start + 1)
        while self._data[position : position + 1] != b"\xff":
            yield position
            position = self.stream.tell()
        self.stream.seek(position + 1)

    def _read_argument(self, start: int) -> int:
        """The number in the head at `start`, encoded as an unsigned integer is: without its major type."""
        self.stream.seek(start)
        self.stream.write(bytes((self._data[start] & 31,)))
        self.stream.seek(start)
        argument: int = self._decode_next()
        return argument


def _apply_tag(tag: int, content: object) -> object:
    try:
        match tag, content:
            case ((2 | 3), bytes()) if len(content) <= _BIG_NUMBER_MAX_BYTES:
                number = int.from_bytes(content)
                return number if tag == _POSITIVE_TAG else -1 - number
            case 4, [int(exponent), int(mantissa)] if abs(exponent) <= _EXPONENT_MAX:
                return float(f"{mantissa}e{exponent}")
            case 5, [int(exponent), int(mantissa)] if abs(exponent) <= _EXPONENT_MAX:
                return math.ldexp(mantissa, exponent)
    except (OverflowError, ValueError):
        pass
    if tag in _NUMBER_TAGS:
        raise CborDecodeError(f"tag {tag} is not followed by a number, or it is too large")
    return content
