"""`tidegate query`, `tidegate spool read` and `tidegate spool export`: readings out of a spool."""

from __future__ import annotations

import csv
import sys
from contextlib import contextmanager
from dataclasses import dataclass
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
    add_command,
    build_selection,
    console,
    exit_on_spool_error,
    parse_time_range,
    print_json,
    progress_bar,
    resolve_spool,
    table,
)
from gateway.humanize import escape_text, format_count, format_iso_time, format_time, parse_duration_s
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

    from gateway.spool.series_catalog import KnownSeries, SeriesCatalog
    from gateway.spooltools.reading_export import WriteReadings

app = typer.Typer(add_completion=False)
_MATCHES_MAX = 20
_NOT_IN_TABLE = ("first", "last", "excluded")  # a table has no room for them
_CHART_POINTS = 2000


@dataclass(frozen=True, kw_only=True)
class QueryOptions:
    """Which series `tidegate query` shows, over which time, and how."""

    series: Annotated[
        str,
        typer.Argument(
            metavar="ID/TYPE",
            help="The series; ID alone if it has one type; or a pattern that one series matches.",
        ),
    ]
    spool: SpoolArgument = None
    config: ConfigOption = None
    since: Annotated[
        str,
        typer.Option(metavar="WHEN", help="Start of the range: 30min, 6h, 2d (ago), or 2026-05-01T12:00."),
    ] = "6h"
    until: UntilOption = None
    every: Annotated[
        str | None, typer.Option(metavar="LENGTH", help="Windows of 1m, 5m, 1h, 1d, ...; raw for readings.")
    ] = None
    points: Annotated[
        int | None,
        typer.Option(min=3, metavar="N", help="Downsample to at most N points, keeping the line's shape."),
    ] = None
    average: Annotated[
        int, typer.Option(min=0, metavar="N", help="Also a moving average over N windows.")
    ] = 0
    form: Annotated[
        Literal["table", "csv", "json", "chart"], typer.Option("--format", help="Output format.")
    ] = "table"


def query(options: QueryOptions) -> None:
    """Show one series: windows from its rollups, or from readings where there are no rollups yet.

    Without --every the windows suit the time range; up to 15 minutes, readings are shown. Times are UTC.

    Exit codes: 0; 1 when damaged segments were skipped; 2 when the spool cannot be read or no series, or more
    than one, matches.

    Examples: `tidegate query boiler-1/temperature -c gateway.toml --since 6h --every 1m`,
    `tidegate query boiler-1/temperature spool.db --since 1d --format chart`.
    """
    which = resolve_spool(options.spool, options.config)
    question = _build_query(options)
    with exit_on_spool_error(), open_spool_read_only(which.path) as connection:
        known = _find_series(connection, options.series)
        found = run_query(connection, known, question)
    if options.form == "json":
        print_json(found)
    elif options.form == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(["time", *list(found.columns)[1:]])
        writer.writerows(
            [format_iso_time(at), *values] for at, *values in zip(*found.columns.values(), strict=True)
        )
    elif found.rows == 0:
        typer.echo(f"{escape_text(_series_name(known))}: no readings in this time range", err=True)
    elif options.form == "chart":
        _print_chart(found)
    else:
        _print_table(found)
    if found.damaged_rows:
        typer.echo(f"tidegate: {format_count(found.damaged_rows)} damaged rows were skipped", err=True)
        raise typer.Exit(EXIT_FOUND)


add_command(app, query, QueryOptions)


