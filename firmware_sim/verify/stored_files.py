"""Stored rows from files: line protocol, and exported Parquet, CSV and JSON lines.

    temperature,location=hall-3,sensor_id=t-17 value=21.5,quality=98.0,seq=17i 1767225600000000000
    sensor_type, tags: sensor_id, attributes    fields                          time

Writing a point twice is one point in line protocol, so equal copies are no duplicates. A file still being
written may end within a line or a gzip member; that is noted and no error. Exports have the columns of
`sensor_data`: time, sensor_id, sensor_type, value, and optionally others (`tidegate spool export`, `COPY`).
"""

from __future__ import annotations

import gzip
import re
import zlib
from array import array
from typing import TYPE_CHECKING, Any

import numpy as np

from firmware_sim.errors import SimError
from firmware_sim.ground_truth import ATTRIBUTES, SEQ_ABSENT
from firmware_sim.verify.comparison import COMPARED_COLUMNS, STORED_DTYPE, StoredRows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from firmware_sim.ground_truth import GroundTruth

US_PER = {"s": 1_000_000, "ms": 1000, "us": 1}
PRECISIONS = ("ns", *US_PER)

_LINE_SUFFIXES = (".lp", ".lp.gz")
_REPORT_EVERY = 50_000
_KEY_END = re.compile(r"(?<!\\) ")
_COMMA = re.compile(r"(?<!\\),")
_EQUALS = re.compile(r"(?<!\\)=")
_ESCAPED = re.compile(r"\\([,= ])")
_INTEGERS = ("series", "state", "time_us", "seq", "flags")
_FLOATS = ("value", "quality", "battery_level", "signal_strength")


class SeriesIndex:
    """Finds a series and its state among those the truth knows."""

    def __init__(self, truth: GroundTruth) -> None:
        self._series = {name: number for number, name in enumerate(truth.names)}
        self._states: dict[tuple[int, tuple[str, ...]], int] = {}
        for number, state in enumerate(truth.states):
            key = (int(truth.state_series[number]), tuple(text or "" for text in state.attributes))
            self._states.setdefault(key, number)

    def find(self, sensor_type: str, tags: Mapping[str, str]) -> tuple[int, int]:
        """(series, state); -1 for what was never produced."""
        series = self._series.get((tags.get("sensor_id", ""), sensor_type), -1)
        return series, self._states.get((series, tuple(tags.get(name, "") for name in ATTRIBUTES)), -1)


def parse_line_key(key: str) -> tuple[str, dict[str, str]]:
    """Measurement and tags of a line's first part."""
    measurement, *pairs = _COMMA.split(key)
    tags = {}
    for pair in pairs:
        name, _, text = pair.partition("=") if "\\" not in pair else _split_pair(pair)
        tags[_ESCAPED.sub(r"\1", name)] = _ESCAPED.sub(r"\1", text)
    return _ESCAPED.sub(r"\1", measurement), tags


def _split_pair(pair: str) -> tuple[str, str, str]:
    name, *rest = _EQUALS.split(pair, maxsplit=1)
    return name, "=", rest[0] if rest else ""


class LineCollector:
    """Gathers lines as columns. `precision` is the unit of their times."""

    def __init__(self, truth: GroundTruth, precision: str) -> None:
        self._names = SeriesIndex(truth)
        self._known: dict[str, tuple[int, int]] = {}
        self._precision = precision
        self._numbers = {name: array("d") for name in _FLOATS}
        self._whole = {name: array("q") for name in _INTEGERS}
        self.foreign = 0
        self.unparsed = 0

    @property
    def rows(self) -> int:
        """Lines taken so far."""
        return len(self._whole["series"])

    def take(self, line: str) -> None:
        """Take one line; one that cannot be read is counted in `unread`."""
        try:
            key, fields, stamp = line.split(" ") if "\\" not in line else self._split(line)
            found = self._known.get(key)
            if found is None:
                found = self._known[key] = self._names.find(*parse_line_key(key))
            if found[0] < 0:
                self.foreign += 1
                return
            values = dict(pair.split("=", 1) for pair in fields.split(","))
            numbers = [float(values.get(name, "nan")) for name in _FLOATS]
            seq = int(values["seq"].removesuffix("i")) if "seq" in values else SEQ_ABSENT
            flags = int(values["flags"].removesuffix("i")) if "flags" in values else 0
            time_us = self._time_us(int(stamp))
        except (ValueError, OverflowError):
            self.unparsed += 1
            return
        for name, number in zip(_FLOATS, numbers, strict=True):
            self._numbers[name].append(number)
        for name, whole in zip(_INTEGERS, (*found, time_us, seq, flags), strict=True):
            self._whole[name].append(whole)

    def stored(self, notes: list[str]) -> StoredRows:
        """Everything taken, as rows."""
        rows = np.zeros(self.rows, STORED_DTYPE)
        if self.rows:
            for name, numbers in self._numbers.items():
                rows[name] = np.frombuffer(numbers, np.float64)
            for name, integers in self._whole.items():
                rows[name] = np.frombuffer(integers, np.int64)
        if self.unparsed:
            notes = [*notes, f"{self.unparsed} lines could not be read"]
        return StoredRows(rows, foreign=self.foreign, idempotent=True, notes=notes)

    def _time_us(self, stamp: int) -> int:
        return stamp // 1000 if self._precision == "ns" else stamp * US_PER[self._precision]

    @staticmethod
    def _split(line: str) -> tuple[str, str, str]:
        key, fields, stamp = _KEY_END.split(line)
        return key, fields, stamp


def find_line_files(folder: Path) -> list[Path]:
    """Every line protocol file under a folder, or the file itself."""
    if folder.is_file():
        return [folder] if folder.name.endswith(_LINE_SUFFIXES) else []
    return sorted(path for path in folder.rglob("*") if path.name.endswith(_LINE_SUFFIXES))


