"""Rollups as columns: one row is one revision of one series' summary of one window. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from cloud_sync.records import RecordClass, Records

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Rollups(Records):
    """Summaries of windows. Every array has shape (rows,).

    The newest revision of a series, window length and start is the one that holds. What it says of values is
    of the `count` readings that count; out-of-range readings are left out of it and counted in `excluded`.
    Where `count` is 0 the values are NaN and their times the start of the window.

    Attributes:
        series: int32, what it indexes is the holder's.
        time_us: int64, start of the window, microseconds since 1970 UTC.
        window_s: int32, length of the window, seconds.
        revision: int32, from 1.
        count: int32, readings that count, suppressed ones among them.
        mean: float64.
        m2: float64, sum of squared differences from the mean: the variance is m2 / (count - 1).
        minimum, maximum: float64.
        first, last: float64, values of the earliest and the latest reading.
        first_at_us, last_at_us: int64, when those were.
        flagged: int32, readings with any flag but SUPPRESSED, excluded ones among them.
        excluded: int32, readings left out because they are out of range.
        suppressed: int32, of `count`: readings within their deadband, which are not delivered one by one.
    """

    record_class: ClassVar[RecordClass] = RecordClass.ROLLUP
    order: ClassVar[tuple[str, ...]] = ("series", "window_s", "time_us", "revision")
    columns: ClassVar[dict[str, np.dtype[Any]]] = {
        "series": np.dtype(np.int32),
        "time_us": np.dtype(np.int64),
        "window_s": np.dtype(np.int32),
        "revision": np.dtype(np.int32),
        "count": np.dtype(np.int32),
        "mean": np.dtype(np.float64),
        "m2": np.dtype(np.float64),
        "minimum": np.dtype(np.float64),
        "maximum": np.dtype(np.float64),
        "first": np.dtype(np.float64),
        "first_at_us": np.dtype(np.int64),
        "last": np.dtype(np.float64),
        "last_at_us": np.dtype(np.int64),
        "flagged": np.dtype(np.int32),
        "excluded": np.dtype(np.int32),
        "suppressed": np.dtype(np.int32),
    }
    series: NDArray[np.int32]
    time_us: NDArray[np.int64]
    window_s: NDArray[np.int32]
    revision: NDArray[np.int32]
    count: NDArray[np.int32]
    mean: NDArray[np.float64]
    m2: NDArray[np.float64]
    minimum: NDArray[np.float64]
    maximum: NDArray[np.float64]
    first: NDArray[np.float64]
    first_at_us: NDArray[np.int64]
    last: NDArray[np.float64]
    last_at_us: NDArray[np.int64]
    flagged: NDArray[np.int32]
    excluded: NDArray[np.int32]
    suppressed: NDArray[np.int32]
