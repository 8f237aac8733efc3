"""`tidegate sim verify`: the record of the truth against a store."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from firmware_sim import influx as influxdb
from firmware_sim import lines
from firmware_sim.commands.options import EXIT_DIFFERENT, JsonOption, QuietOption
from firmware_sim.commands.running import errors_in_words, steps
from firmware_sim.display import describe
from firmware_sim.errors import SimError
from firmware_sim.truth import Truth, load
from firmware_sim.verify import Differences, Stored, compare

_STORES = "Where the readings were stored"


def verify(
    *,
    truth: Annotated[Path, typer.Option(help="Folder with the record of `sim run` or `sim replay`.")],
    postgres: Annotated[
        str | None,
        typer.Option(help="DSN of a PostgreSQL or TimescaleDB.", metavar="DSN", rich_help_panel=_STORES),
    ] = None,
    table: Annotated[
        str,
        typer.Option(
            help="Table or view there, with at least time, sensor_id, sensor_type, value.",
            rich_help_panel=_STORES,
        ),
    ] = "sensor_data",
    files: Annotated[
        Path | None, typer.Option(help="Folder with line protocol, *.lp or *.lp.gz.", rich_help_panel=_STORES)
    ] = None,
    precision: Annotated[
        str, typer.Option(help="Unit of the times in the files: ns, us, ms or s.", rich_help_panel=_STORES)
    ] = "ns",
    influx: Annotated[
        str | None,
        typer.Option(help="URL of an InfluxDB, read by its v1 API.", metavar="URL", rich_help_panel=_STORES),
    ] = None,
    database: Annotated[str, typer.Option(help="Database there.", rich_help_panel=_STORES)] = "tidegate",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare every acknowledged reading with what a store holds, one by one.

    Exit code 0 when nothing is lost, duplicated or altered; 1 when something is; 2 when it cannot
    be compared.
    """
    with errors_in_words():
        if [postgres, files, influx].count(None) != 2:  # noqa: PLR2004 - all but one
            raise SimError(
                "say where the readings were stored: one of --postgres DSN, --files DIR, --influx URL"
            )
        if precision not in lines.PRECISIONS:
            raise SimError(f"--precision {precision}: expected one of {', '.join(lines.PRECISIONS)}")
        with steps(quiet=quiet) as step:
            step("reading the record of the truth")
            record = load(truth)
            step(f"{record.rows:,} readings were produced; reading what was stored")

            def on_rows(rows: int) -> None:
                step(f"{record.rows:,} readings were produced; {rows:,} rows read")

            if postgres is not None:
                stored = _fetch_postgres(postgres, table, record, on_rows)
            elif files is not None:
                stored = lines.read_files(files, record, precision=precision, on_rows=on_rows)
            else:
                stored = influxdb.fetch(str(influx), database, record, on_rows=on_rows)
            step(f"comparing {record.rows:,} readings with {len(stored.rows):,} rows")
            differences = compare(record, stored)
        _report(differences, stored.notes, as_json=as_json)


def _fetch_postgres(dsn: str, table: str, record: Truth, on_rows: Callable[[int], None]) -> Stored:
    from firmware_sim import postgres  # noqa: PLC0415 - asyncpg is needed for this only

    return asyncio.run(postgres.fetch(dsn, table, record, on_rows=on_rows))


def _report(differences: Differences, notes: list[str], *, as_json: bool) -> NoReturn:
    if as_json:
        typer.echo(json.dumps({"ok": differences.clean, **asdict(differences), "notes": notes}))
    else:
        typer.echo(describe(differences, notes))
    raise typer.Exit(0 if differences.clean else EXIT_DIFFERENT)
