"""Fatal errors of a command: one message on stderr, no traceback, exit code 2."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from cloud_sync.runtime.logs import is_journal, notify_systemd

EXIT_USAGE = 2


def fail(message: str) -> NoReturn:
    """Print `message` on stderr and end the program."""
    priority = "<3>" if is_journal(sys.stderr) else ""
    for line in message.splitlines():
        typer.echo(f"{priority}tidegate: {line}", err=True)
    notify_systemd(f"STATUS={' '.join(message.split())}")
    raise typer.Exit(EXIT_USAGE)
