"""The loss ledger in a few lines: what was given up, why, and what remains of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloud_sync.records import RecordClass
from gateway.operate.records_summary import Loss, LossesStatus
from gateway.spool import losses

if TYPE_CHECKING:
    import sqlite3

_NEWEST = 20


def losses_of(connection: sqlite3.Connection) -> LossesStatus:
    """The ledger of an open spool; it has one row for each run of losses, and few kinds of them."""
    totals = sorted(losses.totals(connection), key=lambda total: -total.declared_at_us)
    return LossesStatus(
        entries=len(totals),
        readings=sum(total.rows for total in totals if total.record_class is RecordClass.READING),
        newest=[
            Loss(
                declared_at_us=total.declared_at_us,
                destination=total.destination,
                what=total.record_class.name.lower(),
                records=total.rows,
                reason=total.reason,
                remains=total.survives,
                from_us=total.from_us,
                to_us=total.to_us,
            )
            for total in totals[:_NEWEST]
        ],
    )
