"""`tidegate config apply`: a new configuration on trial, rolled back unless the gateway stays healthy."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NoReturn

import httpx
import msgspec
import typer

from cloud_sync.runtime.settings_file import InvalidSettingsError
from gateway.commands.exit_errors import fail
from gateway.doctor import Level, network
from gateway.humanize import escape_text
from gateway.settings import config_changes, gateway_settings
from gateway.settings.config_changes import diff_settings, find_reload_obstacles, flatten_settings
from gateway.status.active_config import ActiveConfigDocument, fingerprint_values, mask_settings
from gateway.web.client import local_client, local_endpoint_url

if TYPE_CHECKING:
    from types import FrameType

    from gateway.settings.gateway_settings import GatewaySettings

_REQUEST_TIMEOUT_S: Final = 3.0


def fetch_active_config(settings: GatewaySettings) -> ActiveConfigDocument | None:
    """What the gateway with these settings has in force; None when none answers."""
    answer = _get_from_gateway(settings, "/config")
    if answer is None or not answer.is_success:
        return None
    try:
        return msgspec.json.decode(answer.content, type=ActiveConfigDocument)
    except msgspec.DecodeError:
        return None


def find_regressions(settings: GatewaySettings, before: dict[str, str]) -> list[str]:
    """Everything that is worse than before.

    Args:
        settings: that the gateway runs with now.
        before: destinations that were out of reach with the old settings; they may be so still.
    """
    found = []
    for path in ("/healthz", "/readyz"):
        answer = _get_from_gateway(settings, path)
        if answer is None:
            found.append(f"{path}: no answer")
        elif not answer.is_success:
            found.append(f"{path}: {' '.join(answer.text.split())[:200]}")
    away = find_unreachable_destinations(settings)
    return found + [f"destination {name}: {why}" for name, why in away.items() if name not in before]


def find_unreachable_destinations(settings: GatewaySettings) -> dict[str, str]:
    """Destinations that cannot be reached or do not accept this gateway, each with the reason."""

    async def ask() -> dict[str, str]:
        found = await asyncio.gather(
            *(network.check_destination(d, settings.gateway_id) for d in settings.destinations)
        )
        return {f.subject: f.what for each in found for f in each if f.level is Level.FAULT}

    return asyncio.run(ask())


def _get_from_gateway(settings: GatewaySettings, path: str) -> httpx.Response | None:
    try:
        with local_client(_REQUEST_TIMEOUT_S) as client:
            return client.get(local_endpoint_url(settings.status) + path)
    except (httpx.HTTPError, httpx.InvalidURL):
        return None


EXIT_ROLLED_BACK = 1
_POLL_S = 0.5
_ROLLBACK_TIMEOUT_S = 60.0
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h|)")
_UNIT_S = {"": 1, "s": 1, "min": 60, "h": 3600}


class _TrialFailedError(Exception):
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
    probe_s, settle_s = _parse_seconds("--probe", probe), _parse_seconds("--settle", settle)
    if settle_s >= probe_s:
        fail("--settle must be shorter than --probe")
    text, old, wanted = _read_configs(new, config)
    changed = diff_settings(flatten_settings(old), flatten_settings(wanted))
    running = fetch_active_config(old)
    if not changed or running is None:
        config_changes.replace_config(config, text)
        reason = "no gateway answers, so nothing was probed" if changed else "it differs in comments only"
        typer.echo(f"{config}: in place; {reason}. Kept: {config_changes.previous_config_path(config)}")
        return
    _check_process(running.pid, config)
    if not wanted.status.enabled:
        fail(
            "status.enabled = false: nobody could ask whether the gateway is well, so no trial can succeed; "
            f"nothing was changed. Leave it on, or replace {config} by hand and restart the gateway"
        )
    before = find_unreachable_destinations(old)
    restart = bool(find_reload_obstacles(changed))
    typer.echo(
        f"{len(changed)} changes by a {'restart' if restart else 'reload'}, on trial for {probe_s:g} s"
    )
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _raise_interrupt)
    try:
        config_changes.begin_trial(config, text, probe_s=probe_s)
        deadline = time.monotonic() + probe_s
        _signal_gateway(running.pid, restart=restart)
        _wait_until_active(config, wanted, running.attempts, deadline, restart=restart)
        _wait_until_healthy(wanted, before, deadline, settle_s)
        config_changes.confirm_trial(config)
    except (_TrialFailedError, KeyboardInterrupt, OSError) as reason:
        _roll_back(config, old, running.pid, str(reason) or "interrupted", restart=restart)
    typer.echo(f"{config}: in force and confirmed. Kept: {config_changes.previous_config_path(config)}")


def _read_configs(new: Path, config: Path) -> tuple[bytes, GatewaySettings, GatewaySettings]:
    """The new text, and both settings; ends the program when they cannot be used."""
    left_s = config_changes.trial_time_left_s(config)
    if left_s is not None and left_s >= 0:
        fail(
            f"another configuration is on trial, for {left_s:.0f} s more: "
            f"{config_changes.trial_marker_path(config)}"
        )
    beside = config.with_name(f"{config.name}.{os.getpid()}.candidate")
    try:
        if left_s is not None:
            config_changes.restore_previous_config(config)
        text = new.read_bytes()
        old = gateway_settings.parse_settings_file(config)
        beside.write_bytes(text)
        wanted = gateway_settings.load_settings(beside)
    except OSError as fault:
        fail(f"{fault.filename or new}: {fault.strerror or fault}")
    except InvalidSettingsError as fault:
        fail(str(fault).replace(str(beside), str(new)))
    finally:
        beside.unlink(missing_ok=True)
    return text, old, wanted


def _check_process(pid: int, config: Path) -> None:
    """Whoever answers at the port says which process it is; it is signalled only if it runs this file."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        folder = Path(f"/proc/{pid}/cwd").resolve()
    except OSError as fault:
        fail(f"the gateway says it is process {pid}, which cannot be looked at ({fault.strerror}): use sudo?")
    files = {(folder / os.fsdecode(word)).resolve() for word in words if word}
    if b"gateway" not in words or config.resolve() not in files:
        fail(f"process {pid}, which answers for the gateway, does not run with {config}: nothing was changed")


