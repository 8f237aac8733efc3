"""The ground truth: what was produced, and which of it was acknowledged.

Stored form, in one folder, three append-only files for each run:

    RUN.series.jsonl    line 1: {"form": 1, "run": RUN, ...whatever describes the run}
                        then one line per series state, numbered from 0 in order:
                        {"sensor_id": S, "sensor_type": T, "attributes": {"unit": U, ...}}
                        and one for each start of a device, valid from that reading on:
                        {"device": D, "boot_id": B, "first_row": N}
    RUN.produced.bin    one record of 40 bytes per reading, little-endian, numbered from 0 in order:
                        series state i32, time in us since 1970 i64, value f64, quality f32,
                        battery level f32, signal strength f32, seq i64   (NaN and -1: absent)
    RUN.acks.bin        one record of 24 bytes per acknowledged publish:
                        first reading u64, readings u32, reason code u32 (>= 128: refused), when i64
    RUN.produced.pack   instead of produced.bin once a large run has ended: for each block of a million rows
                        rows u32, then for each field in order bytes u32 and a standalone pcodec file; its
                        acknowledgements are merged where one follows the other with the same reason

A reading is recorded before it is sent, so nothing stored can be missing here. Acknowledgements are written
at each flush: a simulator killed in between knows of too few, never of too many. A torn last line or record
is ignored by the reader.
"""

from __future__ import annotations

import json
import math
import os
import struct
import time
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from pcodec import ChunkConfig, standalone

from firmware_sim.errors import SimError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from io import FileIO
    from pathlib import Path
    from typing import Self

    from numpy.typing import NDArray

FORMAT_VERSION = 1
SEQ_ABSENT = -1
ATTRIBUTES = ("unit", "location", "manufacturer", "firmware_version")
MEASURES = ("quality", "battery_level", "signal_strength", "seq")
REFUSED_FROM_CODE = 128
"""MQTT 5 reason codes from here on are failures."""
PACK_FROM_ROWS = 500_000
BLOCK_ROWS = 1_000_000

PRODUCED_DTYPE = np.dtype(
    [
        ("state", "<i4"),
        ("time_us", "<i8"),
        ("value", "<f8"),
        ("quality", "<f4"),
        ("battery_level", "<f4"),
        ("signal_strength", "<f4"),
        ("seq", "<i8"),
    ]
)
ACK_DTYPE = np.dtype([("first_row", "<u8"), ("rows", "<u4"), ("reason_code", "<u4"), ("at_us", "<i8")])
_PRODUCED_STRUCT = struct.Struct("<iqdfffq")
_ACK_STRUCT = struct.Struct("<QIIq")
_U32 = struct.Struct("<I")
_PCODEC_CONFIG = ChunkConfig(compression_level=4)


class SeriesState(NamedTuple):
    """A series with one state of its attributes, in the order of `ATTRIBUTES`; None is absent."""

    sensor_id: str
    sensor_type: str
    attributes: tuple[str | None, ...] = (None,) * len(ATTRIBUTES)


class Reading(NamedTuple):
    """One measured value. Absent measures are NaN, an absent seq is `SEQ_ABSENT`."""

    time_us: int
    value: float
    quality: float = math.nan
    battery_level: float = math.nan
    signal_strength: float = math.nan
    seq: int = SEQ_ABSENT


class Publish(NamedTuple):
    """One PUBLISH and the recorded readings it carries; `rows` is 0 for a payload that is not recorded."""

    topic: str
    payload: bytes
    first_row: int = 0
    rows: int = 0


class GroundTruthWriter:
    """Appends one run to a folder. Use as a context manager; `flush` before sending what was recorded."""

    def __init__(self, folder: Path, run: str, about: Mapping[str, object]) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._series, self._produced, self._acks = (
                (folder / f"{run}.{kind}").open("xb", buffering=0)
                for kind in ("series.jsonl", "produced.bin", "acks.bin")
            )
        except OSError as fault:
            raise SimError(f"--truth {folder}: cannot record there: {fault}") from fault
        self._folder, self._run = folder, run
        self._states: dict[SeriesState, int] = {}
        self.rows = 0
        self._pending_produced = bytearray()
        self._pending_acks = bytearray()
        self._write_line({"form": FORMAT_VERSION, "run": run, **about})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def number_state(self, state: SeriesState) -> int:
        """The number of a series state; a new one is written to the record."""
        number = self._states.get(state)
        if number is None:
            number = self._states[state] = len(self._states)
            named = {n: v for n, v in zip(ATTRIBUTES, state.attributes, strict=True) if v is not None}
            self._write_line(
                {"sensor_id": state.sensor_id, "sensor_type": state.sensor_type, "attributes": named}
            )
        return number

    def record_boot(self, device: str, boot_id: str) -> None:
        """Record the start of a device: boot id and `seq` together identify its readings."""
        self._write_line({"device": device, "boot_id": boot_id, "first_row": self.rows})

    def append(self, state: int, reading: Reading) -> None:
        """Record one reading, not yet on disk."""
        self._pending_produced += _PRODUCED_STRUCT.pack(state, *reading)
        self.rows += 1

    def settle(self, publish: Publish, reason_code: int) -> None:
        """Record the acknowledgement of a publish as of now, not yet on disk."""
        if publish.rows:
            at_us = time.time_ns() // 1000
            self._pending_acks += _ACK_STRUCT.pack(publish.first_row, publish.rows, reason_code, at_us)

    def flush(self) -> None:
        """Hand everything recorded to the operating system: from here on a SIGKILL loses nothing of it."""
        for file, pending in ((self._produced, self._pending_produced), (self._acks, self._pending_acks)):
            if pending:
                _write_all(file, bytes(pending))
                pending.clear()

    def close(self) -> None:
        """Flush, fsync and close; a large run is packed."""
        self.flush()
        for file in (self._series, self._produced, self._acks):
            os.fsync(file.fileno())
            file.close()
        if self.rows >= PACK_FROM_ROWS:
            pack_run(self._folder, self._run)

    def _write_line(self, entry: Mapping[str, object]) -> None:
        _write_all(self._series, json.dumps(entry).encode() + b"\n")


