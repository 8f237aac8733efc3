"""`tidegate ingest`: serve, migrate, gateways, load, token.

Configuration errors are one message on stderr and exit 2.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, TypeVar

import typer

from cloud_sync.http import tokens
from cloud_sync.http.responses import progress_to_json
from cloud_sync.http.uvicorn_server import CannotStartError
from cloud_sync.ingest import file_import
from cloud_sync.ingest import settings as settings_of_ingest
from cloud_sync.ingest.program import build_sink, run_service
from cloud_sync.model.errors import DeliveryError
from cloud_sync.model.ledger_rules import find_coverage
from cloud_sync.runtime.settings_file import InvalidSettingsError
from cloud_sync.runtime.watchdog import FailedStarts
from cloud_sync.timescale.schema import SchemaTooNewError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from cloud_sync.model.ledger_rules import Coverage, DeclaredLoss, GatewayProgress
    from cloud_sync.timescale.sink import TimescaleSink

T = TypeVar("T")

app = typer.Typer(
    help="The regional ingest service: takes batches from gateways and applies them to TimescaleDB.",
    invoke_without_command=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
token_app = typer.Typer(
    help="Tokens of gateways and clients. A running service notices changes.", no_args_is_help=True
)
app.add_typer(token_app, name="token")

Config = Annotated[Path, typer.Option("--config", "-c", help="Settings file, see config/ingest.toml.")]
OptionalConfig = Annotated[
    Path | None, typer.Option("--config", "-c", help="Settings file naming tokens_file.")
]
TokensFile = Annotated[
    Path | None, typer.Option("--tokens-file", help="The file itself, instead of --config.")
]
Gateway = Annotated[str, typer.Argument(help="gateway_id as in the gateway's own settings.")]

EXIT_CONFIGURATION = 2
EXIT_FAILED = 1


@app.callback()
def default(context: typer.Context, config: OptionalConfig = None) -> None:
    """Serve when no command is given."""
    if context.invoked_subcommand is None:
        if config is None:
            _fail("expected --config FILE or a command; see --help")
        serve(config)


@app.command()
def serve(config: Config) -> None:
    """Take batches until SIGTERM, then finish the requests accepted."""
    FailedStarts().begin()
    with _exit_on_error():
        asyncio.run(run_service(config))


@app.command()
def migrate(config: Config) -> None:
    """Bring the database to this release's schema and end. `serve` does the same when it starts."""
    with _exit_on_error():
        schema = _with_sink(config, lambda sink: sink.prepare())
    kind = f"TimescaleDB {schema.timescale_version}" if schema.timescale_version else "plain PostgreSQL"
    done = ", ".join(schema.applied) or "nothing to do"
    typer.echo(f"schema {schema.version} on {kind}: {done}")


@app.command()
def gateways(
    config: Config,
    gateway: Annotated[str | None, typer.Argument(help="Only this one.")] = None,
    as_json: Annotated[  # noqa: FBT002 - a flag of the command line
        bool, typer.Option("--json", help="One JSON object, as the service answers.")
    ] = False,
) -> None:
    """Show what has been applied of every gateway: when, complete through which commit, gaps, readings."""
    with _exit_on_error():
        known = _with_sink(config, lambda sink: sink.progress(gateway))
    if gateway is not None and not known:
        _fail(f"{gateway} has never delivered", EXIT_FAILED)
    if as_json:
        typer.echo(json.dumps({"gateways": [progress_to_json(each.gateway_id, each) for each in known]}))
    else:
        typer.echo("\n".join(describe_gateways(known, now=datetime.now(UTC))))


@app.command()
def load(
    folder: Annotated[
        Path, typer.Argument(help="Where a gateway's file destination wrote, or a copy of it.")
    ],
    config: Config,
    quiet: Annotated[  # noqa: FBT002 - as above
        bool, typer.Option("--quiet", help="No progress, only the sums.")
    ] = False,
) -> None:
    """Take in line protocol files. Safe to repeat, to interrupt, and beside a running service."""
    with _exit_on_error():
        try:
            found = file_import.find_import_files(folder)
        except OSError as fault:
            _fail(f"{folder}: {fault.strerror or fault}", EXIT_FAILED)
        report = (lambda _text: None) if quiet else (lambda text: typer.echo(text, err=True))
        done = _with_sink(config, lambda sink: file_import.import_files(sink, found, report))
    typer.echo(done.describe())
    if done.damaged:
        _fail(f"{done.damaged} of {len(found)} files could not be taken in", EXIT_FAILED)


def _with_sink(config: Path, work: Callable[[TimescaleSink], Awaitable[T]]) -> T:
    """Do `work` on the configuration's database, and close it."""
    settings = settings_of_ingest.load_settings(config)
    sink = build_sink(settings.database, settings_of_ingest.read_dsn(settings, config))

    async def done() -> T:
        try:
            return await work(sink)
        finally:
            await sink.aclose()

    try:
        return asyncio.run(done())
    except DeliveryError as fault:
        _fail(str(fault), EXIT_FAILED)


