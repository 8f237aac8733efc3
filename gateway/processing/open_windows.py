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
_CHANGING = tuple(
    name for name in Rollups.columns if name not in ("series", "time_us", "window_s", "revision")
)
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
        more = more.as_windows_of(window_s)
        at = np.searchsorted(self.keys, more.keys)
        if self.rows and at[-1] < self.rows and np.array_equal(self.keys[at], more.keys):
            return self._with_known(more, at, window_s)
        keys = np.concatenate([self.keys, more.keys])
        groups, order = _groups(keys)
        return OpenWindows(
            keys[order][groups],
            merged(Rollups.concat([self.parts, more.parts]), window_s),
            np.maximum.reduceat(np.concatenate([self.touched_us, more.touched_us])[order], groups),
            np.minimum.reduceat(np.concatenate([self.since_us, more.since_us])[order], groups),
        )

    def as_windows_of(self, window_s: int) -> OpenWindows:
        """The same said of the longer windows that they lie in."""
        if int(self.parts.window_s[0]) == window_s:
            return self
        keys = keys_of(self.parts.series, self.parts.time_us, window_s)
        groups, order = _groups(keys)
        return OpenWindows(
            keys[order][groups],
            merged(self.parts, window_s),
            np.maximum.reduceat(self.touched_us[order], groups),
            np.minimum.reduceat(self.since_us[order], groups),
        )

    def _with_known(self, more: OpenWindows, at: NDArray[np.intp], window_s: int) -> OpenWindows:
        """With windows that are open already, at `at`: only those cost anything but a copy."""
        both = merged(Rollups.concat([self.parts.take(at), more.parts]), window_s)
        given = {name: getattr(self.parts, name) for name in Rollups.columns}
        for name in _CHANGING:
            given[name] = given[name].copy()
            given[name][at] = getattr(both, name)
        touched_us, since_us = self.touched_us.copy(), self.since_us.copy()
        touched_us[at] = np.maximum(touched_us[at], more.touched_us)
        since_us[at] = np.minimum(since_us[at], more.since_us)
        return OpenWindows(self.keys, Rollups(**given), touched_us, since_us)

    def not_after(self, now_us: int) -> OpenWindows:
        """The same for a clock that has been set back: nothing was touched later than now."""
        return self._replace(
            touched_us=np.minimum(self.touched_us, now_us), since_us=np.minimum(self.since_us, now_us)
        )


def _groups(keys: Int64s) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Where runs of equal keys begin once they are in order, and that order."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    return np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1]))), order


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
