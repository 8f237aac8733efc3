"""What every command does around its work: signals, errors in words, a spinner, names of runs."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import secrets
import signal
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from firmware_sim.commands.options import EXIT_USAGE
from firmware_sim.errors import SimError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator


def new_run_name() -> str:
    """A name for a run that sorts by time and is not given twice."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{secrets.token_hex(2)}"


def run_until_signal(work: Callable[[asyncio.Event], Coroutine[None, None, None]]) -> None:
    """Run `work` with an event that SIGINT and SIGTERM set; errors come out as they are, not in groups."""

    async def guarded() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        await work(stop)

    asyncio.run(guarded())


def allow_open_files(wanted: int) -> None:
    """Raise the soft limit on open files to what the fleet needs.

    Raises:
        SimError: the hard limit does not allow it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise SimError(
            f"so many devices need {wanted:,} open files and only {hard:,} are allowed here; "
            "raise the limit (ulimit -Hn, LimitNOFILE=) or simulate fewer"
        )
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextlib.contextmanager
def steps(*, quiet: bool) -> Iterator[Callable[[str], None]]:
    """A spinner with the time gone by; calling what it gives says what is being done."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda _: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda text: bar.update(task, description=text)


@contextlib.contextmanager
def bar(*, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar; calling what it gives says what is being done, how much of it is done, of how much
    (0: no idea).
    """
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda _text, _done, _total: None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task("starting", total=None)
        yield lambda text, done, total: shown.update(
            task, description=text, completed=done, total=total or None
        )


@contextlib.contextmanager
def errors_in_words() -> Iterator[None]:
    """Turn errors meant for a person into one line and exit code 2, also out of a task group."""
    try:
        yield
    except SimError as fault:
        _give_up(fault)
    except BaseExceptionGroup as group:
        ours, others = group.split(SimError)
        if ours is None or others is not None:
            raise
        leaf: BaseException = ours
        while isinstance(leaf, BaseExceptionGroup):
            leaf = leaf.exceptions[0]
        _give_up(leaf)


def _give_up(fault: BaseException) -> NoReturn:
    typer.echo(f"tidegate sim: {fault}", err=True)
    raise typer.Exit(EXIT_USAGE) from None
