"""The InfluxDB destination against influxd, VictoriaMetrics, and a stub of what only InfluxDB 2 answers."""

from __future__ import annotations

import asyncio
import gzip
import json
import math
import shutil
import ssl
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest

from cloud_sync.destinations.http_client import HttpOptions
from cloud_sync.destinations.influxdb import (
    ErrorAnswer,
    InfluxDestination,
    InfluxOptions,
)
from cloud_sync.model.errors import RefusedError, RetryLaterError, TooLargeError, UnauthorisedError
from tests.support.batches import batch_of
from tests.support.destination_kinds import unique
from tests.support.fault_proxy import DROP_ANSWER, DUPLICATE, PASS, RESET, Fault, fault_proxy
from tests.support.http_stub import Answer, InfluxV2Stub, answering, http_stub

if TYPE_CHECKING:
    from cloud_sync.model.records import Batch, Receipt
    from tests.support.batches import Row
    from tests.support.fixtures_influx import Influxd
    from tests.support.http_stub import HttpStub

T0_US = 1_767_225_600_000_000
FAR_US = 9_500_000_000_000_000


def rows(
    sensor: str = "t-1", *, count: int = 10, kind: str = "temperature", start_us: int = T0_US
) -> list[Row]:
    return [(sensor, kind, start_us + n * 1_000_000, n / 3) for n in range(count)]


async def send(destination: InfluxDestination, batch: Batch) -> Receipt:
    try:
        return await destination.send(destination.encode(batch))
    finally:
        await destination.aclose()


def v1(server: Influxd, database: str, **options: Any) -> InfluxDestination:
    return InfluxDestination("cloud", InfluxOptions(server.url, api="v1", database=database, **options))


async def test_every_column_arrives_in_influxdb_as_it_was(influxd):
    database = influxd.new_database()
    batch = batch_of(
        [("t-1", "temperature", T0_US + n, 5e-324 * (n + 1)) for n in range(3)],
        attributes=(("boot_id", "b"), ("location", "hall 3, left"), ("unit", "°C")),
    )
    nan = math.nan
    columns: dict[str, Any] = {
        "quality": np.array([98.5, nan, 0], np.float32),
        "battery_level": np.array([nan, nan, 86.7], np.float32),
        "signal_strength": np.array([-67.3, nan, -0.5], np.float32),
        "seq": np.array([0, -1, 2**53 + 1], np.int64),
        "flags": np.array([0, 0, 513], np.int32),
    }
    await send(v1(influxd, database), replace(batch, records=replace(batch.readings, **columns)))
    common = {
        "measurement": "temperature",
        "sensor_id": "t-1",
        "location": "hall 3, left",
        "unit": "°C",
    }
    assert influxd.points(database) == [
        common | fields
        for fields in (
            {
                "time": T0_US * 1000,
                "value": 5e-324,
                "quality": 98.5,
                "battery_level": None,
                "signal_strength": -67.3,
                "seq": 0,
                "flags": None,
            },
            {
                "time": T0_US * 1000 + 1000,
                "value": 1e-323,
                "quality": None,
                "battery_level": None,
                "signal_strength": None,
                "seq": None,
                "flags": None,
            },
            {
                "time": T0_US * 1000 + 2000,
                "value": 1.5e-323,
                "quality": 0,
                "battery_level": 86.7,
                "signal_strength": -0.5,
                "seq": 2**53 + 1,
                "flags": 513,
            },
        )
    ]


async def test_a_database_that_does_not_exist_yet_holds_the_batch_until_it_does(influxd):
    name = unique("later")
    destination = v1(influxd, name)
    encoded_batch = destination.encode(batch_of(rows()))
    with pytest.raises(RetryLaterError, match=f"is '{name}' created.*database not found"):
        await destination.send(encoded_batch)
    influxd.query(f'CREATE DATABASE "{name}"')
    assert (await destination.send(encoded_batch)).rows == 10
    await destination.aclose()
    assert len(influxd.points(name)) == 10


