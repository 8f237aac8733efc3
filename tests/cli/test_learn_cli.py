"""`tidegate learn`: what is published for a while, as rules of a configuration."""

import os
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from gateway.mqtt.codec.packet_codec import encode_packet
from gateway.mqtt.codec.packets import Connect, Publish
from tests.support.fixtures_mosquitto import mosquitto  # noqa: F401 - a fixture

ROOT = Path(__file__).parents[2]
PUBLISHED = (("plant/a/state", '{"t": 1, "ts": 1780000000}'), ("plant/b/state", '{"t": 2, "ts": 1780000001}'))
CONFIG = 'gateway_id = "g"\n[spool]\npath = "s.db"\n'


def learning(*arguments):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TIDEGATE_")}
    return subprocess.Popen(
        [sys.executable, "-m", "gateway", "learn", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )


def refused(*arguments):
    process = learning(*arguments)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert "Traceback" not in err
    return err


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_what_a_broker_passes_on_becomes_rules_that_are_written(tmp_path, mosquitto):  # noqa: F811 - a fixture
    publisher = shutil.which("mosquitto_pub")
    if publisher is None:
        pytest.skip("needs mosquitto_pub (Debian package mosquitto-clients)")
    config = tmp_path / "gateway.toml"
    config.write_text(CONFIG)
    for topic, payload in PUBLISHED:  # retained: heard however late the command is
        subprocess.run(
            [publisher, "-p", str(mosquitto.port), "-r", "-t", topic, "-m", payload], check=True, timeout=20
        )
    process = learning("--broker", mosquitto.url, "--seconds", 3, "--config", config, "--write")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "2 messages on 2 topics" in err
    assert "# 2 topics: plant/a/state, plant/b/state" in out
    assert "# 2 readings, 0 quarantined" in out
    written = tomllib.loads(config.read_text())
    assert written["gateway_id"] == "g"
    assert written["ingress"]["rule"] == [
        {"topic": "plant/{sensor_id}/state", "format": "fields", "time": "ts"}
    ]
    again = learning("--broker", mosquitto.url, "--seconds", 3, "--config", config, "--write")
    _, err = again.communicate(timeout=60)
    assert "2 topics match existing rules" in err
    assert tomllib.loads(config.read_text()) == written


def test_devices_that_publish_to_it_are_heard_and_not_acknowledged():
    port = free_port()
    process = learning("--listen", f"127.0.0.1:{port}", "--seconds", 6)
    deadline_s = time.monotonic() + 30
    while True:
        try:
            device = socket.create_connection(("127.0.0.1", port), timeout=5)
            break
        except OSError:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
    with device:
        device.sendall(encode_packet(Connect("dev"), 5))
        assert device.recv(100)[:1] == b"\x20"
        for number, (topic, payload) in enumerate(PUBLISHED, 1):
            device.sendall(encode_packet(Publish(topic.encode(), payload.encode(), number, 1), 5))
        out, err = process.communicate(timeout=60)
        rest = device.recv(100)
    assert process.returncode == 0, err
    assert "2 messages on 2 topics" in err
    assert 'topic = "plant/{sensor_id}/state"' in out
    assert not any(byte == 0x40 for byte in rest[:1])  # no PUBACK


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "name where to listen"),
        (("--broker", "mqtt://h", "--listen", "h:1"), "name where to listen"),
        (("--broker", "http://h"), "must be mqtt://"),
        (("--listen", "127.0.0.1:x"), "127.0.0.1:x: "),
        (("--broker", "mqtt://h", "--write"), "--write needs --config"),
        (("--broker", "mqtt://h", "--config", "absent.toml"), "there is no such file"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_message(arguments, words):
    assert words in refused(*arguments)
