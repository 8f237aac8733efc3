"""Errors of delivery. Each class answers what the shipper does next.

DeliveryError
├── RetryLater      nothing was settled; send the same batch again, not before retry_after_s
├── TooLarge        the destination wants smaller batches; split and send again
├── Refused         the destination will never take this batch as it is
└── Unauthorised    hold everything for this destination and tell a person

FormatError         bytes that are no batch or no column block of ours; `reason` is machine-readable
"""

from __future__ import annotations


class DeliveryError(Exception):
    """A batch was not accepted."""


class RetryLater(DeliveryError):  # noqa: N818 - the classes are named for what to do next
    """A passing fault. `retry_after_s` is the destination's wish in seconds, or None."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TooLarge(DeliveryError):  # noqa: N818 - as above
    """The batch exceeds what the destination takes in one request."""


class Refused(DeliveryError):  # noqa: N818 - as above
    """The destination understood the batch and will not take it. `reason` is its own code or status."""

    def __init__(self, message: str, reason: str = "refused") -> None:
        super().__init__(message)
        self.reason = reason


class Unauthorised(DeliveryError):  # noqa: N818 - as above
    """Credentials are missing, wrong, or for someone else."""


class StoreTrouble(Exception):  # noqa: N818 - as above
    """The durable store that a shipper reads from is full, locked or failing; its own errors derive from this."""


class FormatError(Exception):
    """Bytes that cannot be decoded.

    `reason` is one of: truncated, bad_magic, unsupported_version, bad_checksum, malformed, too_large.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
