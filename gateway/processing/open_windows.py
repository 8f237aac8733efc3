"""What of one window length has not been sent on yet: summaries of readings since the last revision. Pure.

An open window holds a delta, never a total, so that nothing is counted twice: what is closed is the prior
revision, if there was one, with the delta merged into it, and the delta alone goes up to the longer windows.

Form of `pack`: a version byte, then a msgpack map: `rows`, `parts` (a column block of rollups), `touched_us`
and `since_us` (pcodec), `run_first` and `run_last` (pcodec) of the windows that were closed before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
from pcodec import ChunkConfig, standalone

from cloud_sync import columns
from cloud_sync.errors import FormatError
from cloud_sync.records import RecordClass
from cloud_sync.summaries import Rollups
from gateway.processing.rollup import merged
from gateway.processing.windows import Runs, keys_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Int64s = NDArray[np.int64]

VERSION = 1
_PCODEC = ChunkConfig(compression_level=4)


class OpenWindows(NamedTuple):
    """Open windows of one length, in order of `keys`; arrays of shape (rows,).

    Attributes:
        keys: int64, each window once (`gateway.processing.windows`).
        parts: the deltas, revision 0.
        touched_us: int64, when a reading last came for it, by the gateway's clock.
        since_us: int64, when the first one of the delta came.
    """

    keys: Int64s
    parts: Rollups
    touched_us: Int64s
    since_us: Int64s

    @classmethod
    def none(cls) -> OpenWindows:
        """No window is open."""
        empty = np.empty(0, np.int64)
        return cls(empty, Rollups.none(), empty, empty)

    @property
    def rows(self) -> int:
        """How many windows are open."""
        return len(self.keys)

    def take(self, index: NDArray[np.intp] | NDArray[np.bool_]) -> OpenWindows:
        """The open windows at `index` (rising integers or a mask)."""
        return OpenWindows(
            self.keys[index], self.parts.take(index), self.touched_us[index], self.since_us[index]
        )

    @classmethod
    def of(cls, parts: Rollups, window_s: int, now_us: int) -> OpenWindows:
        """Summaries of the shortest length, each window once and in order, that came just now."""
        now = np.full(parts.rows, now_us, np.int64)
        return cls(keys_of(parts.series, parts.time_us, window_s), parts, now, now)

    def with_more(self, more: OpenWindows, window_s: int) -> OpenWindows:
        """These windows of `window_s` with `more`, of this length or a shorter one and of other readings."""
        if not more.rows:
            return self
        parts = Rollups.concat([self.parts, more.parts])
        keys = np.concatenate([self.keys, keys_of(more.parts.series, more.parts.time_us, window_s)])
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        groups = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
        return OpenWindows(
            keys[groups],
            merged(parts, window_s),
            np.maximum.reduceat(np.concatenate([self.touched_us, more.touched_us])[order], groups),
            np.minimum.reduceat(np.concatenate([self.since_us, more.since_us])[order], groups),
        )

    def not_after(self, now_us: int) -> OpenWindows:
        """The same for a clock that has been set back: nothing was touched later than now."""
        return self._replace(
            touched_us=np.minimum(self.touched_us, now_us), since_us=np.minimum(self.since_us, now_us)
        )


def pack(windows: OpenWindows, closed: Runs) -> bytes:
    """The open windows of one length, and which were closed before, as bytes."""
    fields: dict[str, Any] = {
        "rows": windows.rows,
        "parts": columns.encode(windows.parts, level=columns.FRESH_LEVEL) if windows.rows else b"",
        "touched_us": _packed(windows.touched_us),
        "since_us": _packed(windows.since_us),
        "run_first": _packed(closed.first),
        "run_last": _packed(closed.last),
    }
    return bytes([VERSION]) + msgspec.msgpack.encode(fields)


def unpack(packed: bytes, window_s: int) -> tuple[OpenWindows, Runs]:
    """What `pack` was given.

    Raises:
        FormatError: not of this version, or damaged.
    """
    if packed[:1] != bytes([VERSION]):
        raise FormatError("unsupported", f"open windows of version {packed[:1].hex() or 'none'}")
    try:
        fields: dict[str, Any] = msgspec.msgpack.decode(packed[1:])
        closed = Runs(_unpacked(fields["run_first"]), _unpacked(fields["run_last"]))
        if not fields["rows"]:
            return OpenWindows.none(), closed
        parts = columns.decode_records(fields["parts"], RecordClass.ROLLUP)
        assert isinstance(parts, Rollups)
        touched_us, since_us = _unpacked(fields["touched_us"]), _unpacked(fields["since_us"])
    except (msgspec.DecodeError, KeyError, TypeError, RuntimeError) as fault:
        raise FormatError("malformed", f"open windows cannot be read: {fault}") from fault
    if not parts.rows == len(touched_us) == len(since_us):
        raise FormatError("malformed", "open windows of unequal columns")
    return OpenWindows(keys_of(parts.series, parts.time_us, window_s), parts, touched_us, since_us), closed


def pack_times(times_us: Int64s) -> bytes:
    """Times as bytes, with a version."""
    return bytes([VERSION]) + _packed(times_us)


def unpack_times(packed: bytes) -> Int64s:
    """What `pack_times` was given.

    Raises:
        FormatError: not of this version, or damaged.
    """
    if packed[:1] != bytes([VERSION]):
        raise FormatError("unsupported", f"times of version {packed[:1].hex() or 'none'}")
    try:
        return _unpacked(packed[1:])
    except (TypeError, RuntimeError) as fault:
        raise FormatError("malformed", f"times cannot be read: {fault}") from fault


def _packed(column: Int64s) -> bytes:
    return bytes(standalone.simple_compress(np.ascontiguousarray(column), _PCODEC)) if len(column) else b""


def _unpacked(packed: bytes) -> Int64s:
    if not packed:
        return np.empty(0, np.int64)
    column = standalone.simple_decompress(packed)
    if column is None or column.dtype != np.int64:
        raise TypeError("not a column of int64")
    return np.asarray(column, np.int64)
