"""A folder in which there is one of everything that commands and requests ask about, and what serves it.

sound/    a stopped gateway: readings, rollups, an alert, quarantine, a file destination
damaged/  a copy of its spool with one segment overwritten
live/     a running gateway on a copy of that, delivering to a region, an absent cloud and a stick
region/   the running ingest service, with the database given
"""

from __future__ import annotations

import json
import shutil
import socket
import sqlite3
import time
from typing import TYPE_CHECKING, Any

import certifi
import httpx
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from tests.support.free_ports import free_port
from tests.support.programs import ROOT, Program, run, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BATCH = "application/vnd.tidegate.batch"
_COMMON = """gateway_id = "barn-1"
[spool]
path = "spool.db"
min_free_bytes = 0
flash_endurance_tb = 1
[ingress.host]
enabled = false
[processing]
interval_s = 0.02
[rollups]
lateness_s = 0
idle_s = 0.1
close_every_s = 0
[alerts]
group_wait_s = 0
builtin = false
[[alerts.rule]]
name = "hot"
above = 50
[[alerts.channel]]
name = "ops"
kind = "webhook"
url = "http://127.0.0.1:{nowhere}/"
[[destinations]]
name = "stick"
kind = "file"
directory = "readings"
compress = false
min_free_bytes = 0
flush_s = 0.05
[ingress.listen]
port = {broker}
passwords_file = "passwords"
allow_anonymous = true
publish_as = "any"
[status]
port = {shown}
tokens_file = "tokens"
silent_after_s = 0.1
"""
_LIVE = """[ingress.http]
enabled = true
port = {http}
tokens_file = "tokens"
max_body_bytes = 4096
max_plain_bytes = 8192
max_plain_rows = 50
[[ingress.subscribe]]
name = "broker"
url = "mqtt://127.0.0.1:{nowhere}"
filters = ["a/#"]
[[destinations]]
name = "region"
kind = "ingest"
url = "http://127.0.0.1:{region}"
token_file = "region.token"
flush_s = 0.05
[[destinations]]
name = "cloud"
kind = "influxdb"
url = "https://127.0.0.1:{nowhere}"
database = "sensors"
api = "v1"
ca_file = "{authorities}"
"""
_REGION = """tokens_file = "tokens"
[database]
dsn = {dsn}
[limits]
max_body_bytes = 100000
max_plain_bytes = 8192
max_plain_rows = 50
"""
_FILES = {
    "payload.json": '{"value": 21.5, "quality": 98, "unit": "degC"}',
    "bad.json": '[{"value": 1}, {"value": "much"}]',
    "plant.csv": "time,sensor,value\n2026-05-01T12:00Z,pump-1,1.5\n2026-05-01T12:01Z,pump-1,2\n",
    "unknown-key.toml": 'gateway_id = "barn-1"\nspoon = 1\n[spool]\npath = "spool.db"\n',
    "no-toml.toml": "gateway_id = barn-1\n",
    "changed.toml": 'gateway_id = "barn-1"\nlog_level = "debug"\n[spool]\npath = "sound/spool.db"\n',
    "garbage.db": "this is no spool, and long enough to be looked at" * 100,
    "password": "correct horse battery\n",
    "every-key.toml": """tokens_file = "region/tokens"
stop_within_s = 25
log_level = "info"
log_format = "auto"
[listen]
host = "127.0.0.1"
port = 8420
[tls]
cert_file = "region.pem"
key_file = "region.key"
client_ca_file = "gateways-ca.pem"
client_certificates = "optional"
[database]
dsn_file = "database-dsn"
pool_size = 4
statement_timeout_s = 60
merge_ledger_after_days = 7
chunk_hours = 24
compress_after_days = 7
retention_days = 30
rollup_retention_days = { 60 = 30 }
[limits]
max_body_bytes = 33554432
max_plain_bytes = 33554432
max_plain_rows = 100000
max_rows = 1000000
max_requests = 64
max_requests_each = 8
max_buffered_bytes = 268435456
body_idle_s = 30
retry_after_s = 5
""",
}
_DAMAGE = """UPDATE segment SET block = zeroblob(length(block)) WHERE position =
(SELECT min(position) FROM segment WHERE position >> 56 = 4)"""
_CONNECT, _ACCEPTED = b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x3c\x00\x01x", b"\x20\x02\x00\x00"
_STRANGER = b"\x10\x13\x00\x04MQTT\x04\xc2\x00\x3c" + b"\x00\x01x\x00\x01x\x00\x01x"
"""CONNECT of MQTT 3.1.1 with a name and a password that nobody has."""
_TOKENS = {"barn-1": "batches", "gw-1": "batches", "pump-1": "readings", "eye": "view"}


