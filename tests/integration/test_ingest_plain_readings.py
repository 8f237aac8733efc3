"""`POST /v1/readings`: what clients that are no gateways may send, and what becomes of it."""

from __future__ import annotations

import asyncio
import gzip
import json
import tracemalloc
from typing import Any

import asyncpg
import pytest
import zstandard

from cloud_sync.codec.plain_readings import DecompressedSizeError, decompress
from cloud_sync.http import tokens
from cloud_sync.timescale.ledger import ClientIdempotency
from cloud_sync.timescale.row_store import ReadingSource
from cloud_sync.timescale.sink import TimescaleSink
from tests.support.ingest_service import running
from tests.support.wire_examples import from_rows, series

AT = 1_750_000_000
LINES, NDJSON = "text/plain; charset=utf-8", "application/x-ndjson"


class Client:
    """Posts readings with a token of scope readings."""

    def __init__(self, service: Any, name: str = "weather-app") -> None:
        self.http = service.http
        self.token = tokens.add_token(service.tokens_file, name, "readings")

    async def post(
        self, body: Any, kind: str = "application/json", query: str = "", **headers: str
    ) -> tuple[int, dict[str, Any]]:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        every = {"Authorization": f"Bearer {self.token}", "Content-Type": kind}
        every |= {name.replace("_", "-"): value for name, value in headers.items()}
        response = await self.http.post(f"/v1/readings{query}", content=content, headers=every)
        return response.status_code, response.json()


@pytest.fixture
async def service(postgres_dsn, tmp_path):
    limits: dict[str, Any] = {"max_body_bytes": 100_000, "max_plain_bytes": 300_000, "max_plain_rows": 2000}
    async with running(postgres_dsn, tmp_path, **limits) as service:
        yield service


@pytest.fixture
def client(service):
    return Client(service)


async def rows(dsn: str, statement: str) -> list[tuple[Any, ...]]:
    connection = await asyncpg.connect(dsn)
    try:
        return [tuple(row) for row in await connection.fetch(statement)]
    finally:
        await connection.close()


def reading(value: Any = 21.5, ts: Any = AT, **more: Any) -> dict[str, Any]:
    return {"sensor_id": "s-1", "sensor_type": "temperature", "value": value, "ts": ts} | more


def counted(stored: int, duplicates: int = 0, conflicts: int = 0, rejected: Any = ()) -> dict[str, Any]:
    counts = {"stored": stored, "duplicates": duplicates, "conflicts": conflicts}
    return {**counts, "rejected": list(rejected)}


async def test_an_object_an_array_ndjson_and_lines_are_stored_the_same(client, postgres_dsn):
    full = reading(quality=98, battery_level=77.5, signal_strength=-60, seq=5, location="hall 3", unit="C")
    line = (
        b"temperature,sensor_id=s-4,location=hall\\ 3,unit=C,room=7 "
        b'value=21.5,quality=98,battery_level=77.5,signal_strength=-60,seq=5i,note="a, b=c \\" d" '
    )
    assert await client.post(full | {"sensor_id": "s-1"}) == (200, counted(1))
    assert await client.post([full | {"sensor_id": "s-2"}]) == (200, counted(1))
    ndjson = json.dumps(full | {"sensor_id": "s-3", "ts": "2025-06-15T15:06:40Z"}) + "\n\n"
    assert await client.post(ndjson.encode(), NDJSON) == (200, counted(1))
    assert await client.post(b"# c\n" + line + b"%d000000000\n" % AT, LINES) == (200, counted(1))
    seconds = line.replace(b"s-4", b"s-5") + b"%d\r\n" % AT
    assert await client.post(seconds, LINES, "?precision=s") == (200, counted(1))

    found = await rows(
        postgres_dsn,
        "SELECT sensor_type, extract(epoch FROM time)::int8, value, quality, battery_level, signal_strength, "
        "seq, location, unit, flags FROM sensor_data ORDER BY sensor_id",
    )
    assert found == [("temperature", AT, 21.5, 98.0, 77.5, -60.0, 5, "hall 3", "C", 0)] * 5


