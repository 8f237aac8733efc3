"""Options that several commands have, worded once, and the exit codes."""

from pathlib import Path
from typing import Annotated

import typer

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
