"""`tidegate spool info | check | compact` and `tidegate destination list | drop`."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gateway.commands import readings, spool_quarantine
from gateway.commands.exit_errors import fail
from gateway.commands.options import (
    EXIT_FOUND,
    ConfigOption,
    JsonOption,
    SpoolArgument,
    console,
    exit_on_spool_error,
    print_json,
    progress_bar,
    resolve_spool,
    table,
)
from gateway.commands.spool_quarantine import post_to_gateway
from gateway.humanize import escape_text, format_bytes, format_count, format_duration, format_time
from gateway.spool.errors import SpoolInUseError
from gateway.spool.spool import CompactionResult, compact_spool, open_spool
from gateway.spooltools import checker
from gateway.spooltools.spool_info import BacklogInfo, read_spool_info

if TYPE_CHECKING:
    from gateway.spooltools.checker import CheckReport
    from gateway.spooltools.spool_info import ClassInfo, SpoolInfo

_LIVE_TEXT = {True: "a gateway is running on it", False: "stopped", None: "whether it is in use is not known"}


def print_info(document: SpoolInfo) -> None:
    """Print the document of `spool info`."""
    out = console()
    gateway = f", gateway {document.gateway_id}" if document.gateway_id else ""
    each = "" if document.bytes_per_reading is None else f", {document.bytes_per_reading:.2f} B per reading"
    free = format_bytes(document.free_pages * document.page_bytes)
    out.print(f"spool    {escape_text(document.path)}: {_LIVE_TEXT[document.live]}{gateway}")
    out.print(f"format   version {document.format_version}, epoch {escape_text(document.epoch)}")
    out.print(
        f"on disk  {format_bytes(document.file_bytes)} and {format_bytes(document.wal_bytes)} of log; "
        f"{format_bytes(document.used_bytes)} in use{each}; "
        f"{format_count(document.free_pages)} free pages ({free})"
    )
    out.print(
        f"holds    {format_count(document.series)} series, {format_count(document.quarantined)} quarantined"
    )
    if document.damaged_segments:
        out.print(
            f"damaged  {format_count(document.damaged_segments)} segments with "
            f"{format_count(document.damaged_rows)} readings were set aside"
        )
    if document.classes:
        numbers = ("kept", "ever", "segments", "bytes")
        rows = table("class", "kept", "ever", "commits", "segments", "bytes", "from", "to", right=numbers)
        for name, held in document.classes.items():
            rows.add_row(name, *_class_cells(held))
        out.print(rows)
    if document.destinations:
        out.print(_destinations_table(document))


def print_check_result(result: CheckReport) -> None:
    """Print the document of `spool check`."""
    out = console()
    for problem in result.problems:
        out.print(f"{escape_text(problem.where)}: {escape_text(problem.what)}", soft_wrap=True)
    if result.problem_count > len(result.problems):
        out.print(f"... and {format_count(result.problem_count - len(result.problems))} more problems")
    if result.set_aside_segments:
        out.print(
            f"{format_count(result.set_aside_segments)} damaged segments with "
            f"{format_count(result.set_aside_rows)} readings were set aside by the gateway"
        )
    decoded = (
        "" if result.segments == 0 else f", {format_count(result.decoded_segments)} of their segments decoded"
    )
    verdict = f"{format_count(result.problem_count)} problems" if result.problem_count else "sound"
    out.print(
        f"{escape_text(result.path)}: {verdict}; {format_count(result.rows)} readings{decoded}",
        soft_wrap=True,
    )


def _class_cells(held: ClassInfo) -> list[str]:
    about = "~" if held.estimated else ""
    commits = f"{held.oldest_commit}..{held.newest_commit}"
    return [
        format_count(held.rows),
        format_count(held.rows_ever),
        commits if held.oldest_commit else f"none of {held.newest_commit}",
        about + format_count(held.segments),
        about + format_bytes(held.block_bytes),
        *("-" if at is None else about + format_time(at) for at in (held.min_time_us, held.max_time_us)),
    ]


def _destinations_table(document: SpoolInfo) -> object:
    numbers = ("backlog", "oldest", "open batches", "delivered ranges")
    rows = table("destination", *numbers, right=numbers)
    for destination in document.destinations:
        oldest_us = destination.oldest_written_at_us
        lacking = {name: count for name, count in destination.backlog.items() if count} or {"": 0}
        rows.add_row(
            escape_text(f"{destination.name} ({destination.kind})"),
            ", ".join(f"{format_count(count)} {name}".strip() for name, count in lacking.items()),
            "-" if oldest_us is None else f"{format_duration(time.time() - oldest_us / 1e6)} ago",
            str(destination.open_batches),
            str(destination.delivered_ranges),
        )
    return rows


spool_app = typer.Typer(add_completion=False, no_args_is_help=True)


@spool_app.callback()
def spool() -> None:
    """Look into a spool, check it, take readings out of it, tidy it.

    The spool is named by its file or by --config FILE. All but compact, quarantine drop and quarantine retry
    only read; all but compact and quarantine retry work while the gateway runs.
    """


@spool_app.command()
def info(spool: SpoolArgument = None, *, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show what the spool holds and what each destination still lacks.

    Fast at any size: when counting segments takes over a second, their number, bytes and range of times
    are estimated from a sample, and marked with ~.

    Exit codes: 0, or 2 when the spool cannot be read.
    """
    which = resolve_spool(spool, config)
    with exit_on_spool_error():
        document = read_spool_info(which.path, which.gateway_id)
        if as_json:
            print_json(document)
        else:
            print_info(document)


