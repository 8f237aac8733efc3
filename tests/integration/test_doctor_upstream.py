"""The doctor's questions to destinations and brokers: each finds the fault it is there for."""

from __future__ import annotations

import asyncio
import json
import ssl
from contextlib import suppress
from email.utils import formatdate
from typing import TYPE_CHECKING, Any

import pytest

from gateway.doctor import Level, network
from gateway.settings.gateway_settings import GatewaySettings
from tests.support import ingest_service
from tests.support.certificates import Authority
from tests.support.free_ports import free_port
from tests.support.http_stub import Answer, Request, http_stub
from tests.support.programs import run

if TYPE_CHECKING:
    from pathlib import Path

    from gateway.doctor import Finding
    from tests.support.fixtures_mosquitto import Mosquitto

SECRET = "t0p-s3cret-token"


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(SECRET + "\n")
    return path


def settings(**tables: Any) -> GatewaySettings:
    return GatewaySettings.model_validate({"gateway_id": "gw-1", "spool": {"path": "s"}, **tables})


def destination(**keys: Any) -> Any:
    return settings(destinations=[{"name": "region", **keys}]).destinations[0]


def broker(url: str, **keys: Any) -> Any:
    table = {"url": url, "filters": ["sensors/#"], **keys}
    return settings(ingress={"subscribe": [table]}).ingress.subscribe[0]


def worst(found: list[Finding]) -> Finding:
    assert all(f.advice for f in found if f.level is not Level.OK), found
    assert not any(SECRET in f.what for f in found)
    return max(found, key=lambda f: list(Level).index(f.level))


async def test_a_real_region_takes_the_gateway_and_tells_its_release(
    tmp_path: Path, token: Path, postgres_dsn: str
) -> None:
    async with ingest_service.running(postgres_dsn, tmp_path) as service:
        given = destination(kind="ingest", url=service.url, token_file=token)
        refused = worst(await network.check_destination(given, "gw-1"))
        assert (refused.level, "HTTP 401" in refused.what) == (Level.FAULT, True), refused
        assert "token add" in refused.advice
        token.write_text(service.token)  # noqa: ASYNC240 - a few bytes
        well = worst(await network.check_destination(given, "gw-1"))
        assert (well.level, "release 0." in well.what) == (Level.OK, True), well
        other = worst(await network.check_destination(given, "gw-2"))
        assert (other.level, "HTTP 403" in other.what) == (Level.FAULT, True), other


@pytest.mark.parametrize(
    ("answer", "level", "words"),
    [
        (Answer(200, '{"epochs": []}', {"tidegate-version": "0.0.9"}), Level.WARNING, "older than"),
        (
            Answer(200, "<html>Please log in \x1b[2J"),
            Level.FAULT,
            "not the answer of a Tidegate ingest service",
        ),
        (Answer(200, '{"epochs": []}', {"Date": formatdate(0)}), Level.WARNING, "ahead of that of region"),
        (Answer(403, "no"), Level.FAULT, "rejected"),
        (Answer(200, "", {}, hang_s=9), Level.FAULT, "no answer within 0.5 s"),
    ],
)
async def test_a_region_that_is_old_none_or_silent_is_found(
    token: Path, answer: Answer, level: Level, words: str
) -> None:
    async with http_stub(lambda _: answer) as stub:
        given = destination(kind="ingest", url=stub.url, token_file=token)
        found = worst(await network.check_destination(given, "gw-1", within_s=0.5))
    assert (found.level, words in found.what) == (level, True), found
    assert "\x1b" not in found.what


async def test_a_region_that_is_not_there_or_whose_certificate_nobody_signed_is_found(
    tmp_path: Path, token: Path
) -> None:
    away = destination(kind="ingest", url=f"http://127.0.0.1:{free_port()}", token_file=token)
    assert worst(await network.check_destination(away, "gw-1")).level is Level.FAULT
    certificate, key = Authority(tmp_path).issue("server", "localhost", "DNS:localhost")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    server = await asyncio.start_server(lambda _r, w: w.close(), "127.0.0.1", 0, ssl=context)
    async with server:
        url = f"https://localhost:{server.sockets[0].getsockname()[1]}"
        found = worst(
            await network.check_destination(destination(kind="ingest", url=url, token_file=token), "gw-1")
        )
        await asyncio.sleep(0.1)  # for the server to notice that the handshake failed, and close its socket
    assert (found.level, "ca_file" in found.advice) == (Level.FAULT, True), found


