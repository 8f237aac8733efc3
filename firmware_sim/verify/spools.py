"""Readings in a gateway's spool, read from its file by its documented format (docs/spool-format.md).

A reader of its own, so that what the gateway wrote is not read back by the code that wrote it. The file is
opened read-only; a gateway may be writing it meanwhile.
"""

from __future__ import annotations

import json
import sqlite3
import struct
import zlib
from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np
from pcodec import standalone

from firmware_sim.errors import SimError
from firmware_sim.ground_truth import MEASURES
from firmware_sim.verify.comparison import STORED_DTYPE, StoredRows, build_stored_rows
from firmware_sim.verify.loss_explanation import DeclaredLoss

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from firmware_sim.ground_truth import GroundTruth

_APPLICATION_ID = 0x54494445  # "TIDE"
_VERSION = 1
_READING_CLASS = 4
_CLASS_SHIFT = 56
_BLOCK_HEADER = struct.Struct("<2sBBIqqB")
_COLUMN_ENTRY = struct.Struct("<BBI")
_NAN_OF_SMALL = -32_768
_COLUMNS = dict(enumerate(("series", "time_us", "value", *MEASURES, "flags"), start=1))
_CONSTANT, _PLAIN, _PCO, _SMALL_INTEGERS, _RUNS = range(5)
_SEGMENTS_SQL = (
    "SELECT position, block FROM segment WHERE position > ? AND position < ? ORDER BY position LIMIT 200"
)
_LOSSES_SQL = (
    "SELECT destination, reason, survives, rows, from_us, to_us, first_commit, last_commit FROM loss "
    "WHERE class = ? ORDER BY destination, first_commit"
)
_QUARANTINE_SQL = "SELECT topic, payload, received_at_us FROM quarantine"


class BlockError(ValueError):
    """A block that does not follow its format."""


def decode_block(block: bytes) -> dict[str, NDArray[np.generic]]:
    """The columns of a block, by name; `series` are the spool's own numbers. Pure."""
    if len(block) < _BLOCK_HEADER.size + 4 or zlib.crc32(block[:-4]) != int.from_bytes(block[-4:], "little"):
        raise BlockError("its checksum is wrong")
    magic, version, _, rows, _, _, columns = _BLOCK_HEADER.unpack_from(block)
    if magic != b"TC" or version != 1:
        raise BlockError(f"its format {magic!r} {version} is not known")
    at = _BLOCK_HEADER.size + columns * _COLUMN_ENTRY.size
    found = {}
    for number in range(columns):
        column, encoding, size = _COLUMN_ENTRY.unpack_from(
            block, _BLOCK_HEADER.size + number * _COLUMN_ENTRY.size
        )
        payload, at = block[at : at + size], at + size
        if column in _COLUMNS:
            name = _COLUMNS[column]
            found[name] = _decode_column(payload, encoding, STORED_DTYPE[name], rows)
    return found


def _decode_column(
    payload: bytes, encoding: int, kind: np.dtype[np.generic], rows: int
) -> NDArray[np.generic]:
    if encoding == _CONSTANT:
        return np.full(rows, np.frombuffer(payload, kind, 1)[0], kind)
    if encoding == _PLAIN:
        return np.frombuffer(payload, kind, rows)
    if encoding == _RUNS:
        return _decode_runs(payload, kind, rows)
    if encoding not in (_PCO, _SMALL_INTEGERS):
        raise BlockError(f"encoding {encoding} is not known")
    values = standalone.simple_decompress(payload)
    if values is None or len(values) != rows:
        raise BlockError(f"{0 if values is None else len(values)} values of {rows}")
    if encoding == _PCO:
        return np.asarray(values, kind)
    small = np.asarray(values, np.int16)
    numbers = small.astype(kind)
    numbers[small == _NAN_OF_SMALL] = np.nan
    return numbers


def _decode_runs(payload: bytes, kind: np.dtype[np.generic], rows: int) -> NDArray[np.generic]:
    runs = int.from_bytes(payload[:4], "little")
    at, parts = 4, []
    for _ in range(2):
        encoding, size = payload[at], int.from_bytes(payload[at + 1 : at + 5], "little")
        parts.append(_decode_column(payload[at + 5 : at + 5 + size], encoding, kind, runs))
        at += 5 + size
    repeated = np.repeat(parts[0], parts[1].astype(np.int64))
    if len(repeated) != rows:
        raise BlockError(f"runs of {len(repeated)} rows, not {rows}")
    return repeated


