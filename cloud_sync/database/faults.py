"""What a fault of the database means for the batch: every error of asyncpg, mapped once, here."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import asyncpg

from cloud_sync.errors import DeliveryError, Refused, RetryLater, Unauthorised

if TYPE_CHECKING:
    from collections.abc import Iterator

CREDENTIALS = (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InsufficientPrivilegeError)
UNACCEPTABLE = (asyncpg.DataError, asyncpg.ProgramLimitExceededError)
CONTENTION = (asyncpg.SerializationError, asyncpg.DeadlockDetectedError)

MISSING = (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError)
"""The database is not as it was prepared: replaced by an older copy, or emptied."""


def fault_of(fault: asyncpg.PostgresError | asyncpg.InterfaceError | OSError) -> DeliveryError:
    """The delivery error a database fault stands for. Only faults of the data themselves refuse a batch."""
    text = str(fault) or type(fault).__name__
    if isinstance(fault, CREDENTIALS):
        return Unauthorised(f"database: {text}")
    if isinstance(fault, UNACCEPTABLE) and not isinstance(fault, asyncpg.InterfaceError):
        return Refused(f"database: {text}", "unacceptable_data")
    return RetryLater(f"database: {text}")


@contextmanager
def mapped() -> Iterator[None]:
    """Turn every database fault raised inside into the delivery error it stands for."""
    try:
        yield
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as fault:
        raise fault_of(fault) from fault