@pytest.mark.parametrize(
    ("encoding", "pack"), [("gzip", gzip.compress), ("zstd", zstandard.compress)], ids=["gzip", "zstd"]
)
async def test_compressed_bodies_are_taken_and_bombs_are_not(client, service, encoding, pack):
    body = pack(json.dumps([reading(ts=AT + n) for n in range(1000)]).encode())
    assert await client.post(body, Content_Encoding=encoding) == (200, counted(1000))

    status, answer = await client.post(pack(bytes(200 << 20)), Content_Encoding=encoding)
    assert (status, answer["error"]) == (413, "body_too_large")
    for broken in (body[:-9], b"nonsense"):
        status, answer = await client.post(broken, Content_Encoding=encoding)
        assert (status, answer["error"]) == (400, "bad_encoding")
    assert "tidegate_ingest_buffered_bytes 0.0" in (await service.http.get("/metrics")).text


async def test_a_reading_sent_again_is_a_duplicate_and_another_value_is_a_conflict(client, postgres_dsn):
    assert await client.post([reading(1.0), reading(2.0, AT + 1)]) == (200, counted(2))

    again = await client.post([reading(1.0), reading(9.0, AT + 1), reading(3.0, AT + 2)])

    assert again == (200, counted(1, 1, 1))
    assert await rows(postgres_dsn, "SELECT value, gateway_id, epoch FROM reading_conflict") == [
        (9.0, "weather-app", None)
    ]


BAD = [
    (reading(None), "bad_reading"),
    ({"sensor_id": "s", "sensor_type": "t"}, "no_value"),
    (reading("21"), "bad_reading"),
    ({"sensor_type": "t", "value": 1}, "no_sensor_id"),
    ({"sensor_id": "s", "value": 1}, "no_sensor_type"),
    (reading(sensor_id="x" * 1025), "bad_name"),
    (reading(sensor_id="a\0b"), "bad_name"),
    (reading(ts="yesterday"), "bad_time"),
    (reading(ts="2026-01-01T00:00:00"), "bad_time"),
    (reading(ts=10**30), "time_out_of_range"),
    (reading(ts="9999-01-01T00:00:00Z"), "time_out_of_range"),
    (reading(seq=2**63), "number_out_of_range"),
    (reading(seq=-5), "number_out_of_range"),
    (reading(quality=1e300), "number_out_of_range"),
    (7, "bad_reading"),
    ("x", "bad_reading"),
    (None, "bad_reading"),
]


async def test_bad_readings_are_named_by_position_and_reason_and_the_others_are_stored(client, postgres_dsn):
    mixed: list[Any] = [reading(ts=AT - 1)]
    for bad, _ in BAD:
        mixed += [bad, reading(ts=AT + len(mixed))]

    status, answer = await client.post(mixed)

    assert status == 200
    assert answer["rejected"] == [{"index": 2 * n + 1, "reason": reason} for n, (_, reason) in enumerate(BAD)]
    assert answer["stored"] == len(BAD) + 1
    lines = [
        b"t,sensor_id=a value=1 1000",
        b"t value=1 1000",
        b"t,sensor_id=a other=1 1000",
        b"t,sensor_id=a value=abc 1000",
        b"t,sensor_id=a value=1 tomorrow",
        b"t,sensor_id=a",
        b"\xff\xfe",
        b"t,sensor_id=a value=nan 2000",
        b",sensor_id=a value=1 2000",
        b"t,sensor_id=a value=t 3000",
    ]
    status, answer = await client.post(b"\n".join(lines), LINES)
    assert (status, answer["stored"]) == (200, 2)
    assert [(bad["index"], bad["reason"]) for bad in answer["rejected"]] == [
        (1, "no_sensor_id"),
        (2, "no_value"),
        (3, "bad_value"),
        (4, "bad_time"),
        (5, "not_line_protocol"),
        (6, "not_utf8"),
        (7, "bad_value"),
        (8, "no_sensor_type"),
    ]


