"""Errors of delivery, and when a refusal counts against single rows. Pure.

Each class says what the shipper does next:

DeliveryError
├── RetryLaterError     nothing was settled; send the same batch again, not before retry_after_s
│   └── StoreError      the spool cannot serve now, the destination is not to blame; nothing is lost
├── TooLargeError       the destination accepts only smaller batches; split and send again
├── RefusedError        never accepts this batch as it is; `of_rows`: because of its rows
└── UnauthorisedError   hold everything for this destination until an operator acts

FormatError             bytes that are no batch or no column block of ours; `reason` is machine-readable

A destination that answers 400 to every request (a wrong path, a proxy in between) must not have its
whole backlog quarantined row by row: `RefusalPolicy` accepts an unexplained refusal of a row only while
other rows are accepted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable


class DeliveryError(Exception):
    """A batch was not accepted."""


class RetryLaterError(DeliveryError):
    """A transient error. `retry_after_s` is what the destination asks for, in seconds."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StoreError(RetryLaterError):
    """The store that a shipper reads from is full, locked or failing; its own errors derive from this."""


class TooLargeError(DeliveryError):
    """The batch exceeds what the destination accepts in one request."""


class RefusedError(DeliveryError):
    """The destination understood the batch and will never accept it.

    `of_rows`: some of the rows are the reason, so that it may accept the others; `rows`: their positions.
    """

    def __init__(
        self, message: str, reason: str = "refused", *, of_rows: bool = False, rows: Iterable[int] = ()
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.rows = tuple(rows)
        self.of_rows = of_rows or bool(self.rows)


class UnauthorisedError(DeliveryError):
    """Credentials are missing, wrong, or for someone else."""


class FormatError(Exception):
    """`reason`: truncated, bad_magic, unsupported_version, bad_checksum, malformed or too_large."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


MAX_UNEXPLAINED_ROWS = 16
DATA_REASONS = frozenset(
    {
        "beyond_retention",
        "field_type_conflict",
        "series_limit",
        "time_out_of_range",
        "unable_to_parse",
        "unacceptable_data",
    }
)


class RefusedRow(NamedTuple):
    """A row that a destination refused: its position in the batch, the reason, the destination's words."""

    row: int
    reason: str
    words: str


@dataclass(slots=True)
class RefusalPolicy:
    """Counts rows refused without explanation since the destination last accepted any."""

    unexplained: int = 0

    def accepts_refusal(self, reason: str, rows: int = 1) -> bool:
        """Whether so many rows, refused for this reason, are bad rows; counts them."""
        if reason in DATA_REASONS:
            return True
        if self.unexplained + rows > MAX_UNEXPLAINED_ROWS:
            return False
        self.unexplained += rows
        return True
