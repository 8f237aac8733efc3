"""The comparison: acknowledged readings against stored rows, one by one. Pure: arrays in, `Differences` out.

A reading is identified by its series and time. For each identity the first reading produced counts: a later
one with the same identity is a repetition, which the gateway leaves out on purpose.

    lost         acknowledged, not stored, and nobody says why
    waiting      acknowledged, not stored, but still in the gateway's spool
    suppressed   within its deadband, so that it stayed at the gateway on purpose: flagged there, or counted
                 as such by a rollup that was delivered
    quarantined  acknowledged, not stored, kept in the gateway's quarantine
    declared     acknowledged, not stored, and declared as given up: as many as the declarations speak of,
                 each within the times of one of them
    duplicated   stored more than once (where the store keeps what is written twice)
    altered      stored with another value, quality, ... or with other attributes
    unknown      stored for a series of ours, never produced
    early        stored although no acknowledgement arrived: fine, the acknowledgement was lost on its way
    flagged      stored with flags, by flag; `late` is one of them
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from firmware_sim.ground_truth import SeriesState
from firmware_sim.verify.loss_explanation import (
    ROLLED_UP_DTYPE,
    describe_declared_losses,
    format_time_us,
    match_declared_losses,
    match_rolled_up,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from firmware_sim.ground_truth import GroundTruth
    from firmware_sim.verify.loss_explanation import DeclaredLoss

EXAMPLES_SHOWN = 5
COMPARED_COLUMNS = ("value", "quality", "battery_level", "signal_strength", "seq")
"""Compared columns. `value` and `seq` exactly, the others in single precision; NaN equals NaN (absent)."""

STORED_DTYPE = np.dtype(
    [
        ("series", "<i4"),
        ("state", "<i4"),
        ("time_us", "<i8"),
        ("value", "<f8"),
        ("quality", "<f4"),
        ("battery_level", "<f4"),
        ("signal_strength", "<f4"),
        ("seq", "<i8"),
        ("flags", "<i4"),
    ]
)
"""A stored row: `series` indexes `Truth.names`, `state` indexes `Stored.states` or is -1 for none of them."""

FLAG_NAMES = (
    "out_of_range",
    "low_quality",
    "low_battery",
    "weak_signal",
    "time_assigned",
    "late",
    "stuck",
    "spike",
    "clock_in_doubt",
    "restamped",
    "suppressed",
)
"""Names of the bits of a stored row's flags, from the lowest (docs/wire-format.md)."""

_SUPPRESSED = 1 << FLAG_NAMES.index("suppressed")


@dataclass(slots=True)
class StoredRows:
    """Rows found in a store.

    Attributes:
        rows: `STORED` records of series that the truth knows.
        foreign: how many rows belonged to other series.
        compared: which of `NUMBERS` the store has.
        attributes: whether the store's attributes are all there to be compared.
        states: what `state` of its rows means; None: `Truth.states`.
        newest: the store shows for every row the newest attributes of its sensor, not those it came with.
        flags: whether the store has them.
        idempotent: writing the same point twice is one point there, so equal copies are not duplicates.
        notes: what a person should know about this store.
    """

    rows: NDArray[Any]
    foreign: int = 0
    compared: tuple[str, ...] = COMPARED_COLUMNS
    attributes: bool = True
    states: tuple[SeriesState, ...] | None = None
    newest: bool = False
    flags: bool = True
    idempotent: bool = False
    notes: list[str] = field(default_factory=list)


