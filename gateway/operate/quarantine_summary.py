"""The quarantine in a few lines: how much of each reason, and the newest example."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from gateway.operate.quarantine_items import Item, ReasonCount
from gateway.operate.spool_walk import SQL
from gateway.spool.database import SQL as SPOOL_SQL

if TYPE_CHECKING:
    import sqlite3

_NEWEST = (1 << 63) - 1
_TEXT_MAX = 200


class QuarantinedReason(msgspec.Struct):
    """Items of one reason, and the newest of them. `topic` and `detail` hold text of strangers: escape it."""

    reason: str
    items: int
    newest_at_us: int
    source: str
    topic: str
    detail: str


class QuarantineStatus(msgspec.Struct):
    """What is in quarantine. `ever` counts also what was retried, dropped or had to make room."""

    items: int
    ever: int
    reasons: list[QuarantinedReason]


def quarantine_of(connection: sqlite3.Connection) -> QuarantineStatus:
    """The quarantine of an open spool, which is bounded to some thousand items."""
    counts = [ReasonCount(*row) for row in connection.execute(SPOOL_SQL["quarantine_by_reason"])]
    reasons = []
    for count in counts:
        row = connection.execute(SQL["quarantine_items"], (_NEWEST, count.reason, count.reason, 1)).fetchone()
        item = Item(*row)
        reasons.append(
            QuarantinedReason(
                reason=count.reason,
                items=count.items,
                newest_at_us=count.newest_at_us,
                source=item.source,
                topic=item.topic[:_TEXT_MAX],
                detail=item.detail[:_TEXT_MAX],
            )
        )
    ever = connection.execute(SQL["quarantine_ever"]).fetchone()
    return QuarantineStatus(
        items=sum(count.items for count in counts), ever=0 if ever is None else ever[0], reasons=reasons
    )