def _write_all(file: FileIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def pack_run(folder: Path, run: str) -> None:
    """Pack a run that has ended. A crash meanwhile leaves either form, or both, which are the same."""
    acks = folder / f"{run}.acks.bin"
    beside = folder / f"{run}.acks.packing"
    _merge_acks(_read_records(acks, ACK_DTYPE)).tofile(beside)
    beside.replace(acks)
    produced = folder / f"{run}.produced.bin"
    rows = produced.stat().st_size // PRODUCED_DTYPE.itemsize
    beside = folder / f"{run}.produced.packing"
    with beside.open("wb") as out:
        for first in range(0, rows, BLOCK_ROWS):
            count = min(BLOCK_ROWS, rows - first)
            block = np.fromfile(produced, PRODUCED_DTYPE, count, offset=first * PRODUCED_DTYPE.itemsize)
            out.write(_U32.pack(count))
            for name in PRODUCED_DTYPE.names or ():
                packed = standalone.simple_compress(block[name].copy(), _PCODEC_CONFIG)
                out.write(_U32.pack(len(packed)) + packed)
        out.flush()
        os.fsync(out.fileno())
    beside.replace(folder / f"{run}.produced.pack")
    produced.unlink()


def _merge_acks(acks: NDArray[np.void]) -> NDArray[np.void]:
    """Acknowledgements ordered by reading, adjacent ones with one reason merged; the last time stays."""
    if not len(acks):
        return acks
    ordered = acks[np.argsort(acks["first_row"], kind="stable")]
    ends = ordered["first_row"] + ordered["rows"]
    follows = (ordered["first_row"][1:] == ends[:-1]) & (
        ordered["reason_code"][1:] == ordered["reason_code"][:-1]
    )
    starts = np.flatnonzero(np.concatenate(([True], ~follows)))
    lasts = np.append(starts[1:], len(ordered)) - 1
    merged = ordered[starts]
    merged["rows"] = ends[lasts] - merged["first_row"]
    merged["at_us"] = np.maximum.reduceat(ordered["at_us"], starts)
    return merged


@dataclass(frozen=True)
class GroundTruth:
    """Everything the runs of a folder produced. Arrays have shape (readings,), in order of production.

    `produced` are `PRODUCED_DTYPE` records, whose `state` indexes `states`; several states may belong to one
    series. `acknowledged` and `refused` say which acknowledgement came.
    """

    states: tuple[SeriesState, ...]
    produced: NDArray[np.void]
    acknowledged: NDArray[np.bool_]
    refused: NDArray[np.bool_]

    @property
    def rows(self) -> int:
        """Number of readings produced."""
        return len(self.produced)

    @cached_property
    def names(self) -> tuple[tuple[str, str], ...]:
        """(sensor_id, sensor_type) of each series."""
        return tuple(dict.fromkeys((state.sensor_id, state.sensor_type) for state in self.states))

    @cached_property
    def series(self) -> NDArray[np.int32]:
        """int32, shape (readings,): the series of each reading, indexing `names`."""
        numbers = [self._series_numbers[state.sensor_id, state.sensor_type] for state in self.states]
        series: NDArray[np.int32] = np.array(numbers, np.int32)[self.produced["state"]]
        return series

    @property
    def time_range_us(self) -> tuple[int, int]:
        """Earliest and latest time of a reading; (0, -1) without readings."""
        times = self.produced["time_us"]
        return (int(times.min()), int(times.max())) if len(times) else (0, -1)

    @cached_property
    def _series_numbers(self) -> dict[tuple[str, str], int]:
        return {name: number for number, name in enumerate(self.names)}

    @cached_property
    def _state_numbers(self) -> dict[SeriesState, int]:
        numbers: dict[SeriesState, int] = {}
        for number, state in enumerate(self.states):
            attributes = tuple(text or "" for text in state.attributes)
            numbers.setdefault(state._replace(attributes=attributes), number)
        return numbers

    def find_series(self, sensor_type: str, tags: Mapping[str, str]) -> tuple[int, int]:
        """(series, state) for the tags of a stored row; -1 for what was never produced."""
        sensor_id = tags.get("sensor_id", "")
        state = SeriesState(sensor_id, sensor_type, tuple(tags.get(name, "") for name in ATTRIBUTES))
        return self._series_numbers.get((sensor_id, sensor_type), -1), self._state_numbers.get(state, -1)


def load_ground_truth(folder: Path, run: str = "*") -> GroundTruth:
    """Read all runs in a folder, oldest first, or the one named."""
    runs = sorted(path.name.removesuffix(".series.jsonl") for path in folder.glob(f"{run}.series.jsonl"))
    if not runs:
        raise SimError(
            f"--truth {folder}: no record there (no *.series.jsonl); `sim run` and `sim replay` write one"
        )
    numbers: dict[SeriesState, int] = {}
    produced, acknowledged, refused = [], [], []
    for each in runs:
        states, rows = _read_run(folder, each)
        local = np.array([numbers.setdefault(state, len(numbers)) for state in states], np.int32)
        rows["state"] = local[rows["state"]] if len(rows) else rows["state"]
        acks = _read_records(folder / f"{each}.acks.bin", ACK_DTYPE)
        good = acks["reason_code"] < REFUSED_FROM_CODE
        produced.append(rows)
        acknowledged.append(_rows_covered_by(acks[good], len(rows)))
        refused.append(_rows_covered_by(acks[~good], len(rows)))
    return GroundTruth(
        tuple(numbers), np.concatenate(produced), np.concatenate(acknowledged), np.concatenate(refused)
    )


def find_repeated_readings(folder: Path, run: str) -> tuple[int, list[tuple[SeriesState, int]]]:
    """How many readings of a run repeat a series and time of an earlier one, and the first few."""
    truth = load_ground_truth(folder, run)
    rows, series = truth.produced, truth.series
    order = np.lexsort((rows["time_us"], series))
    again = order[1:][(np.diff(series[order]) == 0) & (np.diff(rows["time_us"][order]) == 0)]
    again.sort()
    return len(again), [(truth.states[rows["state"][at]], int(rows["time_us"][at])) for at in again[:5]]


def _read_run(folder: Path, run: str) -> tuple[list[SeriesState], NDArray[np.void]]:
    path = folder / f"{run}.series.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is torn
    states = []
    if lines and (form := json.loads(lines[0]).get("form")) != FORMAT_VERSION:
        raise SimError(f"{path}: a record of form {form}; this release reads form {FORMAT_VERSION}")
    for entry in map(json.loads, lines[1:]):
        if "device" not in entry:
            attributes = tuple(entry["attributes"].get(name) for name in ATTRIBUTES)
            states.append(SeriesState(entry["sensor_id"], entry["sensor_type"], attributes))
    packed = folder / f"{run}.produced.pack"
    if packed.exists():
        rows = _unpack_produced(packed)
    else:
        rows = _read_records(folder / f"{run}.produced.bin", PRODUCED_DTYPE)
    if len(rows) and int(rows["state"].max()) >= len(states):
        raise SimError(f"{path}: fewer series than {run}.produced.bin refers to; the record is damaged")
    return states, rows


def _unpack_produced(path: Path) -> NDArray[np.void]:
    parts = []
    with path.open("rb") as file:
        while head := file.read(_U32.size):
            try:
                block = np.empty(_U32.unpack(head)[0], PRODUCED_DTYPE)
                for name in PRODUCED_DTYPE.names or ():
                    packed = file.read(_U32.unpack(file.read(_U32.size))[0])
                    block[name] = standalone.simple_decompress(packed)
            except (struct.error, ValueError, RuntimeError, TypeError) as fault:
                raise SimError(f"{path}: it is cut short or damaged: {fault}") from fault
            parts.append(block)
    return np.concatenate(parts) if parts else np.empty(0, PRODUCED_DTYPE)


def _read_records(path: Path, dtype: np.dtype[np.void]) -> NDArray[np.void]:
    if not path.exists():
        return np.empty(0, dtype)
    return np.fromfile(path, dtype, count=path.stat().st_size // dtype.itemsize)


def _rows_covered_by(acks: NDArray[np.void], rows: int) -> NDArray[np.bool_]:
    """Which of `rows` readings the acknowledgements cover."""
    edges = np.zeros(rows + 1, np.int64)
    first = np.minimum(acks["first_row"], rows).astype(np.intp)
    last = np.minimum(acks["first_row"] + acks["rows"], rows).astype(np.intp)
    np.add.at(edges, first, 1)
    np.add.at(edges, last, -1)
    return np.cumsum(edges[:-1]) > 0
