"""The ingest service over real HTTP and a real database, as gateways and strangers meet it."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import zlib
from contextlib import suppress
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg
import httpx
import pytest
import zstandard

from cloud_sync.codec import wire
from cloud_sync.destinations.ingest_client import IngestClient
from cloud_sync.http import tokens
from cloud_sync.http.uvicorn_server import bind_http_sockets
from cloud_sync.model.errors import RefusedError, RetryLaterError, TooLargeError, UnauthorisedError
from cloud_sync.model.records import BatchRange, Receipt, RecordClass
from tests.support.ingest_service import MEDIA, Service, running
from tests.support.open_spool import open_spool
from tests.support.shipping import one_sender, send_one
from tests.support.wire_examples import EPOCH, batch, from_rows, readings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def service(postgres_dsn, tmp_path):
    async with running(postgres_dsn, tmp_path, max_body_bytes=200_000, max_rows=50_000) as service:
        yield service


async def count(dsn: str, table: str) -> int:
    connection = await asyncpg.connect(dsn)
    try:
        return int(await connection.fetchval(f"SELECT count(*) FROM {table}"))
    finally:
        await connection.close()


async def test_a_batch_is_answered_with_a_receipt_and_again_with_the_same_one(service, postgres_dsn):
    status, answer = await service.post(wire.encode(batch(3, 5)))

    assert status == 200
    assert answer == {
        "status": "applied",
        "gateway_id": "gw-1",
        "epoch": str(EPOCH),
        "class": "reading",
        "first_commit": 3,
        "last_commit": 5,
        "rows": 12,
        "stored": 12,
        "duplicates": 0,
        "conflicts": 0,
    }
    assert await service.post(wire.encode(batch(3, 5))) == (200, answer | {"status": "duplicate"})
    assert await count(postgres_dsn, "reading") == 12


async def test_the_client_reads_receipts_and_ranges(service):
    client = service.client()

    first = await client.send(client.encode(batch(1, 4)))
    again = await client.send(client.encode(batch(1, 4)))
    other = await client.send(client.encode(batch(6, content=readings(12, start_us=5, seed=2))))

    assert (first, again.applied_before, other) == (Receipt(12, 12), True, Receipt(12, 12))
    assert await client.applied_ranges("gw-1", EPOCH) == [
        BatchRange("gw-1", EPOCH, RecordClass.READING, 1, 4),
        BatchRange("gw-1", EPOCH, RecordClass.READING, 6, 6),
    ]
    assert await client.applied_ranges("gw-1", UUID(int=9)) == []
    await client.aclose()
    await client.aclose()


async def test_the_progress_of_a_gateway_names_ranges_and_gaps(service):
    for commit in (2, 3, 7):
        await service.post(wire.encode(batch(commit)))

    progress = (await service.http.get("/v1/gateways/gw-1")).json()

    assert progress["gateway_id"] == "gw-1"
    assert progress["first_seen"] <= progress["last_seen"]
    (epoch,) = progress["epochs"]
    assert (epoch["ranges"], epoch["gaps"]) == ([[2, 3], [7, 7]], [[1, 1], [4, 6]])
    assert (epoch["rows"], epoch["stored"], epoch["duplicates"]) == (36, 12, 24)
    assert (await service.http.get("/v1/gateways/gw-2")).status_code == 403
    assert (await service.http.get("/v1/gateways/gw-1?epoch=x")).json()["error"] == "bad_epoch"


async def test_a_batch_needs_the_token_of_its_own_gateway(service, postgres_dsn):
    data = wire.encode(batch())
    for header, error in [("", "no_token"), ("Basic abc", "no_token"), ("Bearer wrong", "unknown_token")]:
        response = await service.http.post(
            "/v1/batches", content=data, headers=MEDIA | {"Authorization": header}
        )
        assert (response.status_code, response.json()["error"]) == (401, error)
        assert response.headers["WWW-Authenticate"] == "Bearer"
    status, answer = await service.post(wire.encode(batch(gateway_id="gw-2")))
    assert (status, answer["error"]) == (403, "other_gateway")

    for token, parcel_of in [("wrong", batch()), (service.token, batch(gateway_id="gw-2"))]:
        client = service.client(token)
        with pytest.raises(UnauthorisedError):
            await client.send(client.encode(parcel_of))
        await client.aclose()
    assert (await service.http.get("/readyz")).status_code == 200
    assert await count(postgres_dsn, "reading") == 0


async def test_tokens_added_and_revoked_take_effect_without_a_restart(service):
    token = tokens.add_token(service.tokens_file, "gw-2")
    client = service.client(token)
    encoded_batch = client.encode(batch(gateway_id="gw-2"))
    assert await client.send(encoded_batch) == Receipt(12, 12)

    assert tokens.revoke_tokens(service.tokens_file, "gw-2") == 1

    with pytest.raises(UnauthorisedError, match="no gateway or client has this token"):
        await client.send(encoded_batch)
    await client.aclose()
    service.tokens_file.write_text("this is no token file")
    assert (await service.post(wire.encode(batch())))[0] == 200


def crc(body: bytes) -> bytes:
    return body + struct.pack("<I", zlib.crc32(body))


def bombs() -> dict[str, bytes]:
    """Small bodies that claim much."""
    good = wire.encode(batch())
    header_bytes, block_bytes = struct.unpack_from("<II", good, 8)
    block = good[16 + header_bytes : -4]
    header_bomb = zstandard.compress(bytes(64 << 20))
    same = from_rows(*[(0, 5, 1.0)] * 60_000)
    return {
        "header": crc(good[:8] + struct.pack("<II", len(header_bomb), block_bytes) + header_bomb + block),
        "rows": wire.encode(batch(content=same)),
    }


async def test_bytes_that_are_no_batch_are_told_apart_and_nothing_is_written(service, postgres_dsn):
    good = wire.encode(batch())
    cases = {
        "truncated": [b"", b"x", good[:-1], good[:40], good + b"x"],
        "bad_magic": [b"{}" * 100, b"PK" + good[2:]],
        "unsupported_version": [crc(good[:4] + b"\x02" + good[5:-4]), crc(good[:4] + b"\xff" + good[5:-4])],
        "bad_checksum": [good[:-1] + bytes([good[-1] ^ 1]), good[:50] + bytes([good[50] ^ 4]) + good[51:]],
        "too_large": list(bombs().values()),
        "malformed": [crc(good[:16] + bytes(len(good) - 20))],
    }
    for error, bodies in cases.items():
        for body in bodies:
            status, answer = await service.post(body)
            assert (status, answer["error"]) == (400, error)
            assert answer["message"]

    assert (await service.http.get("/readyz")).status_code == 200
    assert await count(postgres_dsn, "reading") == 0
    assert await count(postgres_dsn, "ingest_ledger") == 0
    metrics = (await service.http.get("/metrics")).text
    assert 'tidegate_ingest_rejections_total{error="bad_checksum"} 2.0' in metrics
    assert "tidegate_ingest_buffered_bytes 0.0" in metrics


async def test_ranges_that_conflict_and_data_that_cannot_be_held_have_their_own_codes(service):
    await service.post(wire.encode(batch(1, 5)))

    overlap = await service.post(wire.encode(batch(5, 6)))
    mismatch = await service.post(wire.encode(batch(1, 5, content=readings(11))))
    early = await service.post(wire.encode(batch(9, content=from_rows((0, -(2**63), 1.0), (0, 5, 1.0)))))

    assert [(status, answer["error"]) for status, answer in (overlap, mismatch, early)] == [
        (409, "range_overlap"),
        (409, "range_mismatch"),
        (422, "time_out_of_range"),
    ]
    assert early[1]["rows"] == [0]
    client = service.client()
    with pytest.raises(RefusedError) as refused:
        await client.send(client.encode(batch(5, 6)))
    assert refused.value.reason == "range_overlap"
    await client.aclose()


async def test_rows_that_the_region_names_go_to_quarantine_after_one_answer(service, postgres_dsn, tmp_path):
    rows = [(f"s{n}", -(2**63) if n in (3, 70) else n, float(n)) for n in range(100)]
    async with open_spool(tmp_path / "spool.db") as spool:
        await spool.append(rows)
        client = service.client(tokens.add_token(service.tokens_file, "gateway-1"))
        shipper = one_sender(spool.deliveries, client, kind="ingest", keeps_ledger=True)
        while await send_one(shipper):
            pass
        query = "SELECT topic, reason FROM quarantine ORDER BY topic"
        kept = await spool.database.read(lambda c: c.execute(query).fetchall())
        await client.aclose()
    assert kept == [("s3/t", "time_out_of_range"), ("s70/t", "time_out_of_range")]
    assert await count(postgres_dsn, "reading") == 98
    metrics = (await service.http.get("/metrics")).text
    assert 'rejections_total{error="time_out_of_range"} 1.0' in metrics


async def test_a_body_of_another_kind_or_too_long_is_refused_while_it_arrives(service):
    data = wire.encode(batch())
    status, answer = await service.post(data, **{"Content-Type": "application/json"})
    assert (status, answer["error"]) == (415, "media_type")
    assert (await service.post(data, **{"Content-Type": f"{wire.MEDIA_TYPE}; v=1"}))[0] == 200

    declared = await service.post(bytes(200_001))
    assert (declared[0], declared[1]["error"]) == (413, "body_too_large")

    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 10_000
            yield bytes(10_000)
            await asyncio.sleep(0)

    with suppress(httpx.TransportError):  # the service hangs up, so its answer may be lost
        chunked = await service.http.post("/v1/batches", content=endless(), headers=MEDIA)
        assert (chunked.status_code, chunked.json()["error"]) == (413, "body_too_large")
    assert sent < 20_000_000
    client = service.client()
    with pytest.raises(TooLargeError):
        await client.send(client.encode(batch(content=readings(49_000))))
    await client.aclose()
    assert (await service.post(wire.encode(batch(7))))[0] == 200


def test_answers_do_not_wait_for_the_clients_delayed_acknowledgement():
    with bind_http_sockets("127.0.0.1", 0)[0] as bound, socket.create_connection(bound.getsockname()):
        accepted, _ = bound.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


async def test_methods_and_paths_that_do_not_exist_are_not_found(service):
    for method, path, status in [("GET", "/v1/batches", 405), ("POST", "/v2/batches", 404)]:
        response = await service.http.request(method, path)
        assert (response.status_code, response.json()["error"]) == (status, "no_such_request")
    assert (await service.http.get("/healthz")).json() == {"status": "ok"}


async def begin_post(
    service: Service, part: bytes, *, declared: int
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A request of which only a part of the body is sent."""
    host, port = service.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = (
        f"POST /v1/batches HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {service.token}\r\n"
        f"Content-Type: {wire.MEDIA_TYPE}\r\nContent-Length: {declared}\r\n\r\n"
    )
    writer.write(head.encode() + part)
    await writer.drain()
    return reader, writer


