"""Series names and attributes to the spool's series numbers, as every source of readings needs them.

Entries are cached by name with the numbers of their attribute states. A sender whose attributes change
without end (a position written as location) stays at its newest number after `_ATTRIBUTE_STATES_MAX` states,
so that it cannot fill the series catalog.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from cloud_sync.model.errors import RetryLaterError
from cloud_sync.model.records import ATTRIBUTE_NAMES, Records, Series
from gateway.payloads.measurement import PayloadDecodeError
from gateway.payloads.topics import SeriesName, find_series_name_fault

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gateway.payloads.formats.json_reading import JsonReading
    from gateway.payloads.measurement import Measurement
    from gateway.spool.series_catalog import SeriesCatalog

R = TypeVar("R", bound=Records)

_ATTRIBUTE_STATES_MAX = 100
_CACHED_NAMES_MAX = 200_000
_CLOCK_STEP_BACK_US = 10_000_000


@dataclass(slots=True)
class SeriesEntry:
    """A name and what is known of it.

    Attributes:
        fault: why readings of it cannot be stored.
        numbers: the number for each state of its attributes seen since start.
    """

    name: SeriesName
    fault: str | None
    numbers: dict[tuple[str | None, ...], int] = field(default_factory=dict)
    last_assigned_us: int = 0

    def assign_time_us(self, now_us: int) -> int:
        """A time of receipt that no other reading of the series has; follows a clock that steps back."""
        if self.last_assigned_us - now_us > _CLOCK_STEP_BACK_US:
            self.last_assigned_us = 0
        self.last_assigned_us = max(now_us, self.last_assigned_us + 1)
        return self.last_assigned_us


class SeriesResolver:
    """Finds series numbers, and gives new series theirs."""

    def __init__(self, catalog: SeriesCatalog) -> None:
        self._catalog = catalog
        self._entries: dict[SeriesName, SeriesEntry] = {}

    def find_entry(self, name: SeriesName) -> SeriesEntry:
        """The entry of a name, whether or not it can be stored."""
        entry = self._entries.get(name)
        if entry is None:
            entry = SeriesEntry(name, find_series_name_fault(name))
            if len(self._entries) < _CACHED_NAMES_MAX:
                self._entries[name] = entry
        return entry

    def find_number(self, entry: SeriesEntry, reading: JsonReading | Measurement) -> int:
        """The number of a series in the state of its attributes that a reading says.

        Raises:
            PayloadDecodeError: the series is new and the catalog is full.
        """
        attributes = (reading.location, reading.manufacturer, reading.firmware_version, reading.unit)
        number = entry.numbers.get(attributes)
        return self._assign_number(entry, attributes) if number is None else number

    def renumber(self, records: R, series: Sequence[Series], *, limit_states: bool) -> R:
        """Records whose series are positions in `series`, by the spool's numbers.

        Raises:
            RetryLaterError: a series is new and the catalog is full.
        """
        numbers = [self._find_or_add(one, limit_states=limit_states) for one in series]
        if None in numbers:
            raise RetryLaterError(self._full_catalog_message())
        return records.with_series(np.array(numbers, np.int32)[records.series]) if records.rows else records

    def build_room_check(self) -> Callable[[Series], bool]:
        """Whether there is room for the series of one request, all of them together."""
        new = 0

        def has_room(series: Series) -> bool:
            nonlocal new
            if series in self._catalog:
                return True
            new += 1
            return len(self._catalog) + new <= self._catalog.max_series

        return has_room

    def _assign_number(self, entry: SeriesEntry, attributes: tuple[str | None, ...]) -> int:
        present = tuple(
            (name, _printable_attribute(value))
            for name, value in zip(ATTRIBUTE_NAMES, attributes, strict=True)
            if value is not None
        )
        number = self._find_or_add(Series(*entry.name, tuple(sorted(present))), limit_states=True)
        if number is None:
            raise PayloadDecodeError("too_many_series", self._full_catalog_message())
        if len(entry.numbers) >= _ATTRIBUTE_STATES_MAX:
            entry.numbers.clear()
        entry.numbers[attributes] = number
        return number

    def _find_or_add(self, series: Series, *, limit_states: bool) -> int | None:
        if limit_states:
            return self._catalog.assign_number_with_state_limit(series, _ATTRIBUTE_STATES_MAX)
        return self._catalog.assign_number(series)

    def _full_catalog_message(self) -> str:
        return f"the spool already knows {len(self._catalog)} series (spool.max_series)"


def _printable_attribute(value: object) -> str:
    """An attribute as text: bounded, without control characters."""
    text = str(value)[:256]
    return "".join(character if character.isprintable() else "?" for character in text)
