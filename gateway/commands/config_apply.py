"""`tidegate config apply`: a new configuration on trial, rolled back unless the gateway stays healthy."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final, NoReturn

import typer

from cloud_sync.runtime.settings_file import InvalidSettingsError
from gateway.commands.exit_errors import fail
from gateway.doctor import Level, network
from gateway.humanize import escape_text, parse_duration_s
from gateway.settings import config_changes
from gateway.settings.config_changes import diff_settings, find_reload_obstacles, flatten_settings
from gateway.settings.gateway_settings import GatewaySettings, load_settings, parse_settings_file
from gateway.status.active_config import ActiveConfigDocument, fingerprint_values, mask_settings
from gateway.web.client import GatewayClientError, local_gateway_client

_REQUEST_TIMEOUT_S: Final = 3.0
EXIT_ROLLED_BACK = 1
_POLL_S = 0.5
_ROLLBACK_TIMEOUT_S = 60.0


class _TrialFailedError(Exception):
    """The new configuration cannot stay; the text says why."""


def fetch_active_config(settings: GatewaySettings) -> ActiveConfigDocument | None:
    """The active configuration of the gateway with these settings; None when none answers."""
    client = local_gateway_client(settings.status, _REQUEST_TIMEOUT_S)
    try:
        return None if client is None else client.get("/config", ActiveConfigDocument)
    except GatewayClientError:
        return None


def _has_settings(running: ActiveConfigDocument | None, settings: GatewaySettings) -> bool:
    return running is not None and running.fingerprint == fingerprint_values(mask_settings(settings))


def _find_regressions(settings: GatewaySettings, before: dict[str, str]) -> list[str]:
    """What is wrong with the running gateway; destinations that were unreachable before do not count."""
    found = []
    client = local_gateway_client(settings.status, _REQUEST_TIMEOUT_S)
    for path in ("/healthz", "/readyz"):
        try:
            if client is not None:
                client.get(path, dict)
        except GatewayClientError as error:
            found.append(str(error))
    unreachable = find_unreachable_destinations(settings)
    return found + [f"destination {name}: {why}" for name, why in unreachable.items() if name not in before]


def find_unreachable_destinations(settings: GatewaySettings) -> dict[str, str]:
    """Destinations that cannot be reached or reject this gateway, each with the reason."""

    async def check() -> dict[str, str]:
        found = await asyncio.gather(
            *(network.check_destination(d, settings.gateway_id) for d in settings.destinations)
        )
        return {f.subject: f.what for each in found for f in each if f.level is Level.FAULT}

    return asyncio.run(check())


def apply(
    new: Annotated[Path, typer.Argument(help="The configuration to activate.")],
    config: Annotated[Path, typer.Option("--config", "-c", help="The file the gateway runs with.")],
    *,
    probe: Annotated[
        str, typer.Option(help="How long the trial may take before it is rolled back, e.g. 120s or 5min.")
    ] = "120s",
    settle: Annotated[
        str, typer.Option(help="How long it must stay healthy before it is confirmed.")
    ] = "10s",
) -> None:
    """Install a configuration, reload or restart the gateway, and roll back unless it stays healthy.

    The old configuration is kept next to it (.previous). The new one is confirmed once the gateway has been
    healthy and ready, with its destinations as reachable as before, for as long as --settle says. If that
    does not happen within --probe, or this command is interrupted, the old one is restored. If this command
    or the machine dies during the trial, the gateway restores it: at the deadline, or at its next start.

    Exit codes: 0 active, 1 rolled back, 2 the configuration has errors and nothing was changed.
    """
    probe_s, settle_s = _parse_seconds("--probe", probe), _parse_seconds("--settle", settle)
    if settle_s >= probe_s:
        fail("--settle must be shorter than --probe")
    text, old, target = _read_configs(new, config)
    changed = diff_settings(flatten_settings(old), flatten_settings(target))
    running = fetch_active_config(old)
    if not changed or running is None:
        config_changes.replace_config(config, text)
        reason = "no gateway answers, so there was no trial" if changed else "only comments differ"
        typer.echo(f"{config}: installed; {reason}. Previous: {config_changes.previous_config_path(config)}")
        return
    _check_process(running.pid, config)
    if not target.status.enabled:
        fail(
            "status.enabled = false: the trial checks the gateway's health at the status endpoint; "
            f"nothing was changed. Leave it enabled, or replace {config} by hand and restart the gateway"
        )
    before = find_unreachable_destinations(old)
    restart = bool(find_reload_obstacles(changed))
    means = "restart" if restart else "reload"
    typer.echo(f"{len(changed)} changes by a {means}, on trial for {probe_s:g} s")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        config_changes.begin_trial(config, text, probe_s=probe_s)
        deadline = time.monotonic() + probe_s
        _signal_gateway(running.pid, restart=restart)
        _wait_until_active(config, target, running.attempts, deadline, restart=restart)
        _wait_until_healthy(target, before, deadline, settle_s)
        config_changes.confirm_trial(config)
    except (_TrialFailedError, KeyboardInterrupt, OSError) as reason:
        _roll_back(config, old, running.pid, str(reason) or "interrupted", restart=restart)
    typer.echo(f"{config}: active and confirmed. Previous: {config_changes.previous_config_path(config)}")


def _read_configs(new: Path, config: Path) -> tuple[bytes, GatewaySettings, GatewaySettings]:
    """The new text, the old settings and the new; ends the program when they have errors."""
    left_s = config_changes.trial_time_left_s(config)
    if left_s is not None and left_s >= 0:
        marker = config_changes.trial_marker_path(config)
        fail(f"another configuration is on trial, for {left_s:.0f} s more: {marker}")
    draft = config.with_name(f"{config.name}.{os.getpid()}.candidate")
    try:
        if left_s is not None:
            config_changes.restore_previous_config(config)
        text = new.read_bytes()
        old = parse_settings_file(config)
        draft.write_bytes(text)
        target = load_settings(draft)
    except OSError as error:
        fail(f"{error.filename or new}: {error.strerror or error}")
    except InvalidSettingsError as error:
        fail(str(error).replace(str(draft), str(new)))
    finally:
        draft.unlink(missing_ok=True)
    return text, old, target


def _check_process(pid: int, config: Path) -> None:
    """The endpoint names its process; end the program unless that process runs this file."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        folder = Path(f"/proc/{pid}/cwd").resolve()
    except OSError as error:
        fail(f"the gateway reports process {pid}, which cannot be inspected ({error.strerror}): use sudo?")
    files = {(folder / os.fsdecode(word)).resolve() for word in words if word}
    if b"gateway" not in words or config.resolve() not in files:
        fail(f"process {pid} answers for the gateway, but does not run with {config}: nothing was changed")


