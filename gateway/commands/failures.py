"""How a command says that it cannot go on: one message, no traceback, exit code 2."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from cloud_sync.logs import leads_to_journal
from cloud_sync.service import notify

USAGE_EXIT = 2


def fail(message: str) -> NoReturn:
    """Print `message` on stderr and end the program."""
    priority = "<3>" if leads_to_journal(sys.stderr) else ""
    for line in message.splitlines():
        typer.echo(f"{priority}tidegate: {line}", err=True)
    notify(f"STATUS={' '.join(message.split())}")
    raise typer.Exit(USAGE_EXIT)
