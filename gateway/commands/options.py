"""Options, exit codes, output and the progress bar that commands share."""

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
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from cloud_sync.runtime.settings_file import InvalidSettingsError
from gateway.commands.exit_errors import fail
from gateway.humanize import parse_time_us
from gateway.settings import gateway_settings
from gateway.spool.errors import SpoolError
from gateway.spooltools.reading_selection import ReadingFilter

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


class NamedSpool(NamedTuple):
    """A spool that was named, with the settings when it was named by them."""

    path: Path
    settings: gateway_settings.GatewaySettings | None

    @property
    def gateway_id(self) -> str | None:
        """The gateway's name, where the settings say it."""
        return None if self.settings is None else self.settings.gateway_id


def resolve_spool(spool: Path | None, config: Path | None) -> NamedSpool:
    """The spool a command is about; ends the program when it is not named, or named twice."""
    if (spool is None) == (config is None):
        fail("name the spool: its file, or --config FILE" + ("" if spool is None else ", not both"))
    if spool is not None:
        return NamedSpool(spool, None)
    assert config is not None
    try:
        given = gateway_settings.load_settings(config)
    except InvalidSettingsError as fault:
        fail(str(fault))
    return NamedSpool(given.spool.path, given)


def build_selection(series: list[str] | None, since: str | None, until: str | None) -> ReadingFilter:
    """What the options select; ends the program when they cannot be read."""
    now_us = time.time_ns() // 1000
    bounds: dict[str, int | None] = {}
    for option, text in (("--since", since), ("--until", until)):
        try:
            bounds[option] = None if text is None else parse_time_us(text, now_us=now_us)
        except ValueError as fault:
            fail(f"{option}: {fault}")
    return ReadingFilter(bounds["--since"], bounds["--until"], tuple(series or ()))


@contextmanager
def exit_on_spool_error() -> Iterator[None]:
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


_REFRESH_PER_S = 5


class ProgressBar:
    """A `Watcher` that people see. Until its length is said it only moves."""

    def __init__(self, progress: Progress, title: str) -> None:
        self._progress = progress
        self._task = progress.add_task(title, total=None)

    def name(self, title: str) -> None:
        """Say what is being done."""
        self._progress.update(self._task, description=title)

    def total(self, total: int) -> None:
        """Say how much there is to do."""
        self._progress.update(self._task, total=total)

    def advance(self, done: int = 1) -> None:
        """Say that so much more is done."""
        self._progress.advance(self._task, done)


@contextmanager
def progress_bar(title: str) -> Iterator[ProgressBar]:
    """A bar that is shown while the block runs."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        refresh_per_second=_REFRESH_PER_S,
    ) as progress:
        yield ProgressBar(progress, title)