def _build_query(options: QueryOptions) -> SeriesQuery:
    since_us, until_us = parse_time_range(options.since, options.until or "now")
    assert since_us is not None
    assert until_us is not None
    if until_us <= since_us:
        fail("--until must be later than --since")
    every_s = None
    if options.every is not None:
        try:
            every_s = 0.0 if options.every == "raw" else parse_duration_s(options.every)
        except ValueError as error:
            fail(f"--every: {error}, or raw")
        if every_s % 1:
            fail(f"--every: {options.every} is not a whole number of seconds")
    points, average = options.points, options.average
    if average and (points is not None or every_s == 0 or options.form == "chart"):
        fail("--average needs windows: use it with --every, without --points and --format chart")
    if options.form == "chart" and points is None:
        points = _CHART_POINTS
    question = SeriesQuery(since_us, until_us, None if every_s is None else int(every_s), points, average)
    if average and not question.window_s:
        fail("--average needs windows: set their length with --every")
    return question


def _find_series(connection: sqlite3.Connection, text: str) -> KnownSeries:
    """The one series that matches; ends the program when none or several do."""
    found = find_series(connection, ReadingFilter(patterns=(text,)))
    if not found:
        name = escape_text(text)
        fail(f"no series is called {name}; a pattern such as '*{name}*' lists similar names")
    if len(found) > 1:
        names = "".join(f"\n  {escape_text(_series_name(known))}" for known in found[:_MATCHES_MAX])
        more = f"\n  and {len(found) - _MATCHES_MAX} more" if len(found) > _MATCHES_MAX else ""
        fail(f"{len(found)} series match {escape_text(text)}; name one of them:{names}{more}")
    return found[0]


def _series_name(known: KnownSeries) -> str:
    return f"{known.series.sensor_id}/{known.series.sensor_type}"


def _print_table(found: SeriesResult) -> None:
    names = [name for name in found.columns if name not in _NOT_IN_TABLE]
    rows = table("time", *names[1:], right=tuple(names[1:]))
    for at, *values in zip(*(found.columns[name] for name in names), strict=True):
        time_text = format_time(at) if found.every_s else format_iso_time(at)
        rows.add_row(time_text, *map(_format_cell, values))
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


def _format_cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


_DAMAGED_MAX = 10
_TERMINAL_ROWS = 1000


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Which readings `tidegate spool read` prints, and how."""

    spool: SpoolArgument = None
    config: ConfigOption = None
    series: SeriesOption = None
    since: SinceOption = None
    until: UntilOption = None
    limit: Annotated[int, typer.Option(min=0, metavar="N", help="Maximum number of readings; 0: all.")] = 50
    oldest: Annotated[bool, typer.Option("--oldest", help="The first received instead of the last.")] = False
    form: Annotated[
        Literal["table", "csv", "jsonl"],
        typer.Option("--format", help="Output format; jsonl: one JSON object a line."),
    ] = "table"
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format jsonl.")] = False


def read(options: ReadOptions) -> None:
    """Print readings: of those selected, the ones that were received last.

    They are sorted by time, except with --limit 0: then they come in storage order, by commit, series and
    time. Control characters in text from devices are escaped.

    Exit codes: 0; 1 when a damaged segment was skipped; 2 when the spool cannot be read.

    Examples: `tidegate spool read spool.db --series 'barn-*/temperature' --since 6h`,
    `tidegate spool read -c gateway.toml --limit 0 --format csv > readings.csv`.
    """
    path = resolve_spool(options.spool, options.config).path
    selection = build_selection(options.series, options.since, options.until)
    limit, newest = options.limit, not options.oldest
    found = ReadSummary()
    with exit_on_spool_error(), open_spool_read_only(path) as connection:
        names = SelectedSeries(connection, selection)
        with progress_bar("reading") as progress:
            newest_first = bool(limit) and newest
            segments = read_selected(
                connection, path, selection, names, found, newest_first=newest_first, progress=progress
            )
            groups = (
                [_limit_readings(segments, limit, newest=newest)]
                if limit
                else group_into_runs(segments, _TERMINAL_ROWS)
            )
            with _open_printer("jsonl" if options.as_json else options.form) as write:
                for readings in groups:
                    if readings.rows:
                        write(readings, names.catalog)
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
            help="The file, ending in .parquet, .csv or .jsonl, also with .gz; - is CSV on stdout.",
        ),
    ],
    config: ConfigOption = None,
    series: SeriesOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write readings to a file, with the columns of the region's view sensor_data.

    They are streamed in storage order, by commit, series and time, using constant memory. The file appears
    under its name only when it is complete.

    Exit codes: 0; 1 when a damaged segment was skipped; 2 on an error.
    """
    which = resolve_spool(spool, config)
    selection = build_selection(series, since, until)
    found = ReadSummary()
    try:
        ending = reading_export.find_file_ending(out)
        with exit_on_spool_error(), open_spool_read_only(which.path) as connection:
            names = SelectedSeries(connection, selection)
            with progress_bar("exporting") as progress, _open_export(out, ending, replace=force) as write:
                segments = read_selected(connection, which.path, selection, names, found, progress=progress)
                for readings in group_into_runs(segments):
                    write(readings, names.catalog)
    except reading_export.ExportError as fault:
        fail(str(fault))
    if as_json and not out.startswith("-"):
        print_json({"out": out, "rows": found.rows, "damaged_rows": found.damaged_rows})
    elif not out.startswith("-"):
        typer.echo(f"{escape_text(out)}: {format_count(found.rows)} readings")
    _report_damaged(found)


