"""How `spool_v1.db` was made: run once, when format 1 was new. A later format gets a file of its own.

python -m tests.golden.spool_v1_made
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cloud_sync.delivery.lanes import ClaimRequest
from cloud_sync.model.records import SEQ_ABSENT, Readings, Series
from gateway.spool.quarantine_items import QuarantineItem
from gateway.spool.spool import open_spool
from tests.support.open_spool import build_retention

if TYPE_CHECKING:
    from gateway.spool.deliveries import Deliveries

HERE = Path(__file__).parent
_SERIES = [
    Series("boiler-1", "temperature", (("location", "cellar"), ("unit", "°C"))),
    Series("boiler-1", "temperature", (("location", "roof"), ("unit", "°C"))),
    Series("mètre/ö", "pressure"),
]
_NAN = float("nan")


def _group(number: int) -> list[tuple[int, int, float, float, float, float, int, int]]:
    """Commit `number`: series, time_us, value, quality, battery_level, signal_strength, seq, flags."""
    at = 1_750_000_000_000_000 + number * 60_000_000
    return [
        (number % 3, at, 20.5 + number, 99.0, 87.0, -61.0, number, 0),
        (1, at + 1, -1.5e-9 * number, 12.5, _NAN, _NAN, SEQ_ABSENT, 2),
        (2, -5_000_000 * number, 1e15 + number, _NAN, _NAN, -120.25, 2**62, 16),
    ] + [(2, at + 1000 * n, n / 3, _NAN, 50.0, -70.0, n, 0) for n in range(2, 40)]


async def _make(path: Path) -> None:
    async with open_spool(path, "g1") as spool:
        database, catalog, appender, deliveries = (
            spool.database,
            spool.catalog,
            spool.appender,
            spool.deliveries,
        )
        for name, kind in (("region", "ingest"), ("cloud", "influxdb")):
            await deliveries.register(name, kind, now_us=1)
        numbers = np.array([catalog.assign_number(series) for series in _SERIES], np.int32)
        for number in range(1, 11):
            columns = [np.array(column) for column in zip(*_group(number), strict=True)]
            types = (np.int64, np.float64, np.float32, np.float32, np.float32, np.int64, np.int32)
            rest = [column.astype(dtype) for column, dtype in zip(columns[1:], types, strict=True)]
            item = QuarantineItem.from_payload(
                received_at_us=number,
                source="listen",
                topic="sensors/x",
                reason="bad_value",
                detail="value is nan",
                payload=b'{"value": NaN}',
            )
            await appender.append(
                Readings(numbers[columns[0]], *rest), [item] * (number == 4), now_us=number * 1_000_000
            )
            if number == 2:
                await _deliver(deliveries, "region")
                await _deliver(deliveries, "cloud")
                await build_retention(database, spool.segments, "region", "cloud").prune_once(1 << 60)
            if number == 5:
                await _deliver(deliveries, "region")
                await spool.compaction.compact_once(everything=True)
            if number == 8:
                await deliveries.claim("region", ClaimRequest(now_us=8))


async def _deliver(deliveries: Deliveries, name: str) -> None:
    while (claimed := await deliveries.claim(name, ClaimRequest(now_us=1))) is not None:
        await deliveries.settle(name, claimed)


def expected() -> dict:
    """What a reader of the file must find."""
    return {
        "series": [[s.sensor_id, s.sensor_type, dict(s.attributes)] for s in _SERIES],
        "pruned_through": 2,
        "newest_commit": 10,
        "commits": {number: _group(number) for number in range(3, 11)},
        "delivered": {"region": [[1, 5]], "cloud": [[1, 2]]},
        "open": {"region": [6, 8]},
        "quarantined": 1,
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spool.db"
        asyncio.run(_make(path))
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode = DELETE")
            connection.execute("VACUUM")
        (HERE / "spool_v1.db").write_bytes(path.read_bytes())
    (HERE / "spool_v1.json").write_text(json.dumps(expected(), ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
