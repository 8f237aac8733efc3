"""TLS at the service itself, and gateways that are known by their certificates. openssl makes those."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import subprocess
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from cloud_sync.codec import wire
from cloud_sync.http.auth import certificate_names
from cloud_sync.http.uvicorn_server import CannotStartError
from cloud_sync.ingest import program
from cloud_sync.ingest.settings import Tls
from tests.support.ingest_service import MEDIA, Service, running
from tests.support.wire_examples import batch

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")


class Authority:
    """A private CA and what it has signed, as files in a folder."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self.folder = folder
        self.name = name
        self._openssl("req", "-x509", "-newkey", *CURVE, "-nodes", "-subj", f"/CN={name}", "-days", "2",
                      "-keyout", f"{name}.key", "-out", f"{name}.pem")  # fmt: skip
        self.file = folder / f"{name}.pem"

    def sign(self, name: str, alternative: str = "") -> tuple[Path, Path]:
        """Certificate and key for a name."""
        stem = f"{self.name}-{name}"
        self._openssl("req", "-newkey", *CURVE, "-nodes", "-subj", f"/CN={name}",
                      "-keyout", f"{stem}.key", "-out", f"{stem}.csr")  # fmt: skip
        extra = self.folder / f"{stem}.ext"
        extra.write_text(f"subjectAltName={alternative}\n" if alternative else "")
        self._openssl("x509", "-req", "-in", f"{stem}.csr", "-CA", f"{self.name}.pem", "-CAkey",
                      f"{self.name}.key", "-CAcreateserial", "-days", "2", "-extfile", extra.name,
                      "-out", f"{stem}.pem")  # fmt: skip
        return self.folder / f"{stem}.pem", self.folder / f"{stem}.key"

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self.folder, capture_output=True, check=True)


CURVE = ("ec", "-pkeyopt", "ec_paramgen_curve:P-256")


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


def tls_of(authority: Authority, **more: Any) -> dict[str, Any]:
    cert, key = authority.sign("region", "IP:127.0.0.1")
    return {"cert_file": cert, "key_file": key, **more}


def http_of(authority: Authority, service: Service, pair: tuple[Path, Path] | None) -> httpx.AsyncClient:
    context = ssl.create_default_context(cafile=str(authority.file))
    if pair is not None:
        context.load_cert_chain(*pair)
    return httpx.AsyncClient(base_url=service.url, verify=context, trust_env=False)


async def post(http: httpx.AsyncClient, gateway_id: str, token: str = "") -> tuple[int, str]:
    headers = MEDIA | ({"Authorization": f"Bearer {token}"} if token else {})
    response = await http.post(
        "/v1/batches", content=wire.encode(batch(gateway_id=gateway_id)), headers=headers
    )
    return response.status_code, response.json().get("error", response.json().get("status"))


async def test_a_certificate_names_its_gateway_and_a_token_does_without_one(
    postgres_dsn, tmp_path, authority
):
    tls = tls_of(authority, client_ca_file=authority.file)
    async with running(postgres_dsn, tmp_path, tls=tls) as service:
        assert service.url.startswith("https://")
        async with http_of(authority, service, authority.sign("gw-7")) as http:
            assert await post(http, "gw-7") == (200, "applied")
            assert await post(http, "gw-1") == (403, "other_gateway")
            assert await post(http, "gw-1", service.token) == (200, "applied")
            assert (await http.get("/v1/gateways/gw-7")).status_code == 200
            assert (await http.get("/v1/gateways/gw-1")).status_code == 403
            assert (await http.get("/v1/gateways")).status_code == 403
            assert (await http.post("/v1/readings", json=[])).status_code == 403
        async with http_of(authority, service, authority.sign("box", "DNS:gw-8,URI:urn:site:9")) as http:
            assert await post(http, "gw-8") == (200, "applied")
            assert await post(http, "urn:site:9") == (200, "applied")
        async with http_of(authority, service, None) as http:
            assert await post(http, "gw-1", service.token) == (200, "duplicate")
            assert await post(http, "gw-7") == (401, "no_token")