async def test_the_retention_policy_is_the_one_asked_for(influxd):
    database = influxd.new_database()
    influxd.query(f'CREATE RETENTION POLICY "raw" ON "{database}" DURATION INF REPLICATION 1')
    await send(v1(influxd, database, retention_policy="raw"), batch_of(rows()))
    assert (
        influxd.query('SELECT count(value) FROM "raw"."temperature"', database=database)[0]["values"][0][1]
        == 10
    )
    with pytest.raises(RetryLaterError, match="retention policy not found"):
        await send(v1(influxd, database, retention_policy="nope"), batch_of(rows()))


async def test_a_line_the_server_cannot_take_is_refused_with_its_words_and_the_others_are_stored(influxd):
    database = influxd.new_database()
    batch = batch_of([*rows(), ("t-1", "temperature", FAR_US, 1.0)])
    with pytest.raises(RefusedError, match=f"unable to parse.*{FAR_US}") as caught:
        await send(v1(influxd, database), batch)
    assert caught.value.reason == "unable_to_parse"
    assert len(influxd.points(database)) == 10


async def test_a_field_of_another_type_is_refused_and_the_others_are_stored(influxd):
    database = influxd.new_database()
    batch = batch_of([*rows(), *rows(kind="state", count=2)])
    destination = v1(influxd, database)
    foreign = gzip.compress(f'state value="open" {T0_US}\n'.encode())
    await destination.send(replace(destination.encode(batch), bodies=(foreign,)))
    with pytest.raises(RefusedError, match=r"field type conflict.*dropped=2") as caught:
        await send(destination, batch)
    assert caught.value.reason == "field_type_conflict"
    assert sum(point["measurement"] == "temperature" for point in influxd.points(database)) == 10


async def test_readings_older_than_the_retention_are_refused_and_the_others_are_stored(influxd):
    database = influxd.new_database()
    influxd.query(f'CREATE RETENTION POLICY "short" ON "{database}" DURATION 1h REPLICATION 1 DEFAULT')
    with pytest.raises(RefusedError) as caught:
        await send(v1(influxd, database), batch_of(rows()))
    assert caught.value.reason == "beyond_retention"


async def test_credentials_are_used_and_wrong_ones_hold_everything(influxd_with_passwords):
    server, root = influxd_with_passwords, ("root", "secret")
    server.query("CREATE DATABASE plant", auth=root)
    server.query("CREATE USER reader WITH PASSWORD 'r'", auth=root)
    server.query("GRANT READ ON plant TO reader", auth=root)
    for username, password in (("root", "wrong"), ("", ""), ("reader", "r")):
        with pytest.raises(UnauthorisedError) as caught:
            await send(v1(server, "plant", username=username, password=password), batch_of(rows()))
        assert "wrong" not in str(caught.value)
    await send(v1(server, "plant", username="root", password="secret"), batch_of(rows()))
    count = server.query("SELECT count(value) FROM temperature", database="plant", auth=root)
    assert count[0]["values"][0][1] == 10


async def test_a_body_beyond_the_servers_bound_is_too_large_and_smaller_ones_are_not(influxd):
    database = influxd.new_database()
    content = [("t-1", "temperature", T0_US + n * 997, math.sin(n)) for n in range(20_000)]
    with pytest.raises(TooLargeError):
        await send(v1(influxd, database, lines_per_body=20_000), batch_of(content))
    await send(v1(influxd, database), batch_of(content))
    assert (
        influxd.query("SELECT count(value) FROM temperature", database=database)[0]["values"][0][1] == 20_000
    )