def read_line_files(
    folder: Path, truth: GroundTruth, *, precision: str, on_rows: Callable[[int], None]
) -> StoredRows:
    """Read every line protocol file under a folder.

    Raises:
        SimError: there is none.
    """
    paths = find_line_files(folder)
    if not paths:
        raise SimError(f"--files {folder}: no line protocol files there (*{', *'.join(_LINE_SUFFIXES)})")
    gatherer = LineCollector(truth, precision)
    notes: list[str] = []
    for path in paths:
        for line in _read_lines(path, notes):
            gatherer.take(line)
            if gatherer.rows % _REPORT_EVERY == 0:
                on_rows(gatherer.rows)
    return gatherer.stored(notes)


def _read_lines(path: Path, notes: list[str]) -> Iterator[str]:
    """Whole lines of a file, up to where it is torn."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield line[:-1].decode("utf-8", "replace")
                else:
                    notes.append(f"{path.name} ends within a line")
    except (EOFError, zlib.error, gzip.BadGzipFile) as fault:
        notes.append(f"{path.name} is cut short or damaged: {fault}")
    except OSError as fault:
        raise SimError(f"--files {path}: {fault.strerror}") from fault


EXPORT_SUFFIXES = (".parquet", ".csv", ".csv.gz", ".jsonl", ".jsonl.gz")
_REQUIRED = ("time", "sensor_id", "sensor_type", "value")


def find_export_files(folder: Path) -> list[Path]:
    """Every such file under a folder, or the file itself."""
    if folder.is_file():
        return [folder] if folder.name.endswith(EXPORT_SUFFIXES) else []
    return sorted(path for path in folder.rglob("*") if path.name.endswith(EXPORT_SUFFIXES))


def read_export_files(
    paths: Sequence[Path], truth: GroundTruth, *, on_rows: Callable[[int], None]
) -> StoredRows:
    """Read them all.

    Raises:
        SimError: one cannot be read, or has not the columns that are needed.
    """
    names = SeriesIndex(truth)
    parts: list[NDArray[Any]] = []
    foreign = 0
    compared: set[str] = set(COMPARED_COLUMNS)
    attributes = flags = True
    for path in paths:
        table = _read_table(path)
        present = set(table.column_names)
        missing = [name for name in _REQUIRED if name not in present]
        if missing:
            raise SimError(f"--files {path}: has no column {', '.join(missing)}")
        compared &= present
        attributes &= present.issuperset(ATTRIBUTES)
        flags &= "flags" in present
        rows = _table_to_stored_rows(table, names, present)
        ours = rows[rows["series"] >= 0]
        foreign += len(rows) - len(ours)
        parts.append(ours)
        on_rows(sum(map(len, parts)))
    return StoredRows(
        np.concatenate(parts),
        foreign=foreign,
        compared=tuple(name for name in COMPARED_COLUMNS if name in compared),
        attributes=attributes,
        flags=flags,
    )


def _read_table(path: Path) -> Any:
    import pyarrow as pa  # noqa: PLC0415 - slow to import, and needed for this only
    from pyarrow import csv, json, parquet  # noqa: PLC0415 - as above

    when = pa.timestamp("us", tz="UTC")
    kinds = {"time": when, "value": pa.float64(), "seq": pa.int64(), "flags": pa.int32()}
    kinds |= {name: pa.float32() for name in ("quality", "battery_level", "signal_strength")}
    kinds |= {name: pa.string() for name in ("sensor_id", "sensor_type", *ATTRIBUTES)}
    try:
        if path.name.endswith(".parquet"):
            table = parquet.read_table(path)
        elif ".csv" in path.name:
            table = csv.read_csv(path, convert_options=csv.ConvertOptions(column_types=kinds))
        else:
            table = json.read_json(
                pa.input_stream(str(path), compression="detect"),
                parse_options=json.ParseOptions(explicit_schema=pa.schema(list(kinds.items()))),
            )
        if "time" in table.column_names:
            place = table.column_names.index("time")
            table = table.set_column(place, "time", table.column("time").cast(when))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as fault:
        raise SimError(f"--files {path}: {fault}") from fault
    return table


def _table_to_stored_rows(table: Any, names: SeriesIndex, present: set[str]) -> NDArray[Any]:
    rows = np.zeros(table.num_rows, STORED_DTYPE)
    rows["time_us"] = table.column("time").cast("int64").to_numpy()
    rows["value"] = table.column("value").to_numpy()
    for name in ("quality", "battery_level", "signal_strength"):
        rows[name] = table.column(name).to_numpy() if name in present else np.nan
    for name, absent in (("seq", SEQ_ABSENT), ("flags", 0)):
        rows[name] = table.column(name).fill_null(absent).to_numpy() if name in present else absent
    keys = ("sensor_id", "sensor_type", *(name for name in ATTRIBUTES if name in present))
    codes = np.zeros(table.num_rows, np.int64)
    texts: list[list[str]] = []
    for key in keys:
        encoded = table.column(key).cast("string").fill_null("").combine_chunks().dictionary_encode()
        texts.append(encoded.dictionary.to_pylist())
        codes = codes * max(1, len(texts[-1])) + encoded.indices.to_numpy()
    distinct, back = np.unique(codes, return_inverse=True)
    found = np.full((len(distinct), 2), -1, np.int32)
    for number, code in enumerate(distinct.tolist()):
        named, rest = {}, code
        for key, known in zip(reversed(keys), reversed(texts), strict=True):
            rest, at = divmod(rest, max(1, len(known)))
            named[key] = known[at]
        found[number] = names.find(named.pop("sensor_type"), named)
    rows["series"], rows["state"] = found[back].T
    return rows