def read_spool(path: Path, truth: GroundTruth, *, on_rows: Callable[[int], None]) -> StoredRows:
    """Every reading in a spool that belongs to the truth's series and time range."""
    notes: list[str] = []
    parts: list[NDArray[np.void]] = []
    total, position, end = 0, (_READING_CLASS << _CLASS_SHIFT) - 1, (_READING_CLASS + 1) << _CLASS_SHIFT
    with closing(_open_spool(path)) as connection:
        numbers = _map_series_numbers(connection, truth)
        while segments := connection.execute(_SEGMENTS_SQL, (position, end)).fetchall():
            for position, block in segments:
                try:
                    columns = decode_block(block)
                except (BlockError, ValueError, RuntimeError) as fault:
                    place = position & (1 << _CLASS_SHIFT) - 1
                    notes.append(f"the segment at {place} cannot be read: {fault}")
                    continue
                series, state = numbers[columns.pop("series")].T
                parts.append(build_stored_rows({**columns, "series": series, "state": state}))
                total += len(series)
            on_rows(total)
    stored = StoredRows.from_parts(parts)
    if truth.rows:
        first_us, last_us = truth.time_range_us
        times = stored.rows["time_us"]
        stored.rows = stored.rows[(times >= first_us) & (times <= last_us)]
    stored.notes = notes
    return stored


def read_quarantine(path: Path, truth: GroundTruth) -> NDArray[np.void]:
    """Series and time of the readings in quarantine that can be identified, as `STORED_DTYPE` records."""
    found = []
    with closing(_open_spool(path)) as connection:
        for topic, payload, received_us in connection.execute(_QUARANTINE_SQL):
            text = topic if isinstance(topic, str) else bytes(topic).decode("utf-8", "replace")
            *_, sensor_id, sensor_type = ("", "", *text.split("/"))
            series, _ = truth.find_series(sensor_type, {"sensor_id": sensor_id})
            try:
                members = json.loads(payload)
            except (ValueError, RecursionError):
                continue
            stamps = [
                member.get("ts", received_us)
                for member in (members if isinstance(members, list) else [members])
                if isinstance(member, dict)
            ]
            found += [(series, stamp) for stamp in stamps if series >= 0 and isinstance(stamp, int)]
    series_numbers, times_us = np.array(found, np.int64).reshape(-1, 2).T
    return build_stored_rows({"series": series_numbers, "time_us": times_us, "state": -1})


def read_declared_losses(path: Path, destination: str | None, *, single_store: bool) -> list[DeclaredLoss]:
    """What the gateway gave up before it reached a destination; None: any destination."""
    with closing(_open_spool(path)) as connection:
        losses = connection.execute(_LOSSES_SQL, (_READING_CLASS,)).fetchall()
    names = sorted({loss[0] for loss in losses})
    if single_store and destination is None and len(names) > 1:
        raise SimError(f"--destination: {', '.join(names)} have losses; name the one that this store is")
    return [
        DeclaredLoss(f"{name}: {reason}" + (f", {survives} survives" if survives else ""), *rest)
        for name, reason, survives, *rest in losses
        if destination in (None, name)
    ]


def _open_spool(path: Path) -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=10)
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
    except sqlite3.Error as fault:
        raise SimError(f"--spool {path}: {fault}") from fault
    if application != _APPLICATION_ID or version < _VERSION:
        connection.close()
        raise SimError(f"--spool {path}: not a spool")
    return connection


def _map_series_numbers(connection: sqlite3.Connection, truth: GroundTruth) -> NDArray[np.int32]:
    """(series, state) of the truth for each series_no of the spool; -1 for none. Shape (numbers, 2)."""
    known = connection.execute("SELECT series_no, sensor_id, sensor_type, attributes FROM series").fetchall()
    numbers = np.full((max((row[0] for row in known), default=0) + 1, 2), -1, np.int32)
    for number, sensor_id, sensor_type, attributes in known:
        numbers[number] = truth.find_series(sensor_type, {**json.loads(attributes), "sensor_id": sensor_id})
    return numbers
