"""The same readings in several formats, and the bytes of each."""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING
from uuid import UUID

import numpy as np
import zstandard

from benchmarks import filling
from cloud_sync.codec import columns, line_protocol
from cloud_sync.model.records import Batch, BatchRange, RecordClass

if TYPE_CHECKING:
    from cloud_sync.model.records import Readings

_ZSTD_LEVEL, _GZIP_LEVEL = 3, 6
_LINES_A_BODY = 5_000


def bytes_per_reading(everything: Readings, rows: int) -> dict[str, float]:
    """Bytes per reading of the first `rows` readings together, by form."""
    part = everything.select(np.arange(rows))
    return {
        "segment": len(columns.encode(part.in_order())) / rows,
        "gzipped line protocol": len(b"".join(gzipped_lines(part))) / rows,
        "zstd of JSON": len(zstd_json(part)) / rows,
        "JSON": len(json_lines(part)) / rows,
    }


def gzipped_lines(part: Readings) -> list[bytes]:
    """Line protocol as InfluxDB gets it: bodies of at most 5,000 lines, each gzipped."""
    known = tuple(series for _, series in filling.numbered_series())
    batch = Batch(
        BatchRange("bench", UUID(int=0), RecordClass.READING, 1, 1), known, part.with_series(part.series - 1)
    )
    lines = line_protocol.encode_lines(batch, precision="us")
    bodies = line_protocol.split_into_bodies(lines, max_lines=_LINES_A_BODY, max_bytes=1 << 30)
    return [gzip.compress(body, _GZIP_LEVEL) for body in bodies]


def zstd_json(part: Readings) -> bytes:
    """One zstd frame of JSON lines."""
    return zstandard.ZstdCompressor(_ZSTD_LEVEL).compress(json_lines(part))


def json_lines(part: Readings) -> bytes:
    """A JSON object a line, as a program writes them by hand."""
    known = {number: series for number, series in filling.numbered_series()}  # noqa: C416 - a list of pairs
    rows = zip(
        part.series.tolist(),
        part.time_us.tolist(),
        part.value.tolist(),
        part.quality.tolist(),
        part.battery_level.tolist(),
        part.signal_strength.tolist(),
        part.seq.tolist(),
        strict=True,
    )
    return b"\n".join(
        json.dumps(
            {
                "sensor_id": known[series].sensor_id,
                "sensor_type": known[series].sensor_type,
                "ts": time_us,
                "value": value,
                "quality": quality,
                "battery_level": battery,
                "signal_strength": signal,
                "seq": seq,
                "location": "hall-07",
                "unit": "degC",
            }
        ).encode()
        for series, time_us, value, quality, battery, signal, seq in rows
    )
