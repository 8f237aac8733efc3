"""The `tidegate` command: finds the command group that was asked for and loads only that."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version as installed_version
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core
import typer.main

from gateway.commands.exit_errors import fail

if TYPE_CHECKING:
    from collections.abc import Sequence

_GROUPS = {
    "gateway": ("gateway.commands.gateway", "Run the gateway agent."),
    "ingest": ("cloud_sync.ingest.cli", "Run the regional ingest service; manage its tokens."),
    "sim": ("firmware_sim.__main__", "Simulate a fleet, replay recordings, verify what arrived."),
    "status": ("gateway.commands.status", "Show what comes in, what is stored and what is still to deliver."),
    "query": ("gateway.commands.readings", "Show one series: a table, a chart, CSV or JSON."),
    "spool": (
        "gateway.commands.spool:spool_app",
        "Inspect a spool: info, check, read, export, compact, quarantine.",
    ),
    "destination": ("gateway.commands.spool:destination_app", "Destinations and their progress: list, drop."),
    "device": ("gateway.commands.credentials:device_app", "Passwords of devices: add, list, remove, check."),
    "token": (
        "gateway.commands.credentials:token_app",
        "Tokens for the status page on other machines: add, list, remove.",
    ),
    "config": ("gateway.commands.config", "Write, check, show, explain and compare configurations."),
    "decode": (
        "gateway.commands.payload_rules:decode_app",
        "Show what a payload becomes, and by which rule.",
    ),
    "learn": (
        "gateway.commands.payload_rules:learn_app",
        "Listen for a while and propose rules for what is published.",
    ),
    "doctor": ("gateway.commands.doctor", "Check this gateway and say what to do about each problem."),
    "install": (
        "gateway.commands.install:install_app",
        "Set this machine up: program, service, configuration.",
    ),
    "uninstall": (
        "gateway.commands.install:uninstall_app",
        "Remove the program and its services; the spool stays.",
    ),
    "demo": ("gateway.commands.demo", "Run the whole path on this machine, through an outage and a kill."),
}
_REQUIRED_EXTRAS = {"ingest": "ingest", "sim": "sim", "demo": "demo"}


class LazyGroup(typer.core.TyperGroup):
    """Command groups by name; each is imported when it is called, not for `--help`."""

    def list_commands(self, _ctx: object) -> list[str]:
        """Every group, in the order of the table."""
        return list(_GROUPS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The imported group if it is called, else its name and summary for a listing."""
        if cmd_name not in _GROUPS:
            return None
        if cmd_name != ctx.meta.get("called"):
            return typer.core.TyperCommand(cmd_name, help=_GROUPS[cmd_name][1])
        return _load_group(cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Remember which group is called, so that only that one is imported."""
        ctx.meta["called"] = args[0] if args else None
        return super().resolve_command(ctx, args)


def _load_group(name: str) -> Any:
    place, summary = _GROUPS[name]
    module, _, attribute = place.partition(":")
    try:
        command = typer.main.get_command(getattr(import_module(module), attribute or "app"))
    except ModuleNotFoundError as missing:
        if name not in _REQUIRED_EXTRAS:
            raise
        fail(
            f"`tidegate {name}` needs {missing.name}, which is not installed: "
            f"install tidegate[{_REQUIRED_EXTRAS[name]}]"
        )
    command.name = name
    command.help = command.help or summary
    return command


app = typer.Typer(
    cls=LazyGroup,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:  # noqa: FBT001 - typer's callback signature
    if asked:
        typer.echo(f"tidegate {installed_version('tidegate')}")
        raise typer.Exit


@app.callback()
def tidegate(
    version: Annotated[  # noqa: FBT002 - read by its callback
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Tidegate: readings are durable before they are acknowledged, and delivered effectively once.

    Start with `tidegate demo`, or `tidegate gateway --config FILE`.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `tidegate` script."""
    app(args=None if arguments is None else list(arguments), prog_name="tidegate")


if __name__ == "__main__":
    main()
