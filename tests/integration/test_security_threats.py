"""What strangers, devices and their data try: the lines of docs/security.md that have no test elsewhere."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import socket
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import uvicorn
from paho.mqtt import publish

from cloud_sync.http import uvicorn_server
from cloud_sync.http.uvicorn_server import HeadTimeoutProtocol, UvicornServer, bind_http_sockets
from tests.support.free_ports import free_port
from tests.support.programs import Program, run, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

TRICKS = [
    "../../evil",
    "..",
    "/etc/evil",
    "a/../../../evil",
    "C:\\evil",
    "evil\nline,injected=1 value=2 3",
    "~/evil",
]
TERMINAL = "\x1b]0;pwned\x07\x1b[2J\x9b31m\u202e"
SECRET = "s3cret-0f-the-g4teway"


class Site:
    """A gateway that takes anything over HTTP, from anyone on this machine, and writes files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.http_port, self.status_port, self.mqtt_port = free_port(), free_port(), free_port()
        (folder / "token").write_text(SECRET + "\n")
        self.config = folder / "gateway.toml"
        self.config.write_text(
            f'gateway_id = "g"\n[spool]\npath = "spool/spool.db"\n[status]\nport = {self.status_port}\n'
            f"[ingress.host]\nenabled = false\n[ingress.listen]\nport = {self.mqtt_port}\n"
            f"[ingress.http]\nenabled = true\nport = {self.http_port}\nmax_plain_bytes = 1048576\n"
            '[[destinations]]\nname = "stick"\nkind = "file"\ndirectory = "out"\ncompress = false\n'
            "min_free_bytes = 0\nflush_s = 0.1\n"
            f'[[destinations]]\nname = "region"\nkind = "ingest"\nurl = "http://me:{SECRET}@127.0.0.1:{free_port()}"\n'
            'token_file = "token"\n'
        )
        self.program = Program(
            folder, "gateway", "gateway", "-c", str(self.config), ready_url=f"{self.status_url}/readyz"
        )

    @property
    def status_url(self) -> str:
        return f"http://127.0.0.1:{self.status_port}"

    def post(self, body: bytes, **headers: str) -> int:
        url = f"http://127.0.0.1:{self.http_port}/v1/readings"
        answer = httpx.post(
            url,
            content=body,
            headers={"Content-Type": "application/json", **headers},
            trust_env=False,
            timeout=20,
        )
        return answer.status_code

    def read(self, sensor_id: str, value: Any = 1, **keys: Any) -> int:
        reading = {"sensor_id": sensor_id, "sensor_type": "t", "value": value, "ts": 1_790_000_000, **keys}
        return self.post(json.dumps([reading]).encode())

    def status(self) -> dict[str, Any]:
        return httpx.get(f"{self.status_url}/status", trust_env=False, timeout=10).json()

    def backlog_of(self, name: str) -> int:
        return next(d["backlog_readings"] for d in self.status()["destinations"] if d["name"] == name)

    def is_well(self) -> bool:
        return httpx.get(f"{self.status_url}/healthz", trust_env=False, timeout=10).is_success


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("site"))
    made.program.start()
    yield made
    made.program.kill()


def test_names_of_sensors_lead_to_no_file_outside_of_the_destinations_folder(site: Site) -> None:
    for trick in TRICKS:
        site.read(trick)
    site.read("honest")
    wait_until(
        lambda: all(not d["backlog_readings"] for d in site.status()["destinations"] if d["name"] == "stick"),
        20,
    )
    files = [path for path in site.folder.parent.rglob("*") if path.is_file() and "evil" in str(path)]
    assert files == []
    assert not Path("/etc/evil").exists()
    written = [path for path in (site.folder / "out").rglob("*") if path.is_file() and path.suffix != ".lock"]
    lines = [line for path in written for line in path.read_text().splitlines()]
    assert any("honest" in line for line in lines)
    assert not any(line.startswith("line,injected") for line in lines), "a name began a line of its own"


