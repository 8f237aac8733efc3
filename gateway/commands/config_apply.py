"""`tidegate config apply NEW --config FILE --probe 120s`: a trial, rolled back unless the gateway is well."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from cloud_sync.settings_file import SettingsFault
from gateway import settings
from gateway.commands.failures import fail
from gateway.operate import trial
from gateway.operate.in_force import fingerprint_of, masked_values
from gateway.operate.terminal import shown
from gateway.settings import pending
from gateway.settings.changes import changes, refusals
from gateway.settings.effective import flat

if TYPE_CHECKING:
    from types import FrameType

    from gateway.settings import GatewaySettings

EXIT_ROLLED_BACK = 1
_PAUSE_S = 0.5
_BACK_WITHIN_S = 60.0
_SPAN = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h|)")
_SECONDS = {"": 1, "s": 1, "min": 60, "h": 3600}


class _Failed(Exception):  # noqa: N818 - the outcome of a trial, not an error of ours
    """The new configuration does not do; the reasons are its text."""


def apply(
    new: Annotated[Path, typer.Argument(help="The configuration to bring into force.")],
    config: Annotated[Path, typer.Option("--config", "-c", help="The file the gateway runs with.")],
    *,
    probe: Annotated[
        str, typer.Option(help="How long it may take to prove itself, e.g. 120s or 5min.")
    ] = "120s",
    settle: Annotated[
        str, typer.Option(help="How long everything has to be well before it is confirmed.")
    ] = "10s",
) -> None:
    """Put a configuration in place, reload or restart the gateway, and roll back unless all is well.

    The old configuration is kept beside it (.previous). The new one is confirmed once the gateway has been
    healthy and ready, with its destinations reachable as before, for as long as --settle says. If that is
    not so within --probe, or this command is interrupted, the old one is put back. If this command or the
    machine dies meanwhile, the gateway itself goes back: when the time is over, or at its next start.

    Exit codes: 0 when it is in force, 1 when it was rolled back, 2 when it has faults and nothing was done.
    """
    probe_s, settle_s = _seconds("--probe", probe), _seconds("--settle", settle)
    if settle_s >= probe_s:
        fail("--settle must be shorter than --probe")
    text, old, wanted = _read(new, config)
    changed = changes(flat(old), flat(wanted))
    running = trial.in_force_at(old)
    if not changed or running is None:
        pending.swap(config, text)
        reason = "no gateway answers, so nothing was probed" if changed else "it differs in comments only"
        typer.echo(f"{config}: in place; {reason}. Kept: {pending.previous_of(config)}")
        return
    _must_be_ours(running.pid, config)
    if not wanted.status.enabled:
        fail(
            "status.enabled = false: nobody could ask whether the gateway is well, so no trial can succeed; "
            f"nothing was changed. Leave it on, or replace {config} by hand and restart the gateway"
        )
    before = trial.unreachable(old)
    restart = bool(refusals(changed))
    typer.echo(
        f"{len(changed)} changes by a {'restart' if restart else 'reload'}, on trial for {probe_s:g} s"
    )
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupted)
    try:
        pending.begin(config, text, probe_s=probe_s)
        deadline = time.monotonic() + probe_s
        _tell(running.pid, restart=restart)
        _taken(config, wanted, running.attempts, deadline, restart=restart)
        _proven(wanted, before, deadline, settle_s)
        pending.confirm(config)
    except (_Failed, KeyboardInterrupt, OSError) as reason:
        _roll_back(config, old, running.pid, str(reason) or "interrupted", restart=restart)
    typer.echo(f"{config}: in force and confirmed. Kept: {pending.previous_of(config)}")


def _read(new: Path, config: Path) -> tuple[bytes, GatewaySettings, GatewaySettings]:
    """The new text, and both settings; ends the program when they cannot be used."""
    left_s = pending.left_s(config)
    if left_s is not None and left_s >= 0:
        fail(f"another configuration is on trial, for {left_s:.0f} s more: {pending.marker_of(config)}")
    beside = config.with_name(f"{config.name}.{os.getpid()}.candidate")
    try:
        if left_s is not None:
            pending.roll_back(config)
        text = new.read_bytes()
        old = settings.read(config)
        beside.write_bytes(text)
        wanted = settings.load(beside)
    except OSError as fault:
        fail(f"{fault.filename or new}: {fault.strerror or fault}")
    except SettingsFault as fault:
        fail(str(fault).replace(str(beside), str(new)))
    finally:
        beside.unlink(missing_ok=True)
    return text, old, wanted


def _must_be_ours(pid: int, config: Path) -> None:
    """Whoever answers at the port says which process it is; it is signalled only if it runs this file."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        folder = Path(f"/proc/{pid}/cwd").resolve()
    except OSError as fault:
        fail(f"the gateway says it is process {pid}, which cannot be looked at ({fault.strerror}): use sudo?")
    files = {(folder / os.fsdecode(word)).resolve() for word in words if word}
    if b"gateway" not in words or config.resolve() not in files:
        fail(f"process {pid}, which answers for the gateway, does not run with {config}: nothing was changed")


