"""What all lanes of a destination know of it together: whether it answers, and since when not. Pure.

When it does not answer, one lane asks again and the others wait for it. When it answers again after an
outage, the backfill begins at a random moment, so that a fleet of gateways that lost the same region does not
come back all at once. Times are monotonic seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

SPREAD_OF_OUTAGE = 0.1
SPREAD_MAX_S = 30.0


@dataclass(slots=True)
class Link:
    """The state of one destination.

    Attributes:
        attempts: sends in a row that failed; 0 while it answers.
        down_since: of the first of them.
        backfill_from: when the backfill may begin after an outage.
    """

    attempts: int = 0
    down_since: float | None = None
    retry_at: float = 0.0
    backfill_from: float = 0.0

    @property
    def is_down(self) -> bool:
        """Whether the newest send failed for a reason that is not the batch's."""
        return self.attempts > 0

    def failed(self, at: float) -> int:
        """Note a failed send; returns the number of this attempt (1, 2, ...)."""
        self.down_since = at if self.down_since is None else self.down_since
        self.attempts += 1
        return self.attempts

    def answered(self, at: float, chance: float) -> None:
        """Note that the destination takes batches again. `chance` is from 0 to 1."""
        if self.down_since is not None:
            self.backfill_from = at + chance * spread_s(at - self.down_since)
        self.attempts, self.down_since, self.retry_at = 0, None, 0.0


def spread_s(outage_s: float) -> float:
    """Over how many seconds the gateways that shared an outage spread the beginning of their backfill."""
    return min(SPREAD_MAX_S, SPREAD_OF_OUTAGE * max(0.0, outage_s))
