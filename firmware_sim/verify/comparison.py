"""The comparison: acknowledged readings against stored rows, one by one. Pure: arrays in, `Differences` out.

A reading is identified by its series and time. For each identity the first reading produced counts: a later
one with the same identity is a repetition, which the gateway leaves out on purpose.

    lost         acknowledged, not stored, and not explained by anything below
    waiting      acknowledged, not stored, but still in the gateway's spool
    suppressed   within its deadband and so not delivered: flagged in the spool, or counted as such by a
                 rollup that was delivered
    quarantined  acknowledged, not stored, kept in the gateway's quarantine
    declared     acknowledged, not stored, and declared as given up: as many as the declarations count,
                 each within the times of one of them
    duplicated   stored more than once (where the store keeps what is written twice)
    altered      stored with another value, quality, ... or with other attributes
    unknown      stored for one of our series, never produced
    early        stored although no acknowledgement arrived: fine, the acknowledgement was lost on its way
    flagged      stored with flags, by flag; `late` is one of them
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import numpy as np

from firmware_sim.errors import SimError
from firmware_sim.ground_truth import ATTRIBUTES, MEASURES, PRODUCED_DTYPE, SEQ_ABSENT, SeriesState
from firmware_sim.verify.loss_explanation import (
    ROLLED_UP_DTYPE,
    describe_declared_losses,
    format_time_us,
    match_declared_losses,
    match_rolled_up,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from numpy.typing import ArrayLike, NDArray

    from firmware_sim.ground_truth import GroundTruth
    from firmware_sim.verify.loss_explanation import DeclaredLoss

EXAMPLES_SHOWN = 5
COMPARED_COLUMNS = ("value", *MEASURES)
"""`value` and `seq` are compared exactly, the others in single precision; NaN equals NaN (absent)."""

STORED_DTYPE = np.dtype([("series", "<i4"), *PRODUCED_DTYPE.descr, ("flags", "<i4")])
"""A stored row: `series` indexes `GroundTruth.names`, `state` `StoredRows.states`; -1: none of them."""

FLAG_NAMES = (
    *("out_of_range", "low_quality", "low_battery", "weak_signal", "time_assigned", "late"),
    *("stuck", "spike", "clock_in_doubt", "restamped", "suppressed"),
)
"""Names of the bits of a stored row's flags, from the lowest (docs/wire-format.md)."""

_SUPPRESSED = 1 << FLAG_NAMES.index("suppressed")
_REQUIRED_COLUMNS = ("time", "sensor_id", "sensor_type", "value")
_ABSENT = {"seq": SEQ_ABSENT, "flags": 0}


def check_columns(where: str, columns: Collection[str]) -> None:
    """Raise a SimError unless a table has the columns without which nothing can be compared."""
    missing = [name for name in _REQUIRED_COLUMNS if name not in columns]
    if missing:
        raise SimError(f"{where}: has no column {', '.join(missing)}")


def build_stored_rows(columns: Mapping[str, ArrayLike]) -> NDArray[np.void]:
    """`STORED_DTYPE` records from columns of one length, or scalars; the rest is absent."""
    rows = np.zeros(len(np.atleast_1d(columns["time_us"])), STORED_DTYPE)
    for name in STORED_DTYPE.names or ():
        rows[name] = columns.get(name, _ABSENT.get(name, np.nan))
    return rows


@dataclass(slots=True)
class StoredRows:
    """Rows found in a store: `STORED_DTYPE` records of series that the truth knows.

    Attributes:
        compared: which of `COMPARED_COLUMNS` the store has.
        states: what `state` of its rows means; None: `GroundTruth.states`.
        newest: the store shows each row with the newest attributes of its sensor, not those it came with.
        idempotent: writing the same point twice is one point there, so equal copies are not duplicates.
    """

    rows: NDArray[np.void]
    foreign: int = 0
    compared: tuple[str, ...] = COMPARED_COLUMNS
    attributes: bool = True
    states: tuple[SeriesState, ...] | None = None
    newest: bool = False
    idempotent: bool = False
    notes: list[str] = field(default_factory=list)

    @classmethod
    def from_parts(
        cls,
        parts: Sequence[NDArray[np.void]],
        columns: Collection[str] | None = None,
        *,
        idempotent: bool = False,
    ) -> Self:
        """The rows of all parts; those of other series are counted. `columns`: of the table; None: all."""
        rows = np.concatenate(parts) if parts else np.empty(0, STORED_DTYPE)
        ours = rows[rows["series"] >= 0]
        present = (*COMPARED_COLUMNS, *ATTRIBUTES) if columns is None else columns
        return cls(
            ours,
            foreign=len(rows) - len(ours),
            compared=tuple(name for name in COMPARED_COLUMNS if name in present),
            attributes=all(name in present for name in ATTRIBUTES),
            idempotent=idempotent,
        )


