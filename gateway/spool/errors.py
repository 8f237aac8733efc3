"""Errors of the spool. Each class answers what the caller does next.

SpoolError
├── SpoolFull       no room to write: hold, and try again when room has returned
├── SpoolFailed     SQLite cannot write or read for another reason: hold, tell a person, try again
├── SpoolTooNew     written by a later release: stop, a person must upgrade
└── SpoolInUse      another process is the writer: stop
"""

from __future__ import annotations

from cloud_sync.errors import StoreTrouble


class SpoolError(StoreTrouble):
    """The spool did not do what was asked; nothing of it was done."""


class SpoolFull(SpoolError):  # noqa: N818 - named for the state it reports
    """The disk or the configured size is full."""


class SpoolFailed(SpoolError):  # noqa: N818 - as above
    """SQLite reported an input/output fault, damage or a lock that was not released."""


class SpoolTooNew(SpoolError):  # noqa: N818 - as above
    """The file's format version is higher than this release knows."""


class SpoolInUse(SpoolError):  # noqa: N818 - as above
    """Another gateway process holds this spool."""
