"""Records as columns, and the batches and receipts that carry them. Pure.

Every record class (`Readings`, `Rollups`, `Alerts`, `Declarations`) holds parallel numpy arrays, one per
column, all of shape (rows,). A `series` column holds integers: in the spool the spool's own series
numbers, in a `Batch` positions in `Batch.series`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from numpy.typing import NDArray

Column: TypeAlias = "NDArray[Any]"
"""A column of any dtype."""

_COLUMN = re.compile(r"NDArray\[np\.(\w+)\]")

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


MAX_TEXT_BYTES = 1024


def is_storable_text(text: str) -> bool:
    """Whether every tier can hold a name or attribute: at most 1024 bytes of UTF-8, without NUL."""
    try:
        return len(text.encode()) <= MAX_TEXT_BYTES and "\0" not in text
    except UnicodeEncodeError:  # a lone surrogate
        return False


class Series(NamedTuple):
    """Identity (sensor_id, sensor_type) with one state of its attributes, sorted by name."""

    sensor_id: str
    sensor_type: str
    attributes: tuple[tuple[str, str], ...] = ()


class Records:
    """Records of one class as columns: what every class can do. Every array has shape (rows,).

    A class declares its columns once, as annotated fields: `NDArray[np.X]` is a column of dtype X, texts are
    of dtype object. Rows are sorted by the columns of `order`, the most significant first.
    """

    __slots__ = ()
    record_class: ClassVar[RecordClass]
    columns: ClassVar[dict[str, np.dtype[np.generic]]]
    has_series: ClassVar[bool] = True
    order: ClassVar[tuple[str, ...]] = ("series", "time_us")
    if TYPE_CHECKING:
        time_us: NDArray[np.int64]
        series: NDArray[np.int32]

    def __init_subclass__(cls) -> None:
        types = {name: _COLUMN.fullmatch(annotation) for name, annotation in cls.__annotations__.items()}
        cls.columns = {name: np.dtype(getattr(np, found[1])) for name, found in types.items() if found}

    @property
    def rows(self) -> int:
        """Number of records."""
        return len(self.time_us)

    def select(self, index: NDArray[np.intp] | NDArray[np.bool_]) -> Self:
        """The records at `index` (integers or a mask), in that order."""
        return type(self)(**{name: getattr(self, name)[index] for name in self.columns})

    def in_order(self) -> Self:
        """The same records in the canonical order of every encoded run; equal ones stay as they came."""
        return self.select(np.lexsort([getattr(self, name) for name in reversed(self.order)]))

    def with_series(self, series: NDArray[np.int32]) -> Self:
        """The same records, their series renumbered."""
        return type(self)(**{name: getattr(self, name) for name in self.columns} | {"series": series})

    @classmethod
    def empty(cls) -> Self:
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
    """Readings as columns; absent floats are NaN, an absent `seq` is `SEQ_ABSENT`, values are finite.

    `quality` and `battery_level` in percent, `signal_strength` in dBm; `flags` are bits of `Flag`.
    """

    record_class: ClassVar[RecordClass] = RecordClass.READING
    series: NDArray[np.int32]
    time_us: NDArray[np.int64]
    value: NDArray[np.float64]
    quality: NDArray[np.float32]
    battery_level: NDArray[np.float32]
    signal_strength: NDArray[np.float32]
    seq: NDArray[np.int64]
    flags: NDArray[np.int32]


class BatchRange(NamedTuple):
    """Which commits of which spool a batch carries: its identity everywhere.

    Commits are inclusive and counted by `record_class`. Part k of n holds what `rows_of_part` says. Parts of
    different n may be mixed as long as they do not overlap; the range is complete when they cover it.
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

    `refused` and `withheld` count rows left out: the destination refuses them, or they are not for it (such
    as suppressed readings); only when that is every row are there no records. `positions`, if known, are
    those of the records among all rows of the range.
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
    """How fast a destination under load accepts one gateway's backlog, and for how long."""

    rows_per_s: float
    valid_s: float


@dataclass(frozen=True, slots=True)
class Receipt:
    """A destination's word that a range is durable there.

    `stored + duplicates + conflicts == rows` where the destination can tell; one that overwrites in place
    (InfluxDB, files) counts every row as stored. Without `credit` there is no limit.
    """

    rows: int
    stored: int
    duplicates: int = 0
    conflicts: int = 0
    applied_before: bool = False
    credit: Credit | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Rollups(Records):
    """Statistics of windows of time; of one series, window length and start the newest revision is valid.

    Values and times are those of the `count` readings within range, suppressed ones included; with none they
    are NaN and the start of the window. `m2` is the sum of squared differences from the mean: the variance is
    m2 / (count - 1). `flagged`: any flag but SUPPRESSED; `excluded`: out of range.
    """

    record_class: ClassVar[RecordClass] = RecordClass.ROLLUP
    order: ClassVar[tuple[str, ...]] = ("series", "window_s", "time_us", "revision")
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


class AlertState(IntEnum):
    """Whether an alert began or ended."""

    FIRING = 1
    RECOVERED = 2


class Severity(IntEnum):
    """Ascending."""

    INFO = 1
    WARNING = 2
    CRITICAL = 3


@dataclass(frozen=True, slots=True)
class Alerts(Records):
    """Alerts that began or ended at `time_us`; identified by series, rule and `time_us`.

    `state` is an `AlertState`, `severity` a `Severity`. `value` was compared with `threshold`; NaN where
    there is none, as for silence. `count`: findings since the alert before it. `detail` is for a person.
    """

    record_class: ClassVar[RecordClass] = RecordClass.ALERT
    order: ClassVar[tuple[str, ...]] = ("time_us", "series")
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
    """Records that a gateway gave up undelivered, by time; each of one destination and one run of commits.

    `of_class` is their `RecordClass`; `from_us` and `to_us` are the earliest and latest time of the `lost`.
    `survives` names the coarser form that is left, e.g. "rollup 60 s", "" for none.
    """

    record_class: ClassVar[RecordClass] = RecordClass.DECLARATION
    has_series: ClassVar[bool] = False
    order: ClassVar[tuple[str, ...]] = ("time_us", "of_class", "first_commit")
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
