"""`tidegate spool read` and `tidegate spool export`: readings out of a spool."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import typer

from cloud_sync.records import Readings
from gateway.commands.failures import fail
from gateway.commands.progress import bar
from gateway.commands.spool_options import (
    EXIT_FOUND,
    ConfigOption,
    JsonOption,
    SeriesOption,
    SinceOption,
    SpoolArgument,
    UntilOption,
    console,
    named,
    print_json,
    selection_of,
    spool_errors,
    table,
)
from gateway.operate import reading_rows, spool_export
from gateway.operate.human import count_text
from gateway.operate.spool_file import opened
from gateway.operate.spool_readings import Found, SeriesNames, in_runs, selected
from gateway.operate.terminal import shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gateway.operate.spool_export import Writer

_DAMAGED_SHOWN = 10
_TERMINAL_ROWS = 1000


def read(
    spool: SpoolArgument = None,
    *,
    config: ConfigOption = None,
    series: SeriesOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    limit: Annotated[int, typer.Option(min=0, metavar="N", help="At most so many; 0 means all.")] = 50,
    oldest: Annotated[bool, typer.Option("--oldest", help="Those that came in first, not last.")] = False,
    form: Annotated[
        Literal["table", "csv", "jsonl"], typer.Option("--format", help="jsonl: one JSON object a line.")
    ] = "table",
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format jsonl.")] = False,
) -> None:
    """Print readings: of those selected, the ones that came in last.

    They are sorted by time, except with --limit 0: then they come as they are stored, by commit, series and
    time. On a terminal nothing that a device wrote can move the cursor.

    Exit codes: 0; 1 when a damaged segment had to be left out; 2 when the spool cannot be read.

    Examples: `tidegate spool read spool.db --series 'barn-*/temperature' --since 6h`,
    `tidegate spool read -c gateway.toml --limit 0 --format csv > readings.csv`.
    """
    which = named(spool, config)
    selection = selection_of(series, since, until)
    form = "jsonl" if as_json else form
    found = Found()
    with spool_errors(), opened(which.path) as connection:
        names = SeriesNames(connection, selection)
        with bar("looking") as watcher:
            parts = selected(
                connection,
                which.path,
                selection,
                names,
                found,
                newest_first=bool(limit) and not oldest,
                watcher=watcher,
            )
            taken = [_limited(parts, limit, newest=not oldest)] if limit else in_runs(parts, _TERMINAL_ROWS)
            with _printer(form) as writer:
                for readings in taken:
                    if readings.rows:
                        writer.write(readings, names)
    _tell_damaged(found)


def export(
    spool: SpoolArgument = None,
    *,
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="Ends in .parquet, .csv or .jsonl, .gz after it; - is CSV on stdout.",
        ),
    ],
    config: ConfigOption = None,
    series: SeriesOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file when it exists.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write readings to a file, with the columns of the region's view sensor_data.

    They stream by in memory that does not grow, as they are stored: by commit, series and time. The file
    appears under its name only when it is whole.

    Exit codes: 0; 1 when a damaged segment had to be left out; 2 when it cannot be done.
    """
    which = named(spool, config)
    selection = selection_of(series, since, until)
    found = Found()
    try:
        ending = spool_export.ending_of(out)
        with spool_errors(), opened(which.path) as connection:
            names = SeriesNames(connection, selection)
            with bar("exporting") as watcher, _export_to(out, ending, replace=force) as writer:
                parts = selected(connection, which.path, selection, names, found, watcher=watcher)
                for readings in in_runs(parts):
                    writer.write(readings, names)
    except spool_export.ExportFault as fault:
        fail(str(fault))
    if as_json and not out.startswith("-"):
        print_json({"out": out, "rows": found.rows, "damaged_rows": found.damaged_rows})
    elif not out.startswith("-"):
        typer.echo(f"{shown(out)}: {count_text(found.rows)} readings")
    _tell_damaged(found)


def _limited(parts: Iterator[Readings], limit: int, *, newest: bool) -> Readings:
    """The first `limit` readings of `parts`, sorted by time; of one segment the newest, or the oldest."""
    taken: list[Readings] = []
    lacking = limit
    for part in parts:
        by_time = part.take(np.argsort(part.time_us, kind="stable"))
        cut = slice(-lacking, None) if newest else slice(lacking)
        taken.append(by_time.take(np.arange(by_time.rows)[cut]))
        lacking -= taken[-1].rows
        if lacking == 0:
            break
    if not taken:
        return _NONE
    whole = Readings.concat(taken)
    return whole.take(np.lexsort((whole.series, whole.time_us)))


_NONE = Readings(*(np.zeros(0, dtype) for dtype in ("i4", "i8", "f8", "f4", "f4", "f4", "i8", "i4")))


class _TablePrinter:
    """A table for a person; long output comes in tables of their own."""

    def write(self, readings: Readings, names: reading_rows.Names) -> None:
        rows = table(
            *reading_rows.COLUMNS, right=("value", "quality", "battery_level", "signal_strength", "seq")
        )
        for row in reading_rows.table_rows(readings, names):
            rows.add_row(*row)
        console().print(rows)

    def close(self) -> None:
        """Nothing is kept open."""


@contextmanager
def _printer(form: str) -> Iterator[Writer]:
    if form == "table":
        yield _TablePrinter()
    else:
        with _text_on_stdout(f".{form}") as writer:
            yield writer


@contextmanager
def _export_to(out: str, ending: str, *, replace: bool) -> Iterator[Writer]:
    if out.startswith("-"):
        with _text_on_stdout(ending) as writer:
            yield writer
    else:
        with spool_export.to_file(Path(out), replace=replace) as writer:
            yield writer


@contextmanager
def _text_on_stdout(ending: str) -> Iterator[Writer]:
    if ".jsonl" in ending:
        with spool_export.to_stdout(ending, reading_rows.json_text) as writer:
            yield writer
        return
    printable = console().is_terminal

    def text_of(readings: Readings, names: reading_rows.Names) -> str:
        return reading_rows.csv_text(readings, names, printable=printable)

    with spool_export.to_stdout(ending, text_of, reading_rows.csv_header()) as writer:
        yield writer


def _tell_damaged(found: Found) -> None:
    if not found.damaged_rows:
        return
    for line in found.damaged[:_DAMAGED_SHOWN]:
        typer.echo(f"tidegate: {shown(line)}", err=True)
    typer.echo(
        f"tidegate: {count_text(found.damaged_rows)} readings in damaged segments were left out; "
        "`tidegate spool check` names them all",
        err=True,
    )
    raise typer.Exit(EXIT_FOUND)
