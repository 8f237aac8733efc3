"""The metrics, the alert rules and the dashboard, each against the real thing."""

from __future__ import annotations

import http.server
import json
import re
import socket
import subprocess
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from cloud_sync.http.requests import RequestAdmission, RequestLimits
from cloud_sync.ingest.app import IngestMetrics
from cloud_sync.ingest.apply_queue import ApplyQueue
from gateway.status.metrics import METRICS
from tests.support.free_ports import free_port
from tests.support.programs import Program, run, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.fixtures_prometheus import Prometheus

ROOT = Path(__file__).parents[2]
RULES = ROOT / "config" / "prometheus" / "alerts.yml"
DASHBOARD = ROOT / "config" / "grafana" / "tidegate.json"
SCRAPES = 4
NOT_ALWAYS = ("tidegate_backlog_drain_seconds",)
"""What is absent while there is nothing to tell."""


class Site:
    """A gateway with a destination that works, one that does not, a wrong publish and a protocol fault."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, mqtt_port = folder, free_port(), free_port()
        config = folder / "gateway.toml"
        (folder / "token").write_text("t\n")
        config.write_text(
            f'gateway_id = "gw-1"\n[spool]\npath = "spool.db"\nflash_endurance_tb = 10\n'
            f"[ingress.listen]\nport = {mqtt_port}\n[ingress.host]\nperiod_s = 0.2\n"
            f'[status]\nport = {self.port}\ntokens_file = "tokens"\n'
            '[[destinations]]\nname = "stick"\nkind = "file"\ndirectory = "files"\nmin_free_bytes = 0\n'
            f'[[destinations]]\nname = "region"\nkind = "ingest"\nurl = "http://127.0.0.1:{free_port()}"\n'
            'token_file = "token"\nflush_s = 0.1\n'
        )
        self.token = run("token", "add", "prometheus", "--config", str(config)).stdout.strip()
        self.program = Program(
            folder, "gateway", "gateway", "-c", str(config), ready_url=f"http://127.0.0.1:{self.port}/readyz"
        )
        self.program.start()
        with socket.create_connection(("127.0.0.1", mqtt_port), timeout=5) as connection:
            connection.sendall(b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x3c\x00\x01d")
            assert connection.recv(4) == b"\x20\x02\x00\x00"
            connection.sendall(b"\x32\x0a\x00\x05a/b/c\x00\x01x" + b"\x00\x00")
            connection.recv(16)

    def metrics(self) -> str:
        return httpx.get(f"http://127.0.0.1:{self.port}/metrics", timeout=5, trust_env=False).text


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("metrics"))
    yield made
    made.program.kill()


@pytest.fixture(scope="module")
def ingest_page() -> Iterator[str]:
    """An ingest service's page of metrics, served by itself; yields host:port."""
    metrics = IngestMetrics(RequestAdmission(RequestLimits()), ApplyQueue(1))
    metrics.database_up.set(1)
    metrics.rejections.labels("other_gateway").inc()
    metrics.apply_seconds.observe(0.2)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(generate_latest(metrics.registry))

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the parent's signature
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def prometheus(site: Site, ingest_page: str, start_prometheus: Callable[..., Prometheus]) -> Prometheus:
    """Has scraped each target several times."""
    started = start_prometheus(
        {"tidegate": f"localhost:{site.port}", "tidegate-ingest": ingest_page}, token=site.token
    )

    def scraped(job: str) -> bool:
        return bool(started.query(f'count_over_time(up{{job="{job}"}}[1m]) >= {SCRAPES}'))

    for job in ("tidegate", "tidegate-ingest"):
        wait_until(partial(scraped, job), 30)
    assert all(result["value"][1] == "1" for result in started.query("up"))
    return started


