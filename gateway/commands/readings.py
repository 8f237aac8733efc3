"""`tidegate query`, `tidegate spool read` and `tidegate spool export`: readings out of a spool."""

from __future__ import annotations

import csv
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import typer

from cloud_sync.model.records import Readings
from gateway.commands.exit_errors import fail
from gateway.commands.options import (
    EXIT_FOUND,
    ConfigOption,
    JsonOption,
    SeriesOption,
    SinceOption,
    SpoolArgument,
    UntilOption,
    build_selection,
    console,
    exit_on_spool_error,
    print_json,
    progress_bar,
    resolve_spool,
    table,
)
from gateway.humanize import (
    escape_text,
    format_count,
    format_iso_time,
    format_time,
    parse_duration_s,
    parse_time_us,
)
from gateway.query.series_chart import draw_line_chart
from gateway.query.series_query import SeriesQuery, SeriesResult, find_series, run_query
from gateway.spool.database import open_spool_read_only
from gateway.spooltools import reading_export
from gateway.spooltools.reading_selection import (
    ReadingFilter,
    ReadSummary,
    SelectedSeries,
    group_into_runs,
    read_selected,
)

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator

    from gateway.spool.series_catalog import KnownSeries
    from gateway.spooltools.reading_export import ExportWriter

app = typer.Typer(add_completion=False)
_MATCHES_MAX = 20
_NOT_IN_TABLE = ("first", "last", "excluded")
"""Columns that a table has no room for; CSV and JSON have them."""
_CHART_POINTS = 2000


@app.command()
def query(
    series: Annotated[
        str,
        typer.Argument(
            metavar="ID/TYPE", help="The series; ID alone when it has one type; *, ? and [..] if one fits."
        ),
    ],
    spool: Annotated[
        Path | None, typer.Argument(metavar="[SPOOL]", help="The spool's file. Or name it by --config.")
    ] = None,
    *,
    config: ConfigOption = None,
    since: Annotated[
        str, typer.Option(metavar="WHEN", help="From then on: 30min, 6h, 2d (ago), or 2026-05-01T12:00.")
    ] = "6h",
    until: UntilOption = None,
    every: Annotated[
        str | None,
        typer.Option(metavar="LENGTH", help="Windows of 1m, 5m, 1h, 1d, ...; raw for readings."),
    ] = None,
    points: Annotated[
        int | None, typer.Option(min=3, metavar="N", help="A line of at most N points that keeps its shape.")
    ] = None,
    average: Annotated[
        int, typer.Option(min=0, metavar="N", help="Also a moving average over N windows.")
    ] = 0,
    form: Annotated[
        Literal["table", "csv", "json", "chart"], typer.Option("--format", help="How to print it.")
    ] = "table",
) -> None:
    """Show what one series was: windows from its rollups, and from readings where there are none yet.

    Without --every the windows suit the span; up to 15 minutes it is the readings themselves. Times are UTC.

    Exit codes: 0; 1 when damaged segments had to be left out; 2 when the spool cannot be read or the
    series is not known, or several fit.

    Examples: `tidegate query boiler-1/temperature -c gateway.toml --since 6h --every 1m`,
    `tidegate query boiler-1/temperature spool.db --since 1d --format chart`.
    """
    which = resolve_spool(spool, config)
    question = _build_question(since, until, every, points, average, form)
    with exit_on_spool_error(), open_spool_read_only(which.path) as connection:
        known = _find_series(connection, series)
        found = run_query(connection, known, question)
    if form == "json":
        print_json(found)
    elif form == "csv":
        _print_csv(found)
    elif found.rows == 0:
        typer.echo(f"{escape_text(_series_name(known))}: nothing in that time", err=True)
    elif form == "chart":
        _print_chart(found)
    else:
        _print_table(found)
    if found.damaged_rows:
        typer.echo(f"tidegate: {format_count(found.damaged_rows)} damaged rows were left out", err=True)
        raise typer.Exit(EXIT_FOUND)


