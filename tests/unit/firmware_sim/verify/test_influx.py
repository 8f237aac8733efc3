"""InfluxDB's answers are read as rows, with a token where one is needed; a difference is read again."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from typer.testing import CliRunner

from firmware_sim.__main__ import app
from firmware_sim.errors import SimError
from firmware_sim.ground_truth import GroundTruthWriter, Publish, Reading, SeriesState, load_ground_truth
from firmware_sim.verify import databases
from firmware_sim.verify.comparison import LossEvidence, compare_readings

AT_US = 1_767_225_600_000_001


class InfluxServer(HTTPServer):
    answers: list[list[dict]] = []  # noqa: RUF012 - set by each test
    queries = 0


@pytest.fixture
def server():
    """Answers each query with the next of `answers`, then the last again."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            right = self.headers.get("Authorization") == "Token t0p"
            body = b"".join(
                json.dumps(a).encode() + b"\n"
                for a in (made.answers[0] if right else [{"error": "unauthorized"}])
            )
            made.queries += 1
            del made.answers[: len(made.answers) > 1]
            self.send_response(200 if right else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            """Quiet."""

    made = InfluxServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture
def truth(tmp_path):
    with GroundTruthWriter(tmp_path, "a", {}) as writer:
        state = writer.number_state(SeriesState("s1", "temperature", ("degC", None, None, "1.0")))
        for n in range(3):
            writer.append(state, Reading(AT_US + n, 20.5 + n, 97.0, 80.0, -60.0, n))
        writer.settle(Publish("t", b"", 0, 3), 0)
    return load_ground_truth(tmp_path)


def fetch(server, truth, token="t0p"):
    url = f"http://127.0.0.1:{server.server_port}"
    return databases.fetch_influx_rows(url, "db", truth, on_rows=lambda _: None, token=token)


COLUMNS = ["time", "battery_level", "flags", "quality", "seq", "signal_strength", "value"]
TAGS = {"sensor_id": "s1", "unit": "degC", "firmware_version": "1.0"}


def chunk(*values):
    series = {"name": "temperature", "tags": TAGS, "columns": COLUMNS, "values": values}
    return {"results": [{"series": [series]}]}


FIRST = [AT_US, 80, 32, 97, 0, -60, 20.5]
SECOND = [AT_US + 1, 80, None, 97, 1, -60, 21.5]
THIRD = [AT_US + 2, 80, None, 97, 2, -60, 22.5]
HALF_APPLIED = [AT_US + 2, 80, None, None, 2, None, None]
APPLIED = [chunk(FIRST, SECOND), chunk(THIRD)]


def test_chunks_of_a_series_are_put_together(server, truth):
    server.answers = [APPLIED]
    found = compare_readings(truth, fetch(server, truth))
    assert (found.clean, found.matched, found.late) == (True, 3, 1)


def test_a_point_whose_fields_are_still_being_applied_is_read_again(server, truth):
    server.answers = [[chunk(FIRST, SECOND, HALF_APPLIED)]] * 2 + [APPLIED]
    found = databases.compare_settled(lambda: fetch(server, truth), truth, LossEvidence(), pause_s=0)
    assert (found.clean, found.matched, server.queries) == (True, 3, 3)


def test_a_difference_that_stays_is_reported_after_it_has_settled(server, truth):
    lost = [chunk(FIRST, SECOND)]
    server.answers = [[chunk(FIRST)], [chunk(FIRST, HALF_APPLIED)], lost]
    found = databases.compare_settled(lambda: fetch(server, truth), truth, LossEvidence(), pause_s=0)
    assert (found.lost, found.matched, server.queries) == (1, 2, 5)


def test_a_store_that_never_settles_is_not_read_for_ever(server, truth):
    server.answers = [[chunk(FIRST, SECOND)], [chunk(FIRST)]] * 20
    found = databases.compare_settled(lambda: fetch(server, truth), truth, LossEvidence(), pause_s=0)
    assert (found.clean, server.queries) == (False, 11)


def test_verify_reads_a_difference_again(server, truth, tmp_path, monkeypatch):
    monkeypatch.setattr(databases, "REREAD_EVERY_S", 0.0)
    server.answers = [[chunk(FIRST, SECOND, HALF_APPLIED)], APPLIED]
    token_file = tmp_path / "token"
    token_file.write_text("t0p\n")
    url = f"http://127.0.0.1:{server.server_port}"
    words = ["verify", "--truth", str(tmp_path), "--influx", url, "--influx-token-file", str(token_file)]
    done = CliRunner().invoke(app, [*words, "--quiet", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["altered"] == 0


def test_a_wrong_token_is_said(server, truth):
    with pytest.raises(SimError, match="unauthorized"):
        fetch(server, truth, token="other")