def _tell(pid: int, *, restart: bool) -> None:
    try:
        os.kill(pid, signal.SIGUSR1 if restart else signal.SIGHUP)
    except OSError as fault:
        raise _Failed(f"process {pid} cannot be told: {fault.strerror}") from fault


def _taken(config: Path, wanted: GatewaySettings, attempts: int, deadline: float, *, restart: bool) -> None:
    """Wait until the gateway has the new configuration in force.

    Raises:
        _Failed: it refused it, or did not come back in time.
    """
    expected = fingerprint_of(masked_values(wanted))
    while time.monotonic() < deadline:
        said = trial.in_force_at(wanted)
        if said is not None and said.fingerprint == expected:
            return
        if said is not None and not restart and said.attempts > attempts and said.refused:
            raise _Failed("the gateway refused it: " + "; ".join(said.refused))
        if pending.left_s(config) is None:
            raise _Failed("the gateway could not run with it and went back by itself: see its log")
        time.sleep(_PAUSE_S)
    raise _Failed("the gateway did not take it in time")


def _proven(wanted: GatewaySettings, before: dict[str, str], deadline: float, settle_s: float) -> None:
    """Wait until all has been well for `settle_s`.

    Raises:
        _Failed: it was not by the deadline; says what is wrong.
    """
    expected = fingerprint_of(masked_values(wanted))
    well_since: float | None = None
    faults: list[str] = []
    while time.monotonic() < deadline:
        faults = trial.faults_of(wanted, before)
        said = trial.in_force_at(wanted)
        if said is None or said.fingerprint != expected:
            faults.append("the gateway has another configuration in force")
        now = time.monotonic()
        well_since = None if faults else now if well_since is None else well_since
        if well_since is not None and now - well_since >= settle_s:
            return
        time.sleep(_PAUSE_S)
    raise _Failed("; ".join(faults) or "it was not well for long enough")


def _roll_back(config: Path, old: GatewaySettings, pid: int, reason: str, *, restart: bool) -> NoReturn:
    """Put the old configuration back into force, and end the program."""
    typer.echo(f"tidegate: rolling back: {shown(reason)}", err=True)
    back_already = (
        pending.left_s(config) is None and config.read_bytes() == pending.previous_of(config).read_bytes()
    )
    try:
        pending.roll_back(config)
    except OSError as fault:
        fail(f"{config} cannot be put back: {fault.strerror}; the gateway goes back when the time is over")
    expected = fingerprint_of(masked_values(old))
    if not back_already:
        try:
            _tell(pid, restart=restart)
        except _Failed as gone:
            typer.echo(f"tidegate: {gone}; systemd starts it with the old configuration", err=True)
    deadline = time.monotonic() + _BACK_WITHIN_S
    while time.monotonic() < deadline:
        said = trial.in_force_at(old)
        if said is not None and said.fingerprint == expected:
            typer.echo(f"tidegate: the old configuration is in force again: {config}", err=True)
            raise typer.Exit(EXIT_ROLLED_BACK)
        time.sleep(_PAUSE_S)
    typer.echo(
        f"tidegate: {config} is the old one again, but no gateway answers with it: see its log", err=True
    )
    raise typer.Exit(EXIT_ROLLED_BACK)


def _interrupted(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _seconds(option: str, text: str) -> float:
    found = _SPAN.fullmatch(text.strip())
    if found is None or float(found[1]) <= 0:
        fail(f"{option}: {shown(text)} is no time; write for instance 120s or 5min")
    return float(found[1]) * _SECONDS[found[2]]