async def test_too_many_requests_at_once_are_asked_to_come_back(postgres_dsn, tmp_path):
    async with running(postgres_dsn, tmp_path, max_requests=2, retry_after_s=7) as service:
        await service.post(wire.encode(batch(1)))
        blocker = await asyncpg.connect(postgres_dsn)
        await blocker.execute("BEGIN; LOCK TABLE ingest_ledger IN EXCLUSIVE MODE")
        held = [asyncio.create_task(service.post(wire.encode(batch(n)))) for n in (2, 3)]
        while "tidegate_ingest_requests 2.0" not in (await service.http.get("/metrics")).text:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

        response = await service.http.post("/v1/batches", content=wire.encode(batch(4)), headers=MEDIA)
        client = service.client()
        with pytest.raises(RetryLaterError) as later:
            await client.send(client.encode(batch(4)))

        await client.aclose()
        await blocker.close()
        assert (response.status_code, response.json()["error"]) == (503, "busy")
        assert response.headers["Retry-After"] == "7"
        assert later.value.retry_after_s == 7
        assert [status for status, _ in await asyncio.gather(*held)] == [200, 200]


async def test_one_gateway_cannot_take_every_place(postgres_dsn, tmp_path):
    async with running(postgres_dsn, tmp_path, max_requests=8, max_requests_each=2) as service:
        await service.post(wire.encode(batch(1)))
        blocker = await asyncpg.connect(postgres_dsn)
        await blocker.execute("BEGIN; LOCK TABLE ingest_ledger IN EXCLUSIVE MODE")
        held = [asyncio.create_task(service.post(wire.encode(batch(n)))) for n in (2, 3)]
        while "tidegate_ingest_waiting 1.0" not in (await service.http.get("/metrics")).text:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

        status, answer = await service.post(wire.encode(batch(4)))
        assert (status, answer["error"]) == (429, "busy")
        assert "of gw-1" in answer["message"]
        other = service.client(tokens.add_token(service.tokens_file, "gw-2"))
        sending = asyncio.create_task(other.send(other.encode(batch(1, gateway_id="gw-2"))))
        await asyncio.sleep(0.1)
        await blocker.close()

        assert (await sending).rows == 12
        assert [status for status, _ in await asyncio.gather(*held)] == [200, 200]
        await other.aclose()


