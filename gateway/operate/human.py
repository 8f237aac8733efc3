"""Numbers as people read them. Pure."""

from __future__ import annotations

_STEP = 1000
_MINUTE, _HOUR, _DAY, _YEAR = 60, 3600, 86400, 86400 * 365


def count_text(count: float) -> str:
    """1234567 as "1.23 M"."""
    for size, suffix in ((1e9, " G"), (1e6, " M"), (1e5, " k")):
        if abs(count) >= size:
            unit = 1e3 if suffix == " k" else size
            return f"{count / unit:.3g}{suffix}"
    return f"{count:,.0f}" if count == int(count) or abs(count) >= 100 else f"{count:.1f}"  # noqa: PLR2004 - three digits


def bytes_text(size: float) -> str:
    """1234567 as "1.23 MB"."""
    for suffix in ("B", "kB", "MB", "GB"):
        if abs(size) < _STEP:
            return f"{size:.3g} {suffix}"
        size /= _STEP
    return f"{size:.3g} TB"


def seconds_text(seconds: float) -> str:
    """93784 as "1 d 2 h"."""
    if seconds < _MINUTE:
        return f"{max(seconds, 0):.0f} s"
    if seconds >= 10 * _YEAR:
        return "over 10 years"
    for large, small, names in ((_DAY, _HOUR, "dh"), (_HOUR, _MINUTE, "hm"), (_MINUTE, 1, "ms")):
        if seconds >= large:
            whole, rest = divmod(int(seconds), large)
            return f"{whole} {_UNIT[names[0]]} {rest // small} {_UNIT[names[1]]}"
    return f"{seconds:.0f} s"


_UNIT = {"d": "d", "h": "h", "m": "min", "s": "s"}
