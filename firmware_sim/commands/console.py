"""What the commands share: options and exit codes, signals, errors, progress, summaries, sd_notify."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import secrets
import signal
import socket
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, cast

import typer
from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from firmware_sim.errors import SimError
from firmware_sim.verify.comparison import EXAMPLES_SHOWN

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Mapping
    from typing import Self

    from firmware_sim.verify.comparison import Differences

EXIT_DIFFERENT = 1
EXIT_USAGE = 2

BrokerOption = Annotated[
    str,
    typer.Option(
        help="mqtt://[USER:PASSWORD@]HOST[:PORT], or mqtts://. {device} in it becomes the device's id."
    ),
]
TruthOption = Annotated[
    Path, typer.Option(help="Folder for the record of what was produced and acknowledged.")
]
CaOption = Annotated[Path | None, typer.Option(help="PEM certificates to trust, for mqtts://.")]
QosOption = Annotated[int | None, typer.Option(min=0, max=2, help="MQTT quality of service. Default: 1.")]
ReadingsOption = Annotated[
    int | None,
    typer.Option(min=1, help="Readings per publish; more than one are sent as an array. Default: 1."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="The last line as one JSON object.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress, only the last line.")]
DrainOption = Annotated[
    float,
    typer.Option(min=0, help="At the end, wait at most this long for outstanding acknowledgements, in s."),
]


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
def show_spinner(*, quiet: bool) -> Iterator[Callable[[str], None]]:
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
def show_progress_bar(*, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
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
def exit_on_errors() -> Iterator[None]:
    """Turn errors meant for a person into one line and exit code 2, also out of a task group."""
    try:
        yield
    except SimError as fault:
        _exit_with_error(fault)
    except BaseExceptionGroup as group:
        ours, others = group.split(SimError)
        if ours is None or others is not None:
            raise
        leaf: BaseException = ours
        while isinstance(leaf, BaseExceptionGroup):
            leaf = leaf.exceptions[0]
        _exit_with_error(leaf)


def _exit_with_error(fault: BaseException) -> NoReturn:
    typer.echo(f"tidegate sim: {fault}", err=True)
    raise typer.Exit(EXIT_USAGE) from None


class SystemdNotifier:
    """READY at the first word, a fed watchdog and a status text with each."""

    def __init__(self) -> None:
        self._said = False

    def tell(self, status: str) -> None:
        """The fleet is alive and this is how it does."""
        ready, self._said = "" if self._said else "READY=1\n", True
        notify_systemd(f"{ready}WATCHDOG=1\nSTATUS={status}")


def notify_systemd(state: str) -> None:
    """Send assignments, one a line."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        try:
            channel.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
        except OSError:
            return


_LINE_EVERY_S = 5.0
_REASONS_SHOWN = 10
_COUNTER_LABELS = (
    ("produced", "readings sampled"),
    ("published", "readings sent at least once"),
    ("acknowledged", "readings the server has acknowledged"),
    ("outstanding_publishes", "publishes kept until acknowledged"),
    ("publishes_resent", "publishes sent again after a connection was lost"),
    ("refused", "readings the server refused for good"),
    ("overrun", "readings lost to a full ring buffer"),
    ("forgotten", "readings lost with a device's memory"),
    ("malformed_publishes", "spoilt publishes sent beside them"),
    ("reboots", "restarts of devices"),
    ("attacks", "attacks by hostile devices"),
    ("behind_s", "seconds that sampling is behind"),
    ("reconnects", "connections made again"),
)