class World:
    """The folder, the addresses in it, and the tokens: by name, of the gateway and of the region alike."""

    def __init__(self, folder: Path, dsn: str) -> None:
        self.folder = folder
        self._ports = {name: free_port() for name in ("broker", "endpoint", "http", "region", "nowhere")}
        self.urls = {name: f"http://127.0.0.1:{port}" for name, port in self._ports.items()}
        self.words = {"{dsn}": dsn, "{broker}": f"mqtt://127.0.0.1:{self._ports['broker']}"} | {
            "{" + name + "}": self.urls[name] for name in ("endpoint", "nowhere")
        }
        for name in ("sound", "damaged", "live", "region"):
            (folder / name).mkdir()
        texts = {
            name: _COMMON.format(**self._ports, shown=self._ports[name]) for name in ("nowhere", "endpoint")
        }
        (folder / "sound/gateway.toml").write_text(texts["nowhere"])
        live = _LIVE.format(**self._ports, authorities=certifi.where())
        (folder / "live/gateway.toml").write_text(texts["endpoint"] + live)
        (folder / "region/ingest.toml").write_text(_REGION.format(dsn=json.dumps(dsn)))
        self.tokens = {"nobody": "nobody-has-this"}
        for name, scope in _TOKENS.items():
            words = ("ingest", "token", "add", name, "--scope", scope, "--tokens-file")
            self.tokens[name] = run(*words, str(folder / "region/tokens")).stdout.strip()
        for name in ("sound", "live"):
            shutil.copy(folder / "region/tokens", folder / name / "tokens")
            (folder / name / "passwords").touch()
        (folder / "live/region.token").write_text(self.tokens["barn-1"])
        for name, text in _FILES.items():
            (folder / name).write_text(text)
        self._programs: list[Program] = []

    def start(self) -> None:
        sound = self._started("sound", "gateway", "endpoint", TIDEGATE_GATEWAY_STATUS__PORT="endpoint")
        now_us = time.time_ns() // 1000
        for seconds in range(-600, 0, 40):
            self._publish(value=-seconds / 20, ts=now_us + seconds * 1_000_000, quality=98, unit="degC")
        self._publish(value=99, battery_level=80, signal_strength=-60, seq=1)
        self._publish(value=1, ts=now_us - 600_000_000)  # there with another value
        self._publish(value="much")
        self._publish("no JSON")
        self._wait(
            lambda s: s["processing"]["rollups"] > 10 and s["alerts"]["firing"] and s["devices"]["silent"]
        )
        assert sound.stop() == 0
        self._copy_damaged()
        self._started("region", "ingest", "region", TIDEGATE_INGEST_LISTEN__PORT="region")
        self._started("live", "gateway", "endpoint")
        self._publish(value=98)
        self._publish("no JSON")
        self._offend()
        for server in ("http", "region"):
            self.ask(server, "POST", "/v1/readings", "as=pump-1", "type=application/json", "body=[]")
            self.ask(server, "POST", "/v1/readings")
            for name in ("declaration", "rollup", "part", "part"):
                batch = f"file=wire_v1_{name}.tgwb"
                self.ask(server, "POST", "/v1/batches", "as=gw-1", f"type={BATCH}", batch)
        self._wait(_is_settled)

    def ask(self, server: str, method: str, path: str, *told: str) -> httpx.Response:
        """An HTTP request; `told` are headers, NAME=VALUE, and as=TOKEN, body=TEXT, fill=BYTES, file=NAME."""
        headers, content = {}, b""
        for word in told:
            name, _, value = word.partition("=")
            match name:
                case "as":
                    headers["Authorization"] = f"Bearer {self.tokens[value]}"
                case "body":
                    content = value.replace("{eye}", self.tokens["eye"]).encode()
                case "fill":
                    content = b"1" * int(value)
                case "file":
                    content = (ROOT / "tests/golden" / value).read_bytes()
                case "type":
                    headers["Content-Type"] = value
                case _:
                    headers[name] = value
        with httpx.Client(trust_env=False, timeout=30) as client:
            return client.request(method, self.urls[server] + path, headers=headers, content=content)

    def close(self) -> None:
        for program in self._programs:
            program.kill()

    def _started(self, folder: str, command: str, server: str, **ports: str) -> Program:
        """A program that answers at a server's address; `ports` are variables that give it one."""
        config = self.folder / folder / f"{command}.toml"
        environment = {variable: str(self._ports[port]) for variable, port in ports.items()}
        url = f"{self.urls[server]}/readyz"
        program = Program(self.folder, folder, command, "-c", str(config), ready_url=url, **environment)
        self._programs.append(program)
        program.start()
        return program

    def _copy_damaged(self) -> None:
        shutil.copy(self.folder / "sound/spool.db", self.folder / "damaged/spool.db")
        spool = sqlite3.connect(self.folder / "damaged/spool.db")
        assert spool.execute(_DAMAGE).rowcount == 1
        spool.commit()
        spool.close()
        shutil.copy(self.folder / "damaged/spool.db", self.folder / "live/spool.db")

    def _publish(self, payload: str = "", **reading: Any) -> None:
        """One publish, a commit of its own."""
        client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
        client.connect("127.0.0.1", self._ports["broker"])
        client.loop_start()
        client.publish("sensors/pump-1/temperature", payload or json.dumps(reading), 1).wait_for_publish(10)
        client.disconnect()
        client.loop_stop()

    def _offend(self) -> None:
        """What the gateway counts as a refusal, and as a fault of the protocol."""
        with self._connected(_CONNECT) as first:
            assert first.recv(4) == _ACCEPTED
            with self._connected(_CONNECT):  # takes its place
                assert first.recv(1) == b""
        for data in (_STRANGER, b"\x00\x00"):
            with self._connected(data) as connection:
                while connection.recv(100):
                    pass

    def _connected(self, data: bytes) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self._ports["broker"]), 10)
        connection.sendall(data)
        return connection

    def _wait(self, true: Callable[[dict[str, Any]], bool]) -> None:
        seen: list[Any] = []

        def looked() -> bool:
            seen[:] = [self.ask("endpoint", "GET", "/status").json()]
            return true(seen[0])

        wait_until(looked, 30, lambda: json.dumps(seen, indent=1))


def _is_settled(status: dict[str, Any]) -> bool:
    """Whether everything that takes its time has happened."""
    region = next(d for d in status["destinations"] if d["name"] == "region")
    return bool(
        all(status["ways_in"]["listen"][name] for name in ("refused", "protocol_faults", "closed"))
        and status["ways_in"]["subscribe"][0]["faults"]
        and status["losses"]["readings"]
        and not region["backlog_readings"]
        and status["channels"][-1]["failed"]
        and status["devices"]["silent"]
        and status["quarantine"]["items"]
    )
