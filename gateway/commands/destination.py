"""`tidegate destination list | drop`: whose progress a spool keeps, and forgetting one."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Annotated

import typer

from gateway.commands.failures import fail
from gateway.commands.spool_options import (
    ConfigOption,
    JsonOption,
    console,
    named,
    print_json,
    spool_errors,
    table,
)
from gateway.operate.human import count_text, seconds_text
from gateway.operate.spool_info import BacklogInfo, info_of
from gateway.operate.terminal import shown
from gateway.spool.database import Database
from gateway.spool.deliveries import Deliveries
from gateway.spool.errors import SpoolInUse
from gateway.spool.segments import Segments
from gateway.spool.series import SeriesBook

app = typer.Typer(add_completion=False, no_args_is_help=True)
SpoolOption = Annotated[
    Path | None, typer.Option("--spool", help="The spool's file. Or name it by --config.")
]


@app.callback()
def destination() -> None:
    """Destinations that a spool knows, and how far each is.

    A destination that is taken out of the configuration keeps its progress: put back under the same name, it
    goes on where it was. Until then nothing is kept in the spool for its sake.
    """


@app.command("list")
def list_(spool: SpoolOption = None, *, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """List every destination the spool knows, configured or not, with what it still lacks.

    Exit codes: 0, or 2 when the spool cannot be read.
    """
    which = named(spool, config)
    configured = None if which.settings is None else {d.name for d in which.settings.destinations}
    with spool_errors():
        known = info_of(which.path, which.gateway_id).destinations
        if as_json:
            print_json([_document(d, configured) for d in known])
            return
        rows = table("destination", "kind", "configured", "lacks", "oldest", right=("lacks",))
        for entry in known:
            state = "?" if configured is None else "yes" if entry.name in configured else "no"
            lacks = sum(entry.backlog.values())
            rows.add_row(
                shown(entry.name), shown(entry.kind), state, f"{count_text(lacks)} readings", _age(entry)
            )
        console().print(rows)


@app.command()
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
    which = named(spool, config)
    if which.settings is not None and name in {d.name for d in which.settings.destinations}:
        fail(f"{name} is still configured: take it out of the configuration first, then drop its progress")
    with spool_errors():
        info_of(which.path)  # refuses what is no spool before a writer would make one of it
        try:
            known = asyncio.run(_drop(which.path, name))
        except SpoolInUse as fault:
            raise SpoolInUse(f"{fault}. Stop the gateway first") from fault
    if not known:
        fail(f"{which.path} knows no destination {name}; `tidegate destination list` shows those it does")
    typer.echo(f"{shown(name)}: forgotten")


async def _drop(path: Path, name: str) -> bool:
    database = await Database.open(path)
    try:
        book = await SeriesBook.load(database)
        return await Deliveries(database, await Segments.load(database, book), book, "").drop(name)
    finally:
        await database.close()


def _document(entry: BacklogInfo, configured: set[str] | None) -> dict[str, object]:
    return {
        "name": entry.name,
        "kind": entry.kind,
        "configured": None if configured is None else entry.name in configured,
        "backlog_readings": sum(entry.backlog.values()),
        "oldest_written_at_us": entry.oldest_written_at_us,
        "open_batches": entry.open_batches,
    }


def _age(entry: BacklogInfo) -> str:
    if entry.oldest_written_at_us is None:
        return ""
    return seconds_text(time.time() - entry.oldest_written_at_us / 1e6)
