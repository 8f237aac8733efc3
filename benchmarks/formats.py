"""`make bench NAME=formats`: what a reading costs in each payload shape, from its bytes to the group.

CPU of this process, without sockets and without the commit, whose costs are the same for every shape
(`ingress` has those). Every shape carries the same values with a time of their own; the shapes take turns,
round by round, so that what else the machine does hits all of them.

Then a device that was asleep: arrays of 500 old readings, shuffled, half of them sent before, through real
commits, against the same number of readings that are new and in order.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from benchmarks.figures import Figures, say
from benchmarks.ingress import FOLDER
from gateway.ingress.committer import Committer, CommitterOptions
from gateway.ingress.publish_decoder import PublishDecoder, SeriesResolver
from gateway.mqtt.codec.packets import Publish
from gateway.payloads.decoder_registry import RuleSet
from gateway.payloads.formats.sparkplug import Payload
from gateway.payloads.rule import PayloadRule
from gateway.payloads.topics import TopicTemplate
from gateway.spool.database import Database
from gateway.spool.series_catalog import SeriesCatalog
from gateway.spool.spool import build_spool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.spool.appender import Appender

MEMBERS = 10
ASLEEP = 500
_START_US = 1_780_000_000_000_000
_NAMES = tuple(f"member_{n}" for n in range(MEMBERS))
TEMPLATE = TopicTemplate("sensors/{sensor_id}/{sensor_type}")
RULES = RuleSet(
    TEMPLATE,
    [
        PayloadRule("fields/{sensor_id}", "fields", time="ts", companions={"battery_level": "battery"}),
        PayloadRule("senml/{sensor_id}", "senml"),
        PayloadRule("cbor/{sensor_id}", "senml"),
        PayloadRule("lines/#", "line_protocol"),
        PayloadRule("csv/{sensor_id}", "csv", columns=("ts", *_NAMES), time="ts"),
        PayloadRule("number/{sensor_id}/{sensor_type}", "number"),
        PayloadRule("spBv1.0/#", "sparkplug_b"),
    ],
)


class Shape(NamedTuple):
    """Payloads of one shape: (topic, payload), and how many readings each holds."""

    published: Sequence[tuple[bytes, bytes]]
    readings_each: int


class Source:
    """Where the publishes come from; nobody waits for the answer."""

    name = "bench"
    may_publish_sensor = None

    def acknowledge(self, publishes: Sequence[Publish]) -> None:
        """Nobody waits."""

    def refuse(self, publishes: Sequence[Publish], reason_code: int) -> None:
        """Nobody waits."""


def shapes(count: int) -> dict[str, Shape]:
    """The payloads of every shape, `count` each."""
    chance = random.Random(1)
    made: dict[str, list[tuple[bytes, bytes]]] = {}
    for n in range(count):
        at_us = _START_US + n * 1_000_000
        values = [round(chance.gauss(20, 5), 2) for _ in _NAMES]
        device = n % 100
        for name, topic, payload in _payloads(device, at_us, dict(zip(_NAMES, values, strict=True))):
            made.setdefault(name, []).append((topic.encode(), payload))
    each = {"json": 1, "number": 1, "json_array": 50}
    return {name: Shape(published, each.get(name, MEMBERS)) for name, published in made.items()}


def _payloads(device: int, at_us: int, values: dict[str, float]) -> list[tuple[str, str, bytes]]:
    reading: dict[str, Any] = {"value": values["member_0"], "ts": at_us, "quality": 99, "seq": 7}
    reading |= {"battery_level": 80.5, "signal_strength": -61, "unit": "degC"}
    pack: list[dict[str, Any]] = [{"n": name, "v": value} for name, value in values.items()]
    pack[0] |= {"bn": f"urn:dev:mac:{device:012x}:", "bt": at_us / 1e6, "bu": "Cel"}
    lines = [f"{name},sensor_id=m{device} value={value} {at_us}000" for name, value in values.items()]
    message = Payload(timestamp=at_us // 1000, seq=at_us // 1_000_000 % 256)
    for number, value in enumerate(values.values()):
        message.metrics.add(alias=number, float_value=value)
    many = [{**reading, "ts": at_us + n} for n in range(50)]
    return [
        ("json", f"sensors/m{device}/t", _compact(reading)),
        ("json_array", f"sensors/m{device}/t", _compact(many)),
        ("fields", f"fields/m{device}", _compact({"ts": at_us, "battery": 80.5, **values})),
        ("senml", f"senml/m{device}", _compact(pack)),
        ("line_protocol", "lines/x", "\n".join(lines).encode()),
        ("csv", f"csv/m{device}", ",".join(map(str, (at_us, *values.values()))).encode()),
        ("number", f"number/m{device}/t", str(values["member_0"]).encode()),
        ("sparkplug", f"spBv1.0/g/DDATA/n{device}/d", message.SerializeToString()),
    ]


def _compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _births() -> list[Publish]:
    """What explains the aliases of every node."""
    publishes = []
    for device in range(100):
        node, born = Payload(timestamp=1, seq=0), Payload(timestamp=1, seq=1)
        for number, name in enumerate(_NAMES):
            born.metrics.add(name=name, alias=number, datatype=9, float_value=0)
        for topic, message in ((f"NBIRTH/n{device}", node), (f"DBIRTH/n{device}/d", born)):
            publishes.append(Publish(f"spBv1.0/g/{topic}".encode(), message.SerializeToString(), 1, 1))
    return publishes


def us_per_reading(shape: Shape) -> float:
    """CPU of one round through a committer that knows the topics."""
    decoder = PublishDecoder(RULES, SeriesResolver(SeriesCatalog()))
    committer = Committer(cast("Appender", None), decoder, CommitterOptions(interval_s=0))
    source = Source()
    committer.submit_publishes(source, _births())
    for warm in (True, False):
        runs = [
            [Publish(topic, payload, 1, 1) for topic, payload in shape.published[at : at + 50]]
            for at in range(0, len(shape.published), 50)
        ]
        started = time.process_time()
        for run in runs:
            committer.submit_publishes(source, run)
        if not warm:
            return (time.process_time() - started) / (len(shape.published) * shape.readings_each) * 1e6
    raise AssertionError


async def measure_resent(folder: Path, arrays: int, *, old: bool) -> tuple[float, int]:
    """Seconds until `arrays` of `ASLEEP` readings are durable, and how many were duplicates."""
    database = await Database.open(folder / f"asleep-{old}.db")
    spool = await build_spool(database)
    decoder = PublishDecoder(RuleSet(TEMPLATE), SeriesResolver(spool.catalog))
    committer = Committer(spool.appender, decoder, CommitterOptions(interval_s=0))
    source, chance = Source(), random.Random(2)
    try:
        topics = [f"sensors/s{n}/t".encode() for n in range(arrays)]
        stored: list[list[bytes]] = []
        for _ in topics:
            times = [_START_US + n * 60_000_000 for n in range(ASLEEP * 2)]
            stored.append([b'{"value":%d.5,"ts":%d,"seq":%d}' % (n, at, n) for n, at in enumerate(times)])
        for topic, readings in zip(topics, stored, strict=True):
            first = readings[: ASLEEP // 2] + readings[-1:] if old else readings[:1]
            committer.submit_publishes(source, [Publish(topic, b"[" + b",".join(first) + b"]", 1, 1)])
        await committer.commit_once()
        batches = []
        for topic, readings in zip(topics, stored, strict=True):
            part = readings[:ASLEEP] if old else readings[1 : ASLEEP + 1]
            if old:
                chance.shuffle(part)
            batches.append(Publish(topic, b"[" + b",".join(part) + b"]", 1, 1))
        before = committer.counters.duplicates
        started = time.perf_counter()
        for at in range(0, len(batches), 20):
            committer.submit_publishes(source, batches[at : at + 20])
            await committer.commit_once()
        return time.perf_counter() - started, committer.counters.duplicates - before
    finally:
        await database.close()


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=15, help="about how long the shapes take")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    given = parser.parse_args()
    say("payload shapes: CPU from the bytes of a payload to the group, commits left out")
    figures = Figures("payload shapes")
    made = shapes(2_000)
    found: dict[str, list[float]] = {name: [] for name in made}
    until = time.monotonic() + given.seconds
    while time.monotonic() < until or len(found["json"]) < 3:
        for name, shape in made.items():
            found[name].append(us_per_reading(shape))
    goals = {"json": "<= 2.7, with all of ingress"}
    for name, values in found.items():
        what = f"{name}, {made[name].readings_each} readings a payload, us per reading"
        figures.add_runs(f"us_per_reading_{name}", values, what, goals.get(name, ""), low_is_good=True)
    for name, values in found.items():
        if name != "json":
            ratio = [a / b for a, b in zip(values, found["json"], strict=True)]
            figures.add_runs(f"{name}_to_json", ratio, f"{name}, as a share of json", low_is_good=True)
    given.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        arrays = 100
        new_s, _ = asyncio.run(measure_resent(Path(folder), arrays, old=False))
        old_s, duplicates = asyncio.run(measure_resent(Path(folder), arrays, old=True))
    if duplicates != arrays * (ASLEEP // 2):
        raise SystemExit(f"FAILED: {duplicates} duplicates, {arrays * (ASLEEP // 2)} were sent")
    rows = arrays * ASLEEP
    figures.add("new_readings_per_s", rows / new_s, f"arrays of {ASLEEP}, new and in order, readings/s")
    figures.add("asleep_readings_per_s", rows / old_s, f"arrays of {ASLEEP}, old, shuffled, half sent before")
    figures.print()


if __name__ == "__main__":
    main()
