"""The status page in a real browser: what a person sees, by eye, by keyboard, by screen reader."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

from gateway.humanize import format_bytes, format_count, format_duration
from tests.support import browser
from tests.support.free_ports import free_port
from tests.support.programs import Program, run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.browser import Page

AXE = Path(__file__).parents[1] / "axe" / "node_modules" / "axe-core" / "axe.min.js"
PICTURES = os.environ.get("TIDEGATE_PICTURES")
"""A folder to leave pictures in, for whoever wants to look."""

HOSTILE = '<img src=x onerror="pwned=1">\u202e<script>pwned=1</script>'
LONG = "a-sensor-with-a-name-that-never-seems-to-end-" * 4
EVERY_SIZE = [(1200, 900), (390, 844), (320, 640)]


class Site:
    """A gateway with a destination that takes everything and one that is away."""

    def __init__(self, folder: Path) -> None:
        self.port, self.mqtt_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}/"
        self.config = folder / "gateway.toml"
        (folder / "token").write_text("t\n")
        self.config.write_text(
            f'gateway_id = "barn-1"\n[spool]\npath = "spool.db"\n[ingress.listen]\nport = {self.mqtt_port}\n'
            "[ingress.host]\nenabled = false\n"
            f'[status]\nport = {self.port}\ntokens_file = "tokens"\nsilent_after_s = 1\n'
            '[[destinations]]\nname = "stick"\nkind = "file"\ndirectory = "files"\nmin_free_bytes = 0\n'
            f'[[destinations]]\nname = "region"\nkind = "ingest"\nurl = "http://127.0.0.1:{free_port()}"\n'
            'token_file = "token"\nflush_s = 0.1\n'
        )
        self.token = run("token", "add", "anna", "--config", str(self.config)).stdout.strip()
        self.program = Program(
            folder, "gateway", "gateway", "-c", str(self.config), ready_url=f"{self.url}readyz"
        )

    def publish(self, *readings: tuple[str, bytes]) -> None:
        """QoS 1 publishes over MQTT 3.1.1 to sensors/ID/TYPE, acknowledged when this returns."""
        with socket.create_connection(("127.0.0.1", self.mqtt_port), timeout=5) as connection:
            connection.sendall(b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x3c\x00\x01d")
            assert connection.recv(4) == b"\x20\x02\x00\x00"
            for number, (name, payload) in enumerate(readings, start=1):
                topic = f"sensors/{name}".encode()
                body = len(topic).to_bytes(2) + topic + number.to_bytes(2) + payload
                connection.sendall(b"\x32" + _length(len(body)) + body)
            waiting = 4 * len(readings)
            while waiting:
                waiting -= len(connection.recv(waiting))


def _length(size: int) -> bytes:
    return bytes([size]) if size < 128 else bytes([size % 128 | 0x80]) + _length(size // 128)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if browser.EXECUTABLE is None:
        pytest.skip("chromium is not installed")
    with browser.chromium(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("page"))
    made.program.start()
    yield made
    made.program.kill()


@pytest.fixture(scope="module")
def filled(site: Site) -> Site:
    """The site with a day of a series, hostile and endless names, and something in quarantine."""
    now_s = time.time()
    day = [
        {"value": 20 + n % 7 + 90 * (n == 100), "ts": int(now_s) - 86_400 + 300 + n * 600, "unit": "°C"}
        for n in range(140)
        if not 60 < n < 80
    ]
    site.publish(
        ("stall-1/temperature", json.dumps(day).encode()),
        ("stall-1/humidity", b'{"value": 60, "unit": "%"}'),
        ("stall-1/pressure", b'{"value": 101325.25, "unit": "Pa"}'),
        (f"{HOSTILE.replace('/', '')}/t", b'{"value": 1, "unit": "<b>K</b>"}'),
        (f"{LONG}/{LONG[:60]}", b'{"value": 1}'),
        ("stall-2/temperature", b"<script>pwned=1</script>"),
        (f"{HOSTILE}/t", b'{"value": 1}'),
    )
    return site


def opened(
    page: Page,
    site: Site,
    *,
    width: int = 1200,
    height: int = 900,
    scheme: Literal["light", "dark"] = "light",
    motion: Literal["reduce", "no-preference"] = "no-preference",
    series: str = "",
) -> None:
    """The page with its first document shown and its chart drawn."""
    page.complaints.clear()
    page.requests.clear()
    page.look(width=width, height=height, scheme=scheme, motion=motion)
    page.open(site.url + series)
    page.wait_until("document.querySelector('main').getAttribute('aria-busy') === 'false'")
    page.wait_until("document.querySelector('#chart svg, #chart .empty') !== null")


def chosen(sensor_id: str, sensor_type: str) -> str:
    return f"#sensor_id={sensor_id}&sensor_type={sensor_type}"


def violations(page: Page) -> list[Any]:
    """The rules of accessibility that the page breaks, and where."""
    if not AXE.exists():
        pytest.skip("axe-core is not installed (npm ci --prefix tests/axe)")
    page.evaluate(AXE.read_text(encoding="utf-8"))
    rules = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
    found: list[Any] = page.evaluate(
        f"axe.run(document, {{runOnly: {json.dumps(rules)}}}).then(r => r.violations.map("
        "v => [v.id, v.nodes.map(n => n.target.join(' ') + ': ' + n.failureSummary)]))"
    )
    return found


def picture(page: Page, name: str) -> None:
    if PICTURES:
        page.picture(Path(PICTURES) / f"{name}.png")


def test_an_empty_gateway_says_what_will_be_where(page: Page, site: Site):
    opened(page, site)
    assert "No device has sent a reading yet." in page.text("#remarks")
    assert "No alerts." in page.text("#alerts")
    assert "No losses" in page.text("#losses")
    assert "Empty" in page.text("#quarantine")
    assert "a day of any series is drawn here" in page.text("#chart")
    assert "NaN" not in page.text("body")
    assert "undefined" not in page.text("body")
    picture(page, "empty")
    assert page.complaints == []


def test_figures_are_those_of_the_document(page: Page, filled: Site):
    opened(page, filled)
    page.wait_until("document.querySelector('#destinations').innerText.includes('retrying')")
    shown = page.text("#destinations")
    region = page.evaluate("fetch('/status').then(a => a.json())")["destinations"]
    waiting = next(d["backlog_readings"] for d in region if d["name"] == "region")
    assert waiting > 100
    assert f"Backlog\n{waiting}\nreadings" in shown
    assert " of 3" in page.text("#in")
    page.wait_until("document.querySelector('#quarantine').innerText.includes('not json')")
    assert "unknown topic" in page.text("#quarantine")
    assert page.complaints == []


@pytest.mark.parametrize("width", [320, 1200])
@pytest.mark.parametrize("sensor_type", ["temperature", "pressure"])
def test_no_label_of_the_chart_is_cut_off(page: Page, filled: Site, sensor_type: str, width: int):
    opened(page, filled, width=width, series=chosen("stall-1", sensor_type))
    page.wait_until("document.querySelectorAll('#chart svg text').length > 2")
    cut = page.evaluate(
        "(() => { const svg = document.querySelector('#chart svg'), box = svg.getBoundingClientRect(); "
        "return [...svg.querySelectorAll('text')].filter(t => { const b = t.getBoundingClientRect(); "
        "return b.left < box.left || b.right > box.right || b.top < box.top || b.bottom > box.bottom; })"
        ".map(t => t.textContent); })()"
    )
    picture(page, f"labels-{sensor_type}-{width}")
    assert cut == []


def test_nothing_is_asked_of_any_other_host_or_stored_in_the_browser(page: Page, filled: Site):
    opened(page, filled)
    assert {request for request in page.requests if not request.startswith((filled.url, "about:"))} == set()
    assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0


def test_the_page_lives_without_being_loaded_again(page: Page, filled: Site):
    opened(page, filled)
    page.evaluate("document.body.dataset.mine = '1'")
    before = page.text("#in")
    filled.publish(*((f"new-{n}/t", b'{"value": 1}') for n in range(50)))
    page.wait_until(f"document.querySelector('#in').innerText !== {json.dumps(before)}")
    assert "Live" in page.text("#live")
    assert page.evaluate("document.body.dataset.mine") == "1"


def test_what_devices_call_themselves_stays_text(page: Page, filled: Site):
    opened(page, filled)
    page.evaluate("document.querySelector('#pick').click()")
    page.wait_until("document.querySelectorAll('#picks li').length > 3")
    page.wait_until("document.querySelector('#silent').innerText.includes('<img src=x')", 15)
    assert "\\u202e<script>pwned=1<script>" in page.text("#picks"), "the text runs in its own direction"
    assert "<b>K</b>" in page.text("#picks")
    assert page.evaluate("typeof pwned") == "undefined"
    assert page.evaluate("document.querySelectorAll('main img, main script, main b b, #picks b').length") == 0
    name = next(
        s["sensor_id"] for s in page.evaluate("fetch('/series?match=onerror').then(a => a.json())")["series"]
    )
    opened(
        page,
        filled,
        series=page.evaluate(
            f"'#' + new URLSearchParams({{sensor_id: {json.dumps(name)}, sensor_type: 't'}})"
        ),
    )
    assert "<b>K</b>" in page.text("#chart")
    assert page.evaluate("typeof pwned") == "undefined"
    assert page.complaints == []


def test_an_injected_script_would_not_run(page: Page, filled: Site):
    opened(page, filled)
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'pwned = 1'}))"
    )
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"pwned = 1\">')")
    assert page.evaluate("new Promise(r => setTimeout(() => r(typeof pwned), 200))") == "undefined"
    assert any("Content Security Policy" in complaint for complaint in page.complaints)


def test_a_series_is_chosen_and_read_out_by_keyboard_alone(page: Page, filled: Site):
    opened(page, filled)
    focused = "document.activeElement.id || document.activeElement.className || document.activeElement.href"
    page.press("Tab")
    assert page.evaluate(focused) == "skip"
    page.press("Enter")
    assert page.evaluate(focused) == "main"
    for _ in range(6):
        page.press("Tab")
        if page.evaluate(focused) == "pick":
            break
    assert page.evaluate(focused) == "pick"
    page.type("stall-1/t")
    page.wait_until("document.querySelectorAll('#picks [role=option]').length === 1")
    page.press("ArrowDown")
    assert page.evaluate("document.querySelector('#pick').getAttribute('aria-activedescendant')") == "pick-0"
    page.press("Enter")
    page.wait_until("document.querySelector('#chart-words')?.innerText.includes('°C')")
    assert page.evaluate("document.querySelector('#pick').value") == "stall-1 / temperature"
    assert page.evaluate("document.querySelector('#pick').getAttribute('aria-expanded')") == "false"
    page.press("Tab")
    assert page.evaluate(focused) == "earlier"
    page.press("Tab")
    assert page.evaluate("document.activeElement.type") == "range"
    said = "document.activeElement.getAttribute('aria-valuetext')"
    newest = page.evaluate(said)
    page.press("ArrowLeft")
    assert page.evaluate(said) != newest
    assert page.evaluate(said).split(", ")[-2].endswith("°C") or "°C" in page.evaluate(said)
    page.press("Home")
    assert page.text("#chart-words").split(": ")[0] in page.evaluate(said)
    page.press("Tab", shift=True)
    assert page.evaluate(focused) == "earlier"
    page.press("Enter")
    page.wait_until("!document.querySelector('#later').disabled")
    page.wait_until("document.querySelector('#chart').innerText.length > 0")
    assert page.complaints == []


def test_escape_leaves_the_chosen_series_as_it_was(page: Page, filled: Site):
    opened(page, filled, series=chosen("stall-1", "humidity"))
    page.evaluate("document.querySelector('#pick').focus()")
    page.type("nothing is called so")
    page.wait_until("document.querySelector('#picks').innerText.includes('No series')")
    page.press("Escape")
    assert page.evaluate("document.querySelector('#picks').hidden")
    assert page.evaluate("document.querySelector('#pick').value") == "stall-1 / humidity"


def test_a_gap_in_the_readings_is_a_gap_in_the_line(page: Page, filled: Site):
    opened(page, filled, series=chosen("stall-1", "temperature"))
    assert page.evaluate("document.querySelectorAll('#chart .mean').length") == 2
    assert page.evaluate("document.querySelectorAll('#chart .flagged').length") > 0
    picture(page, "chart")


@pytest.mark.parametrize(("width", "height"), EVERY_SIZE)
def test_nothing_runs_out_of_the_window(page: Page, filled: Site, width: int, height: int):
    opened(page, filled, width=width, height=height, series=chosen("stall-1", "temperature"))
    page.wait_until(f"document.querySelector('#silent').innerText.includes({json.dumps(LONG[:30])})", 15)
    wide = """[...document.querySelectorAll('body *')]
        .filter(e => !e.closest('.scroll, .skip, .unseen'))
        .filter(e => e.getBoundingClientRect().right > innerWidth + 1)
        .map(e => e.tagName + '.' + e.className)"""
    assert page.evaluate(wide) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    small = """[...document.querySelectorAll('main button, main input')]
        .filter(e => !e.hidden && e.getBoundingClientRect().height < 24).length"""
    assert page.evaluate(small) == 0, "targets are large enough for a finger"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), EVERY_SIZE[:2])
def test_no_rule_of_accessibility_is_broken(
    page: Page, filled: Site, scheme: Literal["light", "dark"], width: int, height: int
):
    opened(page, filled, width=width, height=height, scheme=scheme, series=chosen("stall-1", "temperature"))
    picture(page, f"page-{scheme}-{width}")
    assert violations(page) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_each_scheme_has_its_own_ground(page: Page, filled: Site, scheme: Literal["light", "dark"]):
    opened(page, filled, scheme=scheme)
    ground = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    lightness = sum(int(part) for part in ground.removeprefix("rgb(").rstrip(")").split(",")) / 3
    assert (lightness > 200) == (scheme == "light")


def test_a_screen_reader_meets_nothing_without_a_name(page: Page, filled: Site):
    opened(page, filled, series=chosen("stall-1", "temperature"))
    nodes = page.accessibility_tree()
    nameless = [n for n in nodes if n["focusable"] and not n["name"] and n["role"] != "main"]
    assert nameless == []
    named = {(n["role"], n["name"]) for n in nodes}
    for wanted in (
        ("heading", "barn-1"),
        ("region", "Ingress"),
        ("region", "Delivery"),
        ("combobox", "Series"),
        ("slider", "Moment"),
        ("button", "A day earlier"),
        ("columnheader", "Last heard"),
    ):
        assert wanted in named, wanted
    chart = next(n for n in nodes if n["role"] == "image" and "°C" in n["name"])
    assert "readings" in chart["name"]


def test_nothing_moves_for_whoever_asked_for_stillness(page: Page, filled: Site):
    opened(page, filled)
    assert page.evaluate("document.getAnimations().length") > 0
    opened(page, filled, motion="reduce")
    assert page.evaluate("document.getAnimations().length") == 0


def test_numbers_read_as_in_the_terminal(page: Page, filled: Site):
    opened(page, filled)
    for name, text_of, numbers in (
        ("count", format_count, [0, 1, 0.26, 12.34, 999, 1234, 99_999, 100_000, 1_234_567, 5.5e9, 123.4]),
        ("bytes", format_bytes, [0, 1, 999, 1000, 1234, 1_234_567, 9.99e9, 5e12]),
        ("duration", format_duration, [0, 1, 59, 60, 61, 3600, 93_784, 86_400 * 400, 4e9]),
    ):
        js = page.evaluate(f"import('/page/words.js').then(w => {json.dumps(numbers)}.map(n => w.{name}(n)))")
        assert js == [text_of(number) for number in numbers], name


def test_whoever_comes_from_elsewhere_signs_in_and_out(page: Page, filled: Site):
    try:
        page.ask("Network.setExtraHTTPHeaders", headers={"X-Forwarded-For": "192.0.2.7"})
        page.look()
        page.open(filled.url)
        page.wait_until("document.activeElement.id === 'token'")
        assert violations(page) == []
        picture(page, "sign-in")
        page.type("wrong")
        page.press("Enter")
        page.wait_until("document.querySelector('[role=alert]') !== null")
        page.evaluate("document.querySelector('#token').focus()")
        page.type(filled.token)
        page.press("Enter")
        page.wait_until("document.querySelector('#rate') !== null")
        page.wait_until("document.querySelector('main').getAttribute('aria-busy') === 'false'")
        assert page.evaluate("document.cookie") == "", "scripts do not see the token"
        page.evaluate("document.querySelector('#sign-out button').click()")
        page.wait_until("document.querySelector('#token') !== null")
    finally:
        page.ask("Network.setExtraHTTPHeaders", headers={})


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 390)])
def test_what_alerts_is_first_with_its_severity_in_words_and_what_is_over_comes_after(
    page: Page, filled: Site, scheme: Literal["light", "dark"], width: int
):
    filled.publish(
        ("kiln/temperature", b'{"value": 46.5}'),
        ("door-2/contact", b'{"value": 1, "battery_level": 5}'),
        ("oven/temperature", b'{"value": 41}'),
        ("oven/temperature", b'{"value": 21}'),
    )
    opened(page, filled, scheme=scheme, width=width)
    page.wait_until("document.querySelector('#alerts').innerText.includes('value is back at 21')")
    rows = page.evaluate("[...document.querySelectorAll('#alerts tbody tr')].map(r => r.innerText)")
    firing = [row for row in rows if "resolved" not in row.split()[0].lower()]
    assert rows[: len(firing)] == firing
    assert [row.split()[0].lower() for row in firing] == ["critical", "warning"]
    assert any("critical kiln/temperature" in row.lower() and "46.5 is above 35" in row for row in firing)
    assert any("warning door-2/contact" in row.lower() and "5 is below 20" in row for row in firing)
    assert any("resolved oven/temperature" in row.lower() for row in rows[len(firing) :])
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    picture(page, f"alerts-{scheme}-{width}")
    assert violations(page) == []


def test_a_gateway_that_is_gone_is_said_to_be_and_comes_back_by_itself(page: Page, filled: Site):
    opened(page, filled)
    assert filled.program.stop() == 0
    page.wait_until("document.querySelector('#live').dataset.state === 'lost'")
    assert "No answer since" in page.text("#live")
    assert "No answer" in page.evaluate("document.querySelector('#announcement').textContent")
    with closing(sqlite3.connect(filled.config.with_name("spool.db"))) as spool, spool:
        spool.execute(
            "INSERT INTO loss VALUES ('region', 4, 900, 901, 4242, ?, ?, 'no_room', 'rollup 60 s', ?)",
            [time.time_ns() // 1000] * 3,
        )
    filled.program.start()
    page.wait_until("document.querySelector('#live').dataset.state === 'live'")
    page.wait_until("document.querySelector('#losses').innerText.includes('4,242')")
    assert "readings for region" in page.text("#losses")
    assert "no room; kept as rollup 60 s" in page.text("#losses")
    assert "4,242 readings were discarded" in page.text("#remarks")
