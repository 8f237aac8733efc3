"""The client's TLS context names the file that cannot be used."""

import ssl

import pytest

from gateway.auth.tls import TlsFileError, build_client_context


def test_without_files_the_system_is_trusted_and_names_are_checked():
    context = build_client_context(None, None, None)
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.check_hostname


def test_a_missing_file_and_one_without_a_certificate_are_named(tmp_path):
    missing, noise = tmp_path / "missing.pem", tmp_path / "noise.pem"
    noise.write_text("nothing\n")
    for files in ((missing, None, None), (None, noise, missing), (noise, None, None), (None, noise, noise)):
        with pytest.raises(TlsFileError) as raised:
            build_client_context(*files)
        assert raised.value.path in files
