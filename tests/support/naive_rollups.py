"""Rollups computed the plain way from all readings at once, to compare with."""

from __future__ import annotations

from collections import defaultdict
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from cloud_sync.model.records import Flag, Readings

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cloud_sync.model.records import Rollups

Row = tuple[int, int, float, int]


def readings_of(rows: Iterable[Row]) -> Readings:
    """Readings of (series, time_us, value, flags), in canonical order."""
    listed = sorted(rows)
    n = len(listed)
    return Readings(
        np.array([r[0] for r in listed], np.int32),
        np.array([r[1] for r in listed], np.int64),
        np.array([r[2] for r in listed], np.float64),
        np.full(n, np.nan, np.float32),
        np.full(n, np.nan, np.float32),
        np.full(n, np.nan, np.float32),
        np.full(n, -1, np.int64),
        np.array([r[3] for r in listed], np.int32),
    )


def naive(rows: Iterable[Row], window_s: int) -> dict[tuple[int, int], dict[str, Any]]:
    """By (series, start of window): what a rollup says, in exact arithmetic, reading by reading."""
    groups: dict[tuple[int, int], list[Row]] = defaultdict(list)
    length_us = window_s * 1_000_000
    for row in sorted(rows):
        groups[row[0], row[1] // length_us * length_us].append(row)
    return {key: _summary(key[1], group) for key, group in groups.items()}


def _summary(start_us: int, group: list[Row]) -> dict[str, Any]:
    counted = [r for r in group if not r[3] & Flag.OUT_OF_RANGE]
    given: dict[str, Any] = {
        "count": len(counted),
        "flagged": sum(bool(r[3] & ~Flag.SUPPRESSED) for r in group),
        "excluded": len(group) - len(counted),
        "suppressed": sum(bool(r[3] & Flag.SUPPRESSED) for r in counted),
    }
    if not counted:
        values = dict.fromkeys(("mean", "m2", "minimum", "maximum", "first", "last"), float("nan"))
        return given | values | {"first_at_us": start_us, "last_at_us": start_us}
    exact = [Fraction(r[2]) for r in counted]
    mean = sum(exact) / len(exact)
    return given | {
        "mean": float(mean),
        "m2": float(sum((x - mean) ** 2 for x in exact)),
        "minimum": min(r[2] for r in counted),
        "maximum": max(r[2] for r in counted),
        "first": counted[0][2],
        "first_at_us": counted[0][1],
        "last": counted[-1][2],
        "last_at_us": counted[-1][1],
    }


def of_rows(rollups: Rollups) -> dict[tuple[int, int], dict[str, Any]]:
    """Rollups of one length by (series, start of window); each window at most once."""
    listed = {name: getattr(rollups, name).tolist() for name in rollups.columns}
    keys = list(zip(listed["series"], listed["time_us"], strict=True))
    assert len(set(keys)) == len(keys), "a window twice"
    return {key: {name: listed[name][at] for name in listed} for at, key in enumerate(keys)}