async def test_a_bad_link_costs_time_and_no_reading(influxd):
    database = influxd.new_database()
    parts = urlsplit(influxd.url)
    async with fault_proxy(parts.hostname, parts.port) as proxy:
        proxy.at_random(
            3, {PASS: 4, RESET: 1, DROP_ANSWER: 1, DUPLICATE: 1, Fault("truncate", after_bytes=9): 1}
        )
        destination = InfluxDestination(
            "cloud", InfluxOptions(proxy.url, api="v1", database=database, timeout_s=5)
        )
        for number in range(1, 31):
            start_us = T0_US + number * 100_000_000
            encoded_batch = destination.encode(batch_of(rows(start_us=start_us), first=number, last=number))
            for _ in range(50):
                try:
                    await destination.send(encoded_batch)
                except RetryLaterError:
                    continue
                break
        await proxy.settled()
        await destination.aclose()
        spoiled = {exchange.fault.kind for exchange in proxy.exchanges}
    assert spoiled == {"pass", "reset", "drop_answer", "duplicate", "truncate"}
    assert len(influxd.points(database)) == 300


async def test_victoriametrics_takes_the_v2_path_and_answers_queries_for_it(victoria):
    sensor = unique("t")
    await send(
        InfluxDestination("cloud", InfluxOptions(victoria.url, bucket="edge", token="any")),
        batch_of(rows(sensor), attributes=(("location", "hall 3"),)),
    )
    points = victoria.points({sensor})
    assert sorted((time_ms, value) for _, time_ms, value in points) == [
        (T0_US // 1000 + n * 1000, pytest.approx(n / 3)) for n in range(10)
    ]
    assert {labels["location"] for labels, _, _ in points} == {"hall 3"}


def v2(stub: HttpStub, **options: str) -> InfluxDestination:
    given: dict[str, Any] = {"org": "plant", "bucket": "edge", "token": "t0ken", **options}
    return InfluxDestination("cloud", InfluxOptions(stub.url, **given))


async def test_a_v2_stub_gets_gzipped_bodies_of_at_most_5000_lines_in_microseconds():
    async with http_stub(InfluxV2Stub()) as stub:
        await send(v2(stub), batch_of(rows(count=12_001)))
    assert [gzip.decompress(request.body).count(b"\n") for request in stub.requests] == [5000, 5000, 2001]
    for request in stub.requests:
        assert (request.method, request.path) == ("POST", "/api/v2/write")
        assert request.query == {"org": "plant", "bucket": "edge", "precision": "us"}
        assert request.headers["content-encoding"] == "gzip"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"token": "stolen"}, UnauthorisedError, "unauthorized access"),
        ({"bucket": "nope"}, RetryLaterError, "is 'nope' created.*bucket \"nope\" not found"),
        ({"org": "nope"}, RetryLaterError, 'organization name "nope" not found'),
    ],
)
async def test_a_v2_stub_refuses_what_it_does_not_know(options, error, words):
    async with http_stub(InfluxV2Stub()) as stub:
        with pytest.raises(error, match=words) as caught:
            await send(v2(stub, **options), batch_of(rows()))
    assert "stolen" not in str(caught.value)


async def test_a_v2_stub_that_finds_its_body_too_large_says_so():
    async with http_stub(InfluxV2Stub(max_body_bytes=100)) as stub:
        with pytest.raises(TooLargeError, match="points batch is too large"):
            await send(v2(stub), batch_of(rows()))


async def test_a_path_in_front_of_the_api_is_kept():
    async with http_stub(answering(Answer())) as stub:
        await send(
            InfluxDestination("cloud", InfluxOptions(f"{stub.url}/influx/", bucket="b")), batch_of(rows())
        )
        await send(
            InfluxDestination("cloud", InfluxOptions(f"{stub.url}/x", api="v1", database="d")),
            batch_of(rows()),
        )
    assert [request.path for request in stub.requests] == ["/influx/api/v2/write", "/x/write"]
    assert stub.requests[1].query == {"db": "d", "precision": "u"}


async def test_a_send_that_is_cancelled_leaves_the_destination_usable():
    async with http_stub(answering(Answer(hang_s=5), Answer())) as stub:
        destination = InfluxDestination("cloud", InfluxOptions(stub.url, bucket="b"))
        encoded_batch = destination.encode(batch_of(rows()))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await destination.send(encoded_batch)
        assert (await destination.send(encoded_batch)).rows == 10
        await destination.aclose()


