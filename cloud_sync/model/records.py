"""Records as columns, and the batches and receipts that carry them. Pure.

Every record class (`Readings`, `Rollups`, `Alerts`, `Declarations`) holds parallel numpy arrays, one per
column, all of shape (rows,). A `series` column holds integers: in the spool the spool's own series
numbers, in a `Batch` positions in `Batch.series`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from numpy.typing import NDArray

SEQ_ABSENT = -1
"""The `seq` of a reading whose device sent none. Absent floats are NaN."""

ATTRIBUTE_NAMES = ("location", "manufacturer", "firmware_version", "unit")
"""The attributes of a series that a payload may carry, in the order of their wire names."""


class RecordClass(IntEnum):
    """Kinds of record, each with its own commit sequence. Lower is delivered earlier."""

    ALERT = 1
    DECLARATION = 2
    ROLLUP = 3
    READING = 4


class Flag(IntFlag):
    """What is remarkable about a reading that is kept; bits of the `flags` column."""

    OUT_OF_RANGE = 1
    LOW_QUALITY = 2
    LOW_BATTERY = 4
    WEAK_SIGNAL = 8
    TIME_ASSIGNED = 16
    LATE = 32
    STUCK = 64
    SPIKE = 128
    CLOCK_IN_DOUBT = 256
    RESTAMPED = 512
    SUPPRESSED = 1024  # within its deadband: kept and rolled up here, not delivered
    PROCESSED = 2048  # rolled up and watched by the gateway it came from; in a spool only, never delivered
    HISTORICAL = 4096  # the device says that it sends it late, from a store of its own


class Series(NamedTuple):
    """Identity (sensor_id, sensor_type) with one state of its attributes, sorted by name."""

    sensor_id: str
    sensor_type: str
    attributes: tuple[tuple[str, str], ...] = ()


class Records:
    """Records of one class as columns: what every class can do. Every array has shape (rows,).

    Attributes:
        record_class: which class.
        columns: the type of each column, in the order of the fields; texts are of type object.
        named: whether there is a column `series`.
        order: names of the columns that rows are sorted by, first the one that counts most.
        time_us: int64, microseconds since 1970 UTC.
        series: int32, only where `named`.
    """

    __slots__ = ()
    record_class: ClassVar[RecordClass]
    columns: ClassVar[dict[str, np.dtype[Any]]]
    named: ClassVar[bool] = True
    order: ClassVar[tuple[str, ...]] = ("series", "time_us")
    if TYPE_CHECKING:
        time_us: NDArray[np.int64]
        series: NDArray[np.int32]

    @property
    def rows(self) -> int:
        """Number of records."""
        return len(self.time_us)

    def take(self, index: NDArray[np.intp] | NDArray[np.bool_]) -> Self:
        """The records at `index` (integers or a mask), in that order."""
        return type(self)(**{name: getattr(self, name)[index] for name in self.columns})

    def in_order(self) -> Self:
        """The same records in the canonical order of every encoded run; equal ones stay as they came."""
        return self.take(np.lexsort([getattr(self, name) for name in reversed(self.order)]))

    def with_series(self, series: NDArray[np.int32]) -> Self:
        """The same records, their series renumbered."""
        return type(self)(**{name: getattr(self, name) for name in self.columns} | {"series": series})

    @classmethod
    def none(cls) -> Self:
        """No records."""
        return cls(**{name: np.empty(0, dtype) for name, dtype in cls.columns.items()})

    @classmethod
    def concat(cls, parts: Sequence[Self]) -> Self:
        """All records of `parts`, one after the other."""
        if len(parts) == 1:
            return parts[0]
        return cls(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in cls.columns})


@dataclass(frozen=True, slots=True)
class Readings(Records):
    """Readings as columns. Every array has shape (rows,).

    Attributes:
        series: int32, what it indexes is the holder's (see the module).
        time_us: int64, microseconds since 1970 UTC.
        value: float64, finite.
        quality: float32, 0-100, NaN when absent.
        battery_level: float32, percent, NaN when absent.
        signal_strength: float32, dBm, NaN when absent.
        seq: int64, the device's own sequence number, `SEQ_ABSENT` when absent.
        flags: int32, bits of `Flag`.
    """

    record_class: ClassVar[RecordClass] = RecordClass.READING
    columns: ClassVar[dict[str, np.dtype[Any]]] = {
        "series": np.dtype(np.int32),
        "time_us": np.dtype(np.int64),
        "value": np.dtype(np.float64),
        "quality": np.dtype(np.float32),
        "battery_level": np.dtype(np.float32),
        "signal_strength": np.dtype(np.float32),
        "seq": np.dtype(np.int64),
        "flags": np.dtype(np.int32),
    }
    series: NDArray[np.int32]
    time_us: NDArray[np.int64]
    value: NDArray[np.float64]
    quality: NDArray[np.float32]
    battery_level: NDArray[np.float32]
    signal_strength: NDArray[np.float32]
    seq: NDArray[np.int64]
    flags: NDArray[np.int32]


READING_DTYPES = Readings.columns
"""The type of each column of `Readings`, in the order of its fields."""


class BatchRange(NamedTuple):
    """Which commits of which spool a batch carries: its identity everywhere.

    `first_commit` and `last_commit` are inclusive and belong to `record_class`, which counts its own commits.
    A range may travel in parts: part k of n holds what `rows_of_part` says. Parts of different n may be mixed
    as long as they do not overlap; the range is complete when they cover it.
    """

    gateway_id: str
    epoch: UUID
    record_class: RecordClass
    first_commit: int
    last_commit: int
    part: int = 1
    parts: int = 1

    def rows_of_part(self, rows: int) -> slice:
        """Which of the range's `rows` rows, in canonical order, this part holds."""
        return slice((self.part - 1) * rows // self.parts, self.part * rows // self.parts)

    def __str__(self) -> str:
        part = "" if self.parts == 1 else f" part {self.part} of {self.parts}"
        return (
            f"{self.gateway_id}/{self.epoch.hex[:8]}/{self.record_class.name.lower()} "
            f"{self.first_commit}..{self.last_commit}{part}"
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """A range with its records, self-contained: their `series` indexes `series`, in canonical order.

    Attributes:
        refused: rows of the range (or of this part of it) left out because the destination refuses them.
        withheld: rows left out because they are not for this destination, such as suppressed readings.
            There are no records at all only when every row was refused or withheld.
        positions: where each record stands among all rows of the range, if known. Shape (rows,).
    """

    range: BatchRange
    series: tuple[Series, ...]
    records: Records
    refused: int = 0
    withheld: int = 0
    positions: NDArray[np.intp] | None = field(default=None, compare=False)

    @property
    def rows(self) -> int:
        """Number of records."""
        return self.records.rows

    @property
    def readings(self) -> Readings:
        """The records of a batch of readings."""
        assert isinstance(self.records, Readings)
        return self.records


class Credit(NamedTuple):
    """How fast a destination under load wants one gateway's backlog: rows per second, for so many seconds."""

    rows_per_s: float
    valid_s: float


@dataclass(frozen=True, slots=True)
class Receipt:
    """A destination's word that a range is durable there.

    `stored + duplicates + conflicts == rows` where the destination can tell; a destination that
    overwrites in place (InfluxDB, files) counts every row as stored. `credit` is no part of what a receipt
    says of its range; None means that there is no limit.
    """

    rows: int
    stored: int
    duplicates: int = 0
    conflicts: int = 0
    applied_before: bool = False
    credit: Credit | None = field(default=None, compare=False)


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
