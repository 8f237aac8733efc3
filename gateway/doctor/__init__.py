"""Checks behind `tidegate doctor`: the machine, its files, the network, destinations and brokers.

A check is a function from what it inspects to findings. It changes nothing, and a machine that lacks what
it inspects (no systemd, no eMMC) is not a fault.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

__all__ = ["Finding", "Level"]


class Level(StrEnum):
    """How bad it is: in order, could be better soon, needs a person now."""

    OK = "ok"
    WARNING = "warning"
    FAULT = "fault"


class Finding(msgspec.Struct, frozen=True):
    """One thing that a check looked at.

    Attributes:
        check: which check, such as "clock" or "destination".
        subject: what it looked at, such as a path or a name; "" for the machine.
        level: how bad it is.
        what: what was found, in words.
        advice: what to do, "" when there is nothing to do.
    """

    check: str
    subject: str
    level: Level
    what: str
    advice: str = ""


def ok(check: str, subject: str, what: str) -> Finding:
    """All is well."""
    return Finding(check, subject, Level.OK, what)


def warning(check: str, subject: str, what: str, advice: str) -> Finding:
    """It works, but."""
    return Finding(check, subject, Level.WARNING, what, advice)


def fault(check: str, subject: str, what: str, advice: str) -> Finding:
    """It does not work, or will not."""
    return Finding(check, subject, Level.FAULT, what, advice)