def _build_question(  # noqa: PLR0917 - the options of one command
    since: str, until: str | None, every: str | None, points: int | None, average: int, form: str
) -> SeriesQuery:
    now_us = time.time_ns() // 1000
    bounds = []
    for option, text in (("--since", since), ("--until", until or "now")):
        try:
            bounds.append(parse_time_us(text, now_us=now_us))
        except ValueError as fault:
            fail(f"{option}: {fault}")
    if bounds[1] <= bounds[0]:
        fail("--until must be later than --since")
    every_s = None
    if every is not None:
        try:
            every_s = 0.0 if every == "raw" else parse_duration_s(every)
        except ValueError as error:
            fail(f"--every: {error}, or raw")
        if every_s % 1:
            fail(f"--every: {every} is not a whole number of seconds")
    if average and (points is not None or every_s == 0 or form == "chart"):
        fail("--average goes over windows: with --every, and without --points and chart")
    if form == "chart" and points is None:
        points = _CHART_POINTS
    question = SeriesQuery(bounds[0], bounds[1], None if every_s is None else int(every_s), points, average)
    if average and not question.window_s:
        fail("--average goes over windows: say how long they are with --every")
    return question


def _find_series(connection: sqlite3.Connection, text: str) -> KnownSeries:
    """The series that is meant; ends the program when there is none, or several."""
    found = find_series(connection, ReadingFilter(patterns=(text,)))
    if not found:
        fail(
            f"no series is called {escape_text(text)}; "
            f"a pattern such as '*{escape_text(text)}*' lists what is there"
        )
    if len(found) > 1:
        names = "".join(f"\n  {escape_text(_series_name(known))}" for known in found[:_MATCHES_MAX])
        more = f"\n  and {len(found) - _MATCHES_MAX} more" if len(found) > _MATCHES_MAX else ""
        fail(f"{len(found)} series fit {escape_text(text)}; name one of them:{names}{more}")
    return found[0]


def _series_name(known: KnownSeries) -> str:
    return f"{known.series.sensor_id}/{known.series.sensor_type}"


def _print_csv(found: SeriesResult) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["time", *list(found.columns)[1:]])
    for row in _csv_rows(found):
        writer.writerow(row)


def _print_table(found: SeriesResult) -> None:
    names = [name for name in found.columns if name not in _NOT_IN_TABLE]
    rows = table("time", *names[1:], right=tuple(names[1:]))
    for at, *values in zip(*(found.columns[name] for name in names), strict=True):
        rows.add_row(
            format_time(at) if found.every_s else format_iso_time(at),
            *(_format_cell(value) for value in values),
        )
    console().print(rows)


def _print_chart(found: SeriesResult) -> None:
    time_us = np.array(found.columns["time_us"], np.int64)
    value = np.array(found.columns["value"], np.float64)
    out = console()
    span = (found.since_us, found.until_us)
    width = min(out.width, 120)
    title = f"{found.sensor_id}/{found.sensor_type}{found.unit and f' in {found.unit}'}"
    typer.echo(escape_text(title))
    for line in draw_line_chart(time_us, value, span, width=width):
        typer.echo(line)
    left, right = format_time(found.since_us), format_time(found.until_us)
    typer.echo(f"{'':12}{left}{right:>{max(1, width - 12 - len(left))}}")


def _csv_rows(found: SeriesResult) -> list[tuple[Any, ...]]:
    times, *columns = found.columns.values()
    return [(format_iso_time(at), *row) for at, *row in zip(times, *columns, strict=True)]


def _format_cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


