"""The endpoint of a running gateway: what it serves, and to whom."""

from __future__ import annotations

import re
import ssl
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.support.certificates import Authority
from tests.support.free_ports import free_port
from tests.support.programs import Program, run, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ELSEWHERE = {"host": "gateway.example"}


class Gateway:
    """A gateway without destinations that reads its own host metrics."""

    def __init__(self, folder: Path, status: str = "", scheme: str = "http") -> None:
        self.folder, self.port = folder, free_port()
        self.config = folder / "gateway.toml"
        self.config.write_text(
            f'gateway_id = "gw-1"\n[spool]\npath = "spool.db"\n[ingress.listen]\nport = {free_port()}\n'
            f"[ingress.host]\nperiod_s = 0.2\n[status]\nport = {self.port}\n{status}"
        )
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        ready = f"{self.url}/readyz" if scheme == "http" else ""
        self.program = Program(folder, "gateway", "gateway", "-c", str(self.config), ready_url=ready)

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(self.url + path, headers=headers, timeout=10, trust_env=False)

    def post(self, path: str, **keywords: object) -> httpx.Response:
        return httpx.post(self.url + path, timeout=10, trust_env=False, **keywords)  # type: ignore[arg-type]  # passed on


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("endpoint")
    made = Gateway(folder, 'tokens_file = "status.tokens"\n')
    token_for(made, "nobody")
    made.program.start()
    yield made
    made.program.kill()


def token_for(gateway: Gateway, name: str) -> str:
    return run("token", "add", name, "--config", str(gateway.config)).stdout.strip()


def test_the_page_and_everything_it_names_are_served_from_here(gateway: Gateway):
    page = gateway.get("/")
    assert page.status_code == 200
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    named = re.findall(r'(?:src|href)="(/page/[^"]+)"', page.text)
    assert len(named) == 3
    for address in [*named, "/page/chart.js", "/page/words.js", "/page/series.js"]:
        assert gateway.get(address).status_code == 200, address
    assert not re.search(r"\b(?:https?:)?//|\son\w+=|\sstyle=|<script>", page.text)
    assert gateway.get("/page/..%2f__init__.py").status_code == 404
    assert gateway.get("/page/index.html").status_code == 404


def test_the_document_holds_what_the_page_shows(gateway: Gateway):
    wait_until(lambda: gateway.get("/status").json()["ingress"]["readings"] > 0, 10)
    document = gateway.get("/status").json()
    assert document["devices"]["known"] == document["devices"]["heard"] == 1
    assert document["quarantine"] == {"items": 0, "ever": 0, "reasons": []}
    assert document["recent"]["readings_per_s"]
    assert document["wear"]["observed_s"] >= 0
    assert document["spool"]["room_bytes"] > 0
    assert document["remarks"][-1]["text"].startswith("No destination")


def test_a_day_of_a_series_is_drawn_from_what_was_read(gateway: Gateway):
    wait_until(lambda: gateway.get("/status").json()["ingress"]["readings"] > 0, 10)
    named = gateway.get("/series?match=CPU_p").json()
    assert (named["total"], named["series"][0]["sensor_type"]) == (1, "cpu_percent")
    chart = gateway.get("/chart?sensor_id=gw-1&sensor_type=cpu_percent").json()
    assert chart["complete"]
    assert chart["readings"] == sum(chart["count"]) > 0
    assert gateway.get("/chart?sensor_id=gw-1&sensor_type=none").status_code == 404
    for wrong in (
        "sensor_id=gw-1",
        "sensor_id=a&sensor_type=b&until_us=soon",
        "sensor_id=a&sensor_type=b&steps=",
    ):
        assert gateway.get(f"/chart?{wrong}").status_code == 400, wrong
    extreme = (
        "sensor_id=gw-1&sensor_type=cpu_percent&until_us=99999999999999999999&span_us=-5&steps=999999999"
    )
    assert gateway.get(f"/chart?{extreme}").status_code in (200, 400)
    assert gateway.get("/series?limit=x").status_code == 400


@pytest.mark.parametrize("path", ["/", "/status", "/series", "/chart?sensor_id=gw-1&sensor_type=cpu_percent"])
@pytest.mark.parametrize(
    "headers", [ELSEWHERE, {"x-forwarded-for": "127.0.0.1"}, {"forwarded": "for=127.0.0.1"}, {"host": ""}]
)
def test_whoever_is_not_plainly_this_machine_needs_a_token(
    gateway: Gateway, path: str, headers: dict[str, str]
):
    answer = gateway.get(path, **headers)
    assert answer.status_code == 401
    assert "gateway_id" not in answer.text
    assert gateway.get(path, **headers, authorization="Bearer wrong").status_code == 401


