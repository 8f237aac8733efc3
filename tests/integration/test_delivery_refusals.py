"""What real servers refuse, through the shipper: the bad rows in quarantine, the rest delivered."""

from __future__ import annotations

import asyncio
import gzip
import ssl
from uuid import UUID

import pytest

from cloud_sync.destinations.http_client import HttpOptions, build_client_tls_context
from cloud_sync.destinations.influxdb import ErrorAnswer, InfluxDestination, InfluxOptions
from cloud_sync.destinations.ingest_client import IngestClient
from cloud_sync.model.errors import RetryLaterError
from cloud_sync.model.records import Series
from gateway.settings.gateway_settings import GatewaySettings
from tests.support.certificates import Authority
from tests.support.http_stub import Answer, InfluxV2Stub, answering, http_stub
from tests.support.open_spool import open_spool
from tests.support.shipping import one_sender, send_one

T0_US = 1_767_225_600_000_000


async def quarantined(spool) -> list[tuple[str, str, str]]:
    return await spool.database.read(
        lambda c: c.execute("SELECT topic, reason, detail FROM quarantine ORDER BY topic").fetchall()
    )


async def test_rows_of_another_field_type_are_found_in_a_real_influxdb_and_the_rest_is_there(
    tmp_path, influxd
):
    database = influxd.new_database()
    destination = InfluxDestination("cloud", InfluxOptions(influxd.url, api="v1", database=database))
    async with open_spool(tmp_path / "spool.db") as spool:
        rows = [(f"s{n % 20}", T0_US + n * 1000, float(n)) for n in range(2000)]
        readings = spool.readings(rows)
        bad = [(f"x{n}", "state") for n in range(2)]
        for at, (sensor, kind) in zip((100, 1500), bad, strict=True):
            readings.series[at] = spool.catalog.assign_number(Series(sensor, kind)) or 0
        await spool.appender.append(readings, [], now_us=1)
        foreign = gzip.compress(f'state value="open" {T0_US}\n'.encode())
        await destination._write(foreign)
        shipper = one_sender(spool.deliveries, destination)
        requests = 0
        while await send_one(shipper):
            requests += 1
        items = await quarantined(spool)
        assert [item[0] for item in items] == ["x0/state", "x1/state"]
        assert {item[1] for item in items} == {"field_type_conflict"}
        assert "already exists as type string" in items[0][2]
        assert requests <= 60
        assert (await spool.deliveries.backlog("cloud")).readings == 0
    await destination.aclose()
    assert len({(p["sensor_id"], p["time"]) for p in influxd.points(database) if "sensor_id" in p}) == 1998


async def test_a_line_that_a_v2_server_repeats_costs_one_more_request(tmp_path):
    server = InfluxV2Stub()
    async with http_stub(server) as stub, open_spool(tmp_path / "spool.db") as spool:
        destination = InfluxDestination(
            "cloud", InfluxOptions(stub.url, org="plant", bucket="edge", token="t0ken")
        )
        await spool.append([(f"s{n}", T0_US + n, 1.0) for n in range(100)])
        shipper = one_sender(spool.deliveries, destination)
        while await send_one(shipper):
            pass
        assert len(server.lines) == 100
        await destination.aclose()


@pytest.mark.parametrize(
    ("answer", "rows"),
    [
        (b"""{"error":"partial write: unable to parse 'b v=1 x': bad timestamp dropped=0"}""", (1,)),
        (
            b"""{"code":"invalid","message":"unable to parse 'a v=1': no; unable to parse 'c v=1': no"}""",
            (0, 2),
        ),
        (b"""{"error":"partial write: points beyond retention policy dropped=3"}""", (0, 1, 2)),
        (b"""{"error":"partial write: field type conflict: input field dropped=1"}""", ()),
        (
            b"""{"error":"partial write","data":[{"line_number":3,"original_line":"c"}]}""",
            (2,),
        ),
        (b"""{"error":"partial write","data":[{"line_number":9}]}""", ()),
        (b"""{"data":"nonsense"}""", ()),
        (b"<html>400</html>", ()),
        (b"\xff\xfe", ()),
    ],
)
def test_an_answer_says_which_lines_or_does_not(answer, rows):
    assert ErrorAnswer(answer).find_refused_lines(["a v=1", "b v=1 x", "c v=1"]) == rows


async def test_a_private_authority_and_a_client_certificate_are_what_the_configuration_says(tmp_path):
    authority = Authority(tmp_path, "region-ca")
    certificate, key = authority.issue("server", "localhost", "DNS:localhost,IP:127.0.0.1")
    mine, my_key = authority.issue("gateway", "gw-1")
    served = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=authority.certificate)
    served.verify_mode = ssl.CERT_REQUIRED
    served.load_cert_chain(certificate, key)
    names = []

    async def serve(reader, writer):
        names.append(dict(pair[0] for pair in writer.get_extra_info("peercert")["subject"])["commonName"])
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 503 Busy\r\ncontent-length: 2\r\nretry-after: 7\r\n\r\n{}")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=served)
    url = f"https://localhost:{server.sockets[0].getsockname()[1]}"
    for options, words in (
        (HttpOptions(build_client_tls_context(authority.certificate, mine, my_key)), "HTTP 503"),
        (HttpOptions(), "certificate verify failed"),
    ):
        client = IngestClient("region", url, "", timeout_s=5, options=options)
        with pytest.raises(RetryLaterError, match=words):
            await client.applied_ranges("gw-1", UUID(int=1))
        await client.aclose()
    assert names == ["gw-1"]
    server.close()
    await server.wait_closed()


async def test_a_proxy_is_used_when_configured_and_never_because_of_the_environment(monkeypatch):
    async with (
        http_stub(answering(Answer(503, "proxied"))) as proxy,
        http_stub(answering(Answer(503, "direct"))) as region,
    ):
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("ALL_PROXY", proxy.url)
        for options, words in ((HttpOptions(), "direct"), (HttpOptions(proxy=proxy.url), "proxied")):
            client = IngestClient("region", region.url, "t", options=options)
            with pytest.raises(RetryLaterError, match=words):
                await client.applied_ranges("gw-1", UUID(int=1))
            await client.aclose()


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ({"windows": ["nonsense"]}, "no window"),
        ({"time_zone": "Mars/Olympus"}, "no time zone"),
        ({"start": "yesterday"}, "with its offset"),
        ({"start": "2026-05-01T12:00:00"}, "with its offset"),
        ({"key_file": "k"}, "key_file needs cert_file"),
        ({"ca_file": "c", "url": "http://127.0.0.1"}, "ca_file and cert_file need an https"),
        ({"url": "http://r"}, "allow_plain"),
        ({"token_file": None}, "token_file is missing"),
    ],
)
def test_settings_of_a_destination_that_cannot_work_are_refused(key, words):
    given = {"name": "r", "kind": "ingest", "url": "https://r", "token_file": "t"} | key
    with pytest.raises(ValueError, match=words):
        GatewaySettings.model_validate({"gateway_id": "g", "spool": {"path": "s"}, "destinations": [given]})
