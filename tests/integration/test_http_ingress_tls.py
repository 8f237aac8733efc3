"""TLS of the `http` ingress: certificates name who brings what, a renewed one is used at once."""

from __future__ import annotations

import asyncio
import shutil
import ssl
from typing import Any

import httpx
import pytest

from cloud_sync.codec import wire
from cloud_sync.runtime.watched_file import WatchedFile
from tests.support.batches import batch_of
from tests.support.certificates import Authority
from tests.support.http_gateway import MEDIA, http_gateway

READING = {"sensor_id": "pump-1", "sensor_type": "t", "value": 1, "ts": 1_750_000_000}


@pytest.fixture
def authority(tmp_path):
    folder = tmp_path / "ca"
    folder.mkdir()
    made = Authority(folder)
    made.issue("server", "localhost", "IP:127.0.0.1")
    made.issue("pump", "pump-1")
    return made


def files(authority: Authority) -> dict[str, Any]:
    folder = authority.folder
    return {"tls_cert_file": folder / "server.pem", "tls_key_file": folder / "server.key"}


def trusting(authority: Authority, name: str | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority.certificate)
    if name is not None:
        context.load_cert_chain(authority.folder / f"{name}.pem", authority.folder / f"{name}.key")
    return context


async def test_a_certificate_names_the_device_and_a_token_works_beside_it(tmp_path, authority):
    given: dict[str, Any] = {
        "client_ca_file": authority.certificate,
        "client_certificate": "optional",
        "identity": "cn",
    }
    async with http_gateway(tmp_path / "gw", **files(authority), **given) as gateway:
        assert gateway.url.startswith("https:")
        async with httpx.AsyncClient(verify=trusting(authority, "pump"), base_url=gateway.url) as pump:
            assert (await pump.post("/v1/readings", json=READING)).json()["stored"] == 1
            other = await pump.post("/v1/readings", json=READING | {"sensor_id": "pump-2"})
            assert (other.status_code, other.json()["error"]) == (403, "other_device")
            own = wire.encode(batch_of([("pump-1", "t", 5, 1.0)], gateway_id="pump-1"))
            assert (await pump.post("/v1/batches", content=own, headers=MEDIA)).status_code == 200
        async with httpx.AsyncClient(verify=trusting(authority), base_url=gateway.url) as nobody:
            assert (await nobody.post("/v1/readings", json=READING)).status_code == 401
            token = gateway.bearer("low")
            theirs = wire.encode(batch_of([("pump-1", "t", 6, 1.0)], gateway_id="low"))
            answer = await nobody.post("/v1/batches", content=theirs, headers=MEDIA | token)
            assert answer.status_code == 200


async def test_a_renewed_certificate_serves_the_next_connection(tmp_path, authority, monkeypatch):
    monkeypatch.setitem(WatchedFile.__init__.__kwdefaults__, "check_interval_s", 0.0)
    async with http_gateway(tmp_path / "gw", tokens_file=None, **files(authority)) as gateway:
        port = int(gateway.url.rpartition(":")[2])

        async def serial() -> str:
            _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting(authority))
            number = str(writer.get_extra_info("peercert")["serialNumber"])
            writer.close()
            return number

        first = await serial()
        authority.issue("next", "localhost", "IP:127.0.0.1")
        for kind in ("pem", "key"):
            shutil.copyfile(authority.folder / f"next.{kind}", authority.folder / f"server.{kind}")
        second = await serial()
        assert first != second
        (authority.folder / "server.pem").write_text("no certificate")
        assert await serial() == second


async def test_without_tls_an_address_others_reach_needs_the_word_for_it(tmp_path):
    given: dict[str, Any] = {"host": "0.0.0.0"}
    with pytest.raises(ValueError, match="allow_plain_passwords"):
        async with http_gateway(tmp_path / "gw", **given):
            pass
    with pytest.raises(ValueError, match="allow_anonymous"):
        async with http_gateway(tmp_path / "gw", tokens_file=None, **given):
            pass
