"""`tidegate sim run`: a fleet against an MQTT server."""

import asyncio
import json
import secrets
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from firmware_sim.broker import parse_broker
from firmware_sim.commands.options import (
    BrokerOption,
    CaOption,
    DrainOption,
    JsonOption,
    QosOption,
    QuietOption,
    ReadingsOption,
    TruthOption,
)
from firmware_sim.commands.running import allow_open_files, errors_in_words, new_run_name, run_until_signal
from firmware_sim.device import Radio
from firmware_sim.display import Progress, one_line
from firmware_sim.errors import SimError
from firmware_sim.fleet import Fleet
from firmware_sim.scenarios import Group, Scenario, read_scenario
from firmware_sim.service import Service
from firmware_sim.truth import TruthWriter


def run(
    *,
    truth: TruthOption,
    broker: BrokerOption = "mqtt://127.0.0.1:1883",
    devices: Annotated[
        int | None, typer.Option(min=1, max=10_000, help="Number of devices. Default: 20.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Readings per second of the whole fleet. Default: 10.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="How long to produce; 0: until stopped. Default: 60.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed makes the same fleet.")] = None,
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

    Each device has its own connection, boot id and sequence numbers, and keeps every publish until it is
    acknowledged, over lost connections and restarts of the server. SIGINT or SIGTERM ends the run properly.
    """
    with errors_in_words():
        plan = read_scenario(scenario) if scenario else Scenario()
        wanted = {
            "rate": rate,
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
        if rate is not None and not 0 < rate < float("inf"):
            raise SimError(f"--rate {rate}: expected a number of readings per second above 0")
        plan = msgspec.structs.replace(
            plan, **{key: value for key, value in wanted.items() if value is not None}
        )
        radio = Radio(
            parse_broker(broker, ca_file=ca_file),
            qos=plan.qos,
            window=window,
            ring_publishes=ring,
            keepalive_s=keepalive,
        )
        boot = new_run_name()
        chosen = plan.seed if plan.seed is not None else secrets.randbelow(1 << 31)
        about = {
            "command": "run",
            "seed": chosen,
            "scenario": msgspec.to_builtins(plan),
            "broker": str(radio.broker),
        }
        with TruthWriter(truth, boot, about) as record, Progress("sim run", quiet=quiet) as progress:
            fleet = Fleet(plan, radio, record, seed=chosen, boot=boot)
            allow_open_files(fleet.size * 4 + 100)

            service = Service()

            def tell(shown: Fleet) -> None:
                progress.show(shown.progress())
                service.tell(one_line(shown.progress()))

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
            json.dumps({**outcome, "seed": chosen})
            if as_json
            else f"sim run: {one_line(outcome)} seed={chosen}"
        )
