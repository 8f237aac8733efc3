"""How a command says that it cannot go on: one message, no traceback, exit code 2."""

from __future__ import annotations

from typing import NoReturn

import typer

USAGE_EXIT = 2


def fail(message: str) -> NoReturn:
    """Print `message` on stderr and end the program."""
    for line in message.splitlines():
        typer.echo(f"tidegate: {line}", err=True)
    raise typer.Exit(USAGE_EXIT)
