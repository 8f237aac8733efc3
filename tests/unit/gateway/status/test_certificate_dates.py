"""The times in certificates and revocation lists, read without a library, against openssl's own words."""

from __future__ import annotations

import subprocess
from datetime import datetime
from typing import TYPE_CHECKING

import pytest

from gateway.settings.gateway_settings import GatewaySettings
from gateway.status.certificates import CertificateMonitor, check_certificate_file, parse_validities
from tests.support.certificates import Authority

if TYPE_CHECKING:
    from pathlib import Path

DAY_S = 86_400


def said_by_openssl(kind: str, path: Path, flag: str) -> float:
    words = subprocess.run(
        ("openssl", kind, "-in", path, "-noout", flag), check=True, capture_output=True, text=True, timeout=30
    ).stdout
    stamp = words.partition("=")[2].strip().replace("GMT", "+0000")
    return datetime.strptime(stamp, "%b %d %H:%M:%S %Y %z").timestamp()


def test_certificates_and_lists_of_a_file_have_the_times_that_openssl_reads(tmp_path):
    authority = Authority(tmp_path)
    certificate, _ = authority.issue("pump", "pump-1", "DNS:pump-1")
    revoked = authority.revocations("pump")
    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes(certificate.read_bytes() + b"words between\n" + authority.certificate.read_bytes())
    first, second = parse_validities(bundle.read_bytes())
    for found, path in ((first, certificate), (second, authority.certificate)):
        assert found.kind == "certificate"
        assert found.not_before_s == said_by_openssl("x509", path, "-startdate")
        assert found.not_after_s == said_by_openssl("x509", path, "-enddate")
    (listed,) = parse_validities(revoked.read_bytes())
    assert listed.kind == "revocation list"
    assert listed.not_after_s == said_by_openssl("crl", revoked, "-nextupdate")


def test_a_certificate_beyond_2049_is_read(tmp_path):
    authority = Authority(tmp_path)
    subprocess.run(
        ("openssl", "x509", "-in", "ca.pem", "-signkey", "ca.key", "-days", "20000", "-out", "long.pem"),
        cwd=tmp_path,
        check=True,
        capture_output=True,
        timeout=30,
    )
    (found,) = parse_validities((tmp_path / "long.pem").read_bytes())
    assert found.not_after_s == said_by_openssl("x509", tmp_path / "long.pem", "-enddate")
    assert authority.certificate.exists()


@pytest.mark.parametrize("damage", [b"", b"AAAA", b"MIIB", b"MIICAzCCAam=", b"not base64!"])
def test_damage_is_told_and_never_raises_anything_else(tmp_path, damage):
    path = tmp_path / "damaged.pem"
    path.write_bytes(b"-----BEGIN CERTIFICATE-----\n" + damage + b"\n-----END CERTIFICATE-----\n")
    assert check_certificate_file("k", path, 0.0).fault
    assert check_certificate_file("k", tmp_path / "absent", 0.0).fault.startswith("cannot be read")


def test_what_ends_soon_is_logged_once_a_day(tmp_path, caplog):
    certificate, key = Authority(tmp_path).issue("server", "localhost")
    listen = {"tls_cert_file": certificate, "tls_key_file": key}
    given = GatewaySettings(gateway_id="g", spool={"path": tmp_path / "s"}, ingress={"listen": listen})  # type: ignore[arg-type]  # as from a file
    now = {"s": certificate.stat().st_mtime}
    watch = CertificateMonitor(lambda: given, clock_s=lambda: now["s"])
    assert [status.key for status in watch.check_once()] == ["ingress.listen.tls_cert_file"]
    watch.check_once()
    assert caplog.text.count("renew it") == 1
    assert [status.urgent for status in watch.newest] == [True]
    now["s"] += DAY_S + 1
    watch.check_once()
    assert caplog.text.count("renew it") == 2
