"""What an HTTP answer means for the batch that was sent."""

from __future__ import annotations

import pytest

from cloud_sync.destinations.http_client import error_from_status, parse_retry_after
from cloud_sync.model.errors import RefusedError, RetryLaterError, TooLargeError, UnauthorisedError

MEANINGS = {
    None: [200, 201, 202, 204, 299],
    RetryLaterError: [100, 199, 301, 302, 307, 408, 425, 429, 500, 502, 503, 504, 507, 599, 600, 999],
    TooLargeError: [413],
    UnauthorisedError: [401, 403],
    RefusedError: [400, 402, 404, 405, 409, 410, 415, 422, 451, 499],
}


@pytest.mark.parametrize(
    ("meaning", "status"), [(m, s) for m, statuses in MEANINGS.items() for s in statuses]
)
def test_every_status_has_one_meaning(meaning, status):
    fault = error_from_status(status, "its words", now_s=0)

    assert fault is None if meaning is None else type(fault) is meaning
    assert fault is None or str(fault) == f"HTTP {status}: its words"


def test_a_refusal_carries_the_destinations_code_or_the_status():
    coded = error_from_status(409, "", now_s=0, reason="range_overlap")
    plain = error_from_status(404, "", now_s=0)

    assert isinstance(coded, RefusedError)
    assert isinstance(plain, RefusedError)
    assert (coded.reason, plain.reason) == ("range_overlap", "http_404")


@pytest.mark.parametrize(
    ("header", "wait_s"),
    [
        (None, None),
        ("0", 0.0),
        ("120", 120.0),
        (" 7 ", 7.0),
        ("-5", 0.0),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 60.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("Thursday, 01-Jan-70 00:01:40 GMT", 60.0),
        ("soon", None),
        ("", None),
        ("1.5", None),
        ("Thu, 99 Jan 1970 00:01:40 GMT", None),
    ],
)
def test_retry_after_is_seconds_or_a_date_and_nothing_else(header, wait_s):
    assert parse_retry_after(header, now_s=40.0) == wait_s


def test_the_wait_comes_with_the_verdict():
    fault = error_from_status(503, "", retry_after="30", now_s=0)

    assert isinstance(fault, RetryLaterError)
    assert fault.retry_after_s == 30
