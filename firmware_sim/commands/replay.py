"""`tidegate sim replay`: a person's own recordings as input."""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from firmware_sim.commands.console import (
    EXIT_DIFFERENT,
    BrokerOption,
    CaOption,
    JsonOption,
    KeepaliveOption,
    ProgressDisplay,
    QuietOption,
    WindowOption,
    build_run_name,
    describe_replay,
    parse_rate,
    run_until_signal,
    show_progress_bar,
)
from firmware_sim.devices.device import RadioSettings
from firmware_sim.devices.mqtt_connection import parse_broker
from firmware_sim.devices.sensors import parse_duration_s
from firmware_sim.errors import SimError
from firmware_sim.ground_truth import GroundTruthWriter, SeriesState, find_repeated_readings
from firmware_sim.replay.column_map import (
    ColumnMap,
    ColumnOptions,
    describe_column_map,
    detect_columns,
    summarize_column_map,
)
from firmware_sim.replay.player import (
    MAX_OUTSTANDING,
    RecordingCounters,
    ReplayPace,
    ReplayPlayer,
    find_time_extent,
    read_recording,
)
from firmware_sim.verify.loss_explanation import format_time_us

_PREVIEW_READINGS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOptions:
    """Options beside those for the columns."""

    files: Annotated[
        list[Path],
        typer.Argument(
            help="CSV with a header, Parquet (.parquet) or line protocol (.lp); CSV and .lp plain or .gz.",
            metavar="FILE...",
        ),
    ]
    truth: Annotated[
        Path | None, typer.Option(help="Folder for the record of what was sent and acknowledged.")
    ] = None
    broker: BrokerOption = "mqtt://127.0.0.1:1883"
    shift_to_now: Annotated[
        bool,
        typer.Option(
            "--shift-to-now/--as-recorded",
            help="Shift all times so that the last is now (at --speed 1: the first).",
        ),
    ] = False
    shift: Annotated[str, typer.Option(help="Shift all times by 7d, -90m, 3600 (seconds), in addition.")] = ""
    loop: Annotated[
        int, typer.Option(min=0, help="How many times to send, each later than the last; 0: until stopped.")
    ] = 1
    speed: Annotated[
        str, typer.Option(help="1: as fast as recorded; 10: ten times as fast; max: as fast as possible.")
    ] = "max"
    readings_per_publish: Annotated[
        int, typer.Option(min=1, help="At most this many readings in one publish, as an array.")
    ] = 50
    qos: Annotated[int, typer.Option(min=1, max=2, help="MQTT quality of service.")] = 1
    window: WindowOption = 100
    keepalive: KeepaliveOption = 30
    connect_timeout: Annotated[
        float, typer.Option(min=0, help="Exit when no device can connect for so long at the start, in s.")
    ] = 30.0
    drain_timeout: Annotated[
        float,
        typer.Option(min=0, help="At the end, stop waiting after so long without an acknowledgement, in s."),
    ] = 30.0
    ca_file: CaOption = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what the columns mean and 5 readings; send nothing.")
    ] = False
    as_json: JsonOption = False
    quiet: QuietOption = False


