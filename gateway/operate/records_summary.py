"""What was given up, and what alerts: the records of the spool that are for a person. Pure."""

from __future__ import annotations

import msgspec


class Loss(msgspec.Struct):
    """What one destination lost of one class of records for one reason.

    Attributes:
        destination: "" where there is none and the records were only kept here.
        what: the class: reading, rollup.
        reason: machine-readable: no_room, max_age, damaged.
        remains: the coarser form that is left, "" for none.
        from_us, to_us: earliest and latest time among the records.
        declared_at_us: when the newest of them was declared.
    """

    declared_at_us: int
    destination: str
    what: str
    records: int
    reason: str
    remains: str
    from_us: int
    to_us: int


class LossesStatus(msgspec.Struct):
    """The loss ledger: readings given up in all (once for each destination), and the newest losses."""

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
