"""File descriptors: as many as the connections need, and some that no connection may take from the spool."""

from __future__ import annotations

import contextlib
import logging
import resource
from typing import Final

_log = logging.getLogger(__name__)
RESERVED: Final = 256
"""For the spool, destinations, the status endpoint and whatever libraries open."""


def connections_affordable(wanted: int) -> int:
    """Raise the soft limit of open files to what `wanted` connections need, as far as the hard limit allows.

    Returns how many connections there is room for then, at most `wanted`; warns when they are fewer.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + RESERVED
    if soft != resource.RLIM_INFINITY and soft < needed:
        raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with contextlib.suppress(OSError, ValueError):  # a sandbox may forbid it
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    affordable = max(1, soft - RESERVED)
    _log.warning(
        "max_connections is %d, but this process may open %d files only: %d connections are taken. "
        "Raise LimitNOFILE of the unit, or `ulimit -n`, to %d or more",
        wanted,
        soft,
        affordable,
        needed,
    )
    return affordable
