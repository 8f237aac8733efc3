"""Errors of delivery. Each class answers what the shipper does next.

DeliveryError
├── RetryLater      nothing was settled; send the same batch again, not before retry_after_s
│   └── StoreFault  it was the gateway's own spool that failed, not the destination
├── TooLarge        the destination wants smaller batches; split and send again
├── Refused         the destination will never take this batch as it is; `of_rows`: because of its rows
└── Unauthorised    hold everything for this destination and tell a person

StoreTrouble        the spool cannot serve just now; try again, nothing is lost
FormatError         bytes that are no batch or no column block of ours; `reason` is machine-readable
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class DeliveryError(Exception):
    """A batch was not accepted."""


class RetryLater(DeliveryError):  # noqa: N818 - the classes are named for what to do next
    """A passing fault. `retry_after_s` is the destination's wish in seconds, or None."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StoreFault(RetryLater):
    """The gateway's own spool could not be read or written; the destination is not to blame."""


class TooLarge(DeliveryError):  # noqa: N818 - as above
    """The batch exceeds what the destination takes in one request."""


class Refused(DeliveryError):  # noqa: N818 - as above
    """The destination understood the batch and will not take it.

    Attributes:
        reason: its own code or status.
        of_rows: whether some of the rows are why, so that it may take the others.
        rows: which rows of the batch, where it says so; each a position in the batch.
    """

    def __init__(
        self, message: str, reason: str = "refused", *, of_rows: bool = False, rows: Iterable[int] = ()
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.rows = tuple(rows)
        self.of_rows = of_rows or bool(self.rows)


class Unauthorised(DeliveryError):  # noqa: N818 - as above
    """Credentials are missing, wrong, or for someone else."""


class StoreTrouble(Exception):  # noqa: N818 - as above
    """The store that a shipper reads from is full, locked or failing; its own errors derive from this."""


class FormatError(Exception):
    """Bytes that cannot be decoded.

    `reason` is one of: truncated, bad_magic, unsupported_version, bad_checksum, malformed, too_large.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