def replay(options: ReplayOptions, columns: ColumnOptions) -> None:
    """Send recorded readings from CSV, Parquet or line protocol files, value for value and time for time.

    Several files are sent at once, each over a connection of its own.

    Without options the meaning of the columns is detected from their names (time, timestamp, ts, date;
    sensor, sensor_id, device; type, sensor_type, metric; value; quality, unit, location and more). --dry-run
    shows it.

    For example:

      tidegate sim replay plant.csv --truth truth --dry-run

      tidegate sim replay weather.csv --truth truth --time-format "%d.%m.%Y %H:%M" --sensor-id roof

      tidegate sim replay log.csv --truth truth --time-column when --value-columns "T1,T2" --speed 10

    Exit code 0 when everything sent is acknowledged, 1 when not or when there was nothing to send, 2 when it
    cannot start.
    """
    recordings = [(path, detect_columns(path, columns)) for path in options.files]
    if options.dry_run:
        _show_first_readings(recordings, as_json=options.as_json)
        return
    if options.truth is None:
        raise SimError("--truth DIR is required: the folder for the record of what was sent")
    speed = parse_rate("--speed", options.speed)
    radio = RadioSettings(
        parse_broker(options.broker, ca_file=options.ca_file),
        qos=options.qos,
        window=options.window,
        ring_publishes=10 * MAX_OUTSTANDING,
        keepalive_s=options.keepalive,
    )
    shift_us, period_us = parse_shift(options.shift), 0
    if options.shift_to_now or options.loop != 1:
        with show_progress_bar(quiet=options.quiet) as step:
            step("reading the times", 0, 0)
            extent = find_time_extent(recordings)
            period_us = extent.period_us
        if options.shift_to_now:
            shift_us += extent.shift_us(now_us=time.time_ns() // 1000, speed=speed)
    name = build_run_name()
    about = {"command": "replay", "files": [str(path) for path in options.files], "shift_us": shift_us}
    with (
        GroundTruthWriter(options.truth, name, about) as record,
        ProgressDisplay("sim replay", options.truth, quiet=options.quiet) as display,
    ):
        player = ReplayPlayer(
            recordings,
            record,
            radio,
            device_id=f"replay-{name[-4:]}",
            pace=ReplayPace(speed, shift_us, options.loop, period_us),
            readings_per_publish=options.readings_per_publish,
        )
        run_until_signal(
            lambda stop: player.run(
                stop,
                connect_timeout_s=options.connect_timeout,
                drain_timeout_s=options.drain_timeout,
                on_progress=display.show,
            )
        )
    outcome = summarize_replay(player, find_repeated_readings(options.truth, name), shift_us)
    typer.echo(json.dumps(outcome) if options.as_json else describe_replay(outcome))
    raise typer.Exit(0 if outcome["acknowledged"] == outcome["sent"] != 0 else EXIT_DIFFERENT)


def parse_shift(text: str) -> int:
    """Microseconds of a duration that may have a sign; "" is none."""
    bare = text.strip().lstrip("+-")
    try:
        seconds = parse_duration_s(float(bare) if bare.replace(".", "", 1).isdigit() else bare or 0.0)
    except ValueError as fault:
        raise SimError(f"--shift {text}: {fault}") from fault
    return round(seconds * 1e6) * (-1 if text.strip().startswith("-") else 1)


def _show_first_readings(recordings: Iterable[tuple[Path, ColumnMap]], *, as_json: bool) -> None:
    summaries = []
    for path, mapping in recordings:
        counters = RecordingCounters()
        readings = [
            {
                "line": recorded.line,
                "series": "/".join(recorded.state[:2]),
                "time": format_time_us(recorded.reading.time_us),
                "value": recorded.reading.value,
            }
            for recorded in islice(read_recording(path, mapping, counters), _PREVIEW_READINGS)
        ]
        summary = summarize_column_map(path, mapping)
        summaries.append({**summary, "first_readings": readings, "skipped_reasons": counters.reasons})
        if not as_json:
            lines = [describe_column_map(path, mapping), "  first readings:"]
            lines += ["    line {line}: {series} {time} {value!r}".format(**each) for each in readings]
            lines += [f"  skipped {reason}" for reason in counters.reasons]
            typer.echo("\n".join(lines))
    if as_json:
        typer.echo(json.dumps({"files": summaries}))


def summarize_replay(
    player: ReplayPlayer, repeats: tuple[int, list[tuple[SeriesState, int]]], shift_us: int
) -> dict[str, object]:
    """The outcome of a replay as one flat object."""
    counters, rows = player.radio.counters, player.counters
    repeated, examples = repeats
    return {
        "rows": rows.rows,
        "readings": rows.readings,
        "loops": player.loops_started,
        "sent": counters.produced,
        "acknowledged": counters.acknowledged,
        "refused": counters.refused,
        "skipped": rows.skipped,
        "skipped_reasons": rows.reasons,
        "empty_cells": rows.empty_cells,
        "cut_times": rows.cut_times,
        "repeated": repeated,
        "repeated_examples": [f"{s.sensor_id}/{s.sensor_type} at {format_time_us(at)}" for s, at in examples],
        "shift_us": shift_us,
        "reconnects": counters.reconnects,
        "last_fault": counters.last_fault,
        "elapsed_s": player.progress()["elapsed_s"],
    }
