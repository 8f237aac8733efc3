"""InfluxDB's answers are read as rows, with a token where one is needed, and its errors are told in words."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from firmware_sim.errors import SimError
from firmware_sim.ground_truth import GroundTruthWriter, SeriesState, load_ground_truth
from firmware_sim.verify import databases
from firmware_sim.verify.comparison import compare_readings

AT_US = 1_767_225_600_000_001


class Answering(HTTPServer):
    answer: list[dict] = []  # noqa: RUF012 - set anew by each test


@pytest.fixture
def server():
    """Answers every query with what `answer` says, when the token is right."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            right = self.headers.get("Authorization") == "Token t0p"
            body = b"".join(
                json.dumps(a).encode() + b"\n"
                for a in (made.answer if right else [{"error": "unauthorized"}])
            )
            self.send_response(200 if right else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            """Quiet."""

    made = Answering(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture
def truth(tmp_path):
    with GroundTruthWriter(tmp_path, "a", {}) as writer:
        state = writer.state(SeriesState("s1", "temperature", ("degC", None, None, "1.0")))
        for n in range(3):
            writer.produce(state, AT_US + n, 20.5 + n, 97.0, 80.0, -60.0, n)
        writer.settle(0, 3, 0, 0)
    return load_ground_truth(tmp_path)


def fetch(server, truth, token="t0p"):
    url = f"http://127.0.0.1:{server.server_port}"
    return databases.fetch_influx_rows(url, "db", truth, on_rows=lambda _: None, token=token)


def test_chunks_of_a_series_are_put_together(server, truth):
    columns = ["time", "battery_level", "flags", "quality", "seq", "signal_strength", "value"]
    tags = {"sensor_id": "s1", "unit": "degC", "firmware_version": "1.0"}
    server.answer = [
        {
            "results": [
                {"series": [{"name": "temperature", "tags": tags, "columns": columns, "values": values}]}
            ]
        }
        for values in (
            [[AT_US, 80, 32, 97, 0, -60, 20.5], [AT_US + 1, 80, None, 97, 1, -60, 21.5]],
            [[AT_US + 2, 80, None, 97, 2, -60, 22.5]],
        )
    ]
    found = compare_readings(truth, fetch(server, truth))
    assert (found.clean, found.matched, found.late) == (True, 3, 1)


def test_a_wrong_token_is_said(server, truth):
    with pytest.raises(SimError, match="unauthorized"):
        fetch(server, truth, token="other")
