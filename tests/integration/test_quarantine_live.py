"""Quarantined publishes are decoded again by the gateway that holds the spool."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING

import httpx

from tests.support.programs import Site, run

if TYPE_CHECKING:
    from pathlib import Path


def publish(port: int, topic: bytes, payload: bytes) -> None:
    """One QoS 1 publish over MQTT 3.1.1, written out by hand."""
    body = len(topic).to_bytes(2, "big") + topic + b"\x00\x01" + payload
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x3c\x00\x01d")
        assert connection.recv(4) == b"\x20\x02\x00\x00"
        connection.sendall(b"\x32" + bytes([len(body)]) + body)
        assert connection.recv(4) == b"\x40\x02\x00\x01"


def test_a_publish_that_fits_the_new_topic_template_becomes_a_reading_without_a_stop(tmp_path: Path):
    site = Site(tmp_path, "postgresql://127.0.0.1:1/none")
    config = tmp_path / "gateway.toml"
    try:
        site.gateway.start()
        publish(site.broker_port, b"plant/pump-1/bar", b'{"value": 2.5, "ts": 1700000000000000}')
        publish(site.broker_port, b"plant/pump-1/bar", b"not json")
        assert site.gateway.stop() == 0
        config.write_text(
            config.read_text().replace(
                "[ingress.listen]\n", '[ingress.listen]\ntopic = "plant/{sensor_id}/{sensor_type}"\n'
            )
        )
        site.gateway.start()
        publish(site.broker_port, b"plant/pump-2/bar", b'{"value": 1, "ts": 1700000000000000}')
        done = run("spool", "quarantine", "retry", "--config", str(config), "--all", "--json")
        assert done.returncode == 1, done.stderr
        result = json.loads(done.stdout)
        assert (result["items"], result["stored"]) == (1, 1)
        assert [
            number for number, _ in ((left["quarantine_no"], left["why"]) for left in result["left"])
        ] == [2]
        again = run("spool", "quarantine", "retry", "--config", str(config), "1")
        assert "there is no such item" in again.stdout
        read = run("spool", "read", "--config", str(config), "--json")
        assert read.stdout.count('"sensor_id"') == 2, read.stdout + read.stderr
        url = f"http://127.0.0.1:{site.status_port}/quarantine/retry"
        assert httpx.post(url, content=b"numbers=1", trust_env=False).status_code == 415
        assert httpx.post(url, json={"numbers": "x"}, trust_env=False).status_code == 400
    finally:
        site.close()
