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
import struct
import zlib
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from firmware_sim.errors import SimError
from firmware_sim.ground_truth import ATTRIBUTES, MEASURES, SEQ_ABSENT
from firmware_sim.verify.comparison import STORED_DTYPE, StoredRows, build_stored_rows, check_columns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import pyarrow as pa
    from numpy.typing import NDArray

    from firmware_sim.ground_truth import GroundTruth

US_PER = {"s": 1_000_000, "ms": 1000, "us": 1}
PRECISIONS = ("ns", *US_PER)

_LINE_SUFFIXES = (".lp", ".lp.gz")
_EXPORT_SUFFIXES = (".parquet", ".csv", ".csv.gz", ".jsonl", ".jsonl.gz")
_REPORT_EVERY = 50_000
_CSV_BLOCK_BYTES = 1 << 24
_LINE = re.compile(r"((?:\\.|[^ \\])+) (.+?)(?: (-?\d+))?")
_FIELD = re.compile(r'((?:\\.|[^=,\\])+)=("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')
_COMMA = re.compile(r"(?<!\\),")
_EQUALS = re.compile(r"(?<!\\)=")
_ESCAPED = re.compile(r"\\([,= ])")
_FLOATS = ("value", "quality", "battery_level", "signal_strength")
_STORED_STRUCT = struct.Struct("<iiqdfffqi")


def split_line(line: str) -> tuple[str, dict[str, str], str]:
    """The key of a line (see `parse_line_key`), its fields, and its time or ""; ValueError for other text."""
    if "\\" not in line and '"' not in line and line.count(" ") == 2:  # noqa: PLR2004 - the usual line, fast
        key, fields, stamp = line.split(" ")
        return key, dict(pair.split("=", 1) for pair in fields.split(",")), stamp
    match = _LINE.fullmatch(line)
    if match is None:
        raise ValueError(f"not line protocol: {line[:80]}")
    texts = {_unescape(name): text for name, text in _FIELD.findall(match[2])}
    return match[1], texts, match[3] or ""


def parse_line_key(key: str) -> tuple[str, dict[str, str]]:
    """Measurement and tags of a line's first part."""
    measurement, *pairs = _COMMA.split(key)
    tags = {}
    for pair in pairs:
        name, text = (*_EQUALS.split(pair, maxsplit=1), "")[:2]
        tags[_unescape(name)] = _unescape(text)
    return _unescape(measurement), tags


def _unescape(text: str) -> str:
    return _ESCAPED.sub(r"\1", text)


def _pack_record(series: tuple[int, int], fields: dict[str, str], time: int, precision: str) -> bytes:
    numbers = [float(fields.get(name, "nan")) for name in _FLOATS]
    seq = int(fields["seq"].removesuffix("i")) if "seq" in fields else SEQ_ABSENT
    flags = int(fields["flags"].removesuffix("i")) if "flags" in fields else 0
    time_us = time // 1000 if precision == "ns" else time * US_PER[precision]
    return _STORED_STRUCT.pack(*series, time_us, *numbers, seq, flags)


def read_files(
    folder: Path, truth: GroundTruth, *, precision: str, on_rows: Callable[[int], None]
) -> StoredRows:
    """Read the line protocol files under a folder, or its exports where it has no line protocol."""
    exports = _find_files(folder, _EXPORT_SUFFIXES)
    if exports and not _find_files(folder, _LINE_SUFFIXES):
        return read_export_files(exports, truth, on_rows=on_rows)
    return read_line_files(folder, truth, precision=precision, on_rows=on_rows)


def _find_files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    paths = [folder] if folder.is_file() else sorted(folder.rglob("*"))
    return [path for path in paths if path.name.endswith(suffixes)]


