"""`tidegate spool ...`: look into a spool, check it, take readings out of it, tidy it."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from gateway.commands import spool_quarantine, spool_read
from gateway.commands.asking import ask_gateway
from gateway.commands.progress import bar
from gateway.commands.spool_display import show_checked, show_info
from gateway.commands.spool_options import (
    EXIT_FOUND,
    ConfigOption,
    JsonOption,
    SpoolArgument,
    named,
    print_json,
    spool_errors,
)
from gateway.operate import spool_check
from gateway.operate.human import bytes_text, count_text
from gateway.operate.spool_compact import Compacted
from gateway.operate.spool_compact import compact as compact_spool
from gateway.operate.spool_info import info_of
from gateway.operate.terminal import shown
from gateway.spool.errors import SpoolInUse

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def spool() -> None:
    """Look into a spool, check it, take readings out of it, tidy it.

    The spool is named by its file or by --config FILE. All but compact, quarantine drop and quarantine retry
    only read; all but compact and quarantine retry work while the gateway runs.
    """


@app.command()
def info(spool: SpoolArgument = None, *, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show what the spool holds and what each destination still lacks.

    Fast at any size: when counting segments takes over a second, their number, bytes and range of times
    are estimated from a sample, and marked with ~.

    Exit codes: 0, or 2 when the spool cannot be read.
    """
    which = named(spool, config)
    with spool_errors():
        document = info_of(which.path, which.gateway_id)
        if as_json:
            print_json(document)
        else:
            show_info(document)


@app.command()
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
    which = named(spool, config)
    with spool_errors():
        with bar("opening") as watcher:
            result = spool_check.check(which.path, decode=not quick, full=full, watcher=watcher)
        if as_json:
            print_json(result)
        else:
            show_checked(result)
    if result.problem_count:
        raise typer.Exit(EXIT_FOUND)


app.command()(spool_read.read)
app.command()(spool_read.export)


@app.command()
def compact(spool: SpoolArgument = None, *, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Merge small segments into large ones and give free space back.

    A running gateway does this by itself, little by little; named by --config it does it now.

    Exit codes: 0, or 2 when it cannot be done.
    """
    which = named(spool, config)
    with spool_errors():
        try:
            with bar("compacting") as watcher:
                done = asyncio.run(compact_spool(which.path, watcher))
        except SpoolInUse as fault:
            done = ask_gateway(which, "/compact", {}, Compacted, fault)
        if as_json:
            print_json(done._asdict())
        else:
            typer.echo(
                f"{shown(str(which.path))}: {count_text(done.segments_before)} segments became "
                f"{count_text(done.segments_after)}, {bytes_text(done.bytes_before)} became "
                f"{bytes_text(done.bytes_after)} ({count_text(done.rows)} readings)"
            )


app.add_typer(spool_quarantine.app, name="quarantine")
