"""Every kind of destination, made ready for the contract suite.

A new kind adds one async context manager to `KINDS`; servers come from the fixtures it asks `request` for.
"""

from __future__ import annotations

import gzip
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import uuid4

from line_protocol_parser import parse_line

from cloud_sync.codec import line_protocol
from cloud_sync.destinations.file import FileDestination, FileOptions
from cloud_sync.destinations.influxdb import InfluxDestination, InfluxOptions
from tests.support.http_stub import InfluxV2Stub, http_stub

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    import pytest

    from cloud_sync.destinations import Destination
    from tests.support.batches import Row


@dataclass(frozen=True)
class Subject:
    """One destination ready to be used.

    Attributes:
        destination: connected to a working server, with its own empty place there.
        stored: every row of the given sensor ids that is there now, each as often as it is there.
        at: the same kind aimed at another base URL, with a short timeout; None when it has no URL.
        as_stored: how a name arrives there.
    """

    destination: Destination
    stored: Callable[[set[str]], Awaitable[list[Row]]]
    at: Callable[[str], Destination] | None = None
    as_stored: Callable[[str], str] = str


@dataclass(frozen=True)
class Kind:
    """How to make a `Subject`, and which tests fit it.

    Attributes:
        ready: a context in which the subject's server runs.
        http: it speaks HTTP, so `Subject.at` exists.
        exact: whether every float64 value and every microsecond, also before 1970, survives there.
    """

    ready: Callable[[pytest.FixtureRequest, Path], AbstractAsyncContextManager[Subject]]
    http: bool = True
    exact: bool = True


def carried(text: str) -> str:
    """How line protocol carries a tag value once the server has taken the escapes away."""
    return line_protocol.escape_tag(text).replace("\\,", ",").replace("\\=", "=").replace("\\ ", " ")


def rows_of(lines: Sequence[str], *, unit_per_us: float) -> list[Row]:
    """Rows of line protocol, read by an independent parser."""
    return [
        (p["tags"]["sensor_id"], p["measurement"], int(p["time"] / unit_per_us), p["fields"]["value"])
        for p in map(parse_line, lines)
    ]


def file_lines(directory: Path) -> list[str]:
    """Every whole line of the files in a directory, the open ones too."""
    lines: list[str] = []
    for path in sorted((*directory.glob("*.lp"), *directory.glob("*.lp.gz"))):
        data = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
        lines += data.decode().split("\n")[:-1]
    return lines


@asynccontextmanager
async def _influxdb_v1(request: pytest.FixtureRequest, _: Path) -> AsyncIterator[Subject]:
    server = request.getfixturevalue("influxd")
    database = server.new_database()

    async def stored(sensor_ids: set[str]) -> list[Row]:
        return [
            (p["sensor_id"], p["measurement"], p["time"] // 1000, p["value"])
            for p in server.points(database)
            if p["sensor_id"] in sensor_ids
        ]

    def at(url: str) -> Destination:
        return InfluxDestination("cloud", InfluxOptions(url, api="v1", database=database, timeout_s=0.5))

    destination = InfluxDestination("cloud", InfluxOptions(server.url, api="v1", database=database))
    yield Subject(destination, stored, at, carried)
    await destination.aclose()


@asynccontextmanager
async def _victoria_v2(request: pytest.FixtureRequest, _: Path) -> AsyncIterator[Subject]:
    server = request.getfixturevalue("victoria")

    async def stored(sensor_ids: set[str]) -> list[Row]:
        return [
            (labels["sensor_id"], labels["__name__"].removesuffix("_value"), time_ms * 1000, value)
            for labels, time_ms, value in server.points(sensor_ids)
        ]

    def at(url: str) -> Destination:
        return InfluxDestination("cloud", InfluxOptions(url, bucket="edge", token="t", timeout_s=0.5))

    destination = InfluxDestination("cloud", InfluxOptions(server.url, bucket="edge", token="t"))
    yield Subject(destination, stored, at, carried)
    await destination.aclose()


@asynccontextmanager
async def _influxdb_v2_stub(_request: pytest.FixtureRequest, _: Path) -> AsyncIterator[Subject]:
    server = InfluxV2Stub()

    async def stored(sensor_ids: set[str]) -> list[Row]:
        return [row for row in rows_of(sorted(server.lines), unit_per_us=1) if row[0] in sensor_ids]

    def at(url: str) -> Destination:
        return InfluxDestination(
            "cloud", InfluxOptions(url, org="plant", bucket="edge", token="t0ken", timeout_s=0.5)
        )

    async with http_stub(server) as stub:
        destination = InfluxDestination(
            "cloud", InfluxOptions(stub.url, org="plant", bucket="edge", token="t0ken")
        )
        yield Subject(destination, stored, at, carried)
        await destination.aclose()


@asynccontextmanager
async def _files(_request: pytest.FixtureRequest, folder: Path, *, compress: bool) -> AsyncIterator[Subject]:
    directory = folder / "out"

    async def stored(sensor_ids: set[str]) -> list[Row]:
        return [row for row in rows_of(file_lines(directory), unit_per_us=1000) if row[0] in sensor_ids]

    destination = FileDestination("stick", directory, FileOptions(compress=compress))
    yield Subject(destination, stored, as_stored=carried)
    await destination.aclose()


KINDS: dict[str, Kind] = {
    "influxdb-v1": Kind(_influxdb_v1),
    "influxdb-v2-victoria": Kind(_victoria_v2, exact=False),  # it keeps milliseconds and 15 digits
    "influxdb-v2-stub": Kind(_influxdb_v2_stub),
    "files": Kind(lambda request, folder: _files(request, folder, compress=False), http=False),
    "files-gzip": Kind(lambda request, folder: _files(request, folder, compress=True), http=False),
}


def unique(name: str) -> str:
    """A sensor id nobody else uses: one VictoriaMetrics serves all tests."""
    return f"{name}-{uuid4().hex[:8]}"
