"""The ground truth: what was produced, and which of it was acknowledged.

Stored form, in one folder, three append-only files for each run:

    RUN.series.jsonl    line 1: {"form": 1, "run": RUN, ...whatever describes the run}
                        then one line per series state, numbered from 0 in order:
                        {"sensor_id": S, "sensor_type": T, "attributes": {"unit": U, ...}}
                        and one for each start of a device, which says from which reading on it holds:
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
is ignored by the reader. `progress.json` is replaced atomically.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
from pcodec import ChunkConfig, standalone

from firmware_sim.errors import SimError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Self

    from numpy.typing import NDArray

BLOCK_ROWS = 1_000_000
_U32 = struct.Struct("<I")
_PCODEC_CONFIG = ChunkConfig(compression_level=4)


def pack_records(source: Path, target: Path, dtype: np.dtype[Any]) -> None:
    """Write the records of `source` packed to `target`, durably, and remove `source`."""
    rows = source.stat().st_size // dtype.itemsize
    beside = target.with_suffix(".packing")
    with beside.open("wb") as out:
        for first in range(0, rows, BLOCK_ROWS):
            count = min(BLOCK_ROWS, rows - first)
            block = np.fromfile(source, dtype, count, offset=first * dtype.itemsize)
            out.write(_U32.pack(count))
            for name in dtype.names or ():
                packed = standalone.simple_compress(block[name].copy(), _PCODEC_CONFIG)
                out.write(_U32.pack(len(packed)) + packed)
        out.flush()
        os.fsync(out.fileno())
    beside.replace(target)
    source.unlink()


def unpack_records(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The records of a packed file.

    Raises:
        SimError: it is cut short or damaged.
    """
    parts = []
    with path.open("rb") as file:
        while head := file.read(_U32.size):
            try:
                block = np.empty(_U32.unpack(head)[0], dtype)
                for name in dtype.names or ():
                    packed = file.read(_U32.unpack(file.read(_U32.size))[0])
                    block[name] = standalone.simple_decompress(packed)
            except (struct.error, ValueError, RuntimeError, TypeError) as fault:
                raise SimError(f"{path}: it is cut short or damaged: {fault}") from fault
            parts.append(block)
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def merge_acks(acks: NDArray[Any]) -> NDArray[Any]:
    """Acknowledgements in the order of their readings, those that follow each other as one; the last time
    stays.
    """
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


FORMAT_VERSION = 1
SEQ_ABSENT = -1
ATTRIBUTES = ("unit", "location", "manufacturer", "firmware_version")
REFUSED_FROM_CODE = 128
PACK_FROM_ROWS = 500_000

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


class SeriesState(NamedTuple):
    """A series with one state of its attributes, in the order of `ATTRIBUTES`; None is absent."""

    sensor_id: str
    sensor_type: str
    attributes: tuple[str | None, ...] = (None,) * len(ATTRIBUTES)


