"""Ten thousand devices with passwords connect to a real gateway, publish once each and are acknowledged."""

import asyncio
import os
import resource
import time
from contextlib import suppress
from typing import Any

import psutil
import pytest
import uvloop

from gateway.auth.device_passwords import hash_password
from gateway.mqtt.codec.packet_codec import encode_packet
from gateway.mqtt.codec.packets import Connect, Publish
from tests.support.free_ports import free_port
from tests.support.programs import Program

DEVICES = int(os.environ.get("CROWD_DEVICES", "10000"))
COST = int(os.environ.get("CROWD_SCRYPT_LN", "2"))
AT_ONCE = 1000
CONNACK, PUBACK = 0x20, 0x40


@pytest.fixture
def files_enough():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = DEVICES + 500
    if hard != resource.RLIM_INFINITY and hard < needed:
        pytest.skip(f"needs {needed} open files, the hard limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed if soft != resource.RLIM_INFINITY else soft, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Device(asyncio.Protocol):
    """Connects, publishes once, stays."""

    def __init__(self, number):
        self.name = f"dev-{number}"
        self.acknowledged = asyncio.get_running_loop().create_future()
        self.transport: Any = None

    def connection_made(self, transport):
        self.transport = transport
        transport.write(
            encode_packet(Connect(self.name, username=self.name, password=b"secret", keep_alive_s=600))
        )

    def data_received(self, data):
        if data[0] == CONNACK and data[3] == 0:
            self.transport.write(
                encode_packet(
                    Publish(f"sensors/{self.name}/t".encode(), b'{"value":1,"ts":1767225600}', 1, 1)
                )
            )
        elif data[0] == PUBACK:
            self.acknowledged.set_result(None)
        else:
            self.acknowledged.set_exception(AssertionError(f"{self.name} got {data[:8].hex(' ')}"))

    def connection_lost(self, _exc):
        if not self.acknowledged.done():
            self.acknowledged.set_exception(AssertionError(f"{self.name} was closed"))


async def crowd(port, gateway):
    loop = asyncio.get_running_loop()
    room = asyncio.Semaphore(AT_ONCE)
    devices = [Device(number) for number in range(DEVICES)]

    async def connect(number, device):
        source = f"127.0.0.{2 + number % 200}"
        async with room:
            await loop.create_connection(lambda: device, "127.0.0.1", port, local_addr=(source, 0))
            await device.acknowledged

    started = time.monotonic()
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        for number, device in enumerate(devices):
            group.create_task(connect(number, device))
    took_s = time.monotonic() - started
    assert all(not device.transport.is_closing() for device in devices)
    rss_mb = gateway.memory_info().rss / 1e6
    for device in devices:
        device.transport.abort()
    return took_s, rss_mb


def test_ten_thousand_devices_publish_and_are_acknowledged(tmp_path, files_enough, record_property):
    port, status = free_port(), free_port()
    lines = (f"dev-{n}:{hash_password(b'secret', ln=COST)}\n" for n in range(DEVICES))
    (tmp_path / "passwords").write_text("".join(lines))
    (tmp_path / "gateway.toml").write_text(
        f'gateway_id = "g"\n[spool]\npath = "spool.db"\n[status]\nport = {status}\n'
        "[ingress.host]\nenabled = false\n"
        f'[ingress.listen]\nport = {port}\npasswords_file = "passwords"\n'
    )
    program = Program(
        tmp_path,
        "gateway",
        *("gateway", "-c", str(tmp_path / "gateway.toml")),
        ready_url=f"http://127.0.0.1:{status}/readyz",
    )
    program.start()
    assert program.process is not None
    try:
        gateway = psutil.Process(program.process.pid)
        empty_mb = gateway.memory_info().rss / 1e6
        took_s, rss_mb = uvloop.run(crowd(port, gateway))
    finally:
        with suppress(Exception):
            program.stop()
        program.kill()
    said = f"{DEVICES} devices in {took_s:.1f} s; gateway {empty_mb:.0f} MB before, {rss_mb:.0f} MB with them"
    record_property("crowd", said)
    print(said)  # noqa: T201 - the figure is what this test is for
    assert "Traceback" not in program.log.read_text()
    assert rss_mb - empty_mb < DEVICES * 0.02