async def test_gateways_that_wait_for_one_another_get_a_credit_and_a_lone_one_none(postgres_dsn, tmp_path):
    async with running(postgres_dsn, tmp_path) as service:
        lone = await service.post(wire.encode(batch(1)))
        assert "credit" not in lone[1]
        names = [f"gw-{n}" for n in range(2, 22)]
        clients = {name: service.client(tokens.add_token(service.tokens_file, name)) for name in names}

        async def drain(name: str) -> list[Receipt]:
            client, receipts = clients[name], []
            for commit in range(1, 6):
                start_us = 10**15 + (int(name[3:]) * 10 + commit) * 10**9
                content = readings(600, start_us=start_us)
                receipts.append(
                    await client.send(client.encode(batch(commit, gateway_id=name, content=content)))
                )
            return receipts

        drained = await asyncio.gather(*map(drain, names))
        for client in clients.values():
            await client.aclose()
        assert {receipt.stored for receipts in drained for receipt in receipts} == {600}
        last = [receipts[-1].credit for receipts in drained]
        assert any(last)
        for credit in filter(None, last):
            assert credit.rows_per_s >= 100
            assert credit.valid_s == 10
        assert "tidegate_ingest_waiting 0.0" in (await service.http.get("/metrics")).text


async def test_bodies_share_a_bound_of_memory_and_a_silent_one_is_given_up(postgres_dsn, tmp_path):
    async with running(postgres_dsn, tmp_path, max_buffered_bytes=20_000, body_idle_s=0.3) as service:
        reader, writer = await begin_post(service, bytes(15_000), declared=16_000)
        while "tidegate_ingest_buffered_bytes 15000" not in (await service.http.get("/metrics")).text:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        busy = await service.post(bytes(10_000))
        answer = await reader.read()  # to its end: the service hangs up
        writer.close()
        await writer.wait_closed()

        assert (busy[0], busy[1]["error"]) == (503, "busy")
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"body_too_slow" in answer
        assert (await service.post(wire.encode(batch())))[0] == 200


