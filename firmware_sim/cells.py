"""Cells of a recording as times and numbers. Pure.

Times become integer microseconds since 1970 UTC. A time without a zone is UTC. Digits below a microsecond
are cut, never rounded. Numbers become the nearest float64, as Python reads them.
"""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation

TIME_FORMATS = ("auto", "iso", "s", "ms", "us", "ns")
MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "-", "--", "?", "#n/a"})

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_US_PER = {"s": Decimal(1_000_000), "ms": Decimal(1000), "us": Decimal(1), "ns": Decimal("0.001")}
_SMALLEST_AUTO = Decimal(100_000_000)  # 1973 in seconds: anything less is more likely something else
_LARGEST_AUTO = {
    "s": Decimal(10) ** 11,
    "ms": Decimal(10) ** 14,
    "us": Decimal(10) ** 17,
    "ns": Decimal(10) ** 20,
}
_LARGEST_US = 253_402_300_800_000_000  # the year 10000
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_CLOCK = r"(?:[ T]+(\d{1,2}):(\d{2})(?::(\d{2})(?:[.,](\d+))?)?)?"
_ZONE = r"\s*(Z|UTC|GMT|[+-]\d{2}(?::?\d{2})?)?"
_YEAR_FIRST = re.compile(r"(\d{4})([-/.])(\d{1,2})\2(\d{1,2})" + _CLOCK + _ZONE, re.IGNORECASE)
_DAY_FIRST_DOTS = re.compile(r"(\d{1,2})(\.)(\d{1,2})\.(\d{4})" + _CLOCK + _ZONE, re.IGNORECASE)


class CellError(ValueError):
    """A cell that cannot be read: what it was and what was expected."""


def parse_time_us(text: str, time_format: str) -> tuple[int, bool]:
    """A time as microseconds since 1970 UTC, and whether digits below a microsecond were cut.

    Args:
        text: the cell.
        time_format: one of `TIME_FORMATS`, or a strptime format (it contains a %).

    Raises:
        CellError: the text is no such time.
    """
    text = text.strip()
    if not text:
        raise CellError("no time")
    if "%" in time_format:
        return _strptime(text, time_format)
    if time_format == "iso":
        return _calendar(text)
    if time_format in _US_PER:
        return _since_epoch(text, _decimal(text), time_format)
    return _since_epoch(text, _decimal(text)) if _NUMBER.fullmatch(text) else _calendar(text)


def parse_number(text: str, decimal: str) -> float:
    """A finite number; true and false count as 1 and 0.

    Raises:
        CellError: the text is no finite number.
    """
    text = text.strip()
    plain = text.replace(",", ".") if decimal == "," else text
    if _NUMBER.fullmatch(plain):
        number = float(plain)
        if math.isfinite(number):
            return number
        raise CellError(f"{text!r} is too large for a float64")
    lower = text.lower()
    if lower in {"true", "false"}:
        return float(lower == "true")
    raise CellError(f"{text!r} is not a number")


def is_missing(text: str) -> bool:
    """Whether a cell says that there is no value."""
    return text.strip().lower() in MISSING


def _decimal(text: str) -> Decimal:
    try:
        number = Decimal(text)
    except InvalidOperation:
        raise CellError(f"time {text!r} is not a number") from None
    if not number.is_finite():
        raise CellError(f"time {text!r} is not a number")
    return number


def _since_epoch(text: str, number: Decimal, unit: str | None = None) -> tuple[int, bool]:
    if unit is None:
        size = abs(number)
        if size < _SMALLEST_AUTO:
            raise CellError(f"time {text!r} is too small for a time since 1970; say --time-format")
        unit = next((u for u, largest in _LARGEST_AUTO.items() if size < largest), "ns")
    exact = number * _US_PER[unit]
    if abs(exact) >= _LARGEST_US:
        raise CellError(f"time {text!r} is after the year 9999")
    whole = math.floor(exact)
    return whole, whole != exact


def _calendar(text: str) -> tuple[int, bool]:
    match = _YEAR_FIRST.fullmatch(text)
    if match:
        year, _, month, day, *rest = match.groups()
    else:
        match = _DAY_FIRST_DOTS.fullmatch(text)
        if not match:
            return _iso_basic(text)
        day, _, month, year, *rest = match.groups()
    hour, minute, second, fraction, zone = rest
    try:
        moment = datetime(
            int(year), int(month), int(day), int(hour or 0), int(minute or 0), int(second or 0), tzinfo=UTC
        )
    except ValueError as fault:
        raise CellError(f"time {text!r}: {fault}") from None
    digits = fraction or ""
    micros = _micros(moment) + int((digits + "000000")[:6]) - _zone_us(zone)
    return micros, bool(digits[6:].strip("0"))


def _iso_basic(text: str) -> tuple[int, bool]:
    """The rarer forms of ISO 8601: 20240131T120000Z, 2024-W05-3."""
    try:
        return _micros(_aware(datetime.fromisoformat(text))), False
    except ValueError:
        raise CellError(
            f"time {text!r} is neither ISO 8601 nor a number; say --time-format, for example '%d/%m/%Y %H:%M'"
        ) from None


def _strptime(text: str, time_format: str) -> tuple[int, bool]:
    try:
        return _micros(_aware(datetime.strptime(text, time_format))), False  # noqa: DTZ007 - without a zone it is UTC
    except ValueError:
        raise CellError(f"time {text!r} does not follow {time_format!r}") from None


def _aware(moment: datetime) -> datetime:
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _micros(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(microseconds=1)


def _zone_us(zone: str | None) -> int:
    if not zone or zone[0] not in "+-":
        return 0
    digits = zone[1:].replace(":", "")
    minutes = int(digits[:2]) * 60 + int(digits[2:] or 0)
    return (-1 if zone[0] == "-" else 1) * minutes * 60_000_000
