"""What an HTTP answer means for the batch that was sent. Pure, one table.

2xx                     accepted (the caller still reads the receipt; nonsense there is RetryLater)
408 425 429 5xx         RetryLater, with Retry-After where given
413                     TooLarge; so is a 400 whose reason is too_large
401 403                 Unauthorised
3xx                     RetryLater: a captive portal or a proxy, not the destination
400 422                 Refused, because of some of the rows unless the reason is the request itself
every other 4xx         Refused
"""

from __future__ import annotations

from email.utils import parsedate_to_datetime
from http import HTTPStatus

from cloud_sync.errors import DeliveryError, Refused, RetryLater, TooLarge, Unauthorised

_PASSING = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS})
_CREDENTIALS = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN})
_CLIENT_ERRORS = range(400, 500)
_SUCCESS = range(200, 300)
_OF_ROWS = frozenset({HTTPStatus.BAD_REQUEST, HTTPStatus.UNPROCESSABLE_ENTITY})
_OF_THE_REQUEST = frozenset(
    {"bad_checksum", "bad_magic", "media_type", "truncated", "unsupported_class", "unsupported_version"}
)


def fault_of(
    status: int, text: str, *, retry_after: str | None = None, now_s: float, reason: str = ""
) -> DeliveryError | None:
    """The error an answer stands for, or None when it was accepted.

    Args:
        status: the HTTP status code.
        text: the destination's own words, for the message.
        retry_after: the Retry-After header, seconds or an HTTP date.
        now_s: wall clock, seconds since 1970, to turn an HTTP date into a wait.
        reason: the destination's machine-readable code, where it gave one.
    """
    if status in _SUCCESS:
        return None
    message = f"HTTP {status}: {text}" if text else f"HTTP {status}"
    if status in _CREDENTIALS:
        return Unauthorised(message)
    if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        return TooLarge(message)
    if status == HTTPStatus.BAD_REQUEST and reason == "too_large":
        return TooLarge(message)
    if status in _CLIENT_ERRORS and status not in _PASSING:
        of_rows = status in _OF_ROWS and reason not in _OF_THE_REQUEST
        return Refused(message, reason or f"http_{status}", of_rows=of_rows)
    return RetryLater(message, wait_of(retry_after, now_s=now_s))


def wait_of(retry_after: str | None, *, now_s: float) -> float | None:
    """Seconds a Retry-After header asks for (RFC 9110 section 10.2.3), or None when absent or unreadable."""
    if retry_after is None:
        return None
    try:
        return max(0.0, float(int(retry_after)))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - now_s)
    except ValueError:
        return None
