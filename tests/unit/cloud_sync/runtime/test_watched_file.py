"""Files that change: read again once they are valid, TLS certificates among them."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

import pytest

from cloud_sync.runtime.watched_file import CertReloader, WatchedFile
from tests.support.certificates import Authority

if TYPE_CHECKING:
    from pathlib import Path


class InvalidError(Exception):
    pass


def numbers(path: Path) -> list[int]:
    try:
        return [int(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as fault:
        raise InvalidError(str(fault)) from fault


def test_a_change_counts_once_it_is_valid_and_is_looked_for_once_a_second(tmp_path, caplog):
    path = tmp_path / "numbers"
    path.write_text("1\n")
    watched = WatchedFile([path], lambda: numbers(path), InvalidError)
    assert watched.current(10.0) == [1]
    path.write_text("1\n2\n")
    assert watched.current(10.9) == [1]
    assert watched.current(11.0) == [1, 2]
    path.write_text("x\n")
    assert [watched.current(12.0), watched.current(13.0)] == [[1, 2], [1, 2]]
    path.unlink()
    assert watched.current(14.0) == [1, 2]
    assert caplog.text.count("stays in use") == 2, "once for each change"
    path.write_text("3\n")
    assert watched.current(15.0) == [3]


def test_a_change_before_the_first_look_is_seen_by_it(tmp_path):
    path = tmp_path / "numbers"
    path.write_text("1\n")
    watched = WatchedFile([path], lambda: numbers(path), InvalidError)
    path.write_text("22\n")
    assert watched.current(0.0) == [22]


def test_files_that_are_invalid_at_the_start_are_an_error(tmp_path):
    with pytest.raises(InvalidError):
        WatchedFile([tmp_path / "none"], lambda: numbers(tmp_path / "none"), InvalidError)


def test_a_certificate_counts_once_it_fits_its_key(tmp_path):
    authority = Authority(tmp_path)
    (certificate, key), newer = authority.issue("first", "a"), authority.issue("second", "b")

    def build() -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        return context

    now_s = [0.0]
    reloader = CertReloader(build, [certificate, key], ssl.SSLError, clock=lambda: now_s[0])
    first = reloader.current()
    newer[0].replace(certificate)
    now_s[0] += 1
    assert reloader.current() is first
    newer[1].replace(key)
    now_s[0] += 1
    assert reloader.current() is not first
    assert reloader.context.sni_callback is not None
