"""`tidegate sim run`: a fleet against an MQTT server."""

import asyncio
import json
import secrets
import signal
import threading
import time
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from firmware_sim.commands.console import (
    BrokerOption,
    CaOption,
    DrainOption,
    JsonOption,
    ProgressDisplay,
    QosOption,
    QuietOption,
    ReadingsOption,
    SystemdNotifier,
    TruthOption,
    allow_open_files,
    exit_on_errors,
    format_counters,
    new_run_name,
    run_until_signal,
    show_spinner,
)
from firmware_sim.devices.device import RadioSettings, parse_broker
from firmware_sim.errors import SimError
from firmware_sim.fleet import Fleet, parse_service
from firmware_sim.ground_truth import GroundTruthWriter
from firmware_sim.raw_mqtt import LoadGenerator, encode_publishes
from firmware_sim.replay.csv_values import CellError, parse_time_us
from firmware_sim.scenarios import Group, Scenario, read_scenario

_OTHER_FILES = 100


def run(
    *,
    truth: TruthOption,
    broker: BrokerOption = "mqtt://127.0.0.1:1883",
    devices: Annotated[
        int | None, typer.Option(min=1, max=10_000, help="Number of devices. Default: 20.")
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(help="Readings per second of the whole fleet, or max. Default: 10."),
    ] = None,
    readings: Annotated[
        int, typer.Option(min=1, help="With --rate max: how many are encoded before it starts.")
    ] = 500_000,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="How long to produce; 0: until stopped. A scenario with a span is played faster or slower. "
            "Default: 60.",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="The same seed makes the same fleet; with --start the same readings.")
    ] = None,
    start: Annotated[
        str,
        typer.Option(
            help="Simulated time of the start, like 2026-05-01T12:00Z. Default: so that it ends now."
        ),
    ] = "",
    service: Annotated[
        list[str] | None,
        typer.Option(
            help="A service that the scenario's outages take away: NAME=PID, paused meanwhile, or "
            "NAME=COMMAND, run with `down` and `up`."
        ),
    ] = None,
    readings_per_publish: ReadingsOption = None,
    qos: QosOption = None,
    scenario: Annotated[Path | None, typer.Option(help="A fleet in TOML; options win over it.")] = None,
    window: Annotated[
        int, typer.Option(min=1, help="Publishes a device sends without acknowledgement.")
    ] = 20,
    ring: Annotated[int, typer.Option(min=1, help="Publishes a device keeps until acknowledged.")] = 10_000,
    keepalive: Annotated[int, typer.Option(min=1, help="MQTT keep-alive, in s.")] = 30,
    connect_timeout: Annotated[
        float | None, typer.Option(min=0, help="Give up when nothing answers for so long at the start, in s.")
    ] = None,
    drain_timeout: DrainOption = 10.0,
    ca_file: CaOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run a fleet of simulated devices against an MQTT server.

    What there is, and what befalls it, is said by options or by a scenario (docs/simulator.md).

    Each device has its own connection, boot id and sequence numbers, and keeps every publish until it is
    acknowledged, over lost connections and restarts of the server. SIGINT or SIGTERM ends the run properly.

    For example:

      tidegate sim run --truth truth --devices 500 --rate 2000 --seconds 0

      tidegate sim run --truth truth --scenario config/scenarios/solar-site.toml --seconds 600

      tidegate sim run --truth truth --scenario config/scenarios/satellite-link.toml --service region=4711

      tidegate sim run --truth truth --devices 100 --rate max --readings 1000000
    """
    with exit_on_errors():
        plan = read_scenario(scenario) if scenario else Scenario()
        per_s = parse_rate(rate)
        wanted = {
            "rate": per_s,
            "seconds": seconds,
            "seed": seed,
            "readings_per_publish": readings_per_publish,
            "qos": qos,
            "groups": (Group(devices=devices),) if devices else None,
        }
        if devices and scenario:
            raise SimError(
                "--devices and --scenario exclude each other: the scenario says which devices there are"
            )
        plan = msgspec.structs.replace(
            plan, **{key: value for key, value in wanted.items() if value is not None}
        )
        services = [parse_service(text) for text in service or ()]
        radio = RadioSettings(
            parse_broker(broker, ca_file=ca_file),
            qos=plan.qos,
            window=window,
            ring_publishes=ring,
            keepalive_s=keepalive,
        )
        chosen = plan.seed if plan.seed is not None else secrets.randbelow(1 << 31)
        start_us = parse_start_us(start, plan)
        about = {
            "command": "run",
            "seed": chosen,
            "start_us": start_us,
            "scenario": msgspec.to_builtins(plan),
            "broker": str(radio.broker),
        }
        with (
            GroundTruthWriter(truth, new_run_name(), about) as record,
            ProgressDisplay("sim run", quiet=quiet) as progress,
        ):
            if rate == "max":
                allow_open_files(sum(group.devices for group in plan.groups) + _OTHER_FILES)
                with show_spinner(quiet=quiet) as step:
                    publishes = encode_publishes(
                        plan,
                        record,
                        seed=chosen,
                        start_us=start_us,
                        readings=readings,
                        encoded=lambda done: step(f"encoding: {done:,} of {readings:,} readings"),
                    )
                radio.counters.produced = record.rows
                load = LoadGenerator(publishes, radio.broker, record, radio.counters, window=window)
                asyncio.run(run_at_full_rate(load, progress, seconds or 0.0, connect_timeout or 10.0))
                outcome = load.progress()
            else:
                fleet = Fleet(plan, radio, record, seed=chosen, start_us=start_us, services=services)
                allow_open_files(fleet.size + _OTHER_FILES)

                own = SystemdNotifier()

                def tell(shown: Fleet) -> None:
                    progress.show(shown.progress())
                    own.tell(format_counters(shown.progress()))

                async def produce(stop: asyncio.Event) -> None:
                    await fleet.run(
                        stop,
                        drain_timeout_s=drain_timeout,
                        connect_timeout_s=connect_timeout,
                        show=tell,
                    )

                run_until_signal(produce)
                outcome = fleet.progress()
        typer.echo(
            json.dumps({**outcome, "seed": chosen, "start_us": start_us})
            if as_json
            else f"sim run: {format_counters(outcome)} seed={chosen}"
        )


async def run_at_full_rate(
    load: LoadGenerator, progress: ProgressDisplay, seconds: float, connect_timeout_s: float
) -> None:
    """Run a load in a thread, showing where it is; SIGINT and SIGTERM end it."""
    stop = threading.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    work = asyncio.ensure_future(
        asyncio.to_thread(load.run, stop, seconds=seconds, connect_timeout_s=connect_timeout_s)
    )
    while not (await asyncio.wait({work}, timeout=1.0))[0]:
        progress.show(load.progress())
    await work


def parse_rate(text: str | None) -> float | None:
    """Readings per second, or None for the scenario's own, which max goes by as well."""
    if text is None or text == "max":
        return None
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise SimError(f"--rate {text}: expected a number of readings per second above 0, or max")
    return rate


def parse_start_us(text: str, plan: Scenario) -> int:
    """Simulated time of the start in microseconds: as said, or so that the run ends now."""
    if text:
        try:
            return parse_time_us(text, "auto")[0]
        except CellError as fault:
            raise SimError(f"--start: {fault}") from fault
    return time.time_ns() // 1000 - int(plan.seconds * (plan.speed - 1) * 1e6)
