"""What became of a group of readings, and of each lot in it. Pure.

A lot is what one request brought: its sender is told how many of its readings were new, and what is to be
remembered of it (an entry of the ledger, an answer) is written by the transaction that stores it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Sequence

    from gateway.spool.duplicates import Screened

    Note = Callable[[sqlite3.Connection, "Appended"], None]


@dataclass(frozen=True, slots=True)
class Appended:
    """What became of one group: `stored + duplicates + conflicts` is what was handed over.

    `lots` says the same of each lot of it.
    """

    stored: int
    duplicates: int
    conflicts: int
    lots: tuple[Appended, ...] = ()


@dataclass(frozen=True, slots=True)
class Lot:
    """Rows of a group whose sender is told what became of them.

    Attributes:
        rows: which of the group's readings, as they were handed over; may be none.
        note: writes what is to be remembered of the lot, inside the transaction that stores it.
    """

    rows: slice
    note: Note | None = None


def of_lots(screened: Screened, lots: Sequence[Lot]) -> tuple[Appended, ...]:
    """What became of each lot's rows."""
    if not lots:
        return ()
    stored, conflicting = np.empty_like(screened.keep), np.empty_like(screened.conflicting)
    stored[screened.arrival], conflicting[screened.arrival] = screened.keep, screened.conflicting
    counts = (
        (len(stored[lot.rows]), int(stored[lot.rows].sum()), int(conflicting[lot.rows].sum())) for lot in lots
    )
    return tuple(Appended(kept, rows - kept - differing, differing) for rows, kept, differing in counts)


def notes_of(lots: Sequence[Lot], by_lot: Sequence[Appended]) -> list[Callable[[sqlite3.Connection], None]]:
    """What the lots want to be remembered of them."""
    return [
        partial(_noted, lot.note, appended)
        for lot, appended in zip(lots, by_lot, strict=True)
        if lot.note is not None
    ]


def _noted(note: Note, appended: Appended, connection: sqlite3.Connection) -> None:
    note(connection, appended)