async def test_a_key_is_answered_once_and_again_and_refused_for_another_body(client, service, postgres_dsn):
    body = [reading(ts=None), reading("x")]
    first = await client.post(body, Idempotency_Key="k-1")
    assert first == (200, counted(1, rejected=[{"index": 1, "reason": "bad_reading"}]))

    assert [await client.post(body, Idempotency_Key="k-1") for _ in range(2)] == [first] * 2
    assert len(await rows(postgres_dsn, "SELECT FROM reading")) == 1
    status, answer = await client.post([reading(5)], Idempotency_Key="k-1")
    assert (status, answer["error"]) == (422, "key_reused")
    assert await Client(service, "other").post([reading(5)], Idempotency_Key="k-1") == (200, counted(1))
    await rows(postgres_dsn, "UPDATE idempotency SET made_at = now() - interval '25 hours'")
    assert (await client.post([reading(6, AT + 9)], Idempotency_Key="k-1"))[1]["stored"] == 1
    status, answer = await client.post([], Idempotency_Key="k" * 256)
    assert (status, answer["error"]) == (400, "bad_key")


async def test_a_key_used_by_several_requests_at_once_stores_once(client, postgres_dsn):
    body = [reading(ts=None)]

    answers = await asyncio.gather(*(client.post(body, Idempotency_Key="same") for _ in range(6)))

    assert answers == [(200, counted(1))] * 6
    assert len(await rows(postgres_dsn, "SELECT FROM reading")) == 1


async def test_a_key_used_at_two_services_at_once_stores_once(postgres_dsn):
    sinks = [TimescaleSink(postgres_dsn) for _ in range(2)]
    await sinks[0].prepare()
    for number in range(10):
        key = f"key {number}"

        async def store(sink: TimescaleSink, at: int, key: str) -> str:
            content = from_rows((0, at, 1.0))
            memory = ClientIdempotency("app", key, bytes(32), lambda receipt: f"{at}: {receipt.stored}")
            return await sink.store(series(1), content, ReadingSource("app"), memory)

        answers = await asyncio.gather(*(store(s, 2 * number + n, key) for n, s in enumerate(sinks)))
        assert len(set(answers)) == 1
    assert len(await rows(postgres_dsn, "SELECT FROM reading")) == 10
    for sink in sinks:
        await sink.aclose()


@pytest.mark.parametrize(
    ("encoding", "pack"), [("gzip", gzip.compress), ("zstd", zstandard.compress)], ids=["gzip", "zstd"]
)
def test_a_bomb_takes_no_more_memory_than_its_bound(encoding, pack):
    bomb = pack(bytes(64 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(DecompressedSizeError):
            decompress(bomb, encoding, max_bytes=100_000)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 4 << 20


async def test_what_cannot_be_taken_at_all_is_refused(client, service):
    for body, kind, query, headers, error in [
        (b"{", "application/json", "", {}, (400, "not_json")),
        (b"[" * 5000, "application/json", "", {}, (400, "not_json")),
        (b"", "application/json", "", {}, (400, "not_json")),
        (b"x", "text/html", "", {}, (415, "media_type")),
        (b"x", LINES, "?precision=h", {}, (400, "bad_precision")),
        (b"x", LINES, "", {"Content_Encoding": "br"}, (415, "content_encoding")),
        (b"\n".join([b"x"] * 2001), LINES, "", {}, (413, "too_many_rows")),
        (b"x" * 100_001, LINES, "", {}, (413, "body_too_large")),
    ]:
        status, answer = await client.post(body, kind, query, **headers)
        assert (status, answer["error"]) == error
    assert await client.post(b"[]") == (200, counted(0))
    response = await service.http.post("/v1/readings", json=reading())
    assert (response.status_code, response.json()["error"]) == (403, "other_scope")
    response = await service.http.post(
        "/v1/batches", content=b"x", headers={"Authorization": f"Bearer {client.token}"}
    )
    assert (response.status_code, response.json()["error"]) == (403, "other_scope")