def test_what_devices_send_cannot_move_the_terminal_of_whoever_looks(site: Site) -> None:
    site.read(f"sensor{TERMINAL}", location=f"barn{TERMINAL}")
    site.read("honest", location=f"barn{TERMINAL}")
    payload = f"no JSON {TERMINAL}".encode() + b"\xff\x1b[5m"
    publish.single("sensors/honest/t", payload, qos=1, hostname="127.0.0.1", port=site.mqtt_port)
    spool = ("--config", str(site.config))
    listed = json.loads(run("spool", "quarantine", "list", *spool, "--json").stdout or "[]")
    numbers = [str(n) for n in re.findall(r'"(?:number|id)": (\d+)', json.dumps(listed))]
    commands = [
        ("spool", "quarantine", "list", *spool),
        ("spool", "read", *spool),
        ("spool", "info", *spool),
        ("status", *spool),
        ("destination", "list", *spool),
        ("config", "show", *spool),
        ("doctor", *spool),
        *(("spool", "quarantine", "show", number, *spool) for number in numbers[:2]),
    ]
    shown = ""
    for words in commands:
        outcome = run(*words)
        out = outcome.stdout + outcome.stderr
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", out), (words, out)
        assert "Traceback" not in out, words
        shown += out
    assert "\\x1b" in shown, "nothing hostile was shown at all"


def test_secrets_are_in_nothing_that_a_gateway_or_a_command_says(site: Site) -> None:
    site.read("honest", ts=1_790_000_777)
    wait_until(lambda: any(d["last_error"] for d in site.status()["destinations"]), 20)
    said = site.program.log.read_text() + json.dumps(site.status())
    said += httpx.get(f"{site.status_url}/config", trust_env=False).text
    said += httpx.get(f"{site.status_url}/metrics", trust_env=False).text
    config = ("--config", str(site.config))
    for words in (
        ("status", *config, "--json"),
        ("config", "show", *config),
        ("config", "show", *config, "--json"),
        ("config", "check", *config),
        ("config", "diff", str(site.config), "--running"),
        ("doctor", *config, "--all"),
        ("doctor", *config, "--json"),
        ("spool", "info", *config),
    ):
        outcome = run(*words)
        said += outcome.stdout + outcome.stderr
    assert "region" in said
    assert SECRET not in said


def test_a_body_that_decompresses_to_more_than_is_taken_is_refused(site: Site) -> None:
    bomb = gzip.compress(b" " * (64 << 20))
    assert len(bomb) < 1 << 17
    assert site.post(bomb, **{"Content-Encoding": "gzip"}) == 413
    assert site.is_well()


@pytest.mark.parametrize("door", ["http_port", "status_port"])
def test_a_head_that_is_too_large_is_refused_and_others_are_served(site: Site, door: str) -> None:
    with socket.create_connection(("127.0.0.1", getattr(site, door)), timeout=20) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
        try:
            for _ in range(64):
                connection.sendall(b"X-Filler: " + b"a" * (1 << 16) + b"\r\n")
            answer = connection.recv(1 << 16)
        except ConnectionError:
            answer = b""
    assert b" 200 " not in answer.split(b"\r\n")[0]
    assert site.is_well()


async def test_a_head_that_comes_byte_by_byte_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uvicorn_server, "HEAD_WITHIN_S", 0.3)

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    bound = bind_http_sockets("127.0.0.1", 0)
    server = UvicornServer(uvicorn.Config(app, http=HeadTimeoutProtocol, log_config=None, lifespan="off"))
    serving = asyncio.create_task(server.serve(sockets=bound))
    reader, writer = await asyncio.open_connection(*bound[0].getsockname())
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
    ended = asyncio.create_task(reader.read())
    for _ in range(200):
        writer.write(b"G")
        await asyncio.wait({ended}, timeout=0.1)
        if ended.done():
            break
    assert ended.done(), "it was let go on"
    with suppress(ConnectionError):  # a close while bytes arrive is a reset
        await ended
    writer.close()
    server.should_exit = True
    await serving
