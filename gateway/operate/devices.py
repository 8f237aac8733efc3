"""Which devices are heard and which have fallen silent. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np

if TYPE_CHECKING:
    from gateway.spool.presence import Heard

LISTED = 100
"""Silent devices that are named; all are counted."""


class SilentDevice(msgspec.Struct):
    """A device that says nothing any more."""

    sensor_id: str
    heard_at_us: int
    series: int


class DevicesStatus(msgspec.Struct):
    """Devices by when they were last heard.

    Attributes:
        known: devices that have a reading in the spool's book of series.
        heard: those heard within `silent_after_s`.
        silent: the others; `silent_devices` names those that fell silent last.
    """

    known: int
    heard: int
    silent: int
    silent_after_s: float
    silent_devices: list[SilentDevice]


def devices_of(heard: Heard, now_us: int, silent_after_s: float) -> DevicesStatus:
    """The devices as of `now_us`."""
    silent = np.flatnonzero(heard.heard_us < now_us - round(silent_after_s * 1e6))
    latest = silent[np.argsort(-heard.heard_us[silent], kind="stable")][:LISTED]
    return DevicesStatus(
        known=len(heard.sensor_ids),
        heard=len(heard.sensor_ids) - len(silent),
        silent=len(silent),
        silent_after_s=silent_after_s,
        silent_devices=[
            SilentDevice(
                sensor_id=heard.sensor_ids[at],
                heard_at_us=max(0, int(heard.heard_us[at])),
                series=int(heard.series[at]),
            )
            for at in latest.tolist()
        ],
    )
