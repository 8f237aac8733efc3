"""The rows of a recorded CSV file as readings, one after the other. Pure but for reading the file."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, NamedTuple

from firmware_sim.cells import CellError, is_missing, parse_number, parse_time_us
from firmware_sim.mapping import encoding_error, open_recording, topic_level
from firmware_sim.truth import SEQ_ABSENT, State

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from firmware_sim.mapping import Mapping

MAX_REASONS = 100


class Recorded(NamedTuple):
    """One reading of a recording. Absent numbers are NaN, an absent seq is -1."""

    line: int
    state: State
    time_us: int
    value: float
    quality: float
    battery_level: float
    signal_strength: float
    seq: int


@dataclass(slots=True)
class Tally:
    """What happened to the rows of recordings."""

    rows: int = 0
    readings: int = 0
    empty_cells: int = 0
    cut_times: int = 0
    skipped: int = 0
    reasons: list[str] = field(default_factory=list)

    def skip(self, where: str, why: str) -> None:
        """Count something left out; the first hundred with where and why."""
        self.skipped += 1
        if len(self.reasons) < MAX_REASONS:
            self.reasons.append(f"{where}: {why}")


def read_recording(path: Path, mapping: Mapping, tally: Tally) -> Iterator[Recorded]:
    """The readings of a file in its order. What cannot be read is counted in `tally`, with file and line.

    Raises:
        SimError: the file cannot be read, or is not text in the expected encoding.
    """
    with open_recording(path, mapping.options) as file:
        offset = _lines_before_data(file, mapping)
        rows = csv.reader(file, delimiter=mapping.delimiter)
        width = len(mapping.columns)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as fault:
                tally.skip(f"{path}:{offset + rows.line_num}", str(fault))
                continue
            except UnicodeDecodeError as fault:
                raise encoding_error(path, fault) from fault
            if not any(cell and not cell.isspace() for cell in row):
                continue
            tally.rows += 1
            line = offset + rows.line_num
            if len(row) > width and any(cell.strip() for cell in row[width:]):
                tally.skip(f"{path}:{line}", f"{len(row)} fields; the header has {width}")
                continue
            yield from _readings(row + [""] * (width - len(row)), mapping, tally, f"{path}:{line}", line)


def _readings(row: list[str], mapping: Mapping, tally: Tally, where: str, line: int) -> Iterator[Recorded]:
    try:
        time_us, cut = parse_time_us(" ".join(row[at] for at in mapping.time), mapping.time_format)
        measures = {
            name: parse_number(row[at], mapping.decimal)
            for name, at in mapping.measures.items()
            if not is_missing(row[at])
        }
    except CellError as fault:
        tally.skip(where, str(fault))
        return
    tally.cut_times += cut
    sensor_id = mapping.sensor if isinstance(mapping.sensor, str) else topic_level(row[mapping.sensor])
    attributes = tuple((row[at].strip() or None) if at is not None else None for at in mapping.attributes)
    for at, kind in mapping.values:
        cell = row[at]
        if is_missing(cell):
            tally.empty_cells += 1
            continue
        try:
            value = parse_number(cell, mapping.decimal)
        except CellError as fault:
            tally.skip(where, f"column {mapping.columns[at]!r}: {fault}")
            continue
        tally.readings += 1
        yield Recorded(
            line,
            State(sensor_id, kind if isinstance(kind, str) else topic_level(row[kind]), attributes),
            time_us,
            value,
            measures.get("quality", math.nan),
            measures.get("battery_level", math.nan),
            measures.get("signal_strength", math.nan),
            int(measures.get("seq", SEQ_ABSENT)),
        )


def _lines_before_data(file: IO[str], mapping: Mapping) -> int:
    """Pass over everything before the first row of data; how many lines that was."""
    number = 0
    for number, line in enumerate(file, 1):
        if number > mapping.options.skip_lines and line.strip() and not line.startswith("#"):
            break
    if mapping.options.header:
        return number
    file.seek(0)
    for _ in range(number - 1):
        file.readline()
    return number - 1
