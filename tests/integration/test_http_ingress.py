"""The gateway's `http` ingress: readings and batches answered after the commit, each stored once."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
from typing import Any

import cbor2
import pytest
import zstandard

from cloud_sync.codec import columns, wire
from cloud_sync.http import uvicorn_server
from cloud_sync.model.errors import RetryLaterError
from cloud_sync.model.records import Batch, Flag, Receipt, RecordClass
from gateway.auth import device_passwords
from gateway.spool.database import open_spool_read_only
from gateway.spool.segment_reader import CommitLogReader, read_block
from gateway.spool.segments import segment_position
from gateway.status.certificates import CertificateMonitor
from gateway.status.collector import StatusCollector
from tests.support.batches import batch_of
from tests.support.http_gateway import JSON, HttpGateway, http_gateway, until
from tests.support.summary_examples import alerts, declarations, rollups
from tests.support.wire_examples import batch, readings

AT = 1_750_000_000
LINES, NDJSON = "text/plain; charset=utf-8", "application/x-ndjson"


def reading(value=21.5, ts=AT, sensor_id="s-1", **more):
    return {"sensor_id": sensor_id, "sensor_type": "temperature", "value": value, "ts": ts} | more


def basic(name: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()}


def counted(stored=0, duplicates=0, conflicts=0, rejected=()):
    return 200, {
        "stored": stored,
        "duplicates": duplicates,
        "conflicts": conflicts,
        "rejected": list(rejected),
    }


@pytest.fixture
async def gateway(tmp_path):
    """With a tokens file; a token of scope readings may bring every sensor."""
    async with http_gateway(tmp_path / "gw", publish_as="any") as running:
        yield running


async def test_every_shape_is_stored_the_same_and_once(gateway: HttpGateway):
    app = gateway.bearer("app", "readings")
    one = reading(quality=98, unit="C", seq=5)
    line = b"temperature,sensor_id=s-4,unit=C value=21.5,quality=98,seq=5i 1750000000"
    assert await gateway.readings(one, app) == counted(1)
    assert await gateway.readings([reading(sensor_id="s-2"), reading(sensor_id="s-3")], app) == counted(2)
    assert await gateway.readings(line, app, LINES, "?precision=s") == counted(1)
    both = (
        json.dumps(reading(ts=AT + 1)) + "\n\n" + json.dumps(reading(value=True, ts="2025-06-15T15:06:42Z"))
    )
    packed = app | {"Content-Encoding": "zstd"}
    assert await gateway.readings(zstandard.compress(both.encode()), packed, NDJSON) == counted(2)
    again = [one, reading(value=22), reading(ts=AT + 3)]
    zipped = app | {"Content-Encoding": "gzip"}
    assert await gateway.readings(gzip.compress(json.dumps(again).encode()), zipped) == counted(1, 1, 1)
    at = AT * 1_000_000
    assert [row[:4] for row in await gateway.rows()] == [
        ("s-1", "temperature", at, 21.5),
        ("s-1", "temperature", at + 1_000_000, 21.5),
        ("s-1", "temperature", at + 2_000_000, 1.0),
        ("s-1", "temperature", at + 3_000_000, 21.5),
        ("s-2", "temperature", at, 21.5),
        ("s-3", "temperature", at, 21.5),
        ("s-4", "temperature", at, 21.5),
    ]


async def test_senml_packs_are_readings_too(gateway: HttpGateway):
    app = gateway.bearer("app", "readings")
    pack = [
        {"bn": "urn:dev:ow:10e2", "n": "temp", "u": "Cel", "bt": AT, "v": 20.5},
        {"n": "door", "vb": True, "t": 1},
    ]
    senml = "application/senml+json"
    assert await gateway.readings(pack, app, senml) == counted(2)
    assert await gateway.readings(pack, app, senml) == counted(duplicates=2)
    assert await gateway.readings(cbor2.dumps(pack), app, "application/senml+cbor") == counted(duplicates=2)
    assert [row[1:4] for row in await gateway.rows()] == [
        ("door", (AT + 1) * 1_000_000, 1.0),
        ("temp", AT * 1_000_000, 20.5),
    ]
    status, answer = await gateway.readings([{"n": "urn:dev:ow:1:t", "v": "warm"}, *pack], app, senml)
    assert (status, answer["duplicates"]) == (200, 2)
    assert answer["rejected"][0]["reason"] == "bad_record"
    assert "record 0" in answer["rejected"][0]["detail"]
    assert (await gateway.readings(b"{", app, senml))[1]["error"] == "not_senml"


async def test_one_bad_request_does_not_fill_the_quarantine(gateway: HttpGateway):
    status, answer = await gateway.readings([{}] * 5000, gateway.bearer("app", "readings"))
    assert (status, len(answer["rejected"]), answer["rejected_more"]) == (200, 1000, 4000)
    assert len(await gateway.quarantined()) == 100


async def test_bad_readings_are_quarantined_and_their_neighbours_stored(gateway: HttpGateway):
    app = gateway.bearer("app", "readings")
    bad = reading(value="warm")
    status, answer = await gateway.readings(
        [reading(), bad, reading(ts="noon"), reading(sensor_id="a\x1b")], app
    )
    assert (status, answer["stored"]) == (200, 1)
    reasons = ["bad_reading", "bad_time", "bad_series_name"]
    assert [(r["index"], r["reason"]) for r in answer["rejected"]] == list(
        zip([1, 2, 3], reasons, strict=True)
    )
    kept = await gateway.quarantined()
    assert [(source, topic, reason) for source, topic, reason, _ in kept] == [
        ("http", JSON, r) for r in reasons
    ]
    assert json.loads(kept[0][3]) == bad
    assert gateway.parts.committer.counters.quarantined == 3


async def test_readings_without_a_time_get_one_each_and_with_a_key_only_once(gateway: HttpGateway):
    app = gateway.bearer("app", "readings")
    body = [{"sensor_id": "s", "sensor_type": "t", "value": n} for n in (1, 2)]
    keyed = app | {"Idempotency-Key": "k-1"}
    first = await gateway.readings(body, keyed)
    assert first == counted(2)
    assert await gateway.readings(body, keyed) == first
    assert (await gateway.readings(body[:1], keyed))[1]["error"] == "key_reused"
    other = gateway.bearer("other", "readings") | {"Idempotency-Key": "k-1"}
    assert await gateway.readings(body, other) == counted(2)
    both = await asyncio.gather(*(gateway.readings(body, app | {"Idempotency-Key": "k-2"}) for _ in range(4)))
    assert both == [counted(2)] * 4
    rows = await gateway.rows()
    assert len({row[2] for row in rows}) == len(rows) == 6
    assert {row[4] for row in rows} == {Flag.TIME_ASSIGNED}


async def test_a_key_is_remembered_after_a_restart(tmp_path):
    body = [{"sensor_id": "s", "sensor_type": "t", "value": 1}]
    for _ in range(2):
        async with http_gateway(tmp_path / "gw", tokens_file=None) as gateway:
            assert await gateway.readings(body, {"Idempotency-Key": "k"}) == counted(1)
            assert len(await gateway.rows()) == 1


async def test_suspicious_readings_of_clients_are_flagged_as_those_of_devices_are(gateway: HttpGateway):
    await gateway.readings(reading(value=300), gateway.bearer("app", "readings"))
    ((*_, flags),) = await gateway.rows()
    assert flags & Flag.OUT_OF_RANGE


async def test_what_is_too_large_or_not_understood_is_refused_with_its_code(tmp_path):
    limits: dict[str, Any] = {
        "max_body_bytes": 20_000,
        "max_plain_bytes": 40_000,
        "max_plain_rows": 5,
        "max_batch_rows": 20,
    }
    async with http_gateway(tmp_path / "gw", **limits) as gateway:
        app, low = gateway.bearer("s-1", "readings"), gateway.bearer("gw-2")
        bomb = zstandard.compress(b"[" + b" " * 1_000_000 + b"]")
        large = wire.encode(batch_of([("s", "t", n, 1.0) for n in range(21)], gateway_id="gw-2"))
        seen = [
            await gateway.readings(b" " * 20_001, app),
            await gateway.readings(bomb, app | {"Content-Encoding": "zstd"}),
            await gateway.readings([reading(ts=AT + n) for n in range(6)], app),
            await gateway.readings(b"{", app),
            await gateway.readings(b"x", app | {"Content-Encoding": "gzip"}),
            await gateway.readings(b"x", app | {"Content-Encoding": "br"}),
            await gateway.readings(b"x", app, "text/html"),
            await gateway.batch(b"TGWB", low),
            await gateway.batch(large, low),
            await gateway.readings(b"x", low, "application/vnd.tidegate.batch"),
        ]
        assert [(status, answer["error"]) for status, answer in seen] == [
            (413, "body_too_large"),
            (413, "body_too_large"),
            (413, "too_many_rows"),
            (400, "not_json"),
            (400, "bad_encoding"),
            (415, "content_encoding"),
            (415, "media_type"),
            (400, "truncated"),
            (400, "too_large"),
            (403, "other_scope"),
        ]
        assert await gateway.rows() == []
        certificates = CertificateMonitor(lambda: gateway.parts.settings)
        status = (await StatusCollector(gateway.parts, certificates).status()).ways_in
        assert status is not None
        assert status.http is not None
        assert (status.http.requests, status.http.rejections["body_too_large"]) == (10, 2)
        assert (status.listen.connections, status.subscribe) == (0, [])


async def test_a_client_brings_readings_of_its_own_name_only(tmp_path):
    passwords = tmp_path / "passwords"
    password = device_passwords.add_device(passwords, "pump-1")
    async with http_gateway(tmp_path / "gw", passwords_file=passwords) as gateway:
        mine = [reading(sensor_id="pump-1"), reading(sensor_id="pump-1:flow")]
        theirs = reading(sensor_id="pump-2")
        sly = reading(sensor_id="pump-2", sensor_type="a/b")
        for credential in (basic("pump-1", password), gateway.bearer("pump-1", "readings")):
            status, answer = await gateway.readings([*mine, theirs, sly], credential)
            assert status == 200
            assert answer["stored"] + answer["duplicates"] == 2
            assert answer["rejected"] == [{"index": n, "reason": "other_device"} for n in (2, 3)]
            assert (await gateway.readings([theirs], credential))[0] == 403
        assert await gateway.quarantined() == []
        assert {row[0] for row in await gateway.rows()} == {"pump-1", "pump-1:flow"}


async def test_a_device_may_deliver_as_a_gateway_of_its_own_name_what_is_its_own(tmp_path):
    passwords = tmp_path / "passwords"
    mine = basic("pump-1", device_passwords.add_device(passwords, "pump-1"))
    async with http_gateway(tmp_path / "gw", passwords_file=passwords) as gateway:

        async def send(sensor_id: str, gateway_id: str, first: int) -> tuple[int, Any]:
            rows = [(sensor_id, "t", first, 1.0)]
            data = wire.encode(batch_of(rows, gateway_id=gateway_id, first=first, last=first))
            status, answer = await gateway.batch(data, mine)
            return status, answer.get("error", answer.get("status"))

        assert await send("pump-1:cpu", "pump-1", 1) == (200, "applied")
        assert await send("pump-2", "pump-1", 2) == (403, "other_device")
        assert await send("pump-1", "gw-9", 3) == (403, "other_gateway")


async def test_who_is_not_known_gets_401_and_who_guesses_has_to_wait(tmp_path):
    passwords = tmp_path / "passwords"
    device_passwords.add_device(passwords, "pump-1")
    async with http_gateway(tmp_path / "gw", passwords_file=passwords) as gateway:
        wrong = [
            {},
            {"Authorization": "Bearer nonsense"},
            {"Authorization": "Basic !"},
            {"Authorization": "Digest x"},
            basic("pump-9", "x"),
        ]
        for headers in wrong:
            assert (await gateway.readings([reading()], headers))[0] == 401
        statuses = [(await gateway.readings([reading()], basic("pump-1", f"{n}")))[0] for n in range(7)]
        assert statuses == [401] * 5 + [429] * 2
        assert (await gateway.http.get("/v1/gateways/gw-9")).status_code == 401
        assert (await gateway.http.get("/healthz")).status_code == 200
        assert (await gateway.http.get("/v2")).json()["error"] == "no_such_request"


async def test_where_nothing_is_asked_anyone_brings_anything(tmp_path):
    async with http_gateway(tmp_path / "gw", tokens_file=None) as gateway:
        assert await gateway.readings(reading(), {}) == counted(1)
        assert (await gateway.batch(wire.encode(batch(1, gateway_id="any")), {}))[0] == 200


async def test_a_batch_gets_the_receipt_the_region_would_give_and_again_the_same(gateway: HttpGateway):
    client = gateway.client("low")
    first = batch(1, gateway_id="low")
    assert await client.send(client.encode(first)) == Receipt(12, 12)
    assert await client.send(client.encode(first)) == Receipt(12, 12, applied_before=True)
    status, answer = await gateway.batch(
        wire.encode(batch(1, gateway_id="low", content=readings(3))), gateway.bearer("low")
    )
    assert (status, answer["error"]) == (409, "range_mismatch")
    both = await asyncio.gather(*(client.send(client.encode(batch(2, gateway_id="low"))) for _ in range(3)))
    assert sorted(receipt.applied_before for receipt in both) == [False, True, True]
    assert await client.applied_ranges("low", first.range.epoch) == [first.range._replace(last_commit=2)]
    await client.aclose()
    viewer = gateway.bearer("boss", "view")
    (seen,) = (await gateway.http.get("/v1/gateways", headers=viewer)).json()["gateways"]
    assert (seen["gateway_id"], seen["epochs"][0]["complete_through"]) == ("low", 2)
    assert (await gateway.http.get("/v1/gateways/low", headers=gateway.bearer("gw-3"))).status_code == 403
    assert (await gateway.http.get("/v1/gateways/low?epoch=x", headers=viewer)).status_code == 400


async def test_flags_and_attributes_of_a_batch_are_kept_and_not_judged_again(gateway: HttpGateway):
    rows = [("s-1", "temperature", AT * 1_000_000 + n, 500.0) for n in range(3)]
    sent = batch_of(rows, gateway_id="low", attributes=(("unit", "C"),))
    sent.readings.flags[:] = [0, Flag.SPIKE, Flag.RESTAMPED]
    assert (await gateway.batch(wire.encode(sent), gateway.bearer("low")))[0] == 200
    assert [row[4] for row in await gateway.rows()] == [0, Flag.SPIKE, Flag.RESTAMPED]
    assert gateway.parts.spool.catalog[1].attributes == (("unit", "C"),)


async def test_rollups_and_alerts_are_passed_on_and_a_loss_is_told_as_an_alert(gateway: HttpGateway):
    low = gateway.client("low")
    sent = {kind: batch(1, gateway_id="low", content=kind()) for kind in (rollups, alerts, declarations)}
    for one in sent.values():
        first = await low.send(low.encode(one))
        assert (first.rows, first.stored) == (one.rows, one.rows)
        assert (await low.send(low.encode(one))).applied_before
    await low.aclose()
    passed = await gateway.batches()
    assert {b.range.gateway_id for b in passed} == {"gw-1"}
    assert [b.range.record_class for b in passed] == [RecordClass.ALERT, RecordClass.ROLLUP]
    (rolled,) = [b for b in passed if b.range.record_class is RecordClass.ROLLUP]
    assert named(rolled) == named(sent[rollups])
    (alarms,) = [b for b in passed if b.range.record_class is RecordClass.ALERT]
    told = [row for row in named(alarms) if row[0][:2] == ("low", "declared_loss")]
    assert [row for row in named(alarms) if row not in told] == named(sent[alerts])
    assert [dict(row[1])["value"] for row in told] == [100.0, 100.0]
    assert "commits 1..10) were given up: max_bytes; left as rollup 60 s" in dict(told[0][1])["detail"]


def named(one: Batch) -> list[tuple[Any, ...]]:
    """Records as (series, members), NaN as a word so that it equals itself."""
    columns = {name: getattr(one.records, name).tolist() for name in one.records.columns}
    numbers = columns.pop("series")
    rows = zip(*columns.values(), strict=True)
    return sorted(
        (one.series[n], tuple((k, "nan" if v != v else v) for k, v in zip(columns, row, strict=True)))  # noqa: PLR0124 - only NaN differs from itself
        for n, row in zip(numbers, rows, strict=True)
    )


async def test_readings_of_another_gateway_are_marked_as_processed_in_the_spool_only(tmp_path):
    for process, kept in ((False, Flag.PROCESSED), (True, 0)):
        async with http_gateway(tmp_path / f"gw-{process}", process_batches=process) as gateway:
            low = gateway.client("low")
            await low.send(low.encode(batch(1, gateway_id="low", content=readings(5))))
            await low.aclose()
            database = gateway.parts.spool.database
            block = await database.read(lambda c: read_block(c, segment_position(RecordClass.READING, 1)))
            assert set((columns.decode(block or b"").flags & Flag.PROCESSED).tolist()) == {kept}
            assert not any(row[4] & Flag.PROCESSED for row in await gateway.rows())
            with open_spool_read_only(database.path) as connection:
                log = CommitLogReader(connection, gateway.parts.spool.catalog)
                assert log.read(0, 100).readings.rows == (5 if process else 0)


async def test_a_gateway_does_not_take_its_own_batches_nor_those_of_another_token(gateway: HttpGateway):
    own = await gateway.batch(wire.encode(batch(1, gateway_id="gw-1")), gateway.bearer("gw-1"))
    other = await gateway.batch(wire.encode(batch(1, gateway_id="gw-2")), gateway.bearer("gw-3"))
    assert [(status, answer["error"]) for status, answer in (own, other)] == [
        (403, "own_gateway"),
        (403, "other_gateway"),
    ]


async def test_a_full_spool_answers_503_and_takes_what_comes_again(tmp_path, monkeypatch):
    async with http_gateway(tmp_path / "gw", answer_within_s=0.5, retry_after_s=7) as gateway:
        low, first = gateway.client("low"), batch(1, gateway_id="low")
        room = gateway.parts.spool.appender._capacity
        object.__setattr__(room, "min_free_bytes", 1 << 62)
        with pytest.raises(RetryLaterError, match="min_free_bytes") as late:
            await low.send(low.encode(first))
        assert late.value.retry_after_s == 7
        answer = await gateway.http.post(
            "/v1/readings", json=reading(sensor_id="s-1"), headers=gateway.bearer("s-1", "readings")
        )
        assert (answer.status_code, answer.json()["error"], answer.headers["Retry-After"]) == (
            503,
            "holding",
            "7",
        )
        object.__setattr__(room, "min_free_bytes", 0)
        await until(lambda: not gateway.parts.committer.counters.holding_reason)
        assert (await low.send(low.encode(first))).rows == 12
        await low.aclose()
        assert len(await gateway.rows()) == 12


async def test_a_spool_that_refuses_when_full_says_so_and_forgets_nothing(tmp_path):
    full = {"max_bytes": 1 << 20, "on_full": "refuse"}
    async with http_gateway(tmp_path / "gw", spool=full) as gateway:
        object.__setattr__(gateway.parts.spool.appender._capacity, "max_bytes", 1)
        low = gateway.client("low")
        with pytest.raises(RetryLaterError, match="max_bytes"):
            await low.send(low.encode(batch(1, gateway_id="low")))
        object.__setattr__(gateway.parts.spool.appender._capacity, "max_bytes", None)
        gateway.parts.committer.counters.holding_reason = ""
        assert (await low.send(low.encode(batch(1, gateway_id="low")))).stored == 12
        await low.aclose()


async def test_more_requests_than_there_is_room_for_are_asked_to_come_back(tmp_path):
    limits: dict[str, Any] = {"max_requests": 2, "max_requests_each": 1, "answer_within_s": 20}
    async with http_gateway(tmp_path / "gw", tokens_file=None, **limits) as gateway:
        room = gateway.parts.spool.appender._capacity
        object.__setattr__(room, "min_free_bytes", 1 << 62)
        held = asyncio.create_task(gateway.readings(reading(), {}))
        await until(lambda: bool(gateway.parts.committer.counters.holding_reason))
        gateway.parts.committer.counters.holding_reason = ""
        response = await gateway.http.post("/v1/readings", json=reading())
        object.__setattr__(room, "min_free_bytes", 0)
        assert (response.status_code, response.json()["error"]) == (429, "busy")
        assert int(response.headers["Retry-After"]) > 0
        assert await held == counted(1)


async def test_series_beyond_the_limit_are_rejected_one_by_one_and_hold_a_batch(tmp_path):
    async with http_gateway(tmp_path / "gw", spool={"max_series": 2}, publish_as="any") as gateway:
        three = [reading(sensor_id=f"s-{n}") for n in range(3)]
        status, answer = await gateway.readings(three, gateway.bearer("app", "readings"))
        assert (status, answer["stored"]) == (200, 2)
        assert answer["rejected"] == [{"index": 2, "reason": "too_many_series"}]
        status, answer = await gateway.batch(wire.encode(batch(1, gateway_id="low")), gateway.bearer("low"))
        assert (status, answer["error"]) == (503, "no_room")


async def test_a_client_whose_attributes_change_without_end_cannot_fill_the_book(gateway: HttpGateway):
    body = [reading(ts=AT + n, location=f"{n}") for n in range(300)]
    assert await gateway.readings(body, gateway.bearer("app", "readings")) == counted(300)
    assert len(gateway.parts.spool.catalog) == 100


async def test_a_head_that_never_ends_and_a_silent_body_are_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(uvicorn_server, "HEAD_WITHIN_S", 0.2)
    async with http_gateway(tmp_path / "gw", tokens_file=None, body_idle_s=0.2) as gateway:
        host, port = gateway.url.removeprefix("http://").split(":")
        slow = (b"", b"POST /v1/readings HTTP/1.1\r\nHost: x\r\n")
        body = slow[1] + b"Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        answers = []
        for start in (*slow, body):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(start)
            async with asyncio.timeout(5):
                answers.append(await reader.read())
            writer.close()
            await writer.wait_closed()
        assert answers[:2] == [b"", b""]
        assert answers[2].startswith(b"HTTP/1.1 408 ")


async def test_stopping_answers_what_was_taken_and_refuses_the_rest(tmp_path):
    async with http_gateway(tmp_path / "gw", tokens_file=None) as gateway:
        gateway.source.pause()
        response = await gateway.http.post("/v1/readings", json=reading())
        assert (response.status_code, response.json()["error"]) == (503, "holding")
        gateway.source.resume()
        assert await gateway.readings(reading(), {}) == counted(1)
