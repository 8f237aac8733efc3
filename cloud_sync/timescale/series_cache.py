"""Series numbers and attributes: the dimension tables, and a bounded memory of them.

A series is (sensor_id, sensor_type) wherever it comes from; two gateways may carry the same one. Attributes
belong to the newest reading that spoke of them: an older one, delivered late, changes nothing, and an
attribute that a reading leaves out keeps its value. So that steady traffic writes no dimension rows, the time
of an unchanged state is written at most once a minute of event time; order is exact to that minute.

What a transaction learned is remembered only after its commit, and forgotten when a new connection is made
(the database behind it may be another, or an older copy).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cloud_sync.model.records import Readings
from cloud_sync.timescale import SQL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from cloud_sync.model.records import Records, Series
    from cloud_sync.timescale import Connection

_SENSOR_ATTRIBUTES = ("location", "manufacturer", "firmware_version", "boot_id")
_NEVER_US = -(1 << 63)
_ATTRIBUTE_STEP_US = 60_000_000

SeriesIdentity = tuple[str, str]


class CachedSeries(NamedTuple):
    """A series as last seen: its numbers, its attributes, the newest time they held, and the time written."""

    series_no: int
    sensor_no: int
    attributes: tuple[tuple[str, str], ...] = ()
    at_us: int = _NEVER_US
    written_us: int = _NEVER_US


@dataclass(slots=True)
class ResolvedSeries:
    """Series numbers by position in the batch, and what there is to remember once they are committed."""

    series_no: NDArray[np.int32]
    learned: dict[SeriesIdentity, CachedSeries] = field(default_factory=dict)


class SeriesCache:
    """Remembers at most `capacity` series; the ones learned first go first."""

    def __init__(self, capacity: int = 200_000) -> None:
        self._capacity = capacity
        self._known: dict[SeriesIdentity, CachedSeries] = {}

    def __len__(self) -> int:
        return len(self._known)

    def forget(self) -> None:
        """Remember nothing."""
        self._known.clear()

    def remember(self, resolved: ResolvedSeries) -> None:
        """Keep what a committed transaction learned."""
        self._known.update(resolved.learned)
        excess = len(self._known) - self._capacity
        for identity in list(itertools.islice(self._known, max(0, excess))):
            del self._known[identity]

    async def resolve(
        self, connection: Connection, series: Sequence[Series], newest_us: NDArray[np.int64]
    ) -> ResolvedSeries:
        """Number every series, making those that are new, and bring attributes up to date."""
        identities = [(s.sensor_id, s.sensor_type) for s in series]
        before = {i: known for i in identities if (known := self._known.get(i)) is not None}
        learned = await self._find(connection, set(identities) - before.keys())
        for position in np.argsort(newest_us, kind="stable"):
            identity, at_us = identities[position], int(newest_us[position])
            known = learned.get(identity) or before[identity]
            if series[position].attributes and at_us > known.at_us:
                learned[identity] = known._replace(attributes=series[position].attributes, at_us=at_us)
        await self._write_attributes(connection, learned, before)
        numbers = [(learned.get(i) or before[i]).series_no for i in identities]
        return ResolvedSeries(np.array(numbers, np.int32), learned)

    @staticmethod
    async def _find(
        connection: Connection, missing: set[SeriesIdentity]
    ) -> dict[SeriesIdentity, CachedSeries]:
        if not missing:
            return {}
        columns = [list(names) for names in zip(*sorted(missing), strict=True)]
        rows = await connection.fetch(SQL["find_series"], *columns)
        if len(rows) < len(missing):
            await connection.execute(SQL["add_sensors"], columns[0])
            await connection.execute(SQL["add_series"], *columns)
            rows = await connection.fetch(SQL["find_series"], *columns)
        return {(row[0], row[1]): CachedSeries(row[2], row[3]) for row in rows}

    @staticmethod
    async def _write_attributes(
        connection: Connection,
        learned: dict[SeriesIdentity, CachedSeries],
        before: dict[SeriesIdentity, CachedSeries],
    ) -> None:
        """Write the sensors of which a state changed, or whose written time is more than a step behind."""
        due = {
            known.sensor_no
            for identity, known in learned.items()
            if known.attributes != getattr(before.get(identity), "attributes", ())
            or (known.attributes and known.at_us - known.written_us >= _ATTRIBUTE_STEP_US)
        }
        sensors: dict[int, tuple[int, dict[str, str]]] = {}
        units: dict[int, tuple[int, str]] = {}
        for identity, known in sorted(learned.items(), key=lambda item: item[1].at_us):
            if known.sensor_no not in due or not known.attributes:
                continue
            learned[identity] = known._replace(written_us=known.at_us)
            attributes = dict(known.attributes)
            if "unit" in attributes:
                units[known.series_no] = (known.at_us, attributes.pop("unit"))
            if attributes:
                earlier = sensors.get(known.sensor_no, (0, {}))[1]
                sensors[known.sensor_no] = (known.at_us, earlier | attributes)
        if sensors:
            columns = [[state.get(name) for _, state in sensors.values()] for name in _SENSOR_ATTRIBUTES]
            times = [at_us for at_us, _ in sensors.values()]
            await connection.execute(SQL["update_sensors"], list(sensors), times, *columns)
        if units:
            moments, names = ([unit[part] for unit in units.values()] for part in (0, 1))
            await connection.execute(SQL["update_series"], list(units), moments, names)


def newest_time_by_series(records: Records, series: int) -> NDArray[np.int64]:
    """The newest time, microseconds since 1970, of each of `series` positions; the smallest int64 if none.

    Only readings speak of attributes as they were at a time.
    """
    newest = np.full(series, _NEVER_US, np.int64)
    if records.rows == 0 or not isinstance(records, Readings):
        return newest
    readings = records
    starts = np.flatnonzero(np.diff(readings.series, prepend=readings.series[0] - 1))
    np.maximum.at(newest, readings.series[starts], np.maximum.reduceat(readings.time_us, starts))
    return newest
