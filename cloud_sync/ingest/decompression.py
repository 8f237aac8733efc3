"""Content encodings of a request's body, bounded whatever the bytes claim. Pure."""

from __future__ import annotations

import zlib

import zstandard

ENCODINGS = ("identity", "gzip", "zstd")

_GZIP_WINDOW = 16 + zlib.MAX_WBITS
_ZSTD_WINDOW_MAX = 8 << 20


class CannotDecompress(Exception):  # noqa: N818 - said of the input, not of the program
    """The body is not what its encoding says."""


class TooMuch(Exception):  # noqa: N818 - as above
    """The body is longer than is taken, once decompressed."""


def decompressed(body: bytes, encoding: str, *, max_bytes: int) -> bytes:
    """The body without its content encoding, one of `ENCODINGS`.

    Raises:
        CannotDecompress, TooMuch: no more than `max_bytes` were kept.
    """
    if encoding == "identity":
        return body
    found = _gunzipped(body, max_bytes) if encoding == "gzip" else _from_zstd(body, max_bytes)
    if len(found) > max_bytes:
        raise TooMuch(f"a body may have {max_bytes} bytes when it is decompressed")
    return found


def _gunzipped(body: bytes, max_bytes: int) -> bytes:
    """All members of a gzip file; one byte more than the bound tells that there is more."""
    found = bytearray()
    while body and len(found) <= max_bytes:
        member = zlib.decompressobj(_GZIP_WINDOW)
        try:
            found += member.decompress(body, max_bytes + 1 - len(found))
        except zlib.error as fault:
            raise CannotDecompress(f"the body is no gzip: {fault}") from fault
        if len(found) <= max_bytes and not member.eof:
            raise CannotDecompress("the gzip body is cut short")
        body = member.unused_data
    return bytes(found)


def _from_zstd(body: bytes, max_bytes: int) -> bytes:
    reader = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_MAX).stream_reader(
        body, read_across_frames=True
    )
    try:
        with reader:
            found = reader.read(max_bytes + 1)
    except (zstandard.ZstdError, MemoryError) as fault:
        raise CannotDecompress(f"the body is no zstd: {fault}") from fault
    if body and not found:
        raise CannotDecompress("the zstd body is cut short or empty")
    return found
