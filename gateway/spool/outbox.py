"""What people are still to be told, by channel: written with the alerts it is of, taken away once it is sent.

A row is what one step changed for one rule on one channel, however many series that were. The outbox is
bounded by channel: beyond `ROWS_MAX` the oldest row gives way, and is counted in `meta` ("outbox_dropped").
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

from gateway.spool.database import SQL, value_of

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Sequence

ROWS_MAX = 1000
EXAMPLES_MAX = 20
_DROPPED = "outbox_dropped"


class Example(msgspec.Struct, frozen=True):
    """One series' change, as a channel tells it. `value` and `threshold` are None where there is none."""

    sensor_id: str
    sensor_type: str
    at_us: int
    value: float | None
    threshold: float | None
    count: int
    detail: str


class Notice(msgspec.Struct, frozen=True):
    """What one step changed for one rule.

    Attributes:
        rule: its name.
        severity: of `cloud_sync.notices.Severity`.
        state: of `cloud_sync.notices.AlertState`.
        series: how many.
        examples: the first few of them.
    """

    rule: str
    severity: int
    state: int
    series: int
    examples: tuple[Example, ...]


class Waiting(NamedTuple):
    """A notice in the outbox of one channel."""

    number: int
    queued_at_us: int
    notice: Notice


def put(connection: sqlite3.Connection, channels: Iterable[str], notice: Notice, now_us: int) -> None:
    """Queue a notice for channels, inside the transaction that holds its alerts."""
    body = msgspec.json.encode(notice)
    for channel in channels:
        connection.execute(SQL["add_outbox"], (channel, now_us, body))
        dropped = connection.execute(SQL["cap_outbox"], (channel, channel, ROWS_MAX)).rowcount
        if dropped > 0:
            _count_dropped(connection, dropped)


def waiting(connection: sqlite3.Connection, channel: str) -> list[Waiting]:
    """What one channel has still to send, oldest first."""
    rows = connection.execute(SQL["outbox_of"], (channel,)).fetchall()
    return [Waiting(number, at_us, msgspec.json.decode(body, type=Notice)) for number, at_us, body in rows]


def take_away(connection: sqlite3.Connection, numbers: Sequence[int], *, dropped: bool = False) -> None:
    """Forget notices: they were sent, or, with `dropped`, given up."""
    connection.executemany(SQL["delete_outbox"], [(number,) for number in numbers])
    if dropped:
        _count_dropped(connection, len(numbers))


def keep_only(connection: sqlite3.Connection, channels: Iterable[str]) -> int:
    """Forget what is for channels that are no more; returns how many notices that were."""
    kept = set(channels)
    gone = [name for (name,) in connection.execute(SQL["outbox_channels"]) if name not in kept]
    return sum(connection.execute(SQL["drop_outbox_of"], (name,)).rowcount for name in gone)


def totals(connection: sqlite3.Connection) -> tuple[dict[str, int], int]:
    """Notices waiting by channel, and how many were ever dropped."""
    dropped = int(value_of(connection.execute(SQL["meta"], (_DROPPED,)).fetchone(), 0))
    return dict(connection.execute(SQL["outbox_totals"]).fetchall()), dropped


def _count_dropped(connection: sqlite3.Connection, dropped: int) -> None:
    before = int(value_of(connection.execute(SQL["meta"], (_DROPPED,)).fetchone(), 0))
    connection.execute(SQL["set_meta"], (_DROPPED, before + dropped))
