"""From when to when certificates and revocation lists are valid, read off their PEM files. Pure.

Only as much of DER is read as leads to the two times (RFC 5280, sections 4.1 and 5.1); nothing is verified.
"""

from __future__ import annotations

import base64
import binascii
import re
from datetime import UTC, datetime
from typing import Final, NamedTuple

_BLOCK = re.compile(
    rb"-----BEGIN (CERTIFICATE|X509 CRL|TRUSTED CERTIFICATE)-----(.+?)-----END \1-----", re.DOTALL
)
_INTEGER, _SEQUENCE, _CONTEXT_0 = 0x02, 0x30, 0xA0
_UTC_TIME, _GENERALIZED_TIME = 0x17, 0x18
_LONG_FORM: Final = 0x80
_CENTURY_TURNS: Final = 50  # two-digit years below it are of this century (RFC 5280, 4.1.2.5.1)


class Validity(NamedTuple):
    """One certificate or revocation list of a file: `kind` in words, times in seconds since 1970."""

    kind: str
    not_before_s: float
    not_after_s: float


def validities(pem: bytes) -> list[Validity]:
    """Those of every certificate and revocation list in a PEM file, in its order.

    Raises:
        ValueError: one of them cannot be read.
    """
    found = []
    for label, body in _BLOCK.findall(pem):
        try:
            der = base64.b64decode(b"".join(body.split()), validate=True)
            times = _of_list(der) if label == b"X509 CRL" else _of_certificate(der)
        except (binascii.Error, IndexError, UnicodeDecodeError) as fault:
            raise ValueError(f"holds a damaged {label.decode().lower()}") from fault
        found.append(Validity("revocation list" if label == b"X509 CRL" else "certificate", *times))
    return found


def _of_certificate(der: bytes) -> tuple[float, float]:
    fields = _members(_members(_members(der)[0][1])[0][1])
    if fields[0][0] == _CONTEXT_0:
        fields = fields[1:]
    before, after = _members(fields[3][1])[:2]  # serial, signature, issuer, validity
    return _time(*before), _time(*after)


def _of_list(der: bytes) -> tuple[float, float]:
    fields = _members(_members(_members(der)[0][1])[0][1])
    if fields[0][0] == _INTEGER:
        fields = fields[1:]
    this_update, following = fields[2], fields[3] if len(fields) > 3 else (0, b"")  # noqa: PLR2004 - signature, issuer, this, next
    begins = _time(*this_update)
    ends = _time(*following) if following[0] in (_UTC_TIME, _GENERALIZED_TIME) else float("inf")
    return begins, ends


def _members(data: bytes) -> list[tuple[int, bytes]]:
    """Tag and content of each element that stands in `data`, one after the other."""
    found, at = [], 0
    while at < len(data):
        tag, length, at = data[at], data[at + 1], at + 2
        if length & _LONG_FORM:
            size = length & ~_LONG_FORM
            length, at = int.from_bytes(data[at : at + size]), at + size
        if at + length > len(data):
            raise IndexError(at)
        found.append((tag, data[at : at + length]))
        at += length
    return found


def _time(tag: int, content: bytes) -> float:
    text = content.decode("ascii")
    if tag == _UTC_TIME:
        text = ("20" if int(text[:2]) < _CENTURY_TURNS else "19") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()