def _signal_gateway(pid: int, *, restart: bool) -> None:
    try:
        os.kill(pid, signal.SIGUSR1 if restart else signal.SIGHUP)
    except OSError as fault:
        raise _TrialFailedError(f"process {pid} cannot be told: {fault.strerror}") from fault


def _wait_until_active(
    config: Path, wanted: GatewaySettings, attempts: int, deadline: float, *, restart: bool
) -> None:
    """Wait until the gateway has the new configuration in force.

    Raises:
        _Failed: it refused it, or did not come back in time.
    """
    expected = fingerprint_values(mask_settings(wanted))
    while time.monotonic() < deadline:
        said = fetch_active_config(wanted)
        if said is not None and said.fingerprint == expected:
            return
        if said is not None and not restart and said.attempts > attempts and said.refused:
            raise _TrialFailedError("the gateway refused it: " + "; ".join(said.refused))
        if config_changes.trial_time_left_s(config) is None:
            raise _TrialFailedError("the gateway could not run with it and went back by itself: see its log")
        time.sleep(_POLL_S)
    raise _TrialFailedError("the gateway did not take it in time")


def _wait_until_healthy(
    wanted: GatewaySettings, before: dict[str, str], deadline: float, settle_s: float
) -> None:
    """Wait until all has been well for `settle_s`.

    Raises:
        _Failed: it was not by the deadline; says what is wrong.
    """
    expected = fingerprint_values(mask_settings(wanted))
    well_since: float | None = None
    faults: list[str] = []
    while time.monotonic() < deadline:
        faults = find_regressions(wanted, before)
        said = fetch_active_config(wanted)
        if said is None or said.fingerprint != expected:
            faults.append("the gateway has another configuration in force")
        now = time.monotonic()
        well_since = None if faults else now if well_since is None else well_since
        if well_since is not None and now - well_since >= settle_s:
            return
        time.sleep(_POLL_S)
    raise _TrialFailedError("; ".join(faults) or "it was not well for long enough")


def _roll_back(config: Path, old: GatewaySettings, pid: int, reason: str, *, restart: bool) -> NoReturn:
    """Put the old configuration back into force, and end the program."""
    typer.echo(f"tidegate: rolling back: {escape_text(reason)}", err=True)
    back_already = (
        config_changes.trial_time_left_s(config) is None
        and config.read_bytes() == config_changes.previous_config_path(config).read_bytes()
    )
    try:
        config_changes.restore_previous_config(config)
    except OSError as fault:
        fail(f"{config} cannot be put back: {fault.strerror}; the gateway goes back when the time is over")
    expected = fingerprint_values(mask_settings(old))
    if not back_already:
        try:
            _signal_gateway(pid, restart=restart)
        except _TrialFailedError as gone:
            typer.echo(f"tidegate: {gone}; systemd starts it with the old configuration", err=True)
    deadline = time.monotonic() + _ROLLBACK_TIMEOUT_S
    while time.monotonic() < deadline:
        said = fetch_active_config(old)
        if said is not None and said.fingerprint == expected:
            typer.echo(f"tidegate: the old configuration is in force again: {config}", err=True)
            raise typer.Exit(EXIT_ROLLED_BACK)
        time.sleep(_POLL_S)
    typer.echo(
        f"tidegate: {config} is the old one again, but no gateway answers with it: see its log", err=True
    )
    raise typer.Exit(EXIT_ROLLED_BACK)


def _raise_interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parse_seconds(option: str, text: str) -> float:
    found = _DURATION.fullmatch(text.strip())
    if found is None or float(found[1]) <= 0:
        fail(f"{option}: {escape_text(text)} is no time; write for instance 120s or 5min")
    return float(found[1]) * _UNIT_S[found[2]]