class GroundTruthWriter:
    """Appends one run to a folder. Use as a context manager; `flush` before sending what was recorded."""

    def __init__(self, folder: Path, run: str, about: Mapping[str, Any]) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._series = (folder / f"{run}.series.jsonl").open("xb", buffering=0)
            self._produced = (folder / f"{run}.produced.bin").open("xb", buffering=0)
            self._acks = (folder / f"{run}.acks.bin").open("xb", buffering=0)
        except OSError as fault:
            raise SimError(f"--truth {folder}: cannot record there: {fault}") from fault
        self.folder, self._run = folder, run
        self._states: dict[SeriesState, int] = {}
        self._rows = 0
        self._pending_produced = bytearray()
        self._pending_acks = bytearray()
        self._write(self._series, json.dumps({"form": FORMAT_VERSION, "run": run, **about}).encode() + b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def rows(self) -> int:
        """Readings recorded so far: the number the next one gets."""
        return self._rows

    def state(self, state: SeriesState) -> int:
        """The number of a series state, written down when it is new."""
        number = self._states.get(state)
        if number is None:
            number = self._states[state] = len(self._states)
            named = {n: v for n, v in zip(ATTRIBUTES, state.attributes, strict=True) if v is not None}
            line = {"sensor_id": state.sensor_id, "sensor_type": state.sensor_type, "attributes": named}
            self._write(self._series, json.dumps(line).encode() + b"\n")
        return number

    def record_boot(self, device: str, boot_id: str) -> None:
        """Write down that a device has started: with `seq` its readings are told apart for ever."""
        line = {"device": device, "boot_id": boot_id, "first_row": self._rows}
        self._write(self._series, json.dumps(line).encode() + b"\n")

    def produce(  # noqa: PLR0917 - a record's fields in their order, on the hot path
        self,
        state: int,
        time_us: int,
        value: float,
        quality: float,
        battery_level: float,
        signal_strength: float,
        seq: int,
    ) -> int:
        """Record one reading, not yet on disk; its number."""
        self._pending_produced += _PRODUCED_STRUCT.pack(
            state, time_us, value, quality, battery_level, signal_strength, seq
        )
        self._rows += 1
        return self._rows - 1

    def settle(self, first_row: int, rows: int, reason_code: int, at_us: int) -> None:
        """Record the acknowledgement of one publish, not yet on disk."""
        self._pending_acks += _ACK_STRUCT.pack(first_row, rows, reason_code, at_us)

    def flush(self) -> None:
        """Hand everything recorded to the operating system: from here on a SIGKILL loses nothing of it."""
        for file, pending in ((self._produced, self._pending_produced), (self._acks, self._pending_acks)):
            if pending:
                self._write(file, bytes(pending))
                pending.clear()

    def progress(self, counters: Mapping[str, Any]) -> None:
        """Rewrite progress.json in one step, so that a reader never sees half of it."""
        beside = self.folder / f".progress.{os.getpid()}"
        beside.write_text(json.dumps(counters) + "\n")
        beside.replace(self.folder / "progress.json")

    def close(self) -> None:
        """Flush, fsync and close; a large run is packed."""
        self.flush()
        for file in (self._series, self._produced, self._acks):
            os.fsync(file.fileno())
            file.close()
        if self._rows >= PACK_FROM_ROWS:
            pack_run(self.folder, self._run)

    @staticmethod
    def _write(file: BinaryIO | Any, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]


def pack_run(folder: Path, run: str) -> None:
    """Pack a run that has ended. A crash meanwhile leaves either form, or both, which are the same."""
    acks = folder / f"{run}.acks.bin"
    beside = folder / f"{run}.acks.packing"
    merge_acks(_read_records(acks, ACK_DTYPE)).tofile(beside)
    beside.replace(acks)
    pack_records(folder / f"{run}.produced.bin", folder / f"{run}.produced.pack", PRODUCED_DTYPE)


@dataclass(frozen=True, slots=True)
class GroundTruth:
    """Everything the runs of a folder produced. Arrays have shape (readings,), in order of production.

    Attributes:
        names: (sensor_id, sensor_type) of each series.
        states: the series states; several may belong to one series.
        state_series: int32, shape (states,), the series of each state.
        produced: `PRODUCED` records; `state` indexes `states`.
        acknowledged: bool, an acknowledgement with success came.
        refused: bool, an acknowledgement with a failure came.
    """

    names: tuple[tuple[str, str], ...]
    states: tuple[SeriesState, ...]
    state_series: NDArray[np.int32]
    produced: NDArray[Any]
    acknowledged: NDArray[np.bool_]
    refused: NDArray[np.bool_]

    @property
    def rows(self) -> int:
        """Number of readings produced."""
        return len(self.produced)

    @property
    def series(self) -> NDArray[np.int32]:
        """int32, shape (readings,): the series of each reading, indexing `names`."""
        series: NDArray[np.int32] = self.state_series[self.produced["state"]]
        return series


def load_ground_truth(folder: Path) -> GroundTruth:
    """Read all runs in a folder, oldest first.

    Raises:
        SimError: there is no run, or one is in a form this release does not know.
    """
    runs = sorted(folder.glob("*.series.jsonl"))
    if not runs:
        raise SimError(
            f"--truth {folder}: no record there (no *.series.jsonl); `sim run` and `sim replay` write one"
        )
    numbers: dict[SeriesState, int] = {}
    produced, acknowledged, refused = [], [], []
    for path in runs:
        run = path.name.removesuffix(".series.jsonl")
        local = np.array([numbers.setdefault(s, len(numbers)) for s in _read_states(path)], np.int32)
        rows = _read_produced(folder, run)
        if len(rows) and (len(local) == 0 or int(rows["state"].max()) >= len(local)):
            raise SimError(f"{path}: fewer series than {run}.produced.bin speaks of; the record is damaged")
        rows["state"] = local[rows["state"]] if len(rows) else rows["state"]
        acks = _read_records(folder / f"{run}.acks.bin", ACK_DTYPE)
        good = acks["reason_code"] < REFUSED_FROM_CODE
        produced.append(rows)
        acknowledged.append(_rows_covered_by(acks[good], len(rows)))
        refused.append(_rows_covered_by(acks[~good], len(rows)))
    states = tuple(numbers)
    names: dict[tuple[str, str], int] = {}
    state_series = np.array(
        [names.setdefault((s.sensor_id, s.sensor_type), len(names)) for s in states], np.int32
    )
    return GroundTruth(
        tuple(names),
        states,
        state_series,
        np.concatenate(produced),
        np.concatenate(acknowledged),
        np.concatenate(refused),
    )


def find_repeated_readings(folder: Path, run: str) -> tuple[int, list[tuple[SeriesState, int]]]:
    """How many readings of a run repeat a series and time of an earlier one, and the first few."""
    states = _read_states(folder / f"{run}.series.jsonl")
    rows = _read_produced(folder, run)
    names: dict[tuple[str, str], int] = {}
    series = np.array([names.setdefault(s[:2], len(names)) for s in states], np.int32)[rows["state"]]
    order = np.lexsort((rows["time_us"], series))
    again = order[1:][(np.diff(series[order]) == 0) & (np.diff(rows["time_us"][order]) == 0)]
    again.sort()
    return len(again), [(states[rows["state"][at]], int(rows["time_us"][at])) for at in again[:5]]


def _read_states(path: Path) -> list[SeriesState]:
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is torn
    if not lines:
        return []
    head = json.loads(lines[0])
    if head.get("form") != FORMAT_VERSION:
        raise SimError(
            f"{path}: a record of form {head.get('form')}; this release reads form {FORMAT_VERSION}"
        )
    states = []
    for line in lines[1:]:
        entry = json.loads(line)
        if "device" in entry:
            continue
        attributes = tuple(entry["attributes"].get(name) for name in ATTRIBUTES)
        states.append(SeriesState(entry["sensor_id"], entry["sensor_type"], attributes))
    return states


def _read_produced(folder: Path, run: str) -> NDArray[Any]:
    packed = folder / f"{run}.produced.pack"
    if packed.exists():
        return unpack_records(packed, PRODUCED_DTYPE)
    return _read_records(folder / f"{run}.produced.bin", PRODUCED_DTYPE)


def _read_records(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    if not path.exists():
        return np.empty(0, dtype)
    return np.fromfile(path, dtype, count=path.stat().st_size // dtype.itemsize)


def _rows_covered_by(acks: NDArray[Any], rows: int) -> NDArray[np.bool_]:
    """Which of `rows` readings the acknowledgements cover."""
    edges = np.zeros(rows + 1, np.int64)
    first = np.minimum(acks["first_row"], rows).astype(np.intp)
    last = np.minimum(acks["first_row"] + acks["rows"], rows).astype(np.intp)
    np.add.at(edges, first, 1)
    np.add.at(edges, last, -1)
    return np.cumsum(edges[:-1]) > 0
