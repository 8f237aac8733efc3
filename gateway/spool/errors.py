"""Errors of the spool. Each class answers what the caller does next.

SpoolError
├── SpoolFullError       no room to write: hold, and try again when room has returned
├── SpoolAccessError     SQLite cannot write or read for another reason: hold, tell a person, try again
├── SpoolTooNewError     written by a later release: stop, a person must upgrade
└── SpoolInUseError      another process is the writer: stop
"""

from __future__ import annotations

from cloud_sync.model.errors import StoreError


class SpoolError(StoreError):
    """The operation failed and had no effect."""


class SpoolFullError(SpoolError):
    """The disk or the configured size is full."""


class SpoolAccessError(SpoolError):
    """SQLite reported an input/output fault, damage or a lock that was not released."""


class SpoolTooNewError(SpoolError):
    """The file's format version is higher than this release knows."""


class SpoolInUseError(SpoolError):
    """Another gateway process holds this spool."""
