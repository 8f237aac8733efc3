"""What people and programs depend on, frozen: the form of every answer, not its values.

commands.txt and http.txt are scripts as well: a line with brackets is a command or a request; in the brackets
is its exit code or status, below it the form of its answer. TIDEGATE_REWRITE_GOLDEN=1 writes all files again.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shlex
from collections import Counter, defaultdict
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from tests.support.commands import Commands
from tests.support.fixtures_postgres import fresh_database
from tests.support.world import World

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from httpx import Response

    from tests.support.fixtures_postgres import LocalPostgres

HERE = Path(__file__).parent
REWRITE = "TIDEGATE_REWRITE_GOLDEN"

MAPPINGS = {"refused", "protocol_faults", "closed", "rejections", "faults", "refused_filters", "lanes"}
MAPPINGS |= {"backlog", "flagged", "examples"}
"""Objects whose keys are data."""
MAYBE = {"disk": "string"} | dict.fromkeys(
    (
        *("room_days", "backlog_oldest_s", "oldest_written_at_us", "drain_s", "last_receipt_at_us"),
        *("last_sent_at_us", "years_left", "amplification", "written_bytes", "written_bytes_per_day"),
        *("disk_written_bytes", "disk_written_bytes_per_day"),
    ),
    "number",
)
"""What is null as long as nothing was measured, or where a machine does not tell."""
LITERAL = frozenset({"error", "status", "rejected[].reason"})
"""Texts of HTTP answers that programs compare."""
HEADERS = ("allow", "location", "retry-after", "www-authenticate")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def dsn(postgres_server: LocalPostgres) -> AsyncIterator[str]:
    async with fresh_database(postgres_server.dsn()) as name:
        yield name


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, dsn: str) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("world"), dsn)
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    running = Commands()
    yield running
    running.close()


def test_commands_end_with_the_same_codes_and_print_the_same_keys(commands: Commands, world: World):
    def answer(words: list[str]) -> tuple[int, list[str], str]:
        *words, given = words if words[-1].startswith("<") else (*words, "<" + os.devnull)
        told = [world.words.get(word, word) for word in words]
        done = commands.run(told, world.folder, given.removeprefix("<"))
        if (documents := documents_in(done.out)) is not None:
            return done.code, form(documents), done.err
        header = done.out.splitlines()[:1] if "csv" in words else []
        return done.code, [f"csv: {names}" for names in header], done.err

    same(*played("commands.txt", answer))


def test_http_answers_have_the_same_codes_and_keys(world: World):
    def answer(words: list[str]) -> tuple[int, list[str], str]:
        got = world.ask(*words)
        return got.status_code, list(told_of(got)), got.text

    same(*played("http.txt", answer))


def test_metrics_have_the_same_names_types_and_labels(world: World):
    lines = []
    for server in ("endpoint", "region"):
        page = world.ask(server, "GET", "/metrics").text
        labels: dict[str, set[str]] = defaultdict(set)
        for name, of in re.findall(r"^(\w+?)(?:_bucket)?\{(.*)\}", page, re.MULTILINE):
            labels[name] |= set(re.findall(r'(\w+)="', of))
        for name, kind in re.findall(r"^# TYPE (\w+) (\w+)", page, re.MULTILINE):
            lines.append(" ".join([server, name, kind, *sorted(labels[name])]))
    same("metrics.txt", sorted(lines))


def test_options_of_every_command_have_the_same_names(commands: Commands):
    lines = []
    for words, text in commands.helps.items():
        lines.append(f"tidegate {' '.join(words)}".rstrip())
        lines += [f"    {entry}" for entry in entries_in(text)]
    same("options.txt", lines)


def test_configuration_keys_have_the_same_types_and_defaults(commands: Commands, tmp_path: Path):
    keys = json.loads(commands.run(["config", "explain", "--json"], tmp_path).out)
    lines = []
    for key in keys:
        default = "required" if key["required"] else f"= {json.dumps(key['default'])}"
        told = [key["key"], ",".join(key["kinds"]), key["type"], key["allowed"], default]
        told += [key["change"], key["environment"] or ""]
        lines.append(" | ".join(told))
    same("config_keys.txt", lines)


def played(
    name: str, answer: Callable[[list[str]], tuple[int, list[str], str]]
) -> tuple[str, list[str], dict[str, str]]:
    """A script with what is answered now, and what was said about each line of it."""
    lines: list[str] = []
    said: dict[str, str] = {}
    for line in (HERE / name).read_text().splitlines():
        if command := re.fullmatch(r"\[.*?\] (.*)", line):
            code, below, message = answer(shlex.split(command[1]))
            entry = [f"[{code}] {command[1]}", *(f"    {part}" for part in below)]
            said |= dict.fromkeys(entry, message)
            lines += entry
        elif not line.startswith("    "):
            lines.append(line)
    return name, lines, said


def same(name: str, lines: list[str], said: dict[str, str] | None = None) -> None:
    file = HERE / name
    if os.environ.get(REWRITE):
        file.write_text("\n".join([*lines, ""]))
    told = []
    for line in difflib.unified_diff(file.read_text().splitlines(), lines, name, "now", lineterm="", n=3):
        told.append(line)
        if line.startswith("+["):
            told.append(f"     ({(said or {}).get(line[1:], '').strip()[-500:]})")
    if told:
        pytest.fail("\n".join([*told, f"{REWRITE}=1 takes it over, if it is meant"]), pytrace=False)


def documents_in(text: str) -> list[Any] | None:
    """What a command printed, if that is JSON: one document, or one a line."""
    for parts in ([text], text.splitlines()):
        try:
            return [json.loads(part) for part in parts]
        except ValueError:
            continue
    return None


def told_of(answer: Response) -> Iterator[str]:
    media_type = answer.headers.get("content-type", "")
    for name in HEADERS:
        if name in answer.headers:
            yield f"{name}: {', '.join(sorted(answer.headers[name].split(', ')))}"
    if not answer.content:
        return
    if media_type != "application/json":
        yield media_type or "nothing"
    elif answer.request.url.path == "/openapi.json" and answer.is_success:
        paths = answer.json()["paths"].items()
        yield from (f"{m} {path} {' '.join(d['responses'])}" for path, of in paths for m, d in of.items())
    else:
        yield from form([answer.json()], LITERAL)


def form(documents: list[Any], literal: frozenset[str] = frozenset()) -> list[str]:
    """Each key with its types, one a line; a list as all of its items together, "?" where some lack a key."""
    kinds: dict[str, set[str]] = defaultdict(set)
    seen: Counter[str] = Counter()
    within: dict[str, str] = {}

    def look(value: Any, path: str, name: str) -> None:
        seen[path] += 1
        match value:
            case dict():
                kinds[path].add("object")
                for key, member in value.items():
                    below = f"{path}.{'*' if name in MAPPINGS else key}".removeprefix(".")
                    within[below] = path if name not in MAPPINGS else below
                    look(member, below, key)
            case list():
                kinds[path].add("list")
                for member in value:
                    look(member, path + "[]", name + "[]")
            case str() if path in literal:
                kinds[path].add(json.dumps(value))
            case _:
                kind = _KINDS[type(value)]
                kinds[path] |= {kind, *({"null", MAYBE[name]} if name in MAYBE and kind == "null" else ())}
                kinds[path] |= {"null"} if kind == MAYBE.get(name) else set()

    for document in documents:
        look(document, "", "")
    inner = {re.sub(r"(\[\]|\.?[^.\[]+)$", "", path) for path in kinds} | set(within.values())
    return [
        f"{path or '(all)'}{'?' * (seen[path] < seen[within.get(path, path)])}: {' or '.join(sorted(found))}"
        for path, found in sorted(kinds.items())
        if not (path in inner and found <= {"object", "list"})
    ]


_KINDS = {str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}


def entries_in(text: str) -> Iterator[str]:
    """The names of arguments, options and commands in a help text, with what else is promised about them."""
    for line in re.findall(r"^│ [* ]*(.*?) *│$", text, re.MULTILINE):
        first, *others = re.split(r"  +", line)
        names = [first, *takewhile(lambda name: name.startswith("-"), others)]
        choices = re.findall(r"[<\[](\w+(?:\|\w+)+)[>\]]", " ".join(others[:3]))
        promised = re.findall(r"\[(?:default: .*?|required)\]$", line)
        yield " ".join([*names, *choices, *promised])
