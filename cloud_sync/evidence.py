"""Whether a refusal may cost single rows their place, or is rather about everything that is sent. Pure.

A destination that answers 400 to every request (a wrong path, a proxy in between) would otherwise have a
whole backlog taken apart row by row into quarantine. So an unexplained refusal is believed of a single row
only while the destination takes other things: after some such rows with nothing taken in between, the batch
is held. A refusal with a reason that speaks of data is believed always.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

UNEXPLAINED_ROWS_MAX = 16
EXPLAINED = frozenset(
    {
        "beyond_retention",
        "field_type_conflict",
        "series_limit",
        "time_out_of_range",
        "unable_to_parse",
        "unacceptable_data",
    }
)


class BadRow(NamedTuple):
    """A row that a destination refused: its position in the batch, the reason, the destination's words."""

    row: int
    reason: str
    words: str


@dataclass(slots=True)
class Evidence:
    """Counts rows refused without explanation since the destination last took anything."""

    unexplained: int = 0

    def taken(self) -> None:
        """The destination has taken some rows."""
        self.unexplained = 0

    def believes(self, reason: str, rows: int = 1) -> bool:
        """Whether so many rows, refused for this reason, are bad rows; counts them."""
        if reason in EXPLAINED:
            return True
        if self.unexplained + rows > UNEXPLAINED_ROWS_MAX:
            return False
        self.unexplained += rows
        return True
