"""What was given up, and what alerts: the records of the spool that are for a person. Pure."""

from __future__ import annotations

import msgspec


class Loss(msgspec.Struct):
    """One entry of the loss ledger: what left the spool undelivered, why, and what remains of it."""

    declared_at_us: int
    destination: str
    what: str
    readings: int
    reason: str
    remains: str


class LossesStatus(msgspec.Struct):
    """The loss ledger: readings given up in all, and the newest entries."""

    entries: int
    readings: int
    newest: list[Loss]


class Alert(msgspec.Struct):
    """An alert as it stands. `subject` is what it is about: text of strangers."""

    rule: str
    severity: str
    subject: str
    text: str
    since_us: int
    firing: bool


class AlertsStatus(msgspec.Struct):
    """Alerts that are firing, the critical ones among them, and the newest, resolved ones included."""

    firing: int
    critical: int
    newest: list[Alert]
