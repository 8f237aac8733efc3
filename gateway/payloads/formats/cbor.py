"""CBOR (RFC 8949) as far as measurements need it: bounded first, then decoded by cbor2. Pure.

Before anything is built, one pass over the heads of all items checks nesting, declared lengths and map keys.
Keys are text or plain integers: hashes of arrays and big numbers can be made to collide, and a map of such
keys takes quadratic time. Tags 2 to 5 are numbers; other tags, those of cbor2 too, leave their content as it
is, so shared references and dates are never resolved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final, cast

import cbor2

DEPTH_MAX: Final = 32
_BIG_NUMBER_MAX_BYTES: Final = 128
_EXPONENT_MAX: Final = 5_000
_BYTES, _TEXT, _ARRAY, _MAP, _TAG, _SIMPLE = 2, 3, 4, 5, 6, 7
_ONE_BYTE_ARGUMENT, _EIGHT_BYTE_ARGUMENT, _INDEFINITE = 24, 27, 31
_INDEFINITE_LENGTH: Final = -1
_IGNORED_TAGS: Final = (
    0,
    1,
    25,
    28,
    29,
    30,
    35,
    36,
    37,
    52,
    54,
    100,
    256,
    258,
    260,
    261,
    1004,
    43000,
    55799,
)


class CborDecodeError(ValueError):
    """Bytes that are not CBOR, or beyond what is decoded."""


def looks_like_cbor(payload: bytes) -> bool:
    """Whether a payload begins as a CBOR array does, perhaps with a tag; no JSON text does."""
    return payload[:1] != b"" and payload[0] >> 5 in (_ARRAY, _TAG)


def decode_cbor(data: bytes) -> object:
    """The one item in `data`: numbers, texts, bytes, lists, dicts, booleans and None.

    Raises:
        CborDecodeError: there is none, more than one, or an item that is not accepted.
    """
    _check_structure(data)
    try:
        item = cbor2.loads(
            data,
            max_depth=DEPTH_MAX,
            allow_duplicate_keys=False,
            semantic_decoders=_TAG_DECODERS,
            tag_hook=lambda tag, _: tag.value,
        )
    except cbor2.CBORError as fault:
        raise CborDecodeError(str(fault.__cause__ or fault)) from None
    return _to_plain(item)


def _check_structure(data: bytes) -> None:
    """Check nesting, lengths and the kinds of map keys; takes time in proportion to `data`."""
    at, left, in_map = 0, 1, False  # items left of the innermost open one; below 0 of indefinite length
    outer: list[tuple[int, bool]] = []
    while left:
        begins = at
        major, argument, at = _read_head(data, at)
        if major == _SIMPLE and argument == _INDEFINITE_LENGTH:
            if left > 0:
                raise CborDecodeError(f"a break that ends nothing at byte {begins}")
            left, in_map = outer.pop()
        else:
            if in_map and left % 2 == 0 and _ARRAY <= major <= _TAG:
                raise CborDecodeError(f"a map key is neither text nor an integer at byte {begins}")
            inner = _count_inner_items(major, argument)
            if inner > len(data) - at:
                raise CborDecodeError(f"cut short: {inner} items should follow byte {begins}")
            if inner:
                if len(outer) >= DEPTH_MAX:
                    raise CborDecodeError(f"nested more than {DEPTH_MAX} deep at byte {begins}")
                outer.append((left, in_map))
                left, in_map = inner, major == _MAP
                continue
        left -= 1
        while not left and outer:
            left, in_map = outer.pop()
            left -= 1
    if at != len(data):
        raise CborDecodeError(f"more bytes after the end at byte {at}")


def _read_head(data: bytes, at: int) -> tuple[int, int, int]:
    """Major type and argument of the item at a position, and the position after the bytes it has itself."""
    if at >= len(data):
        raise CborDecodeError(f"cut short at byte {len(data)}")
    major, argument = data[at] >> 5, data[at] & 31
    at += 1
    if _ONE_BYTE_ARGUMENT <= argument <= _EIGHT_BYTE_ARGUMENT:
        end = at + (1 << (argument - _ONE_BYTE_ARGUMENT))
        argument, at = int.from_bytes(data[at:end]), end
    elif argument == _INDEFINITE:
        argument = _INDEFINITE_LENGTH
    if major in (_BYTES, _TEXT):
        at += max(argument, 0)
    if at > len(data):
        raise CborDecodeError(f"cut short at byte {len(data)}")
    return major, argument, at


def _count_inner_items(major: int, argument: int) -> int:
    """Items that follow inside one; below 0 when only a break ends them, and even."""
    if argument == _INDEFINITE_LENGTH:
        return -2 if _BYTES <= major <= _MAP else 0
    if major == _ARRAY:
        return argument
    return 2 * argument if major == _MAP else int(major == _TAG)


def _to_plain(item: object) -> object:
    """An item without cbor2's own types."""
    if isinstance(item, (int, float, str, bytes)) or item is None:
        return item
    if isinstance(item, Mapping):  # cbor2 has frozen ones
        return {_check_key(key): _to_plain(value) for key, value in item.items()}
    if isinstance(item, (list, tuple)):
        return [_to_plain(inner) for inner in item]
    if item is cbor2.undefined:
        return None
    if isinstance(item, cbor2.CBORSimpleValue):
        raise CborDecodeError(f"simple value {item.value} has no meaning here")
    return item


def _check_key(key: object) -> str | int:
    if type(key) in (str, int):
        return cast("str | int", key)
    raise CborDecodeError(f"a map key is neither text nor an integer: {key!r:.64}")


def _decode_big_number(content: object, _immutable: bool) -> int:  # noqa: FBT001 - called by cbor2
    if not isinstance(content, bytes) or len(content) > _BIG_NUMBER_MAX_BYTES:
        raise CborDecodeError("not a big number, or too big")
    return int.from_bytes(content)


def _decode_fraction(content: object, compute: Callable[[int, int], float]) -> float:
    match content:
        case [int(exponent), int(mantissa)] if abs(exponent) <= _EXPONENT_MAX:
            try:
                return compute(mantissa, exponent)
            except (OverflowError, ValueError):
                pass
    raise CborDecodeError("not a fraction, or too large")


_TAG_DECODERS: Final = {
    **{tag: lambda content, _: content for tag in _IGNORED_TAGS},
    2: _decode_big_number,
    3: lambda content, immutable: -1 - _decode_big_number(content, immutable),
    4: lambda content, _: _decode_fraction(content, lambda m, exponent: float(f"{m}e{exponent}")),
    5: lambda content, _: _decode_fraction(content, math.ldexp),
}