@spool_app.command()
def check(
    spool: SpoolArgument = None,
    *,
    config: ConfigOption = None,
    quick: Annotated[bool, typer.Option("--quick", help="Do not decode the segments.")] = False,
    full: Annotated[
        bool, typer.Option("--full", help="SQLite's integrity_check (slower) in place of quick_check.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check everything the spool promises about itself; report every problem with its place.

    Looks at SQLite's pages, at every segment's checksum, rows, times and series, at the chain of commits, and
    at the progress of every destination. Changes nothing.

    Exit codes: 0 sound, 1 something is wrong, 2 there is no spool or a later release wrote it.
    """
    which = resolve_spool(spool, config)
    with exit_on_spool_error():
        with progress_bar("opening") as progress:
            result = checker.check_spool(which.path, decode=not quick, full=full, progress=progress)
        if as_json:
            print_json(result)
        else:
            print_check_result(result)
    if result.problem_count:
        raise typer.Exit(EXIT_FOUND)


spool_app.command()(readings.read)
spool_app.command()(readings.export)


@spool_app.command()
def compact(spool: SpoolArgument = None, *, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Merge small segments into large ones and give free space back.

    A running gateway does this by itself, little by little; named by --config it does it now.

    Exit codes: 0, or 2 when it cannot be done.
    """
    which = resolve_spool(spool, config)
    with exit_on_spool_error():
        try:
            with progress_bar("compacting") as progress:
                done = asyncio.run(compact_spool(which.path, progress))
        except SpoolInUseError as fault:
            done = post_to_gateway(which, "/compact", {}, CompactionResult, fault)
        if as_json:
            print_json(done._asdict())
        else:
            typer.echo(
                f"{escape_text(str(which.path))}: {format_count(done.segments_before)} segments became "
                f"{format_count(done.segments_after)}, {format_bytes(done.bytes_before)} became "
                f"{format_bytes(done.bytes_after)} ({format_count(done.rows)} readings)"
            )


spool_app.add_typer(spool_quarantine.app, name="quarantine")


destination_app = typer.Typer(add_completion=False, no_args_is_help=True)
SpoolOption = Annotated[
    Path | None, typer.Option("--spool", help="The spool's file. Or name it by --config.")
]


@destination_app.callback()
def destination() -> None:
    """Destinations that a spool knows, and how far each is.

    A destination that is taken out of the configuration keeps its progress: put back under the same name, it
    goes on where it was. Until then nothing is kept in the spool for its sake.
    """


@destination_app.command("list")
def list_destinations(
    spool: SpoolOption = None, *, config: ConfigOption = None, as_json: JsonOption = False
) -> None:
    """List every destination the spool knows, configured or not, with what it still lacks.

    Exit codes: 0, or 2 when the spool cannot be read.
    """
    which = resolve_spool(spool, config)
    configured = None if which.settings is None else {d.name for d in which.settings.destinations}
    with exit_on_spool_error():
        known = read_spool_info(which.path, which.gateway_id).destinations
        if as_json:
            print_json([_destination_document(d, configured) for d in known])
            return
        rows = table("destination", "kind", "configured", "lacks", "oldest", right=("lacks",))
        for entry in known:
            state = "?" if configured is None else "yes" if entry.name in configured else "no"
            lacks = sum(entry.backlog.values())
            rows.add_row(
                escape_text(entry.name),
                escape_text(entry.kind),
                state,
                f"{format_count(lacks)} readings",
                _backlog_age(entry),
            )
        console().print(rows)


@destination_app.command()
def drop(
    name: Annotated[str, typer.Argument(help="The destination's name.")],
    spool: SpoolOption = None,
    *,
    config: ConfigOption = None,
) -> None:
    """Forget a destination and its progress; the gateway must be stopped.

    Readings stay in the spool. Configured again under this name, it is new: it begins where its `start` says.

    Exit codes: 0, or 2 when the spool does not know it, or a gateway is running.
    """
    which = resolve_spool(spool, config)
    if which.settings is not None and name in {d.name for d in which.settings.destinations}:
        fail(f"{name} is still configured: take it out of the configuration first, then drop its progress")
    with exit_on_spool_error():
        read_spool_info(which.path)  # refuses what is no spool before a writer would make one of it
        try:
            known = asyncio.run(_drop_destination(which.path, name))
        except SpoolInUseError as fault:
            raise SpoolInUseError(f"{fault}. Stop the gateway first") from fault
    if not known:
        fail(f"{which.path} knows no destination {name}; `tidegate destination list` shows those it does")
    typer.echo(f"{escape_text(name)}: forgotten")


async def _drop_destination(path: Path, name: str) -> bool:
    async with open_spool(path) as spool:
        return await spool.deliveries.drop(name)


def _destination_document(entry: BacklogInfo, configured: set[str] | None) -> dict[str, object]:
    return {
        "name": entry.name,
        "kind": entry.kind,
        "configured": None if configured is None else entry.name in configured,
        "backlog_readings": sum(entry.backlog.values()),
        "oldest_written_at_us": entry.oldest_written_at_us,
        "open_batches": entry.open_batches,
    }


def _backlog_age(entry: BacklogInfo) -> str:
    if entry.oldest_written_at_us is None:
        return ""
    return format_duration(time.time() - entry.oldest_written_at_us / 1e6)