def test_a_token_lets_one_look_until_it_is_taken_away(gateway: Gateway):
    token = token_for(gateway, "anna")
    assert gateway.get("/status", **ELSEWHERE, authorization=f"Bearer {token}").status_code == 200
    assert gateway.get("/status", **ELSEWHERE, authorization=f"bearer  {token}").status_code == 200
    assert token not in (gateway.folder / "status.tokens").read_text()
    assert run("token", "list", "--config", str(gateway.config)).stdout.split() == ["nobody", "anna"]
    assert run("token", "remove", "anna", "--config", str(gateway.config)).returncode == 0
    assert gateway.get("/status", **ELSEWHERE, authorization=f"Bearer {token}").status_code == 401
    assert run("token", "remove", "anna", "--config", str(gateway.config)).returncode == 1


def test_signing_in_sets_a_cookie_that_scripts_cannot_read_and_signing_out_takes_it(gateway: Gateway):
    token = token_for(gateway, "berta")
    with httpx.Client(base_url=gateway.url, headers=ELSEWHERE, timeout=10, trust_env=False) as browser:
        asked = browser.get("/")
        assert asked.status_code == 401
        assert 'type="password"' in asked.text
        wrong = browser.post("/sign-in", data={"token": "<script>"})
        assert (wrong.status_code, 'role="alert"' in wrong.text) == (401, True)
        assert "<script>" not in wrong.text
        signed = browser.post("/sign-in", data={"token": token})
        assert (signed.status_code, signed.headers["location"]) == (303, "/")
        assert {"HttpOnly", "SameSite=strict"} <= set(signed.headers["set-cookie"].split("; "))
        name, value = signed.headers["set-cookie"].split(";")[0].split("=", 1)
        cookie = {"cookie": f"{name}={value}"}
        assert browser.get("/status", headers=cookie).status_code == 200
        page = browser.get("/", headers=cookie)
        assert (page.status_code, "Sign out" in page.text) == (200, True)
        gone = browser.post("/sign-out", headers=cookie)
        assert "Max-Age=0" in gone.headers["set-cookie"]
    assert gateway.post("/sign-in", headers=ELSEWHERE, content=b"x" * 100_000).status_code == 401


def test_a_token_changes_nothing(gateway: Gateway):
    bearer = {"authorization": f"Bearer {token_for(gateway, 'carla')}", **ELSEWHERE}
    for path, body in (("/compact", {"all": 1}), ("/quarantine/retry", {"numbers": []})):
        assert gateway.post(path, json=body, headers=bearer).status_code == 403
        assert gateway.post(path, json=body).status_code == 200
    oversized = gateway.post("/quarantine/retry", json={"numbers": [1] * 600_000})
    assert oversized.status_code == 413


def test_probes_are_answered_for_anyone_without_details(gateway: Gateway):
    for path in ("/healthz", "/readyz"):
        answer = gateway.get(path, **ELSEWHERE)
        assert (answer.status_code, answer.json()["status"]) == (200, "ok")


def test_the_endpoint_speaks_tls_and_takes_a_new_certificate_while_it_runs(tmp_path: Path):
    authority = Authority(tmp_path)
    certificate, key = authority.issue("gw-1", "gw-1", "IP:127.0.0.1")
    gateway = Gateway(
        tmp_path, f'tls_cert_file = "{certificate.name}"\ntls_key_file = "{key.name}"\n', scheme="https"
    )
    context = ssl.create_default_context(cafile=authority.certificate)

    def answers() -> bool:
        try:
            return httpx.get(f"{gateway.url}/readyz", verify=context, trust_env=False).is_success
        except httpx.HTTPError:
            return False

    gateway.program.start()
    try:
        wait_until(answers, 15)
        first = ssl.get_server_certificate(("127.0.0.1", gateway.port))
        newer, newer_key = authority.issue("gw-1-b", "gw-1", "IP:127.0.0.1")
        newer.replace(certificate)
        newer_key.replace(key)
        wait_until(lambda: ssl.get_server_certificate(("127.0.0.1", gateway.port)) != first, 15)
        assert answers()
        shown = run("status", "--config", str(gateway.config), "--json")
        assert '"running":true' in shown.stdout, shown.stderr
    finally:
        gateway.program.kill()
