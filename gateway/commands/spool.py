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
    add_command,
    console,
    exit_on_spool_error,
    print_json,
    progress_bar,
    resolve_spool,
    table,
)
from gateway.commands.spool_quarantine import post_to_gateway
from gateway.humanize import escape_text, format_bytes, format_count, format_duration, format_time, pluralize
from gateway.spool.errors import SpoolInUseError
from gateway.spool.spool import CompactionResult, compact_spool, open_spool
from gateway.spooltools import checker
from gateway.spooltools.spool_info import BacklogInfo, read_spool_info

if TYPE_CHECKING:
    from gateway.spooltools.checker import CheckReport
    from gateway.spooltools.spool_info import ClassInfo, SpoolInfo

_LIVE_TEXT = {True: "in use by a gateway", False: "not in use", None: "not known whether it is in use"}


def _print_info(document: SpoolInfo) -> None:
    out = console()
    gateway = f", gateway {document.gateway_id}" if document.gateway_id else ""
    each = "" if document.bytes_per_reading is None else f", {document.bytes_per_reading:.2f} B per reading"
    free = format_bytes(document.free_pages * document.page_bytes)
    out.print(f"spool    {escape_text(document.path)}: {_LIVE_TEXT[document.live]}{gateway}")
    out.print(f"format   version {document.format_version}, epoch {escape_text(document.epoch)}")
    out.print(
        f"on disk  {format_bytes(document.file_bytes)} and {format_bytes(document.wal_bytes)} of WAL; "
        f"{format_bytes(document.used_bytes)} in use{each}; "
        f"{format_count(document.free_pages)} free pages ({free})"
    )
    quarantined = format_count(document.quarantined)
    out.print(f"holds    {format_count(document.series)} series, {quarantined} quarantined")
    if document.damaged_segments:
        segments, damaged = format_count(document.damaged_segments), format_count(document.damaged_rows)
        out.print(f"damaged  {segments} segments with {damaged} readings, set aside")
    if document.classes:
        numbers = ("kept", "ever", "segments", "bytes")
        rows = table("class", "kept", "ever", "commits", "segments", "bytes", "from", "to", right=numbers)
        for name, info in document.classes.items():
            rows.add_row(name, *_class_cells(info))
        out.print(rows)
    if document.destinations:
        out.print(_destinations_table(document))


def _print_check_result(result: CheckReport) -> None:
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
    verdict = f"{format_count(result.problem_count)} problems" if result.problem_count else "sound"
    text = f"{escape_text(result.path)}: {verdict}; {format_count(result.rows)} readings"
    if result.segments:
        text += f", {format_count(result.decoded_segments)} of their segments decoded"
    out.print(text, soft_wrap=True)


def _class_cells(info: ClassInfo) -> list[str]:
    about = "~" if info.estimated else ""
    commits = f"{info.oldest_commit}..{info.newest_commit}"
    return [
        format_count(info.rows),
        format_count(info.rows_ever),
        commits if info.oldest_commit else f"none of {info.newest_commit}",
        about + format_count(info.segments),
        about + format_bytes(info.block_bytes),
        *("-" if at is None else about + format_time(at) for at in (info.min_time_us, info.max_time_us)),
    ]


def _destinations_table(document: SpoolInfo) -> object:
    numbers = ("backlog", "oldest", "open batches", "delivered ranges")
    rows = table("destination", *numbers, right=numbers)
    for destination in document.destinations:
        backlog = {name: count for name, count in destination.backlog.items() if count}
        rows.add_row(
            escape_text(f"{destination.name} ({destination.kind})"),
            ", ".join(pluralize(count, name, f"{name}s") for name, count in backlog.items()) or "0",
            _backlog_age(destination),
            str(destination.open_batches),
            str(destination.delivered_ranges),
        )
    return rows


spool_app = typer.Typer(add_completion=False, no_args_is_help=True)


@spool_app.callback()
def spool() -> None:
    """Inspect, check, read, export and compact a spool, and manage its quarantine.

    Name the spool by its file or by --config FILE. All commands but compact, quarantine drop and quarantine
    retry only read; all work while the gateway runs (compact and quarantine retry need --config then).
    """


