"""The `tidegate` command: finds the command group that was asked for and loads only that."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version as installed_version
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core
import typer.main

from gateway.commands.failures import fail

if TYPE_CHECKING:
    from collections.abc import Sequence

_GROUPS = {
    "gateway": ("gateway.commands.gateway", "Run the gateway agent."),
    "ingest": ("cloud_sync.ingest.cli", "Run the regional ingest service; manage its tokens."),
    "sim": ("firmware_sim.cli", "Simulate a fleet, replay recordings, verify what arrived."),
    "status": ("gateway.commands.status", "Show what comes in, what is kept and what is still to deliver."),
    "query": ("gateway.commands.query", "Show what one series was: a table, a chart, CSV or JSON."),
    "spool": ("gateway.commands.spool", "Look into a spool: info, check, read, export, compact, quarantine."),
    "destination": ("gateway.commands.destination", "Destinations and their progress: list, drop."),
    "device": ("gateway.commands.device", "Passwords of devices: add, list, remove, check."),
    "token": (
        "gateway.commands.token",
        "Tokens for the status page from elsewhere: add, list, remove.",
    ),
    "config": ("gateway.commands.config", "Write, check, show, explain and compare configurations."),
    "decode": ("gateway.commands.decode", "Show what a payload would become, and under which rule."),
    "learn": ("gateway.commands.learn", "Listen for a while and propose rules for what is published."),
    "doctor": ("gateway.commands.doctor", "Look for what is wrong with this gateway, and say what to do."),
    "install": ("gateway.commands.install", "Set this machine up: program, service, configuration."),
    "uninstall": ("gateway.commands.uninstall", "Remove the program and its services; the spool stays."),
    "demo": ("gateway.commands.demo", "Show the whole path at work, through an outage and a kill."),
}
_EXTRAS = {"ingest": "ingest", "sim": "sim", "demo": "demo"}


class LazyGroup(typer.core.TyperGroup):
    """Command groups by name; each is imported when it is called, not for `--help`."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - the parent's signature
        """Every group, in the order a newcomer meets them."""
        return list(_GROUPS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The real group when it is being called, its name and summary for a listing."""
        if cmd_name not in _GROUPS:
            return None
        if cmd_name != ctx.meta.get("called"):
            return typer.core.TyperCommand(cmd_name, help=_GROUPS[cmd_name][1])
        return _load(cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Note which group is called, so that only that one is imported."""
        ctx.meta["called"] = args[0] if args else None
        return super().resolve_command(ctx, args)


def _load(name: str) -> Any:
    module, summary = _GROUPS[name]
    try:
        command = typer.main.get_command(import_module(module).app)
    except ModuleNotFoundError as missing:
        if name not in _EXTRAS:
            raise
        fail(
            f"`tidegate {name}` needs {missing.name}, which is not installed: "
            f"install tidegate[{_EXTRAS[name]}]"
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


def _version(asked: bool) -> None:  # noqa: FBT001 - typer's callback signature
    if asked:
        typer.echo(f"tidegate {installed_version('tidegate')}")
        raise typer.Exit


@app.callback()
def tidegate(
    version: Annotated[  # noqa: FBT002 - read by its callback
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Tidegate: readings made durable before they are acknowledged, delivered once in effect.

    Start with `tidegate demo`, or `tidegate gateway --config FILE`.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `tidegate` script."""
    app(args=None if arguments is None else list(arguments), prog_name="tidegate")


if __name__ == "__main__":
    main()
