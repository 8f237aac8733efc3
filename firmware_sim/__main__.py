"""The command line of the simulator: `tidegate sim`, or `python -m firmware_sim`."""

from __future__ import annotations

import typer

from firmware_sim.commands.console import add_command
from firmware_sim.commands.replay import ReplayOptions, replay
from firmware_sim.commands.run import RunOptions, run
from firmware_sim.commands.verify import VerifyOptions, verify
from firmware_sim.replay.column_map import ColumnOptions

app = typer.Typer(
    name="sim",
    help="Simulated devices, a record of the truth, and its comparison with what was stored.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
add_command(app, run, RunOptions)
add_command(app, verify, VerifyOptions)
add_command(app, replay, ReplayOptions, ColumnOptions)


def main() -> None:
    """Run the command line on its own."""
    app(prog_name="python -m firmware_sim")


if __name__ == "__main__":
    main()
