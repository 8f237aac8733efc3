"""Payloads compressed by gzip or zstd, told by their first bytes, expanded within a bound. Pure."""

from __future__ import annotations

from typing import Final

from cloud_sync.ingest.decompression import CannotDecompress, TooMuch, decompressed

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
BEGINNINGS: Final = frozenset({_GZIP, _ZSTD[:2]})
"""The first two bytes of what may be compressed; no shape begins like this."""


class CannotExpand(ValueError):  # noqa: N818 - said of the input, not of the program
    """A compressed payload that is damaged or too large; `reason` is machine-readable."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def expanded(payload: bytes, max_bytes: int) -> bytes:
    """The payload as it was before it was compressed, or the same when it was not.

    Raises:
        CannotExpand: no more than `max_bytes` were kept.
    """
    if payload[:2] == _GZIP:
        encoding = "gzip"
    elif payload[:4] == _ZSTD:
        encoding = "zstd"
    else:
        return payload
    try:
        return decompressed(payload, encoding, max_bytes=max_bytes)
    except CannotDecompress as fault:
        raise CannotExpand("bad_compression", str(fault).replace("body", "payload")) from None
    except TooMuch:
        what = f"more than {max_bytes} bytes when it is decompressed (max_payload_bytes)"
        raise CannotExpand("too_large", what) from None