async def test_a_service_whose_database_is_away_says_so_and_recovers_by_itself(own_postgres_server, tmp_path):
    own_postgres_server.kill()
    async with running(own_postgres_server.dsn(), tmp_path) as service:
        client = service.client()
        encoded_batch = client.encode(batch())
        ready = await service.http.get("/readyz")
        assert (ready.status_code, ready.json()["error"]) == (503, "database_away")
        assert ready.json()["message"]
        assert (await service.http.get("/healthz")).status_code == 200
        with pytest.raises(RetryLaterError) as later:
            await client.send(encoded_batch)
        assert later.value.retry_after_s == 5
        assert "tidegate_ingest_database_up 0.0" in (await service.http.get("/metrics")).text

        await asyncio.to_thread(own_postgres_server.start)

        assert await client.send(encoded_batch) == Receipt(12, 12)
        assert (await service.http.get("/readyz")).json() == {"status": "ready"}
        await asyncio.to_thread(own_postgres_server.kill)
        with pytest.raises(RetryLaterError):
            await client.send(encoded_batch)
        await asyncio.to_thread(own_postgres_server.start)
        assert (await client.send(encoded_batch)).applied_before
        await client.aclose()


async def test_a_gateway_that_hangs_up_leaves_nothing_behind(service, postgres_dsn):
    data = wire.encode(batch())
    _, writer = await begin_post(service, data[:-1], declared=len(data))
    writer.close()
    await writer.wait_closed()

    hung_up = 'tidegate_ingest_rejections_total{error="disconnected"} 1.0'
    while hung_up not in (await service.http.get("/metrics")).text:  # noqa: ASYNC110
        await asyncio.sleep(0.01)

    assert "tidegate_ingest_requests 0.0" in (await service.http.get("/metrics")).text
    assert (await service.post(data))[0] == 200
    assert await count(postgres_dsn, "ingest_ledger") == 1


