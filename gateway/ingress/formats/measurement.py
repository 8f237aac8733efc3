"""What a payload shape makes of a payload: measurements, and faults for what is none. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from gateway.ingress.topics import SeriesName  # noqa: TC001 - msgspec reads the annotations

if TYPE_CHECKING:
    from collections.abc import Sequence

FAULTS_MAX: Final = 100
"""Faults of one payload that are told one by one; the rest is told as a number."""
MEMBERS_MAX: Final = 100_000
"""Readings, records or metrics that one payload may have."""


class Measurement(msgspec.Struct, gc=False):
    """One reading with the series it belongs to; `time_us` is absent when the device told none.

    `flags` are bits of `cloud_sync.records.Flag` that only the shape can know.
    """

    name: SeriesName
    value: float
    time_us: int | None = None
    quality: float | None = None
    battery_level: float | None = None
    signal_strength: float | None = None
    seq: int | None = None
    location: str | None = None
    manufacturer: str | None = None
    firmware_version: str | None = None
    unit: str | None = None
    flags: int = 0


class Fault(msgspec.Struct):
    """A payload, or a member of one, that is no reading.

    Attributes:
        reason: machine-readable, such as `bad_member`.
        detail: which member, and what was expected, for a person.
        part: its own bytes, in the payload's shape, so that they can be decoded again by themselves.
    """

    reason: str
    detail: str
    part: bytes


class NotDecodable(ValueError):  # noqa: N818 - said of the input, not of the program
    """Nothing of a payload (or of one of its records) can be read."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason

    def fault(self, part: bytes) -> Fault:
        """The same as a fault of `part`."""
        return Fault(self.reason, str(self), part)


def bounded(faults: list[Fault], payload: bytes) -> list[Fault]:
    """At most `FAULTS_MAX` faults: one payload must not push everything else out of the quarantine."""
    if len(faults) <= FAULTS_MAX:
        return faults
    left = len(faults) - FAULTS_MAX + 1
    last = Fault(
        faults[-1].reason, f"{left} more faults in one payload, the last: {faults[-1].detail}", payload
    )
    return [*faults[: FAULTS_MAX - 1], last]


Decoded = tuple["Sequence[Measurement]", list[Fault]]
"""What a decoder returns."""