class ProgressDisplay:
    """A live table on a terminal, a plain line every few seconds elsewhere, nothing when quiet."""

    def __init__(self, title: str, *, quiet: bool) -> None:
        self._title = title
        self._quiet = quiet
        self._console = Console(stderr=True)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._shown_s = time.monotonic()

    def __enter__(self) -> Self:
        if not self._quiet and self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, counters: Mapping[str, object]) -> None:
        """Show the counters of `Fleet.progress` or of a replay."""
        if self._quiet:
            return
        if self._console.is_terminal:
            self._live.update(self._table(counters), refresh=True)
        elif time.monotonic() - self._shown_s >= _LINE_EVERY_S:
            self._shown_s = time.monotonic()
            self._console.out(f"{self._title}: {format_counters(counters)}", highlight=False)

    def _table(self, counters: Mapping[str, object]) -> Table:
        devices = f"{counters['devices_connected']} of {counters['devices']} devices connected"
        table = Table(title=f"{self._title}: {devices}, {counters['elapsed_s']} s", title_justify="left")
        table.add_column("count", justify="right")
        table.add_column("of")
        for name, meaning in _COUNTER_LABELS:
            if counters.get(name) or name in {"produced", "published", "acknowledged"}:
                table.add_row(f"{counters[name]:,}", meaning)
        captions = [f"{name} is down" for name in cast("list[str]", counters.get("services_down", []))]
        captions += [f"last fault: {counters['last_fault']}"] if counters["last_fault"] else []
        table.caption = "; ".join(captions) or None
        return table


def format_counters(counters: Mapping[str, object]) -> str:
    """The counters a log needs, as name=value."""
    names = (
        "produced",
        "published",
        "acknowledged",
        "outstanding_publishes",
        "refused",
        "overrun",
        "reconnects",
        "devices_connected",
        "elapsed_s",
    )
    text = " ".join(f"{name}={counters[name]}" for name in names)
    return f"{text} last_fault={json.dumps(counters['last_fault'])}" if counters["last_fault"] else text


def describe_differences(differences: Differences, notes: list[str]) -> str:
    """The outcome of a comparison in words, ending with one line to search for."""
    lines = [f"note: {note}" for note in notes]
    for kind, texts in differences.examples.items():
        total = getattr(differences, kind)
        lines.append(
            f"{kind}: {total:,}" + (f", the first {EXAMPLES_SHOWN}:" if total > EXAMPLES_SHOWN else ":")
        )
        lines += [f"  {text}" for text in texts]
    d = differences
    if d.flagged:
        lines.append("flagged: " + ", ".join(f"{name} {count:,}" for name, count in d.flagged.items()))
    lines.append(
        f"verify: {'ok' if d.clean else 'FAILED'} acknowledged={d.acknowledged} stored={d.stored} "
        f"lost={d.lost} duplicated={d.duplicated} altered={d.altered} unknown={d.unknown} "
        f"waiting={d.waiting} suppressed={d.suppressed} quarantined={d.quarantined} declared={d.declared} "
        f"late={d.late} "
        f"early={d.early} produced={d.produced} repeated={d.repeated} "
        f"refused={d.refused} rewritten={d.rewritten} foreign={d.foreign}"
    )
    return "\n".join(lines)


def describe_replay(outcome: Mapping[str, object]) -> str:
    """The summary in words, ending with one line to search for."""
    lines = []
    reasons = outcome["skipped_reasons"]
    assert isinstance(reasons, list)
    lines += [f"skipped {reason}" for reason in reasons[:_REASONS_SHOWN]]
    if len(reasons) > _REASONS_SHOWN:
        lines.append(f"skipped: {outcome['skipped']} in all; --json lists the first {len(reasons)}")
    if outcome["repeated"]:
        examples = outcome["repeated_examples"]
        assert isinstance(examples, list)
        lines.append(
            f"{outcome['repeated']} readings repeat the series and time of an earlier one; "
            f"the first of each is the one that is stored: {', '.join(examples)}"
        )
    if outcome["cut_times"]:
        lines.append(f"{outcome['cut_times']} times had digits below a microsecond, which were cut")
    if outcome["last_fault"]:
        lines.append(f"last fault: {outcome['last_fault']}")
    names = (
        "rows",
        "sent",
        "acknowledged",
        "refused",
        "skipped",
        "empty_cells",
        "repeated",
        "reconnects",
        "elapsed_s",
    )
    lines.append("sim replay: " + " ".join(f"{name}={outcome[name]}" for name in names))
    return "\n".join(lines)