def _signal_gateway(pid: int, *, restart: bool) -> None:
    try:
        os.kill(pid, signal.SIGUSR1 if restart else signal.SIGHUP)
    except OSError as error:
        raise _TrialFailedError(f"process {pid} cannot be signalled: {error.strerror}") from error


def _poll(deadline: float, done: Callable[[], bool]) -> bool:
    """Wait until `done`; False when the deadline comes first."""
    while time.monotonic() < deadline:
        if done():
            return True
        time.sleep(_POLL_S)
    return False


def _wait_until_active(
    config: Path, target: GatewaySettings, attempts: int, deadline: float, *, restart: bool
) -> None:
    """Wait until the gateway runs with the new configuration. Raises _TrialFailedError."""

    def is_active() -> bool:
        running = fetch_active_config(target)
        if _has_settings(running, target):
            return True
        if running is not None and not restart and running.attempts > attempts and running.refused:
            raise _TrialFailedError("the gateway refused it: " + "; ".join(running.refused))
        if config_changes.trial_time_left_s(config) is None:
            raise _TrialFailedError("the gateway could not run with it and went back by itself: see its log")
        return False

    if not _poll(deadline, is_active):
        raise _TrialFailedError("the gateway did not activate it in time")


def _wait_until_healthy(
    target: GatewaySettings, before: dict[str, str], deadline: float, settle_s: float
) -> None:
    """Wait until the gateway has been healthy for `settle_s`. Raises _TrialFailedError."""
    healthy_since: float | None = None
    problems: list[str] = []

    def is_settled() -> bool:
        nonlocal healthy_since, problems
        problems = _find_regressions(target, before)
        if not _has_settings(fetch_active_config(target), target):
            problems.append("another configuration is active")
        now = time.monotonic()
        healthy_since = None if problems else now if healthy_since is None else healthy_since
        return healthy_since is not None and now - healthy_since >= settle_s

    if not _poll(deadline, is_settled):
        raise _TrialFailedError("; ".join(problems) or "it was not healthy for long enough")


def _roll_back(config: Path, old: GatewaySettings, pid: int, reason: str, *, restart: bool) -> NoReturn:
    typer.echo(f"tidegate: rolling back: {escape_text(reason)}", err=True)
    back_already = (
        config_changes.trial_time_left_s(config) is None
        and config.read_bytes() == config_changes.previous_config_path(config).read_bytes()
    )
    try:
        config_changes.restore_previous_config(config)
    except OSError as error:
        fail(f"{config} cannot be restored: {error.strerror}; the gateway does so when the trial ends")
    if not back_already:
        try:
            _signal_gateway(pid, restart=restart)
        except _TrialFailedError as gone:
            typer.echo(f"tidegate: {gone}; systemd starts it with the old configuration", err=True)
    deadline = time.monotonic() + _ROLLBACK_TIMEOUT_S
    if _poll(deadline, lambda: _has_settings(fetch_active_config(old), old)):
        message = f"the old configuration is active again: {config}"
    else:
        message = f"{config} is the old one again, but no gateway answers with it: see its log"
    typer.echo(f"tidegate: {message}", err=True)
    raise typer.Exit(EXIT_ROLLED_BACK)


def _parse_seconds(option: str, text: str) -> float:
    try:
        return parse_duration_s(f"{text.strip()}s" if text.strip()[-1:].isdigit() else text)
    except ValueError as error:
        fail(f"{option}: {escape_text(str(error))}")
