"""`tidegate sim run`: a fleet against an MQTT server."""

import json
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from firmware_sim.commands.console import (
    BrokerOption,
    CaOption,
    JsonOption,
    KeepaliveOption,
    ProgressDisplay,
    QuietOption,
    WindowOption,
    build_run_name,
    format_counters,
    parse_rate,
    raise_open_files_limit,
    run_until_signal,
    show_progress_bar,
)
from firmware_sim.devices.device import RadioSettings
from firmware_sim.devices.mqtt_connection import parse_broker
from firmware_sim.errors import SimError
from firmware_sim.fleet import Fleet, parse_service
from firmware_sim.ground_truth import GroundTruthWriter
from firmware_sim.raw_mqtt import LoadGenerator, encode_publishes
from firmware_sim.replay.csv_values import CellError, parse_time_us
from firmware_sim.scenarios import Group, Scenario, read_scenario

_OTHER_FILES = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """Options of the command."""

    truth: Annotated[Path, typer.Option(help="Folder for the record of what was produced and acknowledged.")]
    broker: BrokerOption = "mqtt://127.0.0.1:1883"
    devices: Annotated[
        int | None, typer.Option(min=1, max=10_000, help="Number of devices. Default: 20.")
    ] = None
    rate: Annotated[
        str | None, typer.Option(help="Readings per second of the whole fleet, or max. Default: 10.")
    ] = None
    readings: Annotated[
        int, typer.Option(min=1, help="With --rate max: how many are encoded before it starts.")
    ] = 500_000
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="How long to produce; 0: until stopped. A scenario with a span is played faster or slower. "
            "Default: 60.",
        ),
    ] = None
    seed: Annotated[
        int | None, typer.Option(help="The same seed makes the same fleet; with --start the same readings.")
    ] = None
    start: Annotated[
        str,
        typer.Option(
            help="Simulated time of the start, like 2026-05-01T12:00Z. Default: such that the run ends now."
        ),
    ] = ""
    service: Annotated[
        list[str] | None,
        typer.Option(
            help="A service that the scenario's outages stop: NAME=PID, paused meanwhile, or "
            "NAME=COMMAND, run with `down` and `up`."
        ),
    ] = None
    readings_per_publish: Annotated[
        int | None,
        typer.Option(min=1, help="Readings per publish; more than one are sent as an array. Default: 1."),
    ] = None
    qos: Annotated[int | None, typer.Option(min=0, max=2, help="MQTT quality of service. Default: 1.")] = None
    scenario: Annotated[Path | None, typer.Option(help="A fleet in TOML; options override it.")] = None
    window: WindowOption = 20
    ring: Annotated[int, typer.Option(min=1, help="Publishes a device keeps until acknowledged.")] = 10_000
    keepalive: KeepaliveOption = 30
    connect_timeout: Annotated[
        float | None, typer.Option(min=0, help="Exit when no device connects for so long at the start, in s.")
    ] = None
    drain_timeout: Annotated[
        float, typer.Option(min=0, help="At the end, wait at most this long for acknowledgements, in s.")
    ] = 10.0
    ca_file: CaOption = None
    as_json: JsonOption = False
    quiet: QuietOption = False


def run(options: RunOptions) -> None:
    """Run a fleet of simulated devices against an MQTT server.

    Options or a scenario (docs/simulator.md) define the devices, their faults and outages.

    Each device has its own connection, boot id and sequence numbers, and keeps every publish until it is
    acknowledged, over lost connections and restarts of the server. SIGINT or SIGTERM ends the run cleanly.

    For example:

      tidegate sim run --truth truth --devices 500 --rate 2000 --seconds 0

      tidegate sim run --truth truth --scenario config/scenarios/solar-site.toml --seconds 600

      tidegate sim run --truth truth --scenario config/scenarios/satellite-link.toml --service region=4711

      tidegate sim run --truth truth --devices 100 --rate max --readings 1000000
    """
    if options.devices and options.scenario:
        raise SimError("--devices and --scenario exclude each other: the scenario defines the devices")
    plan = read_scenario(options.scenario) if options.scenario else Scenario()
    overrides = {
        "rate": None if options.rate in {None, "max"} else parse_rate("--rate", options.rate),
        "seconds": options.seconds,
        "seed": options.seed,
        "readings_per_publish": options.readings_per_publish,
        "qos": options.qos,
        "groups": (Group(devices=options.devices),) if options.devices else None,
    }
    plan = msgspec.structs.replace(plan, **{k: v for k, v in overrides.items() if v is not None})
    services = [parse_service(text) for text in options.service or ()]
    radio = RadioSettings(
        parse_broker(options.broker, ca_file=options.ca_file),
        qos=plan.qos,
        window=options.window,
        ring_publishes=options.ring,
        keepalive_s=options.keepalive,
    )
    seed = plan.seed if plan.seed is not None else secrets.randbelow(1 << 31)
    start_us = time.time_ns() // 1000 - int(plan.seconds * (plan.speed - 1) * 1e6)  # the run ends now
    if options.start:
        try:
            start_us, _ = parse_time_us(options.start, "auto")
        except CellError as fault:
            raise SimError(f"--start: {fault}") from fault
    about = {
        "command": "run",
        "seed": seed,
        "start_us": start_us,
        "scenario": msgspec.to_builtins(plan),
        "broker": str(radio.broker),
    }
    raise_open_files_limit(sum(group.devices for group in plan.groups) + _OTHER_FILES)
    with (
        GroundTruthWriter(options.truth, build_run_name(), about) as record,
        ProgressDisplay("sim run", options.truth, quiet=options.quiet) as display,
    ):
        if options.rate == "max":
            with show_progress_bar(quiet=options.quiet) as step:
                publishes = encode_publishes(
                    plan,
                    record,
                    seed=seed,
                    start_us=start_us,
                    readings=options.readings,
                    on_encoded=lambda done: step("encoding readings", done, options.readings),
                )
            radio.counters.produced = record.rows
            load = LoadGenerator(publishes, radio.broker, record, radio.counters, window=options.window)
            run_until_signal(
                lambda stop: load.run(
                    stop,
                    seconds=options.seconds or 0.0,
                    connect_timeout_s=options.connect_timeout or 10.0,
                    on_progress=display.show,
                )
            )
            outcome = load.progress()
        else:
            fleet = Fleet(plan, radio, record, seed=seed, start_us=start_us, services=services)
            run_until_signal(
                lambda stop: fleet.run(
                    stop,
                    drain_timeout_s=options.drain_timeout,
                    connect_timeout_s=options.connect_timeout,
                    on_progress=display.show,
                )
            )
            outcome = fleet.progress()
    typer.echo(
        json.dumps({**outcome, "seed": seed, "start_us": start_us})
        if options.as_json
        else f"sim run: {format_counters(outcome)} seed={seed}"
    )