@dataclass(slots=True)
class LossEvidence:
    """What else is known of readings that a store does not have.

    Attributes:
        waiting: `STORED` records of readings that are in the gateway's spool.
        quarantined: the same of what is in its quarantine; only series and time count.
        kept: `KEPT` records, what delivered rollups say about suppressed readings.
        declared: what gateways say that they gave up.
    """

    waiting: NDArray[Any] = field(default_factory=lambda: np.empty(0, STORED_DTYPE))
    quarantined: NDArray[Any] = field(default_factory=lambda: np.empty(0, STORED_DTYPE))
    kept: NDArray[Any] = field(default_factory=lambda: np.empty(0, ROLLED_UP_DTYPE))
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
        """Every acknowledged reading is stored once and unchanged, or declared as given up, or suppressed."""
        return not (self.lost or self.duplicated or self.altered or self.waiting or self.quarantined)

    @property
    def late(self) -> int:
        """Readings stored with the flag `late`."""
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
    truth_order = np.argsort(truth_keys, kind="stable")
    first = truth_order[_group_starts(truth_keys[truth_order])]
    wanted = truth_keys[first]
    acknowledged = _any_by_key(truth.acknowledged, truth_order, truth_keys)
    refused = _any_by_key(truth.refused, truth_order, truth_keys) & ~acknowledged

    stored_order = np.argsort(stored_keys, kind="stable")
    starts = _group_starts(stored_keys[stored_order])
    found = stored_order[starts]
    copies = np.diff(starts, append=len(stored_order)) - 1
    at, present = _locate(wanted, stored_keys[found])
    _, known = _locate(stored_keys[found], wanted)

    same, reasons = _match_columns(truth, stored, first[present], found[at[present]])
    missing = acknowledged & ~present
    kept = (evidence.waiting["flags"] & _SUPPRESSED) != 0
    suppressed = missing & np.isin(wanted, waiting_keys[kept])
    waiting = missing & ~suppressed & np.isin(wanted, waiting_keys)
    quarantined = missing & ~suppressed & ~waiting & np.isin(wanted, quarantined_keys)
    lost = missing & ~suppressed & ~waiting & ~quarantined
    kept_back = _match_rolled_up(truth, first, lost, suppressed, evidence)
    suppressed |= kept_back
    lost &= ~kept_back
    declared = _match_declared(truth.produced["time_us"][first], lost, evidence.declared)
    lost &= ~declared
    early = present & ~acknowledged
    extra = copies.copy()
    rewritten = 0
    if stored.idempotent:
        equal = _equal_copies(rows, stored_order, starts)
        rewritten = int(copies[equal].sum())
        extra[equal] = 0
    examples = {
        "lost": _describe_produced(truth, first[lost]),
        "waiting": _describe_produced(truth, first[waiting]),
        "quarantined": _describe_produced(truth, first[quarantined]),
        "declared": list(describe_declared_losses(evidence.declared)) if declared.any() else [],
        "duplicated": [
            f"{text}: {n + 1} rows"
            for text, n in zip(
                _describe_stored(truth, rows, found[extra > 0]), extra[extra > 0], strict=False
            )
        ],
        "altered": [
            f"{text}: {why}"
            for text, why in zip(
                _describe_produced(truth, first[present][~same]),
                _describe_alterations(
                    truth, stored, first[present][~same], found[at[present]][~same], reasons
                ),
                strict=False,
            )
        ],
        "unknown": _describe_stored(truth, rows, found[~known]),
    }
    return Differences(
        produced=len(wanted),
        acknowledged=int(acknowledged.sum()),
        repeated=truth.rows - len(wanted),
        refused=int(refused.sum()),
        stored=len(rows),
        matched=int(same.sum()),
        lost=int(lost.sum()),
        duplicated=int(extra.sum()),
        altered=int((~same).sum()),
        unknown=int((~known).sum()),
        early=int(early.sum()),
        foreign=stored.foreign,
        rewritten=rewritten,
        waiting=int(waiting.sum()),
        suppressed=int(suppressed.sum()),
        quarantined=int(quarantined.sum()),
        declared=int(declared.sum()),
        flagged=_count_flags(rows["flags"][found]),
        examples={kind: texts for kind, texts in examples.items() if texts},
    )


def _match_rolled_up(
    truth: GroundTruth,
    first: NDArray[np.intp],
    lost: NDArray[np.bool_],
    suppressed: NDArray[np.bool_],
    evidence: LossEvidence,
) -> NDArray[np.bool_]:
    """Which of the lost were suppressed as rollups say; those that the spool knows are counted there too."""
    if not len(evidence.kept):
        return np.zeros(len(lost), bool)
    times = truth.produced["time_us"][first]
    doubtful = np.zeros(len(lost), bool)  # what a declaration may explain as well
    for declaration in evidence.declared:
        doubtful |= (times >= declaration.from_us) & (times <= declaration.to_us)
    rank = doubtful.astype(np.int8)
    rank[suppressed] = -1
    return lost & match_rolled_up(truth.series[first], times, lost | suppressed, evidence.kept, rank)


def _match_declared(
    times_us: NDArray[np.int64], lost: NDArray[np.bool_], declarations: list[DeclaredLoss]
) -> NDArray[np.bool_]:
    index = np.flatnonzero(lost)
    index = index[np.argsort(times_us[index], kind="stable")]
    found = np.zeros(len(lost), bool)
    found[index] = match_declared_losses(times_us[index], declarations)
    return found


def _count_flags(flags: NDArray[np.int32]) -> dict[str, int]:
    counts = {name: int(np.count_nonzero(flags & 1 << bit)) for bit, name in enumerate(FLAG_NAMES)}
    return {name: count for name, count in counts.items() if count}


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


def _group_starts(sorted_keys: NDArray[np.int64]) -> NDArray[np.intp]:
    """Where each run of equal keys begins."""
    if not len(sorted_keys):
        return np.empty(0, np.intp)
    return np.concatenate(([0], np.flatnonzero(np.diff(sorted_keys)) + 1))


