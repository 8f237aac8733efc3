"""Checks behind `tidegate doctor`: the machine, its files, the network, destinations and brokers.

A check is a function from what it inspects to findings. It changes nothing, and a machine that lacks what
it inspects (no systemd, no eMMC) is not a fault.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

__all__ = ["Finding", "Level"]


class Level(StrEnum):
    """Severity of a finding; a fault needs action now."""

    OK = "ok"
    WARNING = "warning"
    FAULT = "fault"


class Finding(msgspec.Struct, frozen=True):
    """The result of one check of `subject`, a path or a name ("": the machine)."""

    check: str
    subject: str
    level: Level
    what: str
    advice: str = ""


def ok(check: str, subject: str, what: str) -> Finding:
    """A finding without need for action."""
    return Finding(check, subject, Level.OK, what)


def warning(check: str, subject: str, what: str, advice: str) -> Finding:
    """A finding to act on soon."""
    return Finding(check, subject, Level.WARNING, what, advice)


def fault(check: str, subject: str, what: str, advice: str) -> Finding:
    """A finding to act on now."""
    return Finding(check, subject, Level.FAULT, what, advice)
