"""What every destination promises to the shipper, whatever stands behind it."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from cloud_sync.destinations import EncodedBatch
from cloud_sync.model.errors import RefusedError, RetryLaterError, TooLargeError, UnauthorisedError
from tests.support.batches import batch_of
from tests.support.destination_kinds import KINDS as DIRECT_KINDS
from tests.support.destination_kinds import Kind, unique
from tests.support.fault_proxy import DROP_ANSWER, DUPLICATE, PASS, RESET, STALL, TRUNCATE, fault_proxy
from tests.support.http_stub import Answer, answering, http_stub
from tests.support.region_kinds import REGION_KINDS

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from tests.support.destination_kinds import Subject
    from tests.support.fault_proxy import FaultProxy

T0_US = 1_767_225_600_000_000

ODD_NAMES = [
    "ordinary",
    "with space, comma=equals",
    "trailing\\",
    "in\\side",
    "before\\ space",
    "two\\\\back",
    '"quoted"',
    "'single'",
    "line\nbreak\r\ttab",
    "#number sign",
    "_underscore",
    "größe ℃ 温度 🌡",
    "=",
    ",",
]


KINDS = DIRECT_KINDS | REGION_KINDS


@pytest.fixture(params=KINDS)
async def subject(request, tmp_path):
    async with KINDS[request.param].ready(request, tmp_path) as subject:
        yield subject


def kinds(fits: Callable[[Kind], bool]) -> pytest.MarkDecorator:
    """Run a test on the kinds of destination that `fits` is true of."""
    return pytest.mark.parametrize("subject", [k for k, kind in KINDS.items() if fits(kind)], indirect=True)


http_only = kinds(lambda kind: kind.http)


async def test_an_accepted_batch_is_stored_and_its_receipt_counts_its_rows(subject):
    sensor = unique("a")
    rows = [(sensor, "temperature", T0_US + n * 1_000_000, 20.0 + n) for n in range(3)]
    batch = batch_of([*rows, (sensor, "humidity", T0_US, 55.5)])
    receipt = await subject.destination.send(subject.destination.encode(batch))
    assert receipt.rows == 4
    assert receipt.stored + receipt.duplicates + receipt.conflicts == 4
    assert sorted(await subject.stored({sensor})) == sorted([*rows, (sensor, "humidity", T0_US, 55.5)])


async def test_a_parcel_keeps_the_range_and_rows_of_its_batch(subject):
    batch = batch_of([(unique("a"), "temperature", T0_US, 1.0)], first=5, last=9)
    encoded_batch = subject.destination.encode(batch)
    assert (encoded_batch.range, encoded_batch.rows) == (batch.range, 1)
    assert encoded_batch.wire_bytes > 0


async def test_encoding_the_same_batch_gives_the_same_bytes(subject):
    batch = batch_of([(unique("a"), "temperature", T0_US, 1.0)])
    assert subject.destination.encode(batch) == subject.destination.encode(batch)


async def test_sending_a_batch_again_stores_nothing_twice(subject):
    sensor = unique("a")
    rows = [(sensor, "temperature", T0_US + n * 1_000_000, float(n)) for n in range(20)]
    encoded_batch = subject.destination.encode(batch_of(rows))
    receipts = [await subject.destination.send(encoded_batch) for _ in range(3)]
    assert {receipt.rows for receipt in receipts} == {20}
    assert sorted(await subject.stored({sensor})) == rows


async def test_batches_out_of_order_all_arrive(subject):
    sensor = unique("a")
    rows = [(sensor, "temperature", T0_US + n * 1_000_000, float(n)) for n in range(10)]
    for number in (7, 1, 2, 9, 8, 3, 6, 5, 4, 10):
        batch = batch_of([rows[number - 1]], first=number, last=number)
        await subject.destination.send(subject.destination.encode(batch))
    assert sorted(await subject.stored({sensor})) == rows


@pytest.mark.parametrize("odd", ODD_NAMES)
async def test_odd_names_arrive_as_themselves_and_harm_no_neighbour(subject, odd):
    neighbour, sensor = unique("a"), unique("") + odd
    rows = [(neighbour, "temperature", T0_US, 1.0), (sensor, "temperature", T0_US, 2.0)]
    attributes = (("location", odd), ("manufacturer", odd * 2), ("unit", ""))
    await subject.destination.send(subject.destination.encode(batch_of(rows, attributes=attributes)))
    expected = [(subject.as_stored(name), *rest) for name, *rest in rows]
    assert sorted(await subject.stored({row[0] for row in expected})) == sorted(expected)


@kinds(lambda kind: kind.exact)
async def test_values_and_times_at_the_edges_arrive_exactly(subject):
    sensor = unique("a")
    values = [
        -0.0,
        0.0,
        1e308,
        -1.7976931348623157e308,
        2.2250738585072014e-308,
        0.1,
        1 / 3,
        1e21,
        123456789.123456789,
    ]
    rows = [(sensor, "temperature", T0_US + n, value) for n, value in enumerate(values)]
    rows += [(sensor, "temperature", time_us, 1.5) for time_us in (-1, 0, 1, -2_208_988_800_000_001)]
    await subject.destination.send(subject.destination.encode(batch_of(rows)))
    found = sorted(await subject.stored({sensor}))
    assert [(*row[:3], float(row[3]).hex()) for row in found] == [
        (*row[:3], row[3].hex()) for row in sorted(rows)
    ]


async def test_a_batch_of_many_rows_arrives_whole(subject):
    sensor = unique("a")
    rows = [(sensor, "temperature", T0_US + n * 1_000_000, float(n)) for n in range(12_001)]
    receipt = await subject.destination.send(subject.destination.encode(batch_of(rows)))
    assert receipt.rows == 12_001
    assert sorted(await subject.stored({sensor})) == rows


async def test_closing_twice_is_harmless_and_sending_after_it_is_no_crash(subject):
    encoded_batch = subject.destination.encode(batch_of([(unique("a"), "temperature", T0_US, 1.0)]))
    await subject.destination.send(encoded_batch)
    await subject.destination.aclose()
    await subject.destination.aclose()
    with pytest.raises(RetryLaterError):
        await subject.destination.send(encoded_batch)


@http_only
async def test_a_server_that_is_away_means_retry_later(subject):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(RetryLaterError, match=r"127\.0\.0\.1"):
            await _send_one(subject.at(f"http://127.0.0.1:{taken.getsockname()[1]}"))


ANSWERS = [
    (Answer(401, '{"message": "who?"}'), UnauthorisedError, "who"),
    (Answer(403, "not you"), UnauthorisedError, "not you"),
    (Answer(413, "too big"), TooLargeError, "too big"),
    (Answer(400, '{"error": "bad batch"}'), RefusedError, "bad batch"),
    (Answer(408), RetryLaterError, "408"),
    (Answer(500, "oops"), RetryLaterError, "oops"),
    (Answer(502, "<html>Bad gateway</html>"), RetryLaterError, "502"),
    (Answer(302, headers={"location": "http://127.0.0.1:1/login"}), RetryLaterError, "302"),
    (Answer(200, "<html>Welcome to the hotel</html>"), RetryLaterError, "hotel"),
    (Answer(200), RetryLaterError, "200"),
    (Answer(raw=b"SSH-2.0-OpenSSH_9.2\r\n"), RetryLaterError, ""),
    (Answer(raw=b"HTTP/1.1 204"), RetryLaterError, ""),
    (Answer(raw=b"HTTP/1.1 500 X\r\ncontent-length: 99\r\n\r\nhalf"), RetryLaterError, ""),
    (Answer(raw=b""), RetryLaterError, ""),
    (Answer(204, hang_s=3), RetryLaterError, "0.5 s"),
    (Answer(500, b"x" * 10_000_000), RetryLaterError, "HTTP 500"),
    (
        Answer(raw=b"HTTP/1.1 500 X\r\ncontent-length: 9999999\r\n\r\n" + b"x" * 200_000),
        RetryLaterError,
        "HTTP 500",
    ),
    (Answer(400, b"\xff\xfe{" * 100), RefusedError, "400"),
    (Answer(400, b"[" * 50_000), RefusedError, "400"),
]


@http_only
@pytest.mark.parametrize(("answer", "error", "words"), ANSWERS, ids=lambda v: repr(v)[:60])
async def test_each_answer_becomes_its_error_with_the_servers_own_words(subject, answer, error, words):
    at = subject.at
    async with http_stub(answering(answer)) as stub:
        with pytest.raises(error) as caught:
            await _send_one(at(stub.url))
        assert words in str(caught.value)
        assert len(str(caught.value)) < 3_000


@http_only
@pytest.mark.parametrize("status", [429, 503])
async def test_the_wait_a_server_asks_for_is_in_the_error(subject, status):
    at = subject.at
    async with http_stub(answering(Answer(status, "slow down", {"retry-after": "17"}))) as stub:
        with pytest.raises(RetryLaterError) as caught:
            await _send_one(at(stub.url))
    assert caught.value.retry_after_s == 17.0


@http_only
@pytest.mark.parametrize("fault", [RESET, STALL, TRUNCATE, DROP_ANSWER], ids=lambda f: f.kind)
async def test_a_spoiled_exchange_is_retried_and_stores_each_row_once(subject, fault):
    at, sensor = subject.at, unique("a")
    rows = [(sensor, "temperature", T0_US + n * 1_000_000, float(n)) for n in range(50)]
    async with _in_front_of(subject) as proxy:
        proxy.script = [fault, PASS, DUPLICATE]
        destination = at(proxy.url)
        encoded_batch = destination.encode(batch_of(rows))
        with pytest.raises(RetryLaterError):
            await destination.send(encoded_batch)
        for _ in range(2):
            assert (await destination.send(encoded_batch)).rows == 50
        await proxy.settled()
        await destination.aclose()
    assert sorted(await subject.stored({sensor})) == rows


def _in_front_of(subject: Subject) -> AbstractAsyncContextManager[FaultProxy]:
    parts = urlsplit(str(getattr(subject.destination, "_url", "")))
    return fault_proxy(parts.hostname or "", parts.port or 0)


async def _send_one(destination) -> None:
    encoded_batch = destination.encode(batch_of([(unique("a"), "temperature", T0_US, 1.0)]))
    assert isinstance(encoded_batch, EncodedBatch)
    try:
        await destination.send(encoded_batch)
    finally:
        await destination.aclose()
