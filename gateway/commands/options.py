"""Options, exit codes, output and the progress bar that commands share."""

from __future__ import annotations

import inspect
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from cloud_sync.runtime.secret_files import read_secret
from cloud_sync.runtime.settings_file import InvalidSettingsError
from gateway.commands.exit_errors import fail
from gateway.humanize import parse_time_us
from gateway.settings.gateway_settings import GatewaySettings, load_settings, parse_settings_file
from gateway.spool.database import ProgressListener
from gateway.spool.errors import SpoolError
from gateway.spooltools.reading_selection import ReadingFilter

T = TypeVar("T")
EXIT_FOUND = 1
_PIPE_WIDTH = 240

SpoolArgument = Annotated[
    Path | None, typer.Argument(metavar="[SPOOL]", help="The spool, unless --config names it.")
]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="The gateway's file, which names it.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
SeriesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--series",
        metavar="ID/TYPE",
        help="Only these series: a name, or a pattern with *, ? and [..]; ID alone: all types. Repeatable.",
    ),
]
SinceOption = Annotated[
    str | None,
    typer.Option(metavar="WHEN", help="Start of the range: 30min, 6h, 2d (ago), or 2026-05-01T12:00 (UTC)."),
]
UntilOption = Annotated[
    str | None, typer.Option(metavar="WHEN", help="End of the time range (exclusive); same forms as --since.")
]


class NamedSpool(NamedTuple):
    """A spool, with the settings when --config named it."""

    path: Path
    settings: GatewaySettings | None

    @property
    def gateway_id(self) -> str | None:
        """The gateway's name, where the settings say it."""
        return None if self.settings is None else self.settings.gateway_id


def resolve_spool(spool: Path | None, config: Path | None) -> NamedSpool:
    """The spool a command works on; ends the program when it is not named, or named twice."""
    if (spool is None) == (config is None):
        fail("name the spool: its file, or --config FILE" + ("" if spool is None else ", not both"))
    if spool is not None:
        return NamedSpool(spool, None)
    assert config is not None
    settings = load_settings_or_exit(config)
    return NamedSpool(settings.spool.path, settings)


def load_settings_or_exit(config: Path) -> GatewaySettings:
    """The settings, with the files they name checked; errors end the program."""
    try:
        return load_settings(config)
    except InvalidSettingsError as error:
        fail(str(error))


def parse_settings_or_exit(config: Path) -> GatewaySettings:
    """The settings, whatever is in the files they name; errors end the program."""
    try:
        return parse_settings_file(config)
    except InvalidSettingsError as error:
        fail(str(error))


def read_secret_or_exit(path: Path) -> str:
    """The first line of a file; errors end the program."""
    try:
        return read_secret(path)
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}")


def parse_time_range(since: str | None, until: str | None) -> tuple[int | None, int | None]:
    """Both ends in microseconds since 1970; ends the program when one cannot be parsed."""
    now_us = time.time_ns() // 1000

    def parse(option: str, text: str | None) -> int | None:
        try:
            return None if text is None else parse_time_us(text, now_us=now_us)
        except ValueError as error:
            fail(f"{option}: {error}")

    return parse("--since", since), parse("--until", until)


def build_selection(series: list[str] | None, since: str | None, until: str | None) -> ReadingFilter:
    """The filter that the options describe; ends the program when they cannot be parsed."""
    return ReadingFilter(*parse_time_range(since, until), tuple(series or ()))


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
    """Print a document as JSON, ASCII only, so that no text in it can control a terminal."""
    typer.echo(json.dumps(msgspec.to_builtins(document)))


def console() -> Console:
    """Standard output; wide enough not to cut tables when it is not a terminal."""
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(highlight=False, markup=False, width=_PIPE_WIDTH if piped else None)


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """A table without lines; long cells are folded."""
    created = Table(box=None, pad_edge=False)
    for column in columns:
        created.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return created


class ProgressBar(ProgressListener):
    """A `ProgressListener` on the terminal; indeterminate until `total` is called."""

    def __init__(self, progress: Progress, title: str) -> None:
        self._progress = progress
        self._task = progress.add_task(title, total=None)

    def name(self, title: str) -> None:
        """Name the present step."""
        self._progress.update(self._task, description=title)

    def total(self, total: int) -> None:
        """Set the number of items to do."""
        self._progress.update(self._task, total=total)

    def advance(self, done: int = 1) -> None:
        """Count items as done."""
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
        refresh_per_second=5,
    ) as progress:
        yield ProgressBar(progress, title)


def add_command(app: typer.Typer, run: Callable[[T], None], options_type: Callable[..., T]) -> None:
    """Add `run` to `app` as a command whose options are the fields of the dataclass `options_type`."""

    def command(**values: object) -> None:
        run(options_type(**values))

    command.__signature__ = inspect.signature(options_type, eval_str=True)  # type: ignore[attr-defined]
    app.command(run.__name__, help=inspect.getdoc(run))(command)