@dataclass(slots=True)
class LossEvidence:
    """What is known of readings that a store does not have.

    `waiting` are `STORED_DTYPE` records of the spool, `quarantined` the same of the quarantine (only series
    and time count); `rolled_up` are `ROLLED_UP_DTYPE` records that delivered rollups count as suppressed.
    """

    waiting: NDArray[np.void] = field(default_factory=lambda: np.empty(0, STORED_DTYPE))
    quarantined: NDArray[np.void] = field(default_factory=lambda: np.empty(0, STORED_DTYPE))
    rolled_up: NDArray[np.void] = field(default_factory=lambda: np.empty(0, ROLLED_UP_DTYPE))
    declared: list[DeclaredLoss] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Differences:
    """What the comparison found. Counts are of readings, by identity."""

    produced: int
    acknowledged: int
    repeated: int
    refused: int
    stored: int
    matched: int
    lost: int
    duplicated: int
    altered: int
    unknown: int
    early: int
    foreign: int
    rewritten: int
    waiting: int
    suppressed: int
    quarantined: int
    declared: int
    flagged: dict[str, int]
    examples: dict[str, list[str]]

    @property
    def clean(self) -> bool:
        """Whether every acknowledged reading is stored once and unchanged, declared or suppressed."""
        return not (self.lost or self.duplicated or self.altered or self.waiting or self.quarantined)

    @property
    def late(self) -> int:
        """How many readings are stored with the flag `late`."""
        return self.flagged.get("late", 0)


def compare_readings(
    truth: GroundTruth, stored: StoredRows, evidence: LossEvidence | None = None
) -> Differences:
    """Compare every reading of the truth with every stored row of its series."""
    rows = stored.rows
    evidence = evidence or LossEvidence()
    others = (rows, evidence.waiting, evidence.quarantined)
    truth_keys, stored_keys, waiting_keys, quarantined_keys = _identity_keys(
        (truth.series, truth.produced["time_us"]), *((part["series"], part["time_us"]) for part in others)
    )
    identities, first, of_reading = np.unique(truth_keys, return_index=True, return_inverse=True)
    acknowledged, refused = np.zeros((2, len(identities)), bool)
    acknowledged[of_reading[truth.acknowledged]] = True
    refused[of_reading[truth.refused]] = True
    stored_identities, found, of_row, counts = np.unique(
        stored_keys, return_index=True, return_inverse=True, return_counts=True
    )
    present = np.isin(identities, stored_identities, assume_unique=True)
    known = np.isin(stored_identities, identities, assume_unique=True)
    ours, theirs = first[present], found[np.searchsorted(stored_identities, identities[present])]
    same = _match_rows(truth, stored, ours, theirs)

    missing = acknowledged & ~present
    deadband = (evidence.waiting["flags"] & _SUPPRESSED) != 0
    suppressed = missing & np.isin(identities, waiting_keys[deadband])
    waiting = missing & ~suppressed & np.isin(identities, waiting_keys)
    quarantined = missing & ~suppressed & ~waiting & np.isin(identities, quarantined_keys)
    lost = missing & ~suppressed & ~waiting & ~quarantined
    series, times_us = truth.series[first], truth.produced["time_us"][first]
    suppressed |= lost & match_rolled_up(
        series, times_us, evidence.rolled_up, lost=lost, suppressed=suppressed, declared=evidence.declared
    )
    lost &= ~suppressed
    declared = match_declared_losses(times_us, lost, evidence.declared)
    lost &= ~declared
    copies = counts - 1
    rewritten = 0
    if stored.idempotent:
        equal = _find_equal_copies(rows, found, of_row)
        rewritten = int(copies[equal].sum())
        copies[equal] = 0
    flags = rows["flags"][found]
    flagged = {name: int(np.count_nonzero(flags & 1 << bit)) for bit, name in enumerate(FLAG_NAMES)}
    examples = {
        "lost": _describe_produced(truth, first[lost]),
        "waiting": _describe_produced(truth, first[waiting]),
        "quarantined": _describe_produced(truth, first[quarantined]),
        "declared": list(describe_declared_losses(evidence.declared)) if declared.any() else [],
        "duplicated": [
            f"{text}: {count} rows"
            for text, count in zip(
                _describe_stored(truth, rows, found[copies > 0]), counts[copies > 0], strict=False
            )
        ],
        "altered": list(_describe_alterations(truth, stored, ours[~same], theirs[~same])),
        "unknown": _describe_stored(truth, rows, found[~known]),
    }
    return Differences(
        produced=len(identities),
        acknowledged=int(acknowledged.sum()),
        repeated=truth.rows - len(identities),
        refused=int((refused & ~acknowledged).sum()),
        stored=len(rows),
        matched=int(same.sum()),
        lost=int(lost.sum()),
        duplicated=int(copies.sum()),
        altered=int((~same).sum()),
        unknown=int((~known).sum()),
        early=int((present & ~acknowledged).sum()),
        foreign=stored.foreign,
        rewritten=rewritten,
        waiting=int(waiting.sum()),
        suppressed=int(suppressed.sum()),
        quarantined=int(quarantined.sum()),
        declared=int(declared.sum()),
        flagged={name: count for name, count in flagged.items() if count},
        examples={kind: texts for kind, texts in examples.items() if texts},
    )


