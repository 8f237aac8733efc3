"""Alerts and declarations as columns: what a gateway tells of, rather than measures. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from cloud_sync.records import RecordClass, Records

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TEXT = np.dtype(np.object_)


class AlertState(IntEnum):
    """What has become of an alert."""

    FIRING = 1
    RECOVERED = 2


class Severity(IntEnum):
    """How bad it is."""

    INFO = 1
    WARNING = 2
    CRITICAL = 3


@dataclass(frozen=True, slots=True)
class Alerts(Records):
    """Alerts that began or ended. Every array has shape (rows,); rows are in order of time.

    An alert is known by its series, rule and `time_us`.

    Attributes:
        series: int32, what it indexes is the holder's.
        time_us: int64, when it began or ended, microseconds since 1970 UTC.
        state: int32, an `AlertState`.
        severity: int32, a `Severity`.
        value: float64, what was seen; NaN when there is none, as of silence.
        threshold: float64, what it was compared with; NaN when there is none.
        count: int32, how many findings it stands for since the one before it, 1 or more.
        rule: object, texts: the name of the rule.
        detail: object, texts: for a person.
    """

    record_class: ClassVar[RecordClass] = RecordClass.ALERT
    order: ClassVar[tuple[str, ...]] = ("time_us", "series")
    columns: ClassVar[dict[str, np.dtype[Any]]] = {
        "series": np.dtype(np.int32),
        "time_us": np.dtype(np.int64),
        "state": np.dtype(np.int32),
        "severity": np.dtype(np.int32),
        "value": np.dtype(np.float64),
        "threshold": np.dtype(np.float64),
        "count": np.dtype(np.int32),
        "rule": _TEXT,
        "detail": _TEXT,
    }
    series: NDArray[np.int32]
    time_us: NDArray[np.int64]
    state: NDArray[np.int32]
    severity: NDArray[np.int32]
    value: NDArray[np.float64]
    threshold: NDArray[np.float64]
    count: NDArray[np.int32]
    rule: NDArray[np.object_]
    detail: NDArray[np.object_]


@dataclass(frozen=True, slots=True)
class Declarations(Records):
    """What a gateway gave up undelivered. Every array has shape (rows,); rows are in order of time.

    A declaration is of one destination and one run of commits of one class.

    Attributes:
        time_us: int64, when it was declared, microseconds since 1970 UTC.
        of_class: int32, the `RecordClass` that was given up.
        first_commit, last_commit: int64, inclusive.
        lost: int64, how many records.
        from_us, to_us: int64, earliest and latest time among them.
        destination: object, texts: the destination that did not get them.
        reason: object, texts: why, machine-readable.
        survives: object, texts: the coarser form that is left, e.g. "rollup 60 s", "" for none.
    """

    record_class: ClassVar[RecordClass] = RecordClass.DECLARATION
    named: ClassVar[bool] = False
    order: ClassVar[tuple[str, ...]] = ("time_us", "of_class", "first_commit")
    columns: ClassVar[dict[str, np.dtype[Any]]] = {
        "time_us": np.dtype(np.int64),
        "of_class": np.dtype(np.int32),
        "first_commit": np.dtype(np.int64),
        "last_commit": np.dtype(np.int64),
        "lost": np.dtype(np.int64),
        "from_us": np.dtype(np.int64),
        "to_us": np.dtype(np.int64),
        "destination": _TEXT,
        "reason": _TEXT,
        "survives": _TEXT,
    }
    time_us: NDArray[np.int64]
    of_class: NDArray[np.int32]
    first_commit: NDArray[np.int64]
    last_commit: NDArray[np.int64]
    lost: NDArray[np.int64]
    from_us: NDArray[np.int64]
    to_us: NDArray[np.int64]
    destination: NDArray[np.object_]
    reason: NDArray[np.object_]
    survives: NDArray[np.object_]
