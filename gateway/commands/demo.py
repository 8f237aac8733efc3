"""`tidegate demo`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from gateway.commands.exit_errors import fail
from gateway.demo.script import Demo, DemoScreen, psql_path, stop_postgres
from gateway.demo.tiers import DemoError, Processes

app = typer.Typer(add_completion=False)
_EXIT_DIFFERENT = 1
_EXIT_INTERRUPTED = 130
_MIN_SECONDS = 10.0
_TIDEGATE = sys.argv[0]
_PIDS_FILE = "running.json"


@app.command()
def demo(
    *,
    seconds: Annotated[float, typer.Option(min=_MIN_SECONDS, help="How long the fleet publishes.")] = 60.0,
    keep: Annotated[bool, typer.Option(help="Leave everything running when it ends.")] = False,
    data: Annotated[Path | None, typer.Option(help="Folder for the data; default: a temporary one.")] = None,
    stop: Annotated[Path | None, typer.Option(help="Only stop the demo left running in this folder.")] = None,
) -> None:
    """Run every tier on this machine, through an outage and a kill, and compare at the end.

    Simulated devices publish over MQTT to a gateway; the gateway delivers to an ingest service in front of
    PostgreSQL, and to a cloud tier. The ingest service is stopped for a while, the gateway is killed with
    SIGKILL, both are restarted, and the backlog drains. Every reading that was acknowledged to the fleet is
    then looked up in the database. The exit code is 0 only when none is lost and none is duplicated.
    """
    if stop is not None:
        _stop_demo(stop)
        return
    folder = _data_folder(data)
    processes = Processes(folder, keep_running=keep)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a background job inherits SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    warnings.simplefilter("ignore")  # a library warns of a missing XDG_RUNTIME_DIR
    kept_running = remove_data = False
    try:
        with DemoScreen() as screen:
            run = Demo(folder, processes, screen, seconds=seconds)
            outcome = run.run()
        if keep:
            (folder / _PIDS_FILE).write_text(json.dumps(processes.pids()))
            _print_what_runs(run)
            kept_running = True
        remove_data = data is None and outcome.clean and not keep
    except KeyboardInterrupt:
        remove_data = data is None
        typer.echo("demo: interrupted; stopping everything", err=True)
        raise typer.Exit(_EXIT_INTERRUPTED) from None
    except DemoError as error:
        typer.echo(f"demo: failed: {error}", err=True)
        raise typer.Exit(_EXIT_DIFFERENT) from None
    finally:
        if not kept_running:
            processes.stop_all()
            stop_postgres(folder / "pg")
            if remove_data:
                shutil.rmtree(folder, ignore_errors=True)
    typer.echo(str(outcome))
    if not outcome.clean:
        raise typer.Exit(_EXIT_DIFFERENT)


def _data_folder(data: Path | None) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tidegate-demo-")) if data is None else data.absolute()
    if data is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            fail(f"--data {folder}: the folder is not empty")
    folder.chmod(0o755)  # PostgreSQL runs as a user of its own when this user is root
    return folder


def _print_what_runs(run: Demo) -> None:
    edge, region = run.edge, run.region
    query = "SELECT * FROM sensor_data ORDER BY time DESC LIMIT 5"
    for line in (
        "demo: left running",
        f"  gateway    {edge.broker}, status at {edge.status_url}/status",
        f"  region     {region.url}, database {region.dsn}",
        f"  data       {run.folder}",
        "try",
        f"  {_TIDEGATE} status --config {edge.config}",
        f"  {_TIDEGATE} sim run --broker {edge.broker} --seconds 10 --truth {run.folder}/more",
        f'  {psql_path()} "{region.dsn}" -c "{query}"',
        "end it",
        f"  {_TIDEGATE} demo --stop {run.folder}",
    ):
        typer.echo(line)


def _stop_demo(folder: Path) -> None:
    try:
        pids = json.loads((folder / _PIDS_FILE).read_text()).values()
    except (OSError, ValueError):
        fail(f"--stop {folder}: no demo was left running there")
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    stop_postgres(folder / "pg")
    (folder / _PIDS_FILE).unlink()
    typer.echo(f"demo: stopped; its data is still in {folder}")
