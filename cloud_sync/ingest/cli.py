"""`tidegate ingest`: serve, migrate, gateways, load, tokens.

Faults of configuration are one message on stderr and exit 2.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, TypeVar

import typer

from cloud_sync.database.schema import SchemaTooNewError
from cloud_sync.errors import DeliveryError
from cloud_sync.ingest import loading, overview, tokens, volumes
from cloud_sync.ingest import settings as settings_of_ingest
from cloud_sync.ingest.answers import progress_answer
from cloud_sync.ingest.serve import build_sink
from cloud_sync.ingest.serve import run as run_service
from cloud_sync.ingest.server import CannotStartError
from cloud_sync.restarts import Restarts
from cloud_sync.settings_file import SettingsFault

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from cloud_sync.destinations.timescaledb import TimescaleSink

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
    Restarts().begin()
    with _told():
        asyncio.run(run_service(config))


@app.command()
def migrate(config: Config) -> None:
    """Bring the database to this release's schema and end. `serve` does the same when it starts."""
    with _told():
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
    with _told():
        known = _with_sink(config, lambda sink: sink.progress(gateway))
    if gateway is not None and not known:
        _fail(f"{gateway} has never delivered", EXIT_FAILED)
    if as_json:
        typer.echo(json.dumps({"gateways": [progress_answer(each.gateway_id, each) for each in known]}))
    else:
        typer.echo("\n".join(overview.lines(known, now=datetime.now(UTC))))


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
    with _told():
        try:
            found = volumes.find(folder)
        except OSError as fault:
            _fail(f"{folder}: {fault.strerror or fault}", EXIT_FAILED)
        told = (lambda _words: None) if quiet else (lambda words: typer.echo(words, err=True))
        done = _with_sink(config, lambda sink: loading.load(sink, found, told))
    typer.echo(done.words())
    if done.damaged:
        _fail(f"{done.damaged} of {len(found)} files could not be taken in", EXIT_FAILED)


def _with_sink(config: Path, work: Callable[[TimescaleSink], Awaitable[T]]) -> T:
    """Do `work` on the configuration's database, and close it."""
    settings = settings_of_ingest.load(config)
    sink = build_sink(settings.database, settings_of_ingest.dsn_of(settings, config))

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
    with _told():
        typer.echo(tokens.add(_tokens_file(config, tokens_file), name, scope))


@token_app.command("list")
def token_list(config: OptionalConfig = None, tokens_file: TokensFile = None) -> None:
    """Print each gateway or client, how many tokens it has, and for what if not for batches."""
    with _told():
        entries = tokens.read(_tokens_file(config, tokens_file))
    for (name, scope), count in sorted(Counter((entry.name, entry.scope) for entry in entries).items()):
        shown = "" if scope == "batches" else f"  {scope}"
        typer.echo(f"{name}  {count} token{'s' if count > 1 else ''}{shown}")


@token_app.command("revoke")
def token_revoke(gateway: Gateway, config: OptionalConfig = None, tokens_file: TokensFile = None) -> None:
    """Take away every token of a gateway."""
    with _told():
        count = tokens.revoke(_tokens_file(config, tokens_file), gateway)
    if count == 0:
        _fail(f"{gateway} has no token", EXIT_FAILED)
    typer.echo(f"{gateway}: {count} token{'s' if count > 1 else ''} revoked")


def _tokens_file(config: Path | None, tokens_file: Path | None) -> Path:
    if tokens_file is not None:
        return tokens_file
    if config is None:
        _fail("expected --config FILE or --tokens-file FILE")
    return settings_of_ingest.load(config).tokens_file


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Tell faults that a person can mend, without a traceback."""
    try:
        yield
    except (SettingsFault, tokens.TokensFault, CannotStartError, SchemaTooNewError) as fault:
        _fail(str(fault))


def _fail(message: str, code: int = EXIT_CONFIGURATION) -> NoReturn:
    typer.echo(f"tidegate ingest: {message}", err=True)
    raise typer.Exit(code)