@token_app.command("add")
def token_add(
    name: Gateway,
    config: OptionalConfig = None,
    tokens_file: TokensFile = None,
    scope: Annotated[
        tokens.Scope,
        typer.Option(
            help="batches: a gateway. readings: a client of POST /v1/readings. view: see all gateways."
        ),
    ] = "batches",
) -> None:
    """Give a gateway or client one more token and print it. It is not stored and cannot be shown again."""
    with _exit_on_error():
        typer.echo(tokens.add_token(_tokens_file(config, tokens_file), name, scope))


@token_app.command("list")
def token_list(config: OptionalConfig = None, tokens_file: TokensFile = None) -> None:
    """Print each gateway or client, how many tokens it has, and for what if not for batches."""
    with _exit_on_error():
        entries = tokens.read_tokens(_tokens_file(config, tokens_file))
    for (name, scope), count in sorted(Counter((entry.name, entry.scope) for entry in entries).items()):
        shown = "" if scope == "batches" else f"  {scope}"
        typer.echo(f"{name}  {count} token{'s' if count > 1 else ''}{shown}")


@token_app.command("revoke")
def token_revoke(gateway: Gateway, config: OptionalConfig = None, tokens_file: TokensFile = None) -> None:
    """Remove every token of a gateway."""
    with _exit_on_error():
        count = tokens.revoke_tokens(_tokens_file(config, tokens_file), gateway)
    if count == 0:
        _fail(f"{gateway} has no token", EXIT_FAILED)
    typer.echo(f"{gateway}: {count} token{'s' if count > 1 else ''} revoked")


def _tokens_file(config: Path | None, tokens_file: Path | None) -> Path:
    if tokens_file is not None:
        return tokens_file
    if config is None:
        _fail("expected --config FILE or --tokens-file FILE")
    return settings_of_ingest.load_settings(config).tokens_file


@contextlib.contextmanager
def _exit_on_error() -> Iterator[None]:
    """End the program with one message for errors that an operator can correct."""
    try:
        yield
    except (InvalidSettingsError, tokens.TokenFileError, CannotStartError, SchemaTooNewError) as fault:
        _fail(str(fault))


def _fail(message: str, code: int = EXIT_CONFIGURATION) -> NoReturn:
    typer.echo(f"tidegate ingest: {message}", err=True)
    raise typer.Exit(code)


_MAX_GAPS_SHOWN = 5


def describe_gateways(known: Sequence[GatewayProgress], *, now: datetime) -> Iterator[str]:
    """One paragraph a gateway: when it delivered last, then a line for each epoch and class."""
    if not known:
        yield "no gateway has delivered yet"
    for each in known:
        readings = sum(applied.rows for applied in each.ranges)
        seen = _format_age((now - each.last_seen).total_seconds())
        yield f"{each.gateway_id}  last seen {seen}  {readings:,} readings"
        for coverage in find_coverage(each.ranges):
            name = f"{coverage.record_class.name.lower()} of epoch {coverage.epoch.hex[:8]}"
            yield f"  {name}: {_describe_coverage(coverage)}"
        for reason, losses in groupby(sorted(each.declared, key=_loss_group), key=_loss_group):
            yield f"  declared: {_describe_losses(reason, list(losses))}"


def _describe_coverage(coverage: Coverage) -> str:
    parts = [f"complete through {coverage.complete_through}"]
    gaps, more = coverage.gaps[:_MAX_GAPS_SHOWN], len(coverage.gaps) - _MAX_GAPS_SHOWN
    if gaps:
        newest = max(last for _, last in (*coverage.spans, *coverage.partial))
        shown = ", ".join(f"{first}..{last}" if last > first else str(first) for first, last in gaps)
        shown += f" and {more} more" if more > 0 else ""
        count = len(coverage.gaps)
        parts.append(f"newest {newest}, {count} gap{'s' if count > 1 else ''}: {shown}")
    arriving = len(coverage.partial)
    if arriving:
        parts.append(f"{arriving} range{'s' if arriving > 1 else ''} in part")
    counts = {name: coverage.sum(name) for name in ("duplicates", "conflicts", "refused")}
    parts += [f"{count:,} {name}" for name, count in counts.items() if count]
    return "; ".join(parts)


def _loss_group(loss: DeclaredLoss) -> tuple[str, str, str]:
    """Losses of one group are one line."""
    return loss.range.record_class.name.lower(), loss.reason, loss.survives


def _describe_losses(reason: tuple[str, str, str], losses: list[DeclaredLoss]) -> str:
    record_class, why, survives = reason
    rows = sum(loss.rows for loss in losses)
    first = min(loss.range.first_commit for loss in losses)
    last = max(loss.range.last_commit for loss in losses)
    begins = [loss.from_time for loss in losses if loss.from_time]
    ends = [loss.to_time for loss in losses if loss.to_time]
    times = f", of {min(begins):%Y-%m-%d %H:%M} to {max(ends):%Y-%m-%d %H:%M} UTC" if begins and ends else ""
    left = f", left as {survives}" if survives else ""
    return f"{rows:,} {record_class} rows within {first}..{last} given up: {why}{times}{left}"


def _format_age(seconds: float) -> str:
    for unit, name in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{int(seconds // unit)} {name} ago"
    return f"{max(0, int(seconds))} s ago"