async def test_a_certificate_of_another_authority_is_nobodys(postgres_dsn, tmp_path, authority):
    stranger = Authority(tmp_path, "stranger").sign("gw-1")
    tls = tls_of(authority, client_ca_file=authority.file, client_certificates="required")
    async with running(postgres_dsn, tmp_path, tls=tls) as service:
        for pair in (stranger, None):
            async with http_of(authority, service, pair) as http:
                with pytest.raises(httpx.TransportError):
                    await post(http, "gw-1", service.token)
        async with http_of(authority, service, authority.sign("gw-1")) as http:
            assert await post(http, "gw-1") == (200, "applied")
        async with httpx.AsyncClient(base_url=service.url.replace("https", "http"), trust_env=False) as plain:
            with pytest.raises(httpx.TransportError):
                await plain.get("/healthz")


def shown_by(service: Service, authority: Authority) -> bytes:
    """The certificate that a new connection is shown."""
    host, port = service.url.removeprefix("https://").split(":")
    trust = ssl.create_default_context(cafile=authority.file)
    trust.check_hostname = False
    with (
        socket.create_connection((host, int(port)), timeout=10) as plain,
        trust.wrap_socket(plain) as connection,
    ):
        return connection.getpeercert(binary_form=True) or b""


async def test_a_renewed_certificate_is_shown_to_new_connections_once_it_fits_its_key(
    postgres_dsn, tmp_path, authority
):
    certificate, key = authority.sign("localhost", "IP:127.0.0.1")
    newer, newer_key = authority.sign("renewed", "IP:127.0.0.1")
    tls = {"cert_file": certificate, "key_file": key}
    async with running(postgres_dsn, tmp_path, tls=tls) as service:
        old = await asyncio.to_thread(shown_by, service, authority)
        newer.replace(certificate)
        await asyncio.sleep(1.1)
        assert await asyncio.to_thread(shown_by, service, authority) == old, "it does not fit its key yet"
        newer_key.replace(key)
        await asyncio.sleep(1.1)
        assert await asyncio.to_thread(shown_by, service, authority) != old


async def test_without_a_ca_for_clients_a_certificate_says_nothing(postgres_dsn, tmp_path, authority):
    async with (
        running(postgres_dsn, tmp_path, tls=tls_of(authority)) as service,
        http_of(authority, service, authority.sign("gw-1")) as http,
    ):
        assert await post(http, "gw-1") == (401, "no_token")
        assert await post(http, "gw-1", service.token) == (200, "applied")


def test_files_that_cannot_be_used_are_told_in_words(tmp_path, authority):
    cert, key = authority.sign("region")
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("no certificate")
    for broken in (
        {"cert_file": wrong, "key_file": key},
        {"cert_file": cert, "key_file": tmp_path / "none"},
        {"cert_file": cert, "key_file": authority.folder / "ca.key"},
        {"cert_file": cert, "key_file": key, "client_ca_file": wrong},
    ):
        with pytest.raises(CannotStartError, match=r"cannot use the files of \[tls\]"):
            program.build_cert_reloader(Tls.model_validate(broken))
    with pytest.raises(ValueError, match="needs client_ca_file"):
        Tls.model_validate({"cert_file": cert, "key_file": key, "client_certificates": "required"})


def test_names_are_those_of_the_subject_and_its_alternatives():
    certificate = {
        "subject": ((("organizationName", "site"),), (("commonName", "gw-1"),)),
        "subjectAltName": (("DNS", "gw-2"), ("IP Address", "10.0.0.1"), ("URI", "urn:x:gw-3")),
    }
    assert certificate_names(certificate) == {"gw-1", "gw-2", "urn:x:gw-3"}
    assert certificate_names({}) == set()
