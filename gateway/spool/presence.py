"""When each device was last heard: the time of receipt, by the gateway's own clock.

A device is a sensor_id. What came since start is noted by the appender, one assignment a group; for a
device that has not been heard since start, the newest time of its readings in the spool stands in.
Memory: about twenty bytes a series.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gateway.spool.duplicates import Duplicates
    from gateway.spool.series import SeriesBook

_NEVER = np.iinfo(np.int64).min


class Heard(NamedTuple):
    """Every device with the time it was last heard and its number of series; parallel, in order of arrival.

    `heard_us` has shape (devices,), microseconds since 1970; the smallest int64 where nothing is known.
    """

    sensor_ids: list[str]
    heard_us: NDArray[np.int64]
    series: NDArray[np.int32]


class Presence:
    """`note` at every append; `heard` for whoever wants to know."""

    def __init__(self, book: SeriesBook) -> None:
        self._book = book
        self._received_us = np.full(1024, _NEVER, np.int64)
        self._devices: dict[str, int] = {}
        self._device_of = np.full(1024, -1, np.int32)
        self._through = 0

    def note(self, identity: NDArray[np.int32], now_us: int) -> None:
        """Readings of these series, by the number of their first attribute state, have come just now."""
        if len(identity):
            highest = int(identity.max())
            if highest >= len(self._received_us):
                self._received_us = _grown(self._received_us, highest, _NEVER)
            self._received_us[identity] = now_us

    def heard(self, duplicates: Duplicates, now_us: int) -> Heard:
        """When every device was last heard; a time in the future counts as now."""
        self._learn()
        size = len(self._device_of)
        received = _grown(self._received_us, size - 1, _NEVER)[:size]
        stored = np.minimum(_grown(duplicates.newest_us(), size - 1, _NEVER)[:size], now_us)
        heard_us = np.full(len(self._devices), _NEVER, np.int64)
        known = self._device_of >= 0
        at = np.where(received > _NEVER, received, stored)[known]
        np.maximum.at(heard_us, self._device_of[known], at)
        series = np.bincount(self._device_of[known], minlength=len(self._devices)).astype(np.int32)
        return Heard(list(self._devices), heard_us, series)

    def _learn(self) -> None:
        """Give every series that is new in the book its device; attribute states do not count."""
        for number, series in self._book.after(self._through):
            self._through = number
            if number >= len(self._device_of):
                self._device_of = _grown(self._device_of, number, -1)
            if self._book.identity_of(number) == number:
                self._device_of[number] = self._devices.setdefault(series.sensor_id, len(self._devices))


def _grown(array: NDArray, highest: int, filling: int) -> NDArray:  # type: ignore[type-arg]  # of either integer type
    """The array, long enough to have an element `highest`."""
    if highest < len(array):
        return array
    return np.concatenate([array, np.full(max(highest + 1 - len(array), len(array)), filling, array.dtype)])
