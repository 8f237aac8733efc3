"""What processing keeps in the spool: progress, state of its stages, pending readings, queued notices.

Nothing that processing has not durably read is merged or pruned.

Pending readings were stamped while the gateway did not know the time. They are durable and acknowledged but
not yet committed: a row holds one group and the anchor that gives their true times once the clock is right.

Notices are written with the alerts they are of and deleted once sent. A row is what one step changed for one
rule on one channel. Each channel's outbox is limited to `ROWS_MAX` rows; dropped ones are counted in `meta`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

from cloud_sync.codec import columns
from gateway.spool.database import SQL, fetch_scalar, read_meta, write_meta

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Mapping, Sequence

    from cloud_sync.model.records import Readings

PROGRESS_KEY = "follower/progress"
NO_LIMIT = 1 << 62


def read_processed_through(connection: sqlite3.Connection) -> int:
    """The commit of readings up to which processing is durable; `NO_LIMIT` where there is none."""
    commit = fetch_scalar(connection, "processed_through")
    return NO_LIMIT if commit is None else int(commit)


def read_processing_state(connection: sqlite3.Connection) -> dict[str, bytes]:
    """All keys."""
    return {key: bytes(value) for key, value in connection.execute(SQL["processing_state"])}


def write_processing_state(connection: sqlite3.Connection, changes: Mapping[str, bytes | None]) -> None:
    """Write keys, delete those that are None; inside a transaction."""
    for key, value in changes.items():
        if value is None:
            connection.execute(SQL["delete_processing_state"], (key,))
        else:
            connection.execute(SQL["set_processing_state"], (key, value))


class PendingReadings(NamedTuple):
    """One row: the anchor's `boot_id` and `base_us`, and when it was stored, since that boot."""

    number: int
    boot_id: str
    base_us: int
    since_boot_us: int
    block: bytes

    def readings(self) -> Readings:
        """The readings with the times they were stamped with. Raises FormatError."""
        return columns.decode(self.block)


def add_pending(
    connection: sqlite3.Connection, anchor: tuple[str, int], since_boot_us: int, rows: int, block: bytes
) -> None:
    """Store a group's readings, inside the transaction that is acknowledged."""
    connection.execute(SQL["park"], (*anchor, since_boot_us, rows, block))


def find_oldest_pending(connection: sqlite3.Connection) -> PendingReadings | None:
    """The oldest row."""
    row = connection.execute(SQL["oldest_parked"]).fetchone()
    return None if row is None else PendingReadings(*row)


def delete_pending(connection: sqlite3.Connection, number: int) -> None:
    """Delete a row whose readings are committed."""
    connection.execute(SQL["unpark"], (number,))


def count_pending_rows(connection: sqlite3.Connection) -> int:
    """How many readings are pending."""
    return int(fetch_scalar(connection, "parked_rows"))


ROWS_MAX = 1000
MAX_EXAMPLES = 20
_DROPPED_KEY = "outbox_dropped"


class AlertExample(msgspec.Struct, frozen=True):
    """The change of one series. `value` and `threshold` are None where there is none."""

    sensor_id: str
    sensor_type: str
    at_us: int
    value: float | None
    threshold: float | None
    count: int
    detail: str


class AlertNotice(msgspec.Struct, frozen=True):
    """What one step changed for one rule: the number of series, and the first of them as examples."""

    rule: str
    severity: int
    state: int
    series: int
    examples: tuple[AlertExample, ...]


class QueuedNotice(NamedTuple):
    """A notice in the outbox of one channel."""

    number: int
    queued_at_us: int
    notice: AlertNotice


def queue_notice(
    connection: sqlite3.Connection, channels: Iterable[str], notice: AlertNotice, now_us: int
) -> None:
    """Queue a notice for channels, inside the transaction that holds its alerts."""
    body = msgspec.json.encode(notice)
    for channel in channels:
        connection.execute(SQL["add_outbox"], (channel, now_us, body))
        dropped = connection.execute(SQL["cap_outbox"], (channel, channel, ROWS_MAX)).rowcount
        if dropped > 0:
            _count_dropped(connection, dropped)


def read_queued_notices(connection: sqlite3.Connection, channel: str) -> list[QueuedNotice]:
    """What one channel still has to send, oldest first."""
    rows = connection.execute(SQL["outbox_of"], (channel,)).fetchall()
    return [
        QueuedNotice(number, at_us, msgspec.json.decode(body, type=AlertNotice))
        for number, at_us, body in rows
    ]


def delete_notices(connection: sqlite3.Connection, numbers: Sequence[int], *, dropped: bool = False) -> None:
    """Delete notices that were sent or, with `dropped`, abandoned."""
    connection.executemany(SQL["delete_outbox"], [(number,) for number in numbers])
    if dropped:
        _count_dropped(connection, len(numbers))


def delete_other_channels(connection: sqlite3.Connection, channels: Iterable[str]) -> int:
    """Delete the notices of channels that are not configured any more; returns how many."""
    kept = set(channels)
    gone = [name for (name,) in connection.execute(SQL["outbox_channels"]) if name not in kept]
    return sum(connection.execute(SQL["drop_outbox_of"], (name,)).rowcount for name in gone)


def outbox_totals(connection: sqlite3.Connection) -> tuple[dict[str, int], int]:
    """Queued notices by channel, and how many were ever dropped."""
    dropped = int(read_meta(connection, _DROPPED_KEY))
    return dict(connection.execute(SQL["outbox_totals"]).fetchall()), dropped


def _count_dropped(connection: sqlite3.Connection, dropped: int) -> None:
    write_meta(connection, _DROPPED_KEY, int(read_meta(connection, _DROPPED_KEY)) + dropped)
