"""Rollups, alerts and declarations for tests, repeatable."""

from __future__ import annotations

import math

import numpy as np

from cloud_sync.model.records import Alerts, AlertState, Declarations, RecordClass, Rollups, Severity
from tests.support.wire_examples import SECOND_US, START_US

_MINUTE_US = 60 * SECOND_US


def rollups(rows: int = 12, series: int = 3, *, revision: int = 1, seed: int = 1) -> Rollups:
    """Minutes spread over series, one after the other in each; of the last one nothing counts."""
    random = np.random.default_rng(seed)
    positions = np.sort(np.arange(rows, dtype=np.int32) % series)
    within = np.arange(rows) - np.searchsorted(positions, positions)
    start_us = START_US // _MINUTE_US * _MINUTE_US + within * _MINUTE_US
    values = np.sort(random.normal(20, 5, (rows, 5)), axis=1)
    count = random.integers(2, 60, rows).astype(np.int32)
    values[-1], count[-1] = math.nan, 0
    return Rollups(
        series=positions.astype(np.int32),
        time_us=start_us.astype(np.int64),
        window_s=np.full(rows, 60, np.int32),
        revision=np.full(rows, revision, np.int32),
        count=count,
        mean=values[:, 2],
        m2=np.where(count > 0, random.random(rows) * 9, math.nan),
        minimum=values[:, 0],
        maximum=values[:, 4],
        first=values[:, 1],
        first_at_us=(start_us + SECOND_US * (count > 0)).astype(np.int64),
        last=values[:, 3],
        last_at_us=(start_us + 59 * SECOND_US * (count > 0)).astype(np.int64),
        flagged=random.integers(0, 3, rows).astype(np.int32),
        excluded=random.integers(0, 2, rows).astype(np.int32),
        suppressed=np.zeros(rows, np.int32),
    )


def alerts(rows: int = 4, series: int = 3) -> Alerts:
    """Alerts that begin and end in turn, the last without a value."""
    at = np.arange(rows)
    texts = np.empty(rows, np.object_)
    texts[:] = [f"reading {n} ü was too high" for n in at]
    rules = np.empty(rows, np.object_)
    rules[:] = ["too_hot", "silent"] * (rows // 2) + ["too_hot"] * (rows % 2)
    return Alerts(
        series=(at % series).astype(np.int32),
        time_us=(START_US + at * SECOND_US).astype(np.int64),
        state=np.where(at % 2, AlertState.RECOVERED, AlertState.FIRING).astype(np.int32),
        severity=np.full(rows, Severity.CRITICAL, np.int32),
        value=np.where(at == rows - 1, math.nan, 36.5 + at),
        threshold=np.full(rows, 35.0),
        count=np.ones(rows, np.int32),
        rule=rules,
        detail=texts,
    )


def declarations(rows: int = 2, *, destination: str = "regional") -> Declarations:
    """Runs of readings given up one after the other, each of ten commits with a hundred rows."""
    at = np.arange(rows)
    texts = [np.full(rows, text, np.object_) for text in (destination, "max_bytes", "rollup 60 s")]
    return Declarations(
        time_us=np.full(rows, START_US, np.int64),
        of_class=np.full(rows, RecordClass.READING, np.int32),
        first_commit=(1 + 10 * at).astype(np.int64),
        last_commit=(10 + 10 * at).astype(np.int64),
        lost=np.full(rows, 100, np.int64),
        from_us=np.full(rows, START_US - 100 * SECOND_US, np.int64),
        to_us=np.full(rows, START_US, np.int64),
        destination=texts[0],
        reason=texts[1],
        survives=texts[2],
    )
