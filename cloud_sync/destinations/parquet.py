"""Readings as Parquet, and the open file of wire batches that becomes one. Needs pyarrow. Blocking.

Parquet has its index at the end and cannot be appended to durably: batches are kept as they are until
the file is due, then converted under another name, fsynced and renamed. One row group a batch, zstd;
columns as in the region's view `sensor_data`: time (microseconds, UTC), sensor_id, sensor_type, value,
unit, quality, battery_level, signal_strength, location, manufacturer, firmware_version, seq, flags. What
is absent is null.
"""

from __future__ import annotations

import importlib.util
import os
import struct
from typing import TYPE_CHECKING, Any

import numpy as np

from cloud_sync.codec import wire
from cloud_sync.model.errors import FormatError
from cloud_sync.model.reading_builder import InvalidReadingError, validate_series
from cloud_sync.model.records import ATTRIBUTE_NAMES, SEQ_ABSENT, Readings, Series

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from cloud_sync.model.records import Batch

_TEXTS = ("sensor_id", "sensor_type", *ATTRIBUTE_NAMES)
_FLOATS = ("quality", "battery_level", "signal_strength")


def is_available() -> bool:
    """Whether pyarrow is installed."""
    return importlib.util.find_spec("pyarrow") is not None


def write_batches(path: Path, batches: Iterable[Batch]) -> None:
    """Write batches of readings as one new file, a row group each. It is not fsynced."""
    import pyarrow.parquet  # noqa: PLC0415 - an optional package

    schema = _build_schema()
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in batches:
            if batch.rows:
                writer.write_table(_build_table(batch, schema))


def read_pieces(path: Path, *, max_rows: int) -> Iterator[tuple[Sequence[Series], Readings, int]]:
    """The rows of a file in pieces: series, readings in canonical order, and how many rows were rejected.

    ValueError when it is no Parquet file, or lacks a column.
    """
    import pyarrow  # noqa: ICN001, PLC0415 - an optional package
    import pyarrow.parquet  # noqa: PLC0415 - as above

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for piece in file.iter_batches(max_rows, columns=list(_build_schema().names)):
                yield _decode_piece(piece)
    except (pyarrow.ArrowException, KeyError) as fault:
        raise ValueError(f"{path.name}: {fault}") from fault


def _build_schema() -> Any:
    import pyarrow  # noqa: ICN001, PLC0415 - an optional package

    types = dict.fromkeys(_TEXTS, pyarrow.string()) | dict.fromkeys(_FLOATS, pyarrow.float32())
    types |= {"time": pyarrow.timestamp("us", "UTC"), "value": pyarrow.float64()}
    types |= {"seq": pyarrow.int64(), "flags": pyarrow.int32()}
    names = ("time", "sensor_id", "sensor_type", "value", "unit", *_FLOATS)
    return pyarrow.schema(
        [(n, types[n]) for n in (*names, "location", "manufacturer", "firmware_version", "seq", "flags")]
    )


def _build_table(batch: Batch, schema: Any) -> Any:
    import pyarrow  # noqa: ICN001, PLC0415 - an optional package

    readings = batch.readings
    index = pyarrow.array(readings.series)
    texts = [
        {"sensor_id": s.sensor_id, "sensor_type": s.sensor_type, **dict(s.attributes)} for s in batch.series
    ]
    arrays = {
        name: pyarrow.array([text.get(name) for text in texts], pyarrow.string()).take(index)
        for name in _TEXTS
    }
    arrays["time"] = pyarrow.array(readings.time_us.astype("datetime64[us]")).cast(schema.field("time").type)
    arrays["value"] = pyarrow.array(readings.value)
    for name in _FLOATS:
        column = getattr(readings, name)
        arrays[name] = pyarrow.array(column, mask=np.isnan(column))
    arrays["seq"] = pyarrow.array(readings.seq, mask=readings.seq == SEQ_ABSENT)
    arrays["flags"] = pyarrow.array(readings.flags)
    return pyarrow.table([arrays[name] for name in schema.names], schema=schema)


def _decode_piece(piece: Any) -> tuple[Sequence[Series], Readings, int]:
    """One record batch; rows without a time, a finite value or a name are rejected."""
    columns = {name: piece.column(name) for name in piece.schema.names}
    names = zip(*(columns[name].to_pylist() for name in _TEXTS), strict=True)
    numbers: dict[Series, int] = {}
    positions = np.array([_series_position(numbers, texts) for texts in names], np.int32)
    time_us = columns["time"].cast("timestamp[us]").cast("int64").fill_null(0).to_numpy(zero_copy_only=False)
    value = columns["value"].cast("float64").fill_null(np.nan).to_numpy(zero_copy_only=False)
    good = (positions >= 0) & np.isfinite(value)
    good &= columns["time"].is_valid().to_numpy(zero_copy_only=False)
    found: dict[str, Any] = {"series": positions, "time_us": time_us, "value": value}
    for name in _FLOATS:
        found[name] = columns[name].cast("float32").fill_null(np.nan).to_numpy(zero_copy_only=False)
    found["seq"] = columns["seq"].cast("int64").fill_null(SEQ_ABSENT).to_numpy(zero_copy_only=False)
    found["flags"] = columns["flags"].cast("int32").fill_null(0).to_numpy(zero_copy_only=False)
    readings = Readings(**{name: found[name].astype(dtype) for name, dtype in Readings.columns.items()})
    return list(numbers), readings.select(good).in_order(), int((~good).sum())


def _series_position(numbers: dict[Series, int], texts: tuple[str | None, ...]) -> int:
    """The position of a row's series, -1 when its names cannot be stored."""
    sensor_id, sensor_type, *values = texts
    attributes = tuple(sorted((n, v) for n, v in zip(ATTRIBUTE_NAMES, values, strict=True) if v))
    series = Series(sensor_id or "", sensor_type or "", attributes)
    if series not in numbers:
        try:
            validate_series(series)
        except InvalidReadingError:
            return -1
    return numbers.setdefault(series, len(numbers))


_HEAD = struct.Struct("<8xII")
_CRC_BYTES = 4


def convert(source: Path, ends: Sequence[int], target: Path) -> list[bool]:
    """Write the batches of `source`, which end at `ends` bytes, as `target`; returns which could be read.

    `target` is whole and durable on return; there is none when no batch could be read, or after an OSError.
    """
    readable: list[bool] = []

    def read_batches() -> Iterator[Batch]:
        start = 0
        with source.open("rb") as file:
            for end in ends:
                data = file.read(end - start)
                start = end
                try:
                    batch = wire.decode(data)
                except FormatError:
                    readable.append(False)
                    continue
                readable.append(True)
                yield batch

    draft = target.with_name(target.name + ".new")
    write_batches(draft, read_batches())
    if not any(readable):
        draft.unlink()
        return readable
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    draft.rename(target)
    return readable


def read_open_file(path: Path) -> Iterator[Batch]:
    """The batches of an open file that was moved here; an incomplete last one is left out."""
    with path.open("rb") as file:
        while True:
            head = file.read(_HEAD.size)
            if len(head) < _HEAD.size:
                return
            body = file.read(sum(_HEAD.unpack(head)) + _CRC_BYTES)
            try:
                yield wire.decode(head + body)
            except FormatError:
                return
