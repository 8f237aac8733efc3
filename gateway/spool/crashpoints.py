"""Named points at which a test may have the process killed, to see that nothing acknowledged is lost.

`TIDEGATE_CRASH_AT=name` or `name:n` sends SIGKILL when the point is passed for the n-th time (default 1).
Without the variable a point does nothing.
"""

from __future__ import annotations

import os
import signal

_name, _, _count = os.environ.pop("TIDEGATE_CRASH_AT", "").partition(":")
_left = int(_count or 1)


def point(name: str) -> None:
    """Pass a named point."""
    global _left  # noqa: PLW0603 - one process, one crash
    if name != _name:
        return
    _left -= 1
    if _left <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