NONSENSE = {
    "a portal's page": (200, "text/html", b"<html>Welcome to the hotel</html>"),
    "empty": (200, "application/json", b""),
    "another object": (200, "application/json", b'{"ok": true}'),
    "a redirect": (302, "text/html", b""),
    "a proxy's fault": (502, "text/html", b"<html>Bad Gateway</html>"),
    "too long": (200, "application/json", b" " * (5 << 20)),
    "not UTF-8": (200, "application/json", b"\xff\xfe{}"),
}


@pytest.mark.parametrize(("status", "kind", "body"), NONSENSE.values(), ids=NONSENSE)
async def test_an_answer_that_is_no_receipt_means_the_batch_is_sent_again(status, kind, body):
    def answer(_request: httpx.Request) -> httpx.Response:
        return httpx.Response(status, headers={"Content-Type": kind}, content=body)

    async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as http:
        client = IngestClient("region", "http://stub", "token", http=http)
        with pytest.raises(RetryLaterError):
            await client.send(client.encode(batch()))
        with pytest.raises(RetryLaterError):
            await client.applied_ranges("gw-1", EPOCH)


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("status", "ok"),
        ("gateway_id", "gw-2"),
        ("epoch", str(UUID(int=1))),
        ("class", "rollup"),
        ("first_commit", 2),
        ("last_commit", 2),
        ("rows", 11),
        ("stored", 11),
        ("conflicts", -1),
        ("rows", "12"),
    ],
)
async def test_a_receipt_for_something_else_is_no_receipt(key, wrong):
    right = {
        "status": "applied",
        "gateway_id": "gw-1",
        "epoch": str(EPOCH),
        "class": "reading",
        "first_commit": 1,
        "last_commit": 1,
        "rows": 12,
        "stored": 12,
        "duplicates": 0,
        "conflicts": 0,
    }

    def answer(request: httpx.Request) -> httpx.Response:
        assert request.headers["Authorization"] == "Bearer token"
        assert request.headers["Content-Type"] == wire.MEDIA_TYPE
        return httpx.Response(200, content=json.dumps(current))

    async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as http:
        client = IngestClient("region", "http://stub/", "token", http=http)
        current = right
        assert await client.send(client.encode(batch())) == Receipt(12, 12)
        current = right | {key: wrong}
        with pytest.raises(RetryLaterError):
            await client.send(client.encode(batch()))


async def test_a_region_that_is_not_there_is_tried_again_later():
    client = IngestClient("region", "http://127.0.0.1:9", "token")
    with pytest.raises(RetryLaterError, match=r"http://127\.0\.0\.1:9"):
        await client.send(client.encode(batch()))
    await client.aclose()
