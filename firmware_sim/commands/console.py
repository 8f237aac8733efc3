"""Shared by the commands: options and exit codes, signals, errors, progress, summaries, sd_notify."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import resource
import secrets
import signal
import socket
import time
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from firmware_sim.errors import SimError
from firmware_sim.verify.comparison import EXAMPLES_SHOWN

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Mapping
    from typing import Self

    from _typeshed import DataclassInstance

    from firmware_sim.verify.comparison import Differences

EXIT_DIFFERENT = 1

BrokerOption = Annotated[
    str,
    typer.Option(
        help="mqtt://[USER:PASSWORD@]HOST[:PORT], or mqtts://. {device} is replaced by the device's id."
    ),
]
CaOption = Annotated[Path | None, typer.Option(help="PEM certificates to trust, for mqtts://.")]
JsonOption = Annotated[bool, typer.Option("--json", help="The last line as one JSON object.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress, only the last line.")]
WindowOption = Annotated[
    int, typer.Option(min=1, help="Publishes that a device sends without acknowledgement.")
]
KeepaliveOption = Annotated[int, typer.Option(min=1, help="MQTT keep-alive, in s.")]


def add_command(app: typer.Typer, run: Callable[..., None], *groups: type[DataclassInstance]) -> None:
    """Add `run` as a command. Its arguments are these keyword-only dataclasses, its options their fields.

    A SimError, also in exception groups, becomes one line on standard error and exit code 2.
    """

    def command(**values: object) -> None:
        try:
            run(*(group(**{each.name: values[each.name] for each in fields(group)}) for group in groups))
        except (SimError, BaseExceptionGroup) as fault:
            first: BaseException = fault
            while isinstance(first, BaseExceptionGroup):
                if first.split(SimError)[1] is not None:
                    raise
                first = first.exceptions[0]
            typer.echo(f"tidegate sim: {first}", err=True)
            raise typer.Exit(2) from None

    signatures = [inspect.signature(group, eval_str=True) for group in groups]
    parameters = [parameter for each in signatures for parameter in each.parameters.values()]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    app.command(run.__name__, help=inspect.getdoc(run))(command)


def build_run_name() -> str:
    """A unique name for a run that sorts by time."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{secrets.token_hex(2)}"


def parse_rate(option: str, text: str) -> float:
    """A number above 0; infinity for max."""
    try:
        rate = float("inf") if text == "max" else float(text)
    except ValueError:
        rate = 0.0
    if not rate > 0 or (rate == float("inf") and text != "max"):
        raise SimError(f"{option} {text}: expected a number above 0, or max")
    return rate


def run_until_signal(work: Callable[[asyncio.Event], Coroutine[None, None, None]]) -> None:
    """Run `work` with an event that SIGINT and SIGTERM set."""

    async def run() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        await work(stop)

    asyncio.run(run())


def raise_open_files_limit(needed: int) -> None:
    """Raise the soft limit on open files; SimError when the hard limit does not allow it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise SimError(
            f"the devices need {needed:,} open files and the limit is {hard:,}; "
            "raise it (ulimit -Hn, LimitNOFILE=) or simulate fewer devices"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


@contextlib.contextmanager
def show_progress_bar(*, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on a terminal: call it with a step, how much is done, and of how much (0: unknown)."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    disable = quiet or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=disable) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda text, done, total: bar.update(
            task, description=text, completed=done, total=total or None
        )


class SystemdNotifier:
    """Sends READY with the first status, and feeds the watchdog with each."""

    def __init__(self) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "")
        self._prefix = "READY=1\n"

    def notify(self, status: str) -> None:
        """Send a status text; does nothing outside systemd."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
        with socket.socket(socket.AF_UNIX, kind) as channel, contextlib.suppress(OSError):
            channel.sendto(f"{self._prefix}WATCHDOG=1\nSTATUS={status}".encode(), address)
        self._prefix = ""