def test_what_is_exposed_is_what_is_documented(site: Site):
    families = {family.name: family for family in text_string_to_metric_families(site.metrics())}
    told = {metric.name.removesuffix("_total"): metric for metric in METRICS}
    assert {name for name in families if name.startswith("tidegate")} == set(told)
    for name, metric in told.items():
        assert (families[name].type, families[name].documentation) == (metric.kind, metric.help)
        for sample in families[name].samples:
            assert set(sample.labels) == set(metric.labels), sample
    assert "process_resident_memory_bytes" in families


def test_the_number_of_time_series_does_not_grow_with_devices(site: Site):
    count = sum(len(f.samples) for f in text_string_to_metric_families(site.metrics()))
    assert count < 200
    assert "cpu_percent" not in site.metrics()


def test_metrics_agree_with_the_status_document(site: Site):
    wait_until(lambda: "tidegate_readings_total 0" not in site.metrics(), 10)
    before, text = status(site), site.metrics()
    samples = {
        (s.name, *sorted(s.labels.values())): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }
    told = samples["tidegate_readings_total",]
    assert before["ingress"]["readings"] <= told
    wait_until(lambda: status(site)["ingress"]["readings"] >= told, 5)
    assert samples["tidegate_destination_failing", "stick"] == 0
    wait_until(lambda: 'tidegate_destination_failing{destination="region"} 1.0' in site.metrics(), 10)
    assert samples["tidegate_quarantine_items", "unknown_topic"] == 1


def status(site: Site) -> dict:
    return httpx.get(f"http://127.0.0.1:{site.port}/status", timeout=5, trust_env=False).json()


def test_a_real_prometheus_takes_every_metric(prometheus: Prometheus):
    names = {result["metric"]["__name__"] for result in prometheus.query('{__name__=~"tidegate.*"}')}
    for metric in METRICS:
        exposed = f"{metric.name}_count" if metric.kind == "summary" else metric.name
        if metric.labels != ("reason",) and metric.name not in (
            *NOT_ALWAYS,
            "tidegate_flash_left_seconds",
            "tidegate_spool_room_seconds",
        ):
            assert exposed in names, exposed


def expressions_of_rules() -> list[str]:
    text = re.sub(r"\n\s{10,}", " ", RULES.read_text(encoding="utf-8"))
    return [expression.removeprefix(">- ").strip() for expression in re.findall(r"expr: (.+)", text)]


def test_every_alert_rule_asks_for_something_that_exists(prometheus: Prometheus):
    expressions = expressions_of_rules()
    assert len(expressions) == RULES.read_text(encoding="utf-8").count("- alert:")
    for expression in expressions:
        prometheus.query(expression)
        for name in set(re.findall(r"tidegate_\w+", expression)):
            assert prometheus.query(f"count({name})") or name == "tidegate_flash_left_seconds", name


def test_every_panel_of_the_dashboard_shows_something(prometheus: Prometheus):
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    targets = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(targets) > 20
    for expression in targets:
        filled = expression.replace("$__rate_interval", "1m").replace("$instance", ".*")
        assert "$" not in filled
        found = prometheus.query(filled)
        if not any(name in expression for name in NOT_ALWAYS) and "refusals" not in expression:
            assert found, filled
            assert all(result["value"][1] != "NaN" for result in found), filled


def test_panels_do_not_lie_on_each_other():
    cells: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        own = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & own, panel["title"]
        cells |= own


def test_each_alert_fires_when_it_should_and_not_otherwise(promtool: str):
    for arguments in (
        ("check", "rules", str(RULES)),
        ("test", "rules", str(ROOT / "tests" / "prometheus" / "alerts_test.yml")),
    ):
        done = subprocess.run([promtool, *arguments], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_test_and_says_what_it_means():
    rules = RULES.read_text(encoding="utf-8")
    tested = (ROOT / "tests" / "prometheus" / "alerts_test.yml").read_text(encoding="utf-8")
    names = re.findall(r"- alert: (\w+)", rules)
    assert [name for name in names if f"- name: {name}\n" not in tested] == []
    assert rules.count("summary:") == rules.count("description:") == rules.count("severity:") == len(names)