async def test_https_offers_http2_and_distrusts_a_strangers_certificate(tmp_path):
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl (Debian package openssl)")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run(  # noqa: ASYNC221 - nothing else runs in this loop
        [*command, "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"], check=True, capture_output=True
    )
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    served.load_cert_chain(certificate, key)
    served.set_alpn_protocols(["h2", "http/1.1"])
    agreed = []

    def hang_up(_, writer):
        agreed.append(writer.get_extra_info("ssl_object").selected_alpn_protocol())
        writer.transport.abort()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0, ssl=served)
    url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    trusted = ssl.create_default_context(cafile=certificate)
    with pytest.raises(RetryLaterError, match=url):
        await send(
            InfluxDestination("cloud", InfluxOptions(url, bucket="b", http=HttpOptions(trusted))),
            batch_of(rows()),
        )
    assert agreed == ["h2"]
    with pytest.raises(RetryLaterError, match="certificate verify failed"):
        await send(InfluxDestination("cloud", InfluxOptions(url, bucket="b")), batch_of(rows()))
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"url": "influx.example:8086"}, "url"),
        ({"url": "ftp://influx.example"}, "url"),
        ({"url": "http://"}, "url"),
        ({"url": "http://[::1"}, "url"),
        ({"url": "http://me:secret@influx.example"}, "url.*credentials"),
        ({"url": "http://influx.example/?u=x"}, "url.*query"),
        ({"bucket": ""}, "bucket"),
        ({"api": "v1"}, "database"),
        ({"api": "v3"}, "api"),
        ({"token": "secret\n"}, "token"),
        ({"tags": ["value"]}, "value"),
    ],
)
def test_an_argument_that_cannot_work_is_named(options, words):
    arguments: dict[str, Any] = {
        "url": "http://influx.example:8086",
        "bucket": "b",
        **options,
    }
    with pytest.raises(ValueError, match=words) as caught:
        InfluxDestination("cloud", InfluxOptions(**arguments))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        ("partial write: field type conflict: input field ... dropped=1", "", "field_type_conflict"),
        ("partial write: points beyond retention policy dropped=3", "", "beyond_retention"),
        (
            "failure writing points to database: partial write: x dropped=1",
            "unprocessable entity",
            "partial_write",
        ),
        ("partial write: max-values-per-tag limit exceeded (1/1) dropped=9", "", "series_limit"),
        ("unable to parse 'x': invalid", "invalid", "unable_to_parse"),
        ("something else", "unprocessable entity", "unprocessable_entity"),
        ("something else", "", ""),
    ],
)
def test_a_reason_is_found_in_the_servers_words(words, code, reason):
    body = json.dumps({"message": words, "code": code}).encode()
    assert ErrorAnswer(body).reason == reason


@pytest.mark.parametrize(
    ("body", "message", "reason"),
    [
        (b'{"error":"database not found"}\n', "database not found", ""),
        (b'{"code":"invalid","message":"bad\\nline"}', "bad line", "invalid"),
        (b"plain\n text", "plain text", ""),
        (b'{"error": 5}', '{"error": 5}', ""),
    ],
)
def test_the_servers_words_are_taken_from_either_form(body, message, reason):
    answer = ErrorAnswer(body)
    assert (answer.message, answer.reason) == (message, reason)


def test_long_words_are_shortened_in_the_middle():
    message = ErrorAnswer(b"a" * 5000 + b" dropped=7").message
    assert len(message) < 1100
    assert message.endswith("dropped=7")


def test_some_points_rejected_by_the_cloud_service_is_a_refusal():
    destination = InfluxDestination("cloud", InfluxOptions("http://influx.example", bucket="b"))
    verdict = destination._find_error(httpx.Response(201), ErrorAnswer(b""))
    assert isinstance(verdict, RefusedError)
    assert verdict.reason == "partial_write"