def influx(request: Request) -> Answer:
    if request.path == "/ping":
        return Answer(204, headers={"X-Influxdb-Version": "2.7.1"})
    if request.headers.get("authorization") != f"Token {SECRET}":
        return Answer(401, '{"message": "unauthorized access"}')
    if request.query.get("bucket") != "sensors":
        return Answer(404, '{"message": "bucket not found"}')
    assert request.body == b"", "nothing is written by a doctor"
    return Answer(204)


async def test_an_influxdb_that_refuses_the_token_or_has_no_such_bucket_is_found(
    tmp_path: Path, token: Path
) -> None:
    async with http_stub(influx) as stub:
        given = {"kind": "influxdb", "url": stub.url, "org": "farm", "token_file": token}
        well = worst(await network.check_destination(destination(**given, bucket="sensors"), "gw-1"))
        assert (well.level, "version 2.7.1" in well.what) == (Level.OK, True), well
        missing = worst(await network.check_destination(destination(**given, bucket="other"), "gw-1"))
        assert (missing.level, "bucket not found" in missing.what) == (Level.FAULT, True), missing
        token.write_text("wrong")  # noqa: ASYNC240 - a few bytes
        refused = worst(await network.check_destination(destination(**given, bucket="sensors"), "gw-1"))
        assert (refused.level, "rejected" in refused.what) == (Level.FAULT, True), refused
        token.unlink()  # noqa: ASYNC240 - a few bytes
        unreadable = worst(await network.check_destination(destination(**given, bucket="sensors"), "gw-1"))
        assert unreadable.level is Level.FAULT
    async with http_stub(lambda _: Answer(404, "nothing here")) as stub:
        token.write_text(SECRET)  # noqa: ASYNC240 - a few bytes
        stranger = destination(**{**given, "url": stub.url}, bucket="sensors")
        assert (
            "not the answer of an InfluxDB" in worst(await network.check_destination(stranger, "gw-1")).what
        )


async def test_a_token_that_crosses_the_network_readable_is_found(token: Path) -> None:
    given = destination(kind="ingest", url="http://region.invalid:8420", token_file=token, allow_plain=True)
    found = await network.check_destination(given, "gw-1", within_s=2)
    assert any("unencrypted" in f.what and f.level is Level.WARNING for f in found), found


async def test_a_real_broker_is_asked_without_touching_the_session(mosquitto: Mosquitto) -> None:
    well = worst(await network.check_broker(broker(mosquitto.url), "gw-1"))
    assert (well.level, "broker_reviewed" in well.advice or "docs/ingress.md" in well.advice) == (
        Level.WARNING,
        True,
    )
    mosquitto.kill()
    gone = worst(await network.check_broker(broker(mosquitto.url), "gw-1"))
    assert gone.level is Level.FAULT


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"\x20\x03\x00\x87\x00", "not authorized"),
        (b"\x20\x02\x00\x00", "past the end"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", ""),
        (b"", "closed the connection"),
        (None, "no answer within 0.5 s"),
    ],
)
async def test_a_broker_that_refuses_is_none_or_is_silent_is_found(answer: bytes | None, words: str) -> None:
    served = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        if answer is None:
            await reader.read()
        else:
            writer.write(answer)
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
        served.set()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = f"mqtt://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        found = worst(await network.check_broker(broker(url), "gw-1", within_s=0.5))
        await served.wait()
    assert (found.level, words in found.what) == (Level.FAULT, True), found


def test_the_command_tells_faults_and_advice_ends_with_1_and_never_shows_a_secret(
    tmp_path: Path, token: Path
) -> None:
    path = tmp_path / "gateway.toml"
    path.write_text(
        f'gateway_id = "g"\n[spool]\npath = "spool.db"\n[ingress.listen]\nport = {free_port()}\n'
        f'[status]\nport = {free_port()}\n[[destinations]]\nname = "region"\nkind = "ingest"\n'
        f'url = "http://127.0.0.1:{free_port()}"\ntoken_file = "{token}"\n'
    )
    outcome = run("doctor", "-c", str(path), "--all")
    assert outcome.returncode == 1, outcome.stderr
    assert "-> check address, routes and firewalls" in outcome.stdout
    offline = run("doctor", "-c", str(path), "--offline", "--json")
    told = json.loads(offline.stdout)
    assert (offline.returncode, told["faults"]) == (0, 0), told
    assert {f["check"] for f in told["findings"]} >= {
        "clock",
        "disk",
        "port",
        "permissions",
        "spool",
        "folder",
    }
    assert SECRET not in outcome.stdout + outcome.stderr + offline.stdout
    path.write_text("gateway_id = 1")
    assert run("doctor", "-c", str(path)).returncode == 2