def _limit_readings(segments: Iterator[Readings], limit: int, *, newest: bool) -> Readings:
    """The first `limit` readings of `segments`, sorted by time; of one segment the newest, or the oldest."""
    selected: list[Readings] = []
    missing = limit
    for segment in segments:
        by_time = segment.select(np.argsort(segment.time_us, kind="stable"))
        cut = slice(-missing, None) if newest else slice(missing)
        selected.append(by_time.select(np.arange(by_time.rows)[cut]))
        missing -= selected[-1].rows
        if missing == 0:
            break
    if not selected:
        return _NO_READINGS
    whole = Readings.concat(selected)
    return whole.select(np.lexsort((whole.series, whole.time_us)))


_NO_READINGS = Readings(*(np.zeros(0, dtype) for dtype in ("i4", "i8", "f8", "f4", "f4", "f4", "i8", "i4")))


def _print_readings(readings: Readings, catalog: SeriesCatalog) -> None:
    rows = table(
        *reading_export.EXPORT_COLUMNS, right=("value", "quality", "battery_level", "signal_strength", "seq")
    )
    for row in reading_export.format_table_rows(readings, catalog):
        rows.add_row(*row)
    console().print(rows)


@contextmanager
def _open_printer(form: str) -> Iterator[WriteReadings]:
    if form == "table":
        yield _print_readings
    else:
        with _open_text_export(f".{form}") as write:
            yield write


@contextmanager
def _open_export(out: str, ending: str, *, replace: bool) -> Iterator[WriteReadings]:
    if out.startswith("-"):
        with _open_text_export(ending) as write:
            yield write
    else:
        with reading_export.open_file_writer(Path(out), replace=replace) as write:
            yield write


@contextmanager
def _open_text_export(ending: str) -> Iterator[WriteReadings]:
    if ".jsonl" in ending:
        with reading_export.open_stdout_writer(ending, reading_export.format_json_lines) as write:
            yield write
        return
    printable = console().is_terminal

    def format_text(readings: Readings, catalog: SeriesCatalog) -> str:
        return reading_export.format_csv(readings, catalog, printable=printable)

    with reading_export.open_stdout_writer(ending, format_text, reading_export.format_csv_header()) as write:
        yield write


def _report_damaged(found: ReadSummary) -> None:
    if not found.damaged_rows:
        return
    for line in found.damaged[:_DAMAGED_MAX]:
        typer.echo(f"tidegate: {escape_text(line)}", err=True)
    typer.echo(
        f"tidegate: {format_count(found.damaged_rows)} readings in damaged segments were skipped; "
        "`tidegate spool check` lists the segments",
        err=True,
    )
    raise typer.Exit(EXIT_FOUND)
