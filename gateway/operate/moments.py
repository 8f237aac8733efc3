"""Moments as people write them at a prompt: `6h` for six hours ago, or an ISO date and time. Pure."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

_AGO = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d|w)")
_UNIT_S = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 604_800}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def moment_us(text: str, *, now_us: int) -> int:
    """Microseconds since 1970 UTC of `6h`, `30min`, `now`, `2026-05-01`, `2026-05-01T12:00:00+02:00`.

    A time without an offset is UTC.

    Raises:
        ValueError: the text is neither; the message says what is allowed.
    """
    text = text.strip()
    if text == "now":
        return now_us
    if ago := _AGO.fullmatch(text):
        return now_us - round(float(ago[1]) * _UNIT_S[ago[2]] * 1e6)
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"{text!r} is no moment; write how long ago (30min, 6h, 2d, 1w) "
            "or a date and time (2026-05-01T12:00Z)"
        ) from None
    return ((at if at.tzinfo else at.replace(tzinfo=UTC)) - _EPOCH) // timedelta(microseconds=1)


def moment_text(at_us: int) -> str:
    """Microseconds since 1970 as `2026-05-01 12:00:00Z`, to the second."""
    try:
        return f"{_EPOCH + timedelta(seconds=at_us // 1_000_000):%Y-%m-%d %H:%M:%S}Z"
    except OverflowError:
        return f"{at_us} us"


def iso_text(at_us: int) -> str:
    """Microseconds since 1970 as `2026-05-01T12:00:00Z`, with the fraction there is."""
    try:
        return (_EPOCH + timedelta(microseconds=at_us)).replace(tzinfo=None).isoformat() + "Z"
    except OverflowError:
        return f"{at_us} us"


def duration_s(text: str) -> int:
    """Whole seconds of `30s`, `1m`, `5min`, `1h`, `1d`.

    Raises:
        ValueError: the text is none of these; the message says what is allowed.
    """
    given = _AGO.fullmatch(text.strip())
    seconds = float(given[1]) * _UNIT_S[given[2]] if given else 0.0
    if seconds < 1 or seconds != int(seconds):
        raise ValueError(f"{text!r} is no length of time; write whole seconds, such as 30s, 1m, 5min, 1h, 1d")
    return int(seconds)
