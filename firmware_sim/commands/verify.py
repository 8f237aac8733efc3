"""`tidegate sim verify`: the record of the truth against a store."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from typer.models import OptionInfo

from firmware_sim.commands.console import (
    EXIT_DIFFERENT,
    JsonOption,
    QuietOption,
    describe_differences,
    show_progress_bar,
)
from firmware_sim.errors import SimError
from firmware_sim.ground_truth import GroundTruth, load_ground_truth
from firmware_sim.verify import databases, spools, stored_files
from firmware_sim.verify.comparison import LossEvidence, StoredRows, compare_readings


def _store_option(text: str, metavar: str | None = None) -> OptionInfo:
    option: OptionInfo = typer.Option(
        help=text, metavar=metavar, rich_help_panel="Where the readings were stored"
    )
    return option


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions:
    """Options of the command."""

    truth: Annotated[Path, typer.Option(help="Folder with the record of `sim run` or `sim replay`.")]
    postgres: Annotated[str | None, _store_option("DSN of a PostgreSQL or TimescaleDB.", "DSN")] = None
    table: Annotated[
        str, _store_option("Table or view there, with at least time, sensor_id, sensor_type, value.")
    ] = "sensor_data"
    files: Annotated[
        Path | None,
        _store_option("Folder with line protocol (*.lp) or exports (*.parquet, *.csv, *.jsonl), also *.gz."),
    ] = None
    precision: Annotated[str, _store_option("Unit of the times in the files: ns, us, ms or s.")] = "ns"
    influx: Annotated[str | None, _store_option("URL of an InfluxDB, read by its v1 API.", "URL")] = None
    database: Annotated[str, _store_option("Database there.")] = "tidegate"
    influx_token_file: Annotated[
        Path | None,
        _store_option(
            "Its first line is the token of an InfluxDB 2 or 3; user and password go into the URL."
        ),
    ] = None
    spool: Annotated[
        Path | None,
        _store_option(
            "A gateway's spool: the store itself, or, beside another store, the source of readings that "
            "still wait or are in quarantine.",
            "FILE",
        ),
    ] = None
    destination: Annotated[
        str | None,
        _store_option(
            "The destination whose losses in the spool count for these files or this InfluxDB, where "
            "several destinations have losses.",
            "NAME",
        ),
    ] = None
    as_json: JsonOption = False
    quiet: QuietOption = False


def verify(options: VerifyOptions) -> None:
    """Compare every acknowledged reading with what a store holds, one by one.

    Every difference is classified: lost, duplicated or altered, waiting in the gateway's spool, in its
    quarantine, declared as given up; what was stored late or flagged is counted as well. A difference in
    InfluxDB is read again until it no longer changes.

    Exit code 0 when everything acknowledged is stored once and unchanged, or declared; 1 when not; 2 when it
    cannot be compared.
    """
    stores = [store for store in (options.postgres, options.files, options.influx) if store is not None]
    if len(stores) > 1 or not (stores or options.spool):
        raise SimError("expected one store: --postgres DSN, --files DIR, --influx URL or --spool FILE")
    if options.precision not in stored_files.PRECISIONS:
        known = ", ".join(stored_files.PRECISIONS)
        raise SimError(f"--precision {options.precision}: expected one of {known}")
    with show_progress_bar(quiet=options.quiet) as step:
        step("reading the record of the truth", 0, 0)
        record = load_ground_truth(options.truth)

        def on_rows(rows: int) -> None:
            step("reading the store", rows, record.rows)

        on_rows(0)
        notes: list[str] = []
        if options.influx is not None:
            evidence = _read_evidence(options, record)
            differences = databases.compare_settled(
                lambda: _read_store(options, record, on_rows), record, evidence
            )
        else:
            stored = _read_store(options, record, on_rows)
            notes, evidence = stored.notes, _read_evidence(options, record)
            step(f"comparing with {len(stored.rows):,} rows", record.rows, record.rows)
            differences = compare_readings(record, stored, evidence)
    if options.as_json:
        summary = {"ok": differences.clean, **asdict(differences), "late": differences.late}
        typer.echo(json.dumps({**summary, "notes": notes}))
    else:
        typer.echo(describe_differences(differences, notes))
    raise typer.Exit(0 if differences.clean else EXIT_DIFFERENT)


def _read_store(options: VerifyOptions, record: GroundTruth, on_rows: Callable[[int], None]) -> StoredRows:
    if options.postgres is not None:
        return asyncio.run(
            databases.fetch_postgres_rows(options.postgres, options.table, record, on_rows=on_rows)
        )
    if options.influx is not None:
        token = _read_token(options.influx_token_file)
        return databases.fetch_influx_rows(
            options.influx, options.database, record, on_rows=on_rows, token=token
        )
    if options.files is not None:
        return stored_files.read_files(options.files, record, precision=options.precision, on_rows=on_rows)
    assert options.spool is not None
    return spools.read_spool(options.spool, record, on_rows=on_rows)


def _read_evidence(options: VerifyOptions, record: GroundTruth) -> LossEvidence:
    """What region and spool know of readings that the store lacks."""
    spool, evidence = options.spool, LossEvidence()
    if options.postgres is not None:
        evidence = asyncio.run(databases.fetch_loss_evidence(options.postgres, record))
    if spool is not None:
        single_store = any((options.postgres, options.files, options.influx))
        evidence.quarantined = spools.read_quarantine(spool, record)
        if single_store:
            evidence.waiting = spools.read_spool(spool, record, on_rows=lambda _: None).rows
        if options.postgres is None:
            evidence.declared = spools.read_declared_losses(
                spool, options.destination, single_store=single_store
            )
    return evidence


def _read_token(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        return path.read_text().partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as fault:
        raise SimError(f"--influx-token-file {path}: {fault}") from fault
