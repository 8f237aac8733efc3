"""`tidegate ingest`: serve, tokens, migrate. Faults of configuration are one message on stderr and exit 2."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from cloud_sync.database.schema import SchemaTooNewError
from cloud_sync.errors import DeliveryError
from cloud_sync.ingest import settings as settings_of_ingest
from cloud_sync.ingest import tokens
from cloud_sync.ingest.serve import CannotStartError, build_sink
from cloud_sync.ingest.serve import run as run_service
from cloud_sync.settings_file import SettingsFault

if TYPE_CHECKING:
    from collections.abc import Iterator

app = typer.Typer(
    help="The regional ingest service: takes batches from gateways and applies them to TimescaleDB.",
    invoke_without_command=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
token_app = typer.Typer(help="Tokens of gateways. A running service notices changes.", no_args_is_help=True)
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
    with _told():
        asyncio.run(run_service(config))


@app.command()
def migrate(config: Config) -> None:
    """Bring the database to this release's schema and end. `serve` does the same when it starts."""
    with _told():
        settings = settings_of_ingest.load(config)
        sink = build_sink(settings.database, settings_of_ingest.dsn_of(settings, config))

        async def prepare() -> str:
            try:
                schema = await sink.prepare()
            finally:
                await sink.aclose()
            kind = (
                f"TimescaleDB {schema.timescale_version}" if schema.timescale_version else "plain PostgreSQL"
            )
            done = ", ".join(schema.applied) or "nothing to do"
            return f"schema {schema.version} on {kind}: {done}"

        try:
            typer.echo(asyncio.run(prepare()))
        except DeliveryError as fault:
            _fail(str(fault), EXIT_FAILED)


@token_app.command("add")
def token_add(gateway: Gateway, config: OptionalConfig = None, tokens_file: TokensFile = None) -> None:
    """Give a gateway one more token and print it. It is not stored and cannot be shown again."""
    with _told():
        typer.echo(tokens.add(_tokens_file(config, tokens_file), gateway))


@token_app.command("list")
def token_list(config: OptionalConfig = None, tokens_file: TokensFile = None) -> None:
    """Print each gateway and how many tokens it has."""
    with _told():
        entries = tokens.read(_tokens_file(config, tokens_file))
    for gateway_id, count in sorted(Counter(entry.gateway_id for entry in entries).items()):
        typer.echo(f"{gateway_id}  {count} token{'s' if count > 1 else ''}")


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
