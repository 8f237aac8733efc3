"""What sensors see: believable signals as pure functions of time and a site.

A `Site` is one place with its own weather, fixed by a few random phases; every waveform of a device at that
site is a function of (site, time in seconds since 1970, a random source for the noise). Humidity is tied to
the temperature of the same site, as it is in air that keeps its water.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

DAY_S = 86_400.0
_WARMEST_HOUR = 15.0
_OFFICE_HOURS = (7, 18)


@dataclass(frozen=True, slots=True)
class Site:
    """The weather of one place.

    Attributes:
        mean_c: yearly-mean-like base temperature, degC.
        swing_c: half the difference between day and night, degC.
        phases: radians, shape (6,), of the slow fronts.
        hour_offset: local time minus UTC, hours.
        load: how busy the machinery of the place is, 0..1.
    """

    mean_c: float
    swing_c: float
    phases: tuple[float, ...]
    hour_offset: float
    load: float


def make_site(rng: random.Random) -> Site:
    """A temperate place, indoors or out."""
    return Site(
        mean_c=rng.uniform(14, 22),
        swing_c=rng.uniform(2, 7),
        phases=tuple(rng.uniform(0, math.tau) for _ in range(6)),
        hour_offset=rng.uniform(-1, 2),
        load=rng.uniform(0.2, 0.9),
    )


def _front(site: Site, time_s: float, first: int) -> float:
    """A slow wander of about -1..1 over days: three incommensurate periods."""
    days = time_s / DAY_S
    a, b, c = site.phases[first : first + 3]
    return (
        0.5 * math.sin(math.tau * days / 3.7 + a)
        + 0.3 * math.sin(math.tau * days / 1.63 + b)
        + 0.2 * math.sin(math.tau * days / 0.31 + c)
    )


def air_temperature_c(site: Site, time_s: float) -> float:
    """Air temperature without sensor noise, degC: daily swing plus weather."""
    hour = time_s / 3600 + site.hour_offset
    return (
        site.mean_c
        + site.swing_c * math.cos(math.tau * (hour - _WARMEST_HOUR) / 24)
        + 3 * _front(site, time_s, 0)
    )


def temperature(site: Site, time_s: float, rng: random.Random) -> float:
    """DegC, resolution 0.01."""
    return round(air_temperature_c(site, time_s) + rng.gauss(0, 0.05), 2)


def humidity(site: Site, time_s: float, rng: random.Random) -> float:
    """Percent relative, resolution 0.1; falls as the air warms."""
    warmth = air_temperature_c(site, time_s) - site.mean_c
    percent = 58 - 3.2 * warmth + 12 * _front(site, time_s, 3) + rng.gauss(0, 0.4)
    return round(min(99.0, max(8.0, percent)), 1)


def pressure(site: Site, time_s: float, rng: random.Random) -> float:
    """Hectopascal, resolution 0.01: fronts and the twice-daily tide of the air."""
    tide = 0.6 * math.cos(math.tau * time_s / (DAY_S / 2) + site.phases[0])
    return round(1013.25 + 14 * _front(site, time_s, 2) + tide + rng.gauss(0, 0.03), 2)


def vibration(site: Site, time_s: float, rng: random.Random) -> float:
    """Millimetres per second, root mean square: quiet, with bursts while a machine runs."""
    running = math.sin(math.tau * time_s / 900 + site.phases[4]) > 1 - 2 * site.load
    scale = 4.5 if running else 0.25
    return round(abs(rng.gauss(scale, scale / 6)), 4)


def occupancy(site: Site, time_s: float, rng: random.Random) -> float:
    """People in the room: steps over the working day."""
    hour = (time_s / 3600 + site.hour_offset) % 24
    day = (
        max(0.0, math.sin(math.pi * (hour - 7) / 11)) if _OFFICE_HOURS[0] <= hour <= _OFFICE_HOURS[1] else 0.0
    )
    return float(int(day * 24 * site.load + rng.random() * 0.5))


def energy(site: Site, time_s: float, rng: random.Random) -> float:
    """Watt-hours on a 16-bit counter: rises, and wraps at 65,536."""
    watts = 180 + 900 * site.load
    return float(int(watts * time_s / 3600 + rng.random()) % 65_536)


WAVEFORMS: dict[str, tuple[Callable[[Site, float, random.Random], float], str]] = {
    "temperature": (temperature, "degC"),
    "humidity": (humidity, "%"),
    "pressure": (pressure, "hPa"),
    "vibration": (vibration, "mm/s"),
    "occupancy": (occupancy, "1"),
    "energy": (energy, "Wh"),
}
"""sensor_type to (waveform, unit)."""