def _any_by_key(
    mask: NDArray[np.bool_], order: NDArray[np.intp], keys: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """For each distinct key, in order: whether any of its readings is in the mask."""
    starts = _group_starts(keys[order])
    return np.logical_or.reduceat(mask[order], starts) if len(starts) else np.empty(0, bool)


def _locate(
    needles: NDArray[np.int64], haystack: NDArray[np.int64]
) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Positions of sorted, distinct needles in a sorted, distinct haystack, and which are there."""
    at = np.searchsorted(haystack, needles)
    inside = at < len(haystack)
    present = np.zeros(len(needles), bool)
    present[inside] = haystack[at[inside]] == needles[inside]
    return at, present


def _match_columns(
    truth: GroundTruth, stored: StoredRows, ours: NDArray[np.intp], theirs: NDArray[np.intp]
) -> tuple[NDArray[np.bool_], tuple[str, ...]]:
    """Which pairs agree in every compared column, and the names of the columns."""
    same = np.ones(len(ours), bool)
    for name in stored.compared:
        same &= _values_equal(truth.produced[name][ours], stored.rows[name][theirs])
    if stored.attributes:
        same &= _expected_states(truth, stored, ours) == stored.rows["state"][theirs]
    return same, stored.compared


def _expected_states(truth: GroundTruth, stored: StoredRows, ours: NDArray[np.intp]) -> NDArray[np.int32]:
    """The state each of these readings should show, numbered as in the store.

    `ours` are all readings that are there: the newest of a sensor among them decides where only the newest
    is kept.
    """
    produced = truth.produced
    if not stored.newest:
        as_sent: NDArray[np.int32] = produced["state"][ours]
        return as_sent
    states = stored.states or truth.states
    numbers = {state: number for number, state in enumerate(states)}
    order = ours[np.argsort(produced["time_us"][ours], kind="stable")]
    last = dict(zip(produced["state"][order].tolist(), produced["time_us"][order].tolist(), strict=True))
    shown: dict[str, tuple[str | None, ...]] = {}
    units: dict[tuple[str, str], str | None] = {}
    for state_number, _ in sorted(last.items(), key=lambda item: item[1]):
        state = truth.states[state_number]
        if any(state.attributes[1:]) or state.sensor_id not in shown:
            shown[state.sensor_id] = state.attributes[1:]
        units[state[:2]] = state.attributes[0]
    expected = np.array(
        [
            numbers.get(build_newest_state(sensor_id, sensor_type, units, shown), -2)
            if (sensor_id, sensor_type) in units
            else -2
            for sensor_id, sensor_type in truth.names
        ],
        np.int32,
    )
    of_series: NDArray[np.int32] = expected[truth.series[ours]]
    return of_series


def build_newest_state(
    sensor_id: str,
    sensor_type: str,
    units: dict[tuple[str, str], str | None],
    shown: dict[str, tuple[str | None, ...]],
) -> SeriesState:
    """A series with its own unit and its sensor's attributes."""
    return SeriesState(sensor_id, sensor_type, (units[sensor_id, sensor_type], *shown[sensor_id]))


def _values_equal(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.bool_]:
    agree: NDArray[np.bool_] = a == b
    if a.dtype.kind == "f":
        agree |= np.isnan(a) & np.isnan(b)
    return agree


def _equal_copies(rows: NDArray[Any], order: NDArray[np.intp], starts: NDArray[np.intp]) -> NDArray[np.bool_]:
    """For each run of rows with one identity: whether all its rows are alike."""
    if not len(starts):
        return np.empty(0, bool)
    heads = np.repeat(order[starts], np.diff(starts, append=len(order)))
    alike = np.ones(len(order), bool)
    for name in ("state", *COMPARED_COLUMNS):
        alike &= _values_equal(rows[name][order], rows[name][heads])
    return np.logical_and.reduceat(alike, starts)


def _describe_produced(truth: GroundTruth, index: NDArray[np.intp]) -> list[str]:
    texts = []
    for record in truth.produced[index[:EXAMPLES_SHOWN]]:
        state = truth.states[record["state"]]
        texts.append(
            f"{state.sensor_id}/{state.sensor_type} at {format_time_us(record['time_us'])} "
            f"value {float(record['value'])!r} seq {record['seq']}"
        )
    return texts


def _describe_stored(truth: GroundTruth, rows: NDArray[Any], index: NDArray[np.intp]) -> list[str]:
    texts = []
    for record in rows[index[:EXAMPLES_SHOWN]]:
        sensor_id, sensor_type = truth.names[record["series"]]
        texts.append(
            f"{sensor_id}/{sensor_type} at {format_time_us(record['time_us'])} "
            f"value {float(record['value'])!r}"
        )
    return texts


def _describe_alterations(
    truth: GroundTruth,
    stored: StoredRows,
    ours: NDArray[np.intp],
    theirs: NDArray[np.intp],
    names: tuple[str, ...],
) -> Iterator[str]:
    """For the first few altered pairs: each column that differs, produced against stored."""
    for mine, other in zip(
        truth.produced[ours[:EXAMPLES_SHOWN]], stored.rows[theirs[:EXAMPLES_SHOWN]], strict=True
    ):
        parts = [
            f"{name} {mine[name]!s} was stored as {other[name]!s}"
            for name in names
            if not _values_equal(np.array([mine[name]]), np.array([other[name]]))[0]
        ]
        if stored.attributes and (mine["state"] != other["state"] or not parts):
            states = stored.states or truth.states
            sent = truth.states[int(mine["state"])].attributes
            shown = (
                states[other["state"]].attributes if other["state"] >= 0 else "none that was ever produced"
            )
            parts.append(f"attributes {sent} were stored as {shown}")
        yield "; ".join(parts)