@spool_app.command()
def info(spool: SpoolArgument = None, *, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show what the spool holds and the backlog of each destination.

    Fast at any size: when counting segments takes over a second, their number, bytes and time range are
    estimated from a sample, and marked with ~.

    Exit codes: 0, or 2 when the spool cannot be read.
    """
    which = resolve_spool(spool, config)
    with exit_on_spool_error():
        document = read_spool_info(which.path, which.gateway_id)
        if as_json:
            print_json(document)
        else:
            _print_info(document)


@spool_app.command()
def check(
    spool: SpoolArgument = None,
    *,
    config: ConfigOption = None,
    quick: Annotated[bool, typer.Option("--quick", help="Skip decoding the segments.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Run SQLite's slower integrity_check.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check the integrity of the spool; report every problem with its place.

    Checks SQLite's pages, every segment's checksum, rows, times and series, the chain of commits, and the
    progress of every destination. Changes nothing.

    Exit codes: 0 sound, 1 problems found, 2 there is no spool or a later release wrote it.
    """
    which = resolve_spool(spool, config)
    with exit_on_spool_error():
        with progress_bar("opening") as progress:
            result = checker.check_spool(which.path, decode=not quick, full=full, progress=progress)
        if as_json:
            print_json(result)
        else:
            _print_check_result(result)
    if result.problem_count:
        raise typer.Exit(EXIT_FOUND)


add_command(spool_app, readings.read, readings.ReadOptions)
spool_app.command()(readings.export)


@spool_app.command()
def compact(spool: SpoolArgument = None, *, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Merge small segments into large ones and return free space to the file system.

    A running gateway does this continuously in small steps; with --config it does all of it now.

    Exit codes: 0, or 2 on an error.
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
SpoolOption = Annotated[Path | None, typer.Option("--spool", help="The spool, unless --config names it.")]


@destination_app.callback()
def destination() -> None:
    """Destinations that a spool knows, and their progress.

    A destination that is removed from the configuration keeps its progress: added again under the same name,
    it continues where it was.
    """


@destination_app.command("list")
def list_destinations(
    spool: SpoolOption = None, *, config: ConfigOption = None, as_json: JsonOption = False
) -> None:
    """List every destination the spool knows, configured or not, with its backlog.

    Exit codes: 0, or 2 when the spool cannot be read.
    """
    which = resolve_spool(spool, config)
    configured = None if which.settings is None else {d.name for d in which.settings.destinations}
    with exit_on_spool_error():
        known = read_spool_info(which.path, which.gateway_id).destinations
        if as_json:
            print_json([_destination_document(d, configured) for d in known])
            return
        rows = table("destination", "kind", "configured", "backlog", "oldest", right=("backlog",))
        for entry in known:
            state = "?" if configured is None else "yes" if entry.name in configured else "no"
            backlog = f"{format_count(sum(entry.backlog.values()))} records"
            rows.add_row(
                escape_text(entry.name), escape_text(entry.kind), state, backlog, _backlog_age(entry)
            )
        console().print(rows)


@destination_app.command()
def drop(
    name: Annotated[str, typer.Argument(help="The destination's name.")],
    spool: SpoolOption = None,
    *,
    config: ConfigOption = None,
) -> None:
    """Delete a destination's progress from the spool; the gateway must be stopped.

    Readings stay in the spool. A destination added again under this name starts where its `start` says.

    Exit codes: 0, or 2 when the spool does not know it, or a gateway is running.
    """
    which = resolve_spool(spool, config)
    if which.settings is not None and name in {d.name for d in which.settings.destinations}:
        fail(f"{name} is still configured: remove it from the configuration first, then drop its progress")

    async def drop_progress() -> bool:
        async with open_spool(which.path) as opened:
            return await opened.deliveries.drop(name)

    with exit_on_spool_error():
        read_spool_info(which.path)  # fails for another file, which a writer would make a spool of
        try:
            known = asyncio.run(drop_progress())
        except SpoolInUseError as fault:
            raise SpoolInUseError(f"{fault}. Stop the gateway first") from fault
    if not known:
        fail(f"{which.path} knows no destination {name}; see `tidegate destination list`")
    typer.echo(f"{escape_text(name)}: dropped")


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
        return "-"
    return f"{format_duration(time.time() - entry.oldest_written_at_us / 1e6)} ago"
