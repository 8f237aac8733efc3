"""`tidegate sim replay`: a person's own recordings as input."""

import asyncio
import json
import time
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from firmware_sim.commands.console import (
    EXIT_DIFFERENT,
    BrokerOption,
    CaOption,
    JsonOption,
    ProgressDisplay,
    QuietOption,
    describe_replay,
    exit_on_errors,
    new_run_name,
    run_until_signal,
    show_spinner,
)
from firmware_sim.devices.device import RadioSettings, parse_broker
from firmware_sim.devices.sensors import parse_duration_s
from firmware_sim.errors import SimError
from firmware_sim.ground_truth import GroundTruthWriter, SeriesState, find_repeated_readings
from firmware_sim.replay.column_map import ColumnMap, ColumnOptions, describe_column_map, detect_columns
from firmware_sim.replay.csv_values import TIME_FORMATS
from firmware_sim.replay.player import (
    MAX_OUTSTANDING,
    RecordingCounters,
    ReplayPace,
    ReplayPlayer,
    find_time_extent,
    read_recording,
)
from firmware_sim.verify.loss_explanation import format_time_us

_COLUMNS = "What the columns mean"
_FORM = "Form of the file"
_PREVIEW_READINGS = 5


def replay(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="CSV with a header, Parquet (.parquet) or line protocol (.lp); CSV and .lp plain or .gz.",
            metavar="FILE...",
        ),
    ],
    *,
    truth: Annotated[
        Path | None, typer.Option(help="Folder for the record of what was sent and acknowledged.")
    ] = None,
    broker: BrokerOption = "mqtt://127.0.0.1:1883",
    time_column: Annotated[
        str, typer.Option(help="Column of the time; two joined by a space as A,B.", rich_help_panel=_COLUMNS)
    ] = "",
    time_format: Annotated[
        str,
        typer.Option(
            help="auto, iso, s, ms, us, ns (since 1970), or a strptime format like '%d/%m/%Y %H:%M'. "
            "A time without a zone is UTC; digits below a microsecond are cut.",
            rich_help_panel=_COLUMNS,
        ),
    ] = "auto",
    sensor_column: Annotated[
        str, typer.Option(help="Column of the sensor id.", rich_help_panel=_COLUMNS)
    ] = "",
    sensor_id: Annotated[
        str,
        typer.Option(help="One sensor id for all rows. Default: the file's name.", rich_help_panel=_COLUMNS),
    ] = "",
    type_column: Annotated[
        str, typer.Option(help="Column of the sensor type.", rich_help_panel=_COLUMNS)
    ] = "",
    sensor_type: Annotated[
        str, typer.Option(help="One sensor type for all rows.", rich_help_panel=_COLUMNS)
    ] = "",
    value_column: Annotated[str, typer.Option(help="Column of the value.", rich_help_panel=_COLUMNS)] = "",
    value_columns: Annotated[
        str,
        typer.Option(
            help="Columns A,B,C, each a sensor type of its own. Default: all columns of numbers, "
            "when there is no column called value.",
            rich_help_panel=_COLUMNS,
        ),
    ] = "",
    quality_column: Annotated[
        str, typer.Option(help="Column of the quality, 0-100.", rich_help_panel=_COLUMNS)
    ] = "",
    delimiter: Annotated[
        str,
        typer.Option(help="Between fields; 'tab' for a tab. Default: found out.", rich_help_panel=_FORM),
    ] = "",
    decimal: Annotated[
        str, typer.Option(help="Decimal sign. Default: found out.", rich_help_panel=_FORM)
    ] = "",
    encoding: Annotated[str, typer.Option(help="Text encoding.", rich_help_panel=_FORM)] = "utf-8-sig",
    skip_lines: Annotated[
        int, typer.Option(min=0, help="Lines before the header.", rich_help_panel=_FORM)
    ] = 0,
    no_header: Annotated[
        bool,
        typer.Option(
            "--no-header", help="There is none: columns are called 1, 2, 3, ...", rich_help_panel=_FORM
        ),
    ] = False,
    shift_to_now: Annotated[
        bool,
        typer.Option(
            "--shift-to-now/--as-recorded",
            help="Move all times alike so that the last is now (at --speed 1: the first).",
        ),
    ] = False,
    shift: Annotated[
        str, typer.Option(help="Move all times by so much: 7d, -90m, 3600 (seconds), in addition.")
    ] = "",
    loop: Annotated[
        int, typer.Option(min=0, help="Send it so many times, each later than the last; 0: until stopped.")
    ] = 1,
    speed: Annotated[
        str, typer.Option(help="1: as fast as recorded; 10: ten times as fast; max: as fast as it goes.")
    ] = "max",
    readings_per_publish: Annotated[
        int, typer.Option(min=1, help="At most this many readings in one publish, as an array.")
    ] = 50,
    qos: Annotated[int, typer.Option(min=1, max=2, help="MQTT quality of service.")] = 1,
    window: Annotated[int, typer.Option(min=1, help="Publishes sent without acknowledgement.")] = 100,
    keepalive: Annotated[int, typer.Option(min=1, help="MQTT keep-alive, in s.")] = 30,
    connect_timeout: Annotated[
        float, typer.Option(min=0, help="Give up when nothing answers for so long at the start, in s.")
    ] = 30.0,
    drain_timeout: Annotated[
        float,
        typer.Option(min=0, help="At the end, give up after so long without any acknowledgement, in s."),
    ] = 30.0,
    ca_file: CaOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the columns mean and show 5 readings; send nothing.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Send recorded readings from CSV, Parquet or line protocol files, value for value and time for time.

    Several files are sent at once, each over a connection of its own.

    What the columns mean is found out from their names (time, timestamp, ts, date; sensor, sensor_id,
    device; type, sensor_type, metric; value; quality, unit, location and more) where no option says it.
    --dry-run shows it.

    For example:

      tidegate sim replay plant.csv --truth truth --dry-run

      tidegate sim replay weather.csv --truth truth --time-format "%d.%m.%Y %H:%M" --sensor-id roof

      tidegate sim replay log.csv --truth truth --time-column when --value-columns "T1,T2" --speed 10

    Exit code 0 when all that was sent is acknowledged, 1 when not or when there was nothing to send, 2 when
    it could not begin.
    """
    with exit_on_errors():
        options = ColumnOptions(
            tuple(name for name in time_column.split(",") if name),
            check_time_format(time_format),
            sensor_column,
            sensor_id,
            type_column,
            sensor_type,
            value_column,
            tuple(name for name in value_columns.split(",") if name),
            quality_column,
            check_delimiter(delimiter),
            check_decimal(decimal),
            encoding,
            not no_header,
            skip_lines,
        )
        recordings = [(path, detect_columns(path, options)) for path in files]
        if dry_run:
            for path, mapping in recordings:
                typer.echo(describe_first_readings(path, mapping))
            return
        if truth is None:
            raise SimError("--truth DIR is needed: where to record what was sent and acknowledged")
        pace_speed = parse_speed(speed)
        radio = RadioSettings(
            parse_broker(broker, ca_file=ca_file),
            qos=qos,
            window=window,
            ring_publishes=10 * MAX_OUTSTANDING,
            keepalive_s=keepalive,
        )
        shift_us, period_us = parse_shift(shift), 0
        if shift_to_now or loop != 1:
            with show_spinner(quiet=quiet) as step:
                step("reading the times")
                extent = find_time_extent(recordings)
                period_us = extent.period_us
            if shift_to_now:
                shift_us += extent.shift_us(now_us=time.time_ns() // 1000, speed=pace_speed)
        name = new_run_name()
        about = {"command": "replay", "files": [str(path) for path in files], "shift_us": shift_us}
        with (
            GroundTruthWriter(truth, name, about) as record,
            ProgressDisplay("sim replay", quiet=quiet) as progress,
        ):
            work = ReplayPlayer(
                recordings,
                record,
                radio,
                f"replay-{name[-4:]}",
                ReplayPace(pace_speed, shift_us, loop, period_us),
                readings_per_publish,
            )

            async def send(stop: asyncio.Event) -> None:
                await work.run(
                    stop,
                    connect_timeout_s=connect_timeout,
                    drain_timeout_s=drain_timeout,
                    show=progress.show,
                )

            run_until_signal(send)
        outcome = summarise_replay(work, find_repeated_readings(truth, name), shift_us)
        typer.echo(json.dumps(outcome) if as_json else describe_replay(outcome))
        raise typer.Exit(0 if outcome["acknowledged"] == outcome["sent"] != 0 else EXIT_DIFFERENT)


def check_time_format(text: str) -> str:
    """The time format, if it is one."""
    if text not in TIME_FORMATS and "%" not in text:
        raise SimError(
            f"--time-format {text}: expected {', '.join(TIME_FORMATS)}, or a format like '%d/%m/%Y %H:%M'"
        )
    return text


def check_delimiter(text: str) -> str:
    """One character, or nothing for finding it out."""
    text = {"tab": "\t", "\\t": "\t"}.get(text, text)
    if len(text) > 1:
        raise SimError(f"--delimiter {text}: expected one character, or tab")
    return text


def check_decimal(text: str) -> str:
    """The decimal sign, or nothing for finding it out."""
    if text not in {"", ".", ","}:
        raise SimError(f"--decimal {text}: expected . or ,")
    return text


def parse_speed(text: str) -> float:
    """Seconds of the recording per second; infinity for max."""
    if text == "max":
        return float("inf")
    try:
        speed = float(text)
    except ValueError:
        speed = 0.0
    if not speed > 0:
        raise SimError(f"--speed {text}: expected a number above 0, or max")
    return speed


def parse_shift(text: str) -> int:
    """Microseconds of a duration that may have a sign; "" is none."""
    try:
        bare = text.strip().lstrip("+-")
        seconds = (
            parse_duration_s(float(bare) if bare.replace(".", "", 1).isdigit() else bare) if bare else 0.0
        )
    except ValueError as fault:
        raise SimError(f"--shift {text}: {fault}") from fault
    return round(seconds * 1e6) * (-1 if text.strip().startswith("-") else 1)


def describe_first_readings(path: Path, mapping: ColumnMap) -> str:
    """The mapping of a file and its first readings."""
    tally = RecordingCounters()
    lines = [describe_column_map(path, mapping), "  first readings:"]
    lines += [
        f"    line {r.line}: {r.state.sensor_id}/{r.state.sensor_type} "
        f"{format_time_us(r.time_us)} {r.value!r}"
        for r in islice(read_recording(path, mapping, tally), _PREVIEW_READINGS)
    ]
    lines += [f"  skipped {reason}" for reason in tally.reasons]
    return "\n".join(lines)


def summarise_replay(
    work: ReplayPlayer, repeats: tuple[int, list[tuple[SeriesState, int]]], shift_us: int
) -> dict[str, object]:
    """What became of the rows, as one flat object."""
    counters, tally = work.radio.counters, work.tally
    repeated, examples = repeats
    return {
        "rows": tally.rows,
        "readings": tally.readings,
        "loops": work.loops_started,
        "sent": counters.produced,
        "acknowledged": counters.acknowledged,
        "refused": counters.refused,
        "skipped": tally.skipped,
        "skipped_reasons": tally.reasons,
        "empty_cells": tally.empty_cells,
        "cut_times": tally.cut_times,
        "repeated": repeated,
        "repeated_examples": [f"{s.sensor_id}/{s.sensor_type} at {format_time_us(at)}" for s, at in examples],
        "shift_us": shift_us,
        "reconnects": counters.reconnects,
        "last_fault": counters.last_fault,
        "elapsed_s": work.progress()["elapsed_s"],
    }