def _identity_keys(*pairs: tuple[NDArray[np.int32], NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """One int64 per (series, time), the same for the same pair in every part."""
    times = np.concatenate([time_us for _, time_us in pairs]).astype(np.int64)
    series = np.concatenate([number for number, _ in pairs]).astype(np.int64)
    if not len(times):
        return [times.copy() for _ in pairs]
    span = int(times.max()) - int(times.min()) + 1
    if span * (int(series.max()) + 1) < 1 << 63:
        keys = series * span + (times - times.min())
    else:
        distinct, rank = np.unique(times, return_inverse=True)
        keys = series * len(distinct) + rank
    return np.split(keys, np.cumsum([len(number) for number, _ in pairs])[:-1])


def _match_rows(
    truth: GroundTruth, stored: StoredRows, ours: NDArray[np.intp], theirs: NDArray[np.intp]
) -> NDArray[np.bool_]:
    """Which pairs agree in every compared column and in their attributes."""
    same = np.ones(len(ours), bool)
    for name in stored.compared:
        same &= _values_equal(truth.produced[name][ours], stored.rows[name][theirs])
    if stored.attributes:
        same &= _expected_states(truth, stored, ours) == stored.rows["state"][theirs]
    return same


def _expected_states(truth: GroundTruth, stored: StoredRows, ours: NDArray[np.intp]) -> NDArray[np.int32]:
    """The state each of these readings should show, numbered as in the store.

    Where a store keeps only the newest attributes, those of a sensor's newest reading among `ours` count.
    """
    produced = truth.produced
    if not stored.newest:
        as_sent: NDArray[np.int32] = produced["state"][ours]
        return as_sent
    states = stored.states or truth.states
    numbers = {state: number for number, state in enumerate(states)}
    order = ours[np.argsort(produced["time_us"][ours], kind="stable")]
    last = dict(zip(produced["state"][order].tolist(), produced["time_us"][order].tolist(), strict=True))
    newest: dict[str, tuple[str | None, ...]] = {}
    units: dict[tuple[str, str], str | None] = {}
    for state_number, _ in sorted(last.items(), key=lambda item: item[1]):
        state = truth.states[state_number]
        if any(state.attributes[1:]) or state.sensor_id not in newest:
            newest[state.sensor_id] = state.attributes[1:]
        units[state[:2]] = state.attributes[0]
    expected = np.full(len(truth.names), -2, np.int32)
    for series, name in enumerate(truth.names):
        if name in units:
            state = SeriesState(*name, (units[name], *newest[name[0]]))
            expected[series] = numbers.get(state, -2)
    of_series: NDArray[np.int32] = expected[truth.series[ours]]
    return of_series


def _values_equal(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.bool_]:
    agree: NDArray[np.bool_] = a == b
    if a.dtype.kind == "f":
        agree |= np.isnan(a) & np.isnan(b)
    return agree


def _find_equal_copies(
    rows: NDArray[np.void], found: NDArray[np.intp], of_row: NDArray[np.intp]
) -> NDArray[np.bool_]:
    """For each identity: whether all its rows are alike. `of_row`: the identity of a row."""
    alike = np.ones(len(rows), bool)
    for name in ("state", *COMPARED_COLUMNS):
        alike &= _values_equal(rows[name], rows[name][found[of_row]])
    equal = np.ones(len(found), bool)
    equal[of_row[~alike]] = False
    return equal


def _describe_produced(truth: GroundTruth, index: NDArray[np.intp]) -> list[str]:
    return [
        f"{'/'.join(truth.states[record['state']][:2])} at {format_time_us(record['time_us'])} "
        f"value {float(record['value'])!r} seq {record['seq']}"
        for record in truth.produced[index[:EXAMPLES_SHOWN]]
    ]


def _describe_stored(truth: GroundTruth, rows: NDArray[np.void], index: NDArray[np.intp]) -> list[str]:
    return [
        f"{'/'.join(truth.names[record['series']])} at {format_time_us(record['time_us'])} "
        f"value {float(record['value'])!r}"
        for record in rows[index[:EXAMPLES_SHOWN]]
    ]


def _describe_alterations(
    truth: GroundTruth, stored: StoredRows, ours: NDArray[np.intp], theirs: NDArray[np.intp]
) -> Iterator[str]:
    """For the first few altered pairs: each column that differs, produced against stored."""
    states = stored.states or truth.states
    for text, mine, other in zip(
        _describe_produced(truth, ours),
        truth.produced[ours[:EXAMPLES_SHOWN]],
        stored.rows[theirs[:EXAMPLES_SHOWN]],
        strict=True,
    ):
        parts = [
            f"{name} {mine[name]!s} was stored as {other[name]!s}"
            for name in stored.compared
            if not _values_equal(np.array([mine[name]]), np.array([other[name]]))[0]
        ]
        if stored.attributes and (mine["state"] != other["state"] or not parts):
            sent = truth.states[int(mine["state"])].attributes
            shown = states[other["state"]].attributes if other["state"] >= 0 else "none of those produced"
            parts.append(f"attributes {sent} were stored as {shown}")
        yield f"{text}: {'; '.join(parts)}"