_LINE_EVERY_S = 5.0
_REASONS_SHOWN = 10
_COUNTER_LABELS = (
    ("produced", "readings sampled"),
    ("published", "readings sent at least once"),
    ("acknowledged", "readings the server has acknowledged"),
    ("outstanding_publishes", "publishes kept until acknowledged"),
    ("publishes_resent", "publishes sent again after a connection was lost"),
    ("refused", "readings the server refused"),
    ("overrun", "readings lost to a full ring buffer"),
    ("forgotten", "readings lost with a device's memory"),
    ("malformed_publishes", "publishes with a corrupted payload"),
    ("reboots", "restarts of devices"),
    ("attacks", "attacks by hostile devices"),
    ("behind_s", "seconds that sampling is behind"),
    ("reconnects", "connections made again"),
)


class ProgressDisplay:
    """Counters in progress.json, in systemd's status, and as a table or lines on standard error."""

    def __init__(self, title: str, folder: Path, *, quiet: bool) -> None:
        self._title = title
        self._folder = folder
        self._quiet = quiet
        self._systemd = SystemdNotifier()
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
        """Show the counters of a fleet, a load or a replay."""
        write_progress(self._folder, counters)
        self._systemd.notify(format_counters(counters))
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


def write_progress(folder: Path, counters: Mapping[str, object]) -> None:
    """Replace progress.json in one step, so that a reader never sees half of it."""
    beside = folder / f".progress.{os.getpid()}"
    beside.write_text(json.dumps(counters) + "\n")
    beside.replace(folder / "progress.json")


def format_counters(counters: Mapping[str, object]) -> str:
    """The most important counters as name=value."""
    names = "produced published acknowledged outstanding_publishes refused overrun reconnects"
    text = _join_counts(counters, f"{names} devices_connected elapsed_s")
    return f"{text} last_fault={json.dumps(counters['last_fault'])}" if counters["last_fault"] else text


def _join_counts(counters: Mapping[str, object], names: str) -> str:
    return " ".join(f"{name}={counters[name]}" for name in names.split())


def describe_differences(differences: Differences, notes: list[str]) -> str:
    """The outcome of a comparison as text; the last line has all counts."""
    lines = [f"note: {note}" for note in notes]
    for kind, texts in differences.examples.items():
        total = getattr(differences, kind)
        lines.append(
            f"{kind}: {total:,}" + (f", the first {EXAMPLES_SHOWN}:" if total > EXAMPLES_SHOWN else ":")
        )
        lines += [f"  {text}" for text in texts]
    if differences.flagged:
        flagged = (f"{name} {count:,}" for name, count in differences.flagged.items())
        lines.append(f"flagged: {', '.join(flagged)}")
    names = (
        "acknowledged stored lost duplicated altered unknown waiting suppressed quarantined declared late "
        "early produced repeated refused rewritten foreign"
    )
    counts = _join_counts({**asdict(differences), "late": differences.late}, names)
    lines.append(f"verify: {'ok' if differences.clean else 'FAILED'} {counts}")
    return "\n".join(lines)


def describe_replay(outcome: Mapping[str, object]) -> str:
    """The outcome of a replay as text; the last line has the counts."""
    reasons = cast("list[str]", outcome["skipped_reasons"])
    lines = [f"skipped {reason}" for reason in reasons[:_REASONS_SHOWN]]
    if len(reasons) > _REASONS_SHOWN:
        lines.append(f"skipped: {outcome['skipped']} in all; --json lists the first {len(reasons)}")
    if outcome["repeated"]:
        examples = cast("list[str]", outcome["repeated_examples"])
        lines.append(
            f"{outcome['repeated']} readings repeat the series and time of an earlier one; "
            f"only the first of each is stored: {', '.join(examples)}"
        )
    if outcome["cut_times"]:
        lines.append(f"{outcome['cut_times']} times had digits below a microsecond, which were cut")
    if outcome["last_fault"]:
        lines.append(f"last fault: {outcome['last_fault']}")
    names = "rows sent acknowledged refused skipped empty_cells repeated reconnects elapsed_s"
    lines.append(f"sim replay: {_join_counts(outcome, names)}")
    return "\n".join(lines)