_DAMAGED_MAX = 10
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
    which = resolve_spool(spool, config)
    selection = build_selection(series, since, until)
    form = "jsonl" if as_json else form
    found = ReadSummary()
    with exit_on_spool_error(), open_spool_read_only(which.path) as connection:
        names = SelectedSeries(connection, selection)
        with progress_bar("looking") as progress:
            parts = read_selected(
                connection,
                which.path,
                selection,
                names,
                found,
                newest_first=bool(limit) and not oldest,
                progress=progress,
            )
            taken = (
                [_limit_readings(parts, limit, newest=not oldest)]
                if limit
                else group_into_runs(parts, _TERMINAL_ROWS)
            )
            with _open_printer(form) as writer:
                for readings in taken:
                    if readings.rows:
                        writer.write(readings, names)
    _report_damaged(found)


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
    which = resolve_spool(spool, config)
    selection = build_selection(series, since, until)
    found = ReadSummary()
    try:
        ending = reading_export.find_file_ending(out)
        with exit_on_spool_error(), open_spool_read_only(which.path) as connection:
            names = SelectedSeries(connection, selection)
            with progress_bar("exporting") as progress, _open_export(out, ending, replace=force) as writer:
                parts = read_selected(connection, which.path, selection, names, found, progress=progress)
                for readings in group_into_runs(parts):
                    writer.write(readings, names)
    except reading_export.ExportError as fault:
        fail(str(fault))
    if as_json and not out.startswith("-"):
        print_json({"out": out, "rows": found.rows, "damaged_rows": found.damaged_rows})
    elif not out.startswith("-"):
        typer.echo(f"{escape_text(out)}: {format_count(found.rows)} readings")
    _report_damaged(found)


def _limit_readings(parts: Iterator[Readings], limit: int, *, newest: bool) -> Readings:
    """The first `limit` readings of `parts`, sorted by time; of one segment the newest, or the oldest."""
    taken: list[Readings] = []
    lacking = limit
    for part in parts:
        by_time = part.select(np.argsort(part.time_us, kind="stable"))
        cut = slice(-lacking, None) if newest else slice(lacking)
        taken.append(by_time.select(np.arange(by_time.rows)[cut]))
        lacking -= taken[-1].rows
        if lacking == 0:
            break
    if not taken:
        return _NO_READINGS
    whole = Readings.concat(taken)
    return whole.select(np.lexsort((whole.series, whole.time_us)))


_NO_READINGS = Readings(*(np.zeros(0, dtype) for dtype in ("i4", "i8", "f8", "f4", "f4", "f4", "i8", "i4")))


class _TablePrinter:
    """A table for a person; long output comes in tables of their own."""

    def write(self, readings: Readings, names: reading_export.SeriesLookup) -> None:
        rows = table(
            *reading_export.EXPORT_COLUMNS,
            right=("value", "quality", "battery_level", "signal_strength", "seq"),
        )
        for row in reading_export.format_table_rows(readings, names):
            rows.add_row(*row)
        console().print(rows)

    def close(self) -> None:
        """Nothing is kept open."""


@contextmanager
def _open_printer(form: str) -> Iterator[ExportWriter]:
    if form == "table":
        yield _TablePrinter()
    else:
        with _open_text_export(f".{form}") as writer:
            yield writer


@contextmanager
def _open_export(out: str, ending: str, *, replace: bool) -> Iterator[ExportWriter]:
    if out.startswith("-"):
        with _open_text_export(ending) as writer:
            yield writer
    else:
        with reading_export.open_file_writer(Path(out), replace=replace) as writer:
            yield writer


@contextmanager
def _open_text_export(ending: str) -> Iterator[ExportWriter]:
    if ".jsonl" in ending:
        with reading_export.open_stdout_writer(ending, reading_export.format_json_lines) as writer:
            yield writer
        return
    printable = console().is_terminal

    def text_of(readings: Readings, names: reading_export.SeriesLookup) -> str:
        return reading_export.format_csv(readings, names, printable=printable)

    with reading_export.open_stdout_writer(ending, text_of, reading_export.format_csv_header()) as writer:
        yield writer


def _report_damaged(found: ReadSummary) -> None:
    if not found.damaged_rows:
        return
    for line in found.damaged[:_DAMAGED_MAX]:
        typer.echo(f"tidegate: {escape_text(line)}", err=True)
    typer.echo(
        f"tidegate: {format_count(found.damaged_rows)} readings in damaged segments were left out; "
        "`tidegate spool check` names them all",
        err=True,
    )
    raise typer.Exit(EXIT_FOUND)
