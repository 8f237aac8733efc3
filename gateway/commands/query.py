"""`tidegate query`: what one series was, out of the spool of a live or a stopped gateway."""

from __future__ import annotations

import csv
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import typer

from gateway.commands.failures import fail
from gateway.commands.spool_options import (
    EXIT_FOUND,
    ConfigOption,
    UntilOption,
    console,
    named,
    print_json,
    spool_errors,
    table,
)
from gateway.operate.human import count_text
from gateway.operate.line_chart import line_chart
from gateway.operate.moments import duration_s, iso_text, moment_text, moment_us
from gateway.operate.query import Answer, Question, answer
from gateway.operate.selection import Selection
from gateway.operate.series_history import Known, known_series
from gateway.operate.spool_file import opened
from gateway.operate.terminal import shown

if TYPE_CHECKING:
    import sqlite3

app = typer.Typer(add_completion=False)
_LISTED = 20
_LEFT_TO_FILES = ("first", "last", "excluded")
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
    which = named(spool, config)
    question = _question(since, until, every, points, average, form)
    with spool_errors(), opened(which.path) as connection:
        known = _only_one(connection, series)
        found = answer(connection, known, question)
    if form == "json":
        print_json(found)
    elif form == "csv":
        _print_csv(found)
    elif found.rows == 0:
        typer.echo(f"{shown(_name(known))}: nothing in that time", err=True)
    elif form == "chart":
        _print_chart(found)
    else:
        _print_table(found)
    if found.damaged_rows:
        typer.echo(f"tidegate: {count_text(found.damaged_rows)} damaged rows were left out", err=True)
        raise typer.Exit(EXIT_FOUND)


def _question(  # noqa: PLR0917 - the options of one command
    since: str, until: str | None, every: str | None, points: int | None, average: int, form: str
) -> Question:
    now_us = time.time_ns() // 1000
    bounds = []
    for option, text in (("--since", since), ("--until", until or "now")):
        try:
            bounds.append(moment_us(text, now_us=now_us))
        except ValueError as fault:
            fail(f"{option}: {fault}")
    if bounds[1] <= bounds[0]:
        fail("--until must be later than --since")
    every_s = None
    if every is not None:
        try:
            every_s = 0 if every == "raw" else duration_s(every)
        except ValueError as fault:
            fail(f"--every: {fault}, or raw")
    if average and (points is not None or every_s == 0 or form == "chart"):
        fail("--average goes over windows: with --every, and without --points and chart")
    if form == "chart" and points is None:
        points = _CHART_POINTS
    question = Question(bounds[0], bounds[1], every_s, points, average)
    if average and not question.window_s:
        fail("--average goes over windows: say how long they are with --every")
    return question


def _only_one(connection: sqlite3.Connection, text: str) -> Known:
    """The series that is meant; ends the program when there is none, or several."""
    found = known_series(connection, Selection(patterns=(text,)))
    if not found:
        fail(f"no series is called {shown(text)}; a pattern such as '*{shown(text)}*' lists what is there")
    if len(found) > 1:
        names = "".join(f"\n  {shown(_name(known))}" for known in found[:_LISTED])
        more = f"\n  and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
        fail(f"{len(found)} series fit {shown(text)}; name one of them:{names}{more}")
    return found[0]


def _name(known: Known) -> str:
    return f"{known.series.sensor_id}/{known.series.sensor_type}"


def _print_csv(found: Answer) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["time", *list(found.columns)[1:]])
    for row in _rows(found):
        writer.writerow(row)


def _print_table(found: Answer) -> None:
    names = [name for name in found.columns if name not in _LEFT_TO_FILES]
    rows = table("time", *names[1:], right=tuple(names[1:]))
    for at, *values in zip(*(found.columns[name] for name in names), strict=True):
        rows.add_row(moment_text(at) if found.every_s else iso_text(at), *(_short(value) for value in values))
    console().print(rows)


def _print_chart(found: Answer) -> None:
    time_us = np.array(found.columns["time_us"], np.int64)
    value = np.array(found.columns["value"], np.float64)
    out = console()
    span = (found.since_us, found.until_us)
    width = min(out.width, 120)
    title = f"{found.sensor_id}/{found.sensor_type}{found.unit and f' in {found.unit}'}"
    typer.echo(shown(title))
    for line in line_chart(time_us, value, span, width=width):
        typer.echo(line)
    left, right = moment_text(found.since_us), moment_text(found.until_us)
    typer.echo(f"{'':12}{left}{right:>{max(1, width - 12 - len(left))}}")


def _rows(found: Answer) -> list[tuple[Any, ...]]:
    times, *columns = found.columns.values()
    return [(iso_text(at), *row) for at, *row in zip(times, *columns, strict=True)]


def _short(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
