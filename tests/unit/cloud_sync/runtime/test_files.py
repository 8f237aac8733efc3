"""Files replaced as a whole, waits that a stop ends, sockets on every address."""

from __future__ import annotations

import asyncio
import socket
import stat
import time

import pytest

from cloud_sync.runtime.files import replace_file
from cloud_sync.runtime.server_sockets import bind_sockets
from cloud_sync.runtime.waits import sleep_or_stop


def test_a_file_is_replaced_as_a_whole_with_its_mode(tmp_path):
    path = tmp_path / "state"
    replace_file(path, b"one", 0o600)
    replace_file(path, b"two", 0o640, owner=path.stat())
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]


def test_a_file_that_cannot_be_replaced_is_as_it_was(tmp_path):
    folder = tmp_path / "state"
    folder.mkdir()
    with pytest.raises(IsADirectoryError):
        replace_file(folder, b"x")
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]


async def test_a_stop_ends_a_wait_and_is_said_so():
    stop = asyncio.Event()
    assert not await sleep_or_stop(stop, 0.01)
    assert not await sleep_or_stop(stop, 0)
    asyncio.get_running_loop().call_soon(stop.set)
    begun = time.monotonic()
    assert await sleep_or_stop(stop, 60)
    assert await sleep_or_stop(stop, 0)
    assert time.monotonic() - begun < 10


def test_every_address_of_a_host_gets_the_same_port():
    bound = bind_sockets("", 0)
    try:
        assert len({listening.getsockname()[1] for listening in bound}) == 1
        with pytest.raises(OSError, match=r":\d+: address already in use"):
            bind_sockets("127.0.0.1", bound[0].getsockname()[1])
    finally:
        for listening in bound:
            listening.close()
    with pytest.raises(OSError, match=r"no\.such\.host\.invalid:1: "):
        bind_sockets("no.such.host.invalid", 1)
    assert socket.AF_INET in {listening.family for listening in bound}
