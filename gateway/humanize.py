"""Numbers, times and untrusted text as people read and write them. Pure.

Ids, topics and payloads come from devices: whatever is printed of them goes through `escape_text`.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

_KILO = 1000
_MINUTE, _HOUR, _DAY, _YEAR = 60, 3600, 86400, 86400 * 365


def format_count(count: float) -> str:
    """1234567 as "1.23 M"."""
    for size, suffix in ((1e9, " G"), (1e6, " M"), (1e5, " k")):
        if abs(count) >= size:
            unit = 1e3 if suffix == " k" else size
            return f"{count / unit:.3g}{suffix}"
    return f"{count:,.0f}" if count == int(count) or abs(count) >= 100 else f"{count:.1f}"  # noqa: PLR2004 - three digits


def pluralize(count: float, one: str, many: str) -> str:
    """A count with its noun."""
    return f"{format_count(count)} {one if count == 1 else many}"


def format_bytes(size: float) -> str:
    """1234567 as "1.23 MB"."""
    for suffix in ("B", "kB", "MB", "GB"):
        if abs(size) < _KILO:
            return f"{size:.3g} {suffix}"
        size /= _KILO
    return f"{size:.3g} TB"


def format_duration(seconds: float) -> str:
    """93784 as "1 d 2 h"."""
    if 0 < seconds < 1:
        return f"{seconds:.1g} s"
    if seconds < _MINUTE:
        return f"{max(seconds, 0):.0f} s"
    if seconds >= 10 * _YEAR:
        return "over 10 years"
    scales = ((_DAY, _HOUR, "d", "h"), (_HOUR, _MINUTE, "h", "min"), (_MINUTE, 1, "min", "s"))
    large, small, unit, subunit = next(scale for scale in scales if seconds >= scale[0])
    whole, rest = divmod(int(seconds), large)
    return f"{whole} {unit} {rest // small} {subunit}"


_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d|w)")
_UNIT_S = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 604_800}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def parse_time_us(text: str, *, now_us: int) -> int:
    """Microseconds since 1970 UTC of `6h`, `30min`, `now`, `2026-05-01`, `2026-05-01T12:00:00+02:00`.

    A time without an offset is UTC. The ValueError of another text says what is allowed.
    """
    text = text.strip()
    if text == "now":
        return now_us
    if ago := _DURATION.fullmatch(text):
        return now_us - round(float(ago[1]) * _UNIT_S[ago[2]] * 1e6)
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"{text!r} is not a time; write how long ago (30min, 6h, 2d, 1w) "
            "or a date and time (2026-05-01T12:00Z)"
        ) from None
    return ((at if at.tzinfo else at.replace(tzinfo=UTC)) - _EPOCH) // timedelta(microseconds=1)


def format_time(at_us: int) -> str:
    """Microseconds since 1970 as `2026-05-01 12:00:00Z`, to the second."""
    try:
        return f"{_EPOCH + timedelta(seconds=at_us // 1_000_000):%Y-%m-%d %H:%M:%S}Z"
    except OverflowError:
        return f"{at_us} us"


def format_iso_time(at_us: int) -> str:
    """Microseconds since 1970 as `2026-05-01T12:00:00Z`, with the fraction there is."""
    try:
        return (_EPOCH + timedelta(microseconds=at_us)).replace(tzinfo=None).isoformat() + "Z"
    except OverflowError:
        return f"{at_us} us"


def parse_duration_s(text: str) -> float:
    """Seconds of `0.5s`, `30s`, `1m`, `5min`, `1h`, `1d`; the ValueError of another text says so."""
    match = _DURATION.fullmatch(text.strip())
    seconds = float(match[1]) * _UNIT_S[match[2]] if match else 0.0
    if seconds <= 0:
        raise ValueError(f"{text!r} is not a duration; write for instance 30s, 1m, 5min, 1h, 1d")
    return seconds


def escape_text(text: str, limit: int | None = None) -> str:
    r"""The text with what is not printable as an escape (\n, \x1b, \u202e), at most `limit` long.

    Control characters, terminal escapes, line breaks, direction marks and lone surrogates all count.
    """
    if not text.isprintable():
        text = "".join(
            c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text
        )
    if limit is not None and len(text) > limit:
        return text[: limit - 1] + "…"
    return text


def escape_bytes(data: bytes, limit: int | None = None) -> str:
    r"""Bytes as text where they are UTF-8, other bytes as \xNN; safe to print."""
    shown = data if limit is None else data[: limit * 4]
    return escape_text(shown.decode("utf-8", "backslashreplace"), limit)
