"""How the spool commands name a spool, and how they end: options worded once, and the exit codes."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec
import typer
from rich.console import Console

from cloud_sync.settings_file import SettingsFault
from gateway import settings
from gateway.commands.failures import fail
from gateway.operate.moments import moment_us
from gateway.operate.selection import Selection
from gateway.spool.errors import SpoolError

if TYPE_CHECKING:
    from collections.abc import Iterator

EXIT_FOUND = 1
_PIPE_WIDTH = 240

SpoolArgument = Annotated[
    Path | None, typer.Argument(metavar="[SPOOL]", help="The spool's file. Or name it by --config.")
]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="The gateway's TOML file, which names the spool.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
SeriesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--series",
        metavar="ID/TYPE",
        help="Only these series: exact, or with *, ? and [..]; ID alone is all its types. Repeatable.",
    ),
]
SinceOption = Annotated[
    str | None,
    typer.Option(
        metavar="WHEN", help="Readings from then on: 30min, 6h, 2d (ago), or 2026-05-01T12:00 (UTC)."
    ),
]
UntilOption = Annotated[str | None, typer.Option(metavar="WHEN", help="Readings before then; as --since.")]


class Named(NamedTuple):
    """A spool that was named, with the settings when it was named by them."""

    path: Path
    settings: settings.GatewaySettings | None

    @property
    def gateway_id(self) -> str | None:
        """The gateway's name, where the settings say it."""
        return None if self.settings is None else self.settings.gateway_id


def named(spool: Path | None, config: Path | None) -> Named:
    """The spool a command is about; ends the program when it is not named, or named twice."""
    if (spool is None) == (config is None):
        fail("name the spool: its file, or --config FILE" + ("" if spool is None else ", not both"))
    if spool is not None:
        return Named(spool, None)
    assert config is not None
    try:
        given = settings.load(config)
    except SettingsFault as fault:
        fail(str(fault))
    return Named(given.spool.path, given)


def selection_of(series: list[str] | None, since: str | None, until: str | None) -> Selection:
    """What the options select; ends the program when they cannot be read."""
    now_us = time.time_ns() // 1000
    bounds: dict[str, int | None] = {}
    for option, text in (("--since", since), ("--until", until)):
        try:
            bounds[option] = None if text is None else moment_us(text, now_us=now_us)
        except ValueError as fault:
            fail(f"{option}: {fault}")
    return Selection(bounds["--since"], bounds["--until"], tuple(series or ()))


@contextmanager
def spool_errors() -> Iterator[None]:
    """Spool errors end the program with their message and exit code 2; a closed pipe ends it quietly."""
    try:
        yield
    except SpoolError as fault:
        fail(str(fault))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's flush fails
        raise typer.Exit(0) from None


def print_json(document: object) -> None:
    """Print a document as JSON, ASCII only, so that no text in it can move a terminal."""
    typer.echo(json.dumps(msgspec.to_builtins(document)))


def console() -> Console:
    """Standard output; wide enough not to cut tables when it is no terminal."""
    out = Console(highlight=False, markup=False)
    if not out.is_terminal and "COLUMNS" not in os.environ:
        return Console(highlight=False, markup=False, width=_PIPE_WIDTH)
    return out


def table(*columns: str, right: tuple[str, ...] = ()) -> Any:
    """A table without lines, its cells taken as they are."""
    from rich.table import Table  # noqa: PLC0415 - slow to import, and not needed for --json

    made = Table(box=None, pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made
