"""`tidegate demo`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gateway.commands.exit_errors import fail
from gateway.demo.script import Demo, DemoScreen, pids_file, psql_path, stop_postgres, write_pids
from gateway.demo.tiers import DemoError, Processes, terminate_pids

if TYPE_CHECKING:
    from gateway.demo.script import Outcome

app = typer.Typer(add_completion=False)
_EXIT_DIFFERENT = 1
_EXIT_INTERRUPTED = 130
_MIN_SECONDS = 10.0
_TIDEGATE = sys.argv[0]


@app.command()
def demo(
    seconds: Annotated[float, typer.Option(min=_MIN_SECONDS, help="How long the fleet publishes.")] = 60.0,
    keep: Annotated[bool, typer.Option(help="Leave everything running at the end.")] = False,  # noqa: FBT002 - a flag
    data: Annotated[Path | None, typer.Option(help="Folder for the data; default: a temporary one.")] = None,
    stop: Annotated[
        Path | None,
        typer.Option(help="End a demo that was left running, by its data folder, and do nothing else."),
    ] = None,
) -> None:
    """Run every tier on this machine, through an outage and a kill, and count at the end.

    A fleet of simulated devices publishes over MQTT to a gateway; the gateway delivers to an ingest service
    in front of PostgreSQL and to a cloud tier. The ingest service is stopped for a while, the gateway is
    killed with SIGKILL, both come back, the backlog drains, and every reading that the fleet had
    acknowledged is looked for in the database. Exit code 0 only when none is lost and none is there twice.
    """
    if stop is not None:
        _stop_demo(stop)
        return
    folder = _data_folder(data)
    processes = Processes(folder, keep_running=keep)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit it ignored
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    warnings.simplefilter("ignore")  # a library warns of a missing XDG_RUNTIME_DIR
    kept = False
    try:
        with DemoScreen() as screen:
            story = Demo(folder, processes, screen, seconds=seconds)
            outcome = story.run()
        if keep:
            write_pids(folder, processes.pids())
            _print_what_runs(story)
            kept = True
    except KeyboardInterrupt:
        typer.echo("demo: interrupted; stopping everything", err=True)
        raise typer.Exit(_EXIT_INTERRUPTED) from None
    except DemoError as fault:
        kept_logs = True
        typer.echo(f"demo: failed: {fault}", err=True)
        raise typer.Exit(_EXIT_DIFFERENT) from None
    else:
        kept_logs = not outcome.clean
    finally:
        if not kept:
            processes.stop_all()
            stop_postgres(folder / "pg")
            if data is None and not locals().get("kept_logs", False):
                shutil.rmtree(folder, ignore_errors=True)
    _report_outcome(outcome)


def _report_outcome(outcome: Outcome) -> None:
    typer.echo(str(outcome))
    if not outcome.clean:
        raise typer.Exit(_EXIT_DIFFERENT)


def _data_folder(data: Path | None) -> Path:
    if data is None:
        folder = Path(tempfile.mkdtemp(prefix="tidegate-demo-"))
    else:
        folder = data.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            fail(f"--data {folder}: the folder is not empty")
    folder.chmod(0o755)  # PostgreSQL runs as a user of its own when this user is root
    return folder


def _print_what_runs(story: Demo) -> None:
    edge, region = story.edge, story.region
    query = "SELECT * FROM sensor_data ORDER BY time DESC LIMIT 5"
    for line in (
        "demo: left running",
        f"  gateway    {edge.broker}, status at {edge.status_url}/status",
        f"  region     {region.url}, database {region.dsn}",
        f"  data       {story.folder}",
        "try",
        f"  {_TIDEGATE} status --config {edge.config}",
        f"  {_TIDEGATE} sim run --broker {edge.broker} --seconds 10 --truth {story.folder}/more",
        f'  {psql_path()} "{region.dsn}" -c "{query}"',
        "end it",
        f"  {_TIDEGATE} demo --stop {story.folder}",
    ):
        typer.echo(line)


def _stop_demo(folder: Path) -> None:
    try:
        terminate_pids(json.loads(pids_file(folder).read_text()))
    except (OSError, ValueError):
        fail(f"--stop {folder}: no demo was left running there")
    stop_postgres(folder / "pg")
    pids_file(folder).unlink()
    typer.echo(f"demo: stopped; its data is still in {folder}")


def _interrupt(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGINT)