def read_line_files(
    folder: Path, truth: GroundTruth, *, precision: str, on_rows: Callable[[int], None]
) -> StoredRows:
    """Read every line protocol file under a folder."""
    paths = _find_files(folder, _LINE_SUFFIXES)
    if not paths:
        raise SimError(f"--files {folder}: no line protocol files there (*{', *'.join(_LINE_SUFFIXES)})")
    known: dict[str, tuple[int, int]] = {}
    records, notes = bytearray(), list[str]()
    foreign = unparsed = 0
    for line in chain.from_iterable(_read_lines(path, notes) for path in paths):
        try:
            key, fields, stamp = split_line(line)
            series = known.get(key)
            if series is None:
                series = known[key] = truth.find_series(*parse_line_key(key))
            if series[0] < 0:
                foreign += 1
                continue
            records += _pack_record(series, fields, int(stamp), precision)
        except (ValueError, OverflowError, struct.error):
            unparsed += 1
            continue
        if len(records) % (_REPORT_EVERY * _STORED_STRUCT.size) == 0:
            on_rows(len(records) // _STORED_STRUCT.size)
    if unparsed:
        notes.append(f"{unparsed} lines could not be read")
    rows = np.frombuffer(records, STORED_DTYPE)
    return StoredRows(rows, foreign=foreign, idempotent=True, notes=notes)


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


def read_export_files(
    paths: Sequence[Path], truth: GroundTruth, *, on_rows: Callable[[int], None]
) -> StoredRows:
    """Read exported files; SimError where one cannot be read or lacks a required column."""
    parts: list[NDArray[np.void]] = []
    common: set[str] | None = None
    total = 0
    for path in paths:
        try:
            columns, tables = _open_export(path)
            check_columns(f"--files {path}", columns)
            common = columns if common is None else common & columns
            for table in tables:
                parts.append(_table_to_rows(table, truth))
                total += table.num_rows
                on_rows(total)
        except (ValueError, NotImplementedError, OSError) as fault:  # the bases of pyarrow's errors
            raise SimError(f"--files {path}: {fault}") from fault
    return StoredRows.from_parts(parts, common)


def _open_export(path: Path) -> tuple[set[str], Iterator[pa.Table]]:
    """The columns of a file, and its rows in parts; times are microseconds, UTC."""
    import pyarrow as pa  # noqa: PLC0415 - slow to import, and needed for this only
    from pyarrow import csv, json, parquet  # noqa: PLC0415 - as above

    when = pa.timestamp("us", tz="UTC")
    kinds = {"time": when, "value": pa.float64(), "seq": pa.int64(), "flags": pa.int32()}
    kinds |= {name: pa.float32() for name in MEASURES if name != "seq"}
    kinds |= {name: pa.string() for name in ("sensor_id", "sensor_type", *ATTRIBUTES)}
    if path.name.endswith(".parquet"):
        file = parquet.ParquetFile(path)
        schema, batches = file.schema_arrow, file.iter_batches()
    elif ".csv" in path.name:
        options = csv.ConvertOptions(column_types=kinds)
        batches = csv.open_csv(path, csv.ReadOptions(block_size=_CSV_BLOCK_BYTES), convert_options=options)
        schema = batches.schema
    else:
        options = json.ParseOptions(explicit_schema=pa.schema(list(kinds.items())))
        table = json.read_json(pa.input_stream(str(path), compression="detect"), parse_options=options)
        schema, batches = table.schema, table.to_batches()

    tables = (pa.Table.from_batches([batch]) for batch in batches)
    at = schema.get_field_index("time")
    timed = (table.set_column(at, "time", table.column("time").cast(when)) for table in tables)
    return set(schema.names), timed


def _table_to_rows(table: pa.Table, truth: GroundTruth) -> NDArray[np.void]:
    present = set(table.column_names)
    columns = {name: table.column(name).to_numpy() for name in _FLOATS if name in present}
    columns["time_us"] = table.column("time").cast("int64").to_numpy()
    for name, absent in (("seq", SEQ_ABSENT), ("flags", 0)):
        if name in present:
            columns[name] = table.column(name).fill_null(absent).to_numpy()
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
        tags, rest = {}, code
        for key, known in zip(reversed(keys), reversed(texts), strict=True):
            rest, at = divmod(rest, max(1, len(known)))
            tags[key] = known[at]
        found[number] = truth.find_series(tags.pop("sensor_type"), tags)
    columns["series"], columns["state"] = found[back].T
    return build_stored_rows(columns)
