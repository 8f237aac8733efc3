r"""Stored rows from line protocol: files of the file sink, or any others of this mapping.

    temperature,location=hall\ 3,sensor_id=t-17 value=21.5,quality=98.0,seq=17i 1767225600000000000
    sensor_type, tags: sensor_id, attributes    fields                          time

Writing a point twice is one point in this form, so equal copies are no duplicates. Every *.lp and *.lp.gz
under the folder is read; a file still being written may end in the middle of a line or of a gzip member,
which is said and is no error. Control characters and some backslashes have no place in this form: a writer
that replaces them by look-alikes makes such a series foreign here.
"""

from __future__ import annotations

import gzip
import re
import zlib
from array import array
from typing import TYPE_CHECKING

import numpy as np

from firmware_sim.errors import SimError
from firmware_sim.truth import ATTRIBUTES, SEQ_ABSENT
from firmware_sim.verify import STORED, Stored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from firmware_sim.truth import Truth

US_PER = {"s": 1_000_000, "ms": 1000, "us": 1}
PRECISIONS = ("ns", *US_PER)

_SUFFIXES = (".lp", ".lp.gz")
_REPORT_EVERY = 50_000
_KEY_END = re.compile(r"(?<!\\) ")
_COMMA = re.compile(r"(?<!\\),")
_EQUALS = re.compile(r"(?<!\\)=")
_ESCAPED = re.compile(r"\\([,= ])")
_WHOLE = ("series", "state", "time_us", "seq", "flags")
_FLOATS = ("value", "quality", "battery_level", "signal_strength")


class Names:
    """Finds a series and its state among those the truth knows."""

    def __init__(self, truth: Truth) -> None:
        self._series = {name: number for number, name in enumerate(truth.names)}
        self._states: dict[tuple[int, tuple[str, ...]], int] = {}
        for number, state in enumerate(truth.states):
            key = (int(truth.state_series[number]), tuple(text or "" for text in state.attributes))
            self._states.setdefault(key, number)

    def find(self, sensor_type: str, tags: Mapping[str, str]) -> tuple[int, int]:
        """(series, state); -1 for what was never produced."""
        series = self._series.get((tags.get("sensor_id", ""), sensor_type), -1)
        return series, self._states.get((series, tuple(tags.get(name, "") for name in ATTRIBUTES)), -1)


def parse_key(key: str) -> tuple[str, dict[str, str]]:
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


class Gatherer:
    """Gathers lines as columns. `precision` is the unit of their times."""

    def __init__(self, truth: Truth, precision: str) -> None:
        self._names = Names(truth)
        self._known: dict[str, tuple[int, int]] = {}
        self._precision = precision
        self._numbers = {name: array("d") for name in _FLOATS}
        self._whole = {name: array("q") for name in _WHOLE}
        self.foreign = 0
        self.unread = 0

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
                found = self._known[key] = self._names.find(*parse_key(key))
            if found[0] < 0:
                self.foreign += 1
                return
            values = dict(pair.split("=", 1) for pair in fields.split(","))
            numbers = [float(values.get(name, "nan")) for name in _FLOATS]
            seq = int(values["seq"].removesuffix("i")) if "seq" in values else SEQ_ABSENT
            flags = int(values["flags"].removesuffix("i")) if "flags" in values else 0
            time_us = self._time_us(int(stamp))
        except (ValueError, OverflowError):
            self.unread += 1
            return
        for name, number in zip(_FLOATS, numbers, strict=True):
            self._numbers[name].append(number)
        for name, whole in zip(_WHOLE, (*found, time_us, seq, flags), strict=True):
            self._whole[name].append(whole)

    def stored(self, notes: list[str]) -> Stored:
        """Everything taken, as rows."""
        rows = np.zeros(self.rows, STORED)
        if self.rows:
            for name, numbers in self._numbers.items():
                rows[name] = np.frombuffer(numbers, np.float64)
            for name, integers in self._whole.items():
                rows[name] = np.frombuffer(integers, np.int64)
        if self.unread:
            notes = [*notes, f"{self.unread} lines could not be read"]
        return Stored(rows, foreign=self.foreign, idempotent=True, notes=notes)

    def _time_us(self, stamp: int) -> int:
        return stamp // 1000 if self._precision == "ns" else stamp * US_PER[self._precision]

    @staticmethod
    def _split(line: str) -> tuple[str, str, str]:
        key, fields, stamp = _KEY_END.split(line)
        return key, fields, stamp


def find_files(folder: Path) -> list[Path]:
    """Every line protocol file under a folder, or the file itself."""
    if folder.is_file():
        return [folder] if folder.name.endswith(_SUFFIXES) else []
    return sorted(path for path in folder.rglob("*") if path.name.endswith(_SUFFIXES))


def read_files(folder: Path, truth: Truth, *, precision: str, on_rows: Callable[[int], None]) -> Stored:
    """Read every line protocol file under a folder.

    Raises:
        SimError: there is none.
    """
    paths = find_files(folder)
    if not paths:
        raise SimError(f"--files {folder}: no line protocol files there (*{', *'.join(_SUFFIXES)})")
    gatherer = Gatherer(truth, precision)
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
