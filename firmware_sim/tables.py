"""Stored rows from exported files: Parquet, CSV and JSON lines with the columns of `sensor_data`.

time, sensor_id, sensor_type, value, and as far as they are there unit, quality, battery_level,
signal_strength, location, manufacturer, firmware_version, seq, flags: what `tidegate spool export` and a
region's `COPY` write.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from firmware_sim.errors import SimError
from firmware_sim.lines import Names
from firmware_sim.truth import ATTRIBUTES, SEQ_ABSENT
from firmware_sim.verify import NUMBERS, STORED, Stored

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from firmware_sim.truth import Truth

SUFFIXES = (".parquet", ".csv", ".csv.gz", ".jsonl", ".jsonl.gz")
_REQUIRED = ("time", "sensor_id", "sensor_type", "value")


def find_tables(folder: Path) -> list[Path]:
    """Every such file under a folder, or the file itself."""
    if folder.is_file():
        return [folder] if folder.name.endswith(SUFFIXES) else []
    return sorted(path for path in folder.rglob("*") if path.name.endswith(SUFFIXES))


def read_tables(paths: Sequence[Path], truth: Truth, *, on_rows: Callable[[int], None]) -> Stored:
    """Read them all.

    Raises:
        SimError: one cannot be read, or has not the columns that are needed.
    """
    names = Names(truth)
    parts: list[NDArray[Any]] = []
    foreign = 0
    compared: set[str] = set(NUMBERS)
    attributes = flags = True
    for path in paths:
        table = _read(path)
        present = set(table.column_names)
        missing = [name for name in _REQUIRED if name not in present]
        if missing:
            raise SimError(f"--files {path}: has no column {', '.join(missing)}")
        compared &= present
        attributes &= present.issuperset(ATTRIBUTES)
        flags &= "flags" in present
        rows = _as_stored(table, names, present)
        ours = rows[rows["series"] >= 0]
        foreign += len(rows) - len(ours)
        parts.append(ours)
        on_rows(sum(map(len, parts)))
    return Stored(
        np.concatenate(parts),
        foreign=foreign,
        compared=tuple(name for name in NUMBERS if name in compared),
        attributes=attributes,
        flags=flags,
    )


def _read(path: Path) -> Any:
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


def _as_stored(table: Any, names: Names, present: set[str]) -> NDArray[Any]:
    rows = np.zeros(table.num_rows, STORED)
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
