"""CBOR (RFC 8949) as far as measurements need it: bounded, and never trusting a length. Pure.

Numbers, texts, bytes, arrays, maps, booleans, null and undefined, of definite and indefinite length; tags 2
and 3 (big numbers), 4 and 5 (fractions) are numbers, other tags are passed over. A map with the same key
twice is a fault, as RFC 8949 section 5.6 has it.
"""

from __future__ import annotations

import math
import struct
from typing import Any, Final

DEPTH_MAX: Final = 32
_BIG_MAX_BYTES: Final = 128
_BREAK: Final = object()
_MAJOR_TEXT, _MAJOR_ARRAY, _MAJOR_MAP, _MAJOR_TAG = 3, 4, 5, 6
_INDEFINITE, _ONE_BYTE, _EIGHT_BYTES = 31, 24, 27
_SIMPLE = {20: False, 21: True, 22: None, 23: None}
_FLOATS = {25: (">e", 2), 26: (">f", 4), 27: (">d", 8)}
_BIG_POSITIVE, _BIG_NEGATIVE, _DECIMAL, _BINARY = 2, 3, 4, 5


class CborDecodeError(ValueError):
    """Bytes that are no CBOR, or more than is taken; the message says where."""


def decode_cbor(data: bytes) -> Any:
    """The one item that `data` is.

    Raises:
        NotCbor: it is none, or there is more after it.
    """
    reader = _Reader(data)
    item = reader.item(0)
    if item is _BREAK:
        raise CborDecodeError("a break that ends nothing at byte 0")
    if reader.at != len(data):
        raise CborDecodeError(f"more bytes after the end at byte {reader.at}")
    return item


class _Reader:
    """Walks over `data`; `at` is the next byte."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0

    def item(self, depth: int) -> Any:
        """The item that begins here."""
        if depth > DEPTH_MAX:
            raise CborDecodeError(f"nested more than {DEPTH_MAX} deep at byte {self.at}")
        begins = self.at
        head = self._take(1)[0]
        major, more = head >> 5, head & 31
        if major == 7:  # noqa: PLR2004 - RFC 8949 section 3.3
            return self._simple(more)
        if more == _INDEFINITE:
            return self._indefinite(major, depth, begins)
        number = self._number(more)
        if major <= 1:
            return -1 - number if major else number
        if major <= _MAJOR_TEXT:
            raw = self._take(number)
            return raw if major != _MAJOR_TEXT else _text(raw, begins)
        return self._composed(major, number, depth, begins)

    def _composed(self, major: int, number: int, depth: int, begins: int) -> Any:
        if major == _MAJOR_ARRAY:
            self._check_room(number, begins)
            return [self._inner(depth) for _ in range(number)]
        if major == _MAJOR_MAP:
            self._check_room(2 * number, begins)
            return self._map([(self._inner(depth), self._inner(depth)) for _ in range(number)], begins)
        return _tagged(number, self._inner(depth), begins)

    def _inner(self, depth: int) -> Any:
        item = self.item(depth + 1)
        if item is _BREAK:
            raise CborDecodeError(f"a break that ends nothing at byte {self.at - 1}")
        return item

    def _indefinite(self, major: int, depth: int, begins: int) -> Any:
        parts = []
        while (part := self.item(depth + 1)) is not _BREAK:
            parts.append(part)
        if major == _MAJOR_ARRAY:
            return parts
        if major == _MAJOR_MAP and len(parts) % 2 == 0:
            return self._map(list(zip(parts[::2], parts[1::2], strict=True)), begins)
        kind = {2: bytes, 3: str}.get(major)
        if kind is not None and all(type(part) is kind for part in parts):
            return kind().join(parts)
        raise CborDecodeError(f"a broken item of indefinite length at byte {begins}")

    def _map(self, pairs: list[tuple[Any, Any]], begins: int) -> dict[Any, Any]:
        made: dict[Any, Any] = {}
        for key, value in pairs:
            if not isinstance(key, (str, int)):
                raise CborDecodeError(f"a key that is neither text nor a number, in the map at byte {begins}")
            if key in made:
                raise CborDecodeError(f"the key {key!r:.64} stands twice in the map at byte {begins}")
            made[key] = value
        return made

    def _simple(self, more: int) -> Any:
        if more in _FLOATS:
            form, size = _FLOATS[more]
            return struct.unpack(form, self._take(size))[0]
        if more in _SIMPLE:
            return _SIMPLE[more]
        if more == _INDEFINITE:
            return _BREAK
        raise CborDecodeError(f"simple value {more} has no meaning here, at byte {self.at - 1}")

    def _number(self, more: int) -> int:
        if more < _ONE_BYTE:
            return more
        if more > _EIGHT_BYTES:
            raise CborDecodeError(f"a reserved length at byte {self.at - 1}")
        return int.from_bytes(self._take(1 << (more - _ONE_BYTE)))

    def _check_room(self, items: int, begins: int) -> None:
        """An item has at least one byte: refuse lengths that cannot be before anything is made of them."""
        if items > len(self._data) - self.at:
            raise CborDecodeError(f"cut short: {items} items are said to follow at byte {begins}")

    def _take(self, size: int) -> bytes:
        end = self.at + size
        if end > len(self._data):
            raise CborDecodeError(f"cut short at byte {len(self._data)}")
        taken = self._data[self.at : end]
        self.at = end
        return taken


def _text(raw: bytes, begins: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise CborDecodeError(f"text that is not UTF-8 at byte {begins}") from None


def _tagged(tag: int, item: Any, begins: int) -> Any:
    if tag in (_BIG_POSITIVE, _BIG_NEGATIVE):
        if not isinstance(item, bytes) or len(item) > _BIG_MAX_BYTES:
            raise CborDecodeError(f"a big number that is none, or too big, at byte {begins}")
        number = int.from_bytes(item)
        return number if tag == _BIG_POSITIVE else -1 - number
    if tag not in (_DECIMAL, _BINARY):
        return item
    match item:
        case [int(exponent), int(mantissa)] if abs(exponent) <= 5_000:  # noqa: PLR2004 - far beyond floats
            try:
                if tag == _BINARY:
                    return math.ldexp(mantissa, exponent)
                return float(f"{mantissa}e{exponent}")
            except (OverflowError, ValueError):
                pass
    raise CborDecodeError(f"a fraction that is none, or too large, at byte {begins}")
