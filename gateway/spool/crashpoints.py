"""Named points at which a test may have the process killed, to see that nothing acknowledged is lost.

`TIDEGATE_CRASH_AT=name` or `name:n` sends SIGKILL when the point is passed for the n-th time (default 1).
`TIDEGATE_HANG_AT` takes the same and has the thread that passes the point stay there for ever.
Without the variables a point does nothing.
"""

from __future__ import annotations

import os
import signal
import time

_hang = os.environ.pop("TIDEGATE_HANG_AT", "")
_name, _, _count = (os.environ.pop("TIDEGATE_CRASH_AT", "") or _hang).partition(":")
_left = int(_count or 1)


def point(name: str) -> None:
    """Pass a named point."""
    global _left  # noqa: PLW0603 - one process, one crash
    if name != _name:
        return
    _left -= 1
    if _left > 0:
        return
    while _hang:
        time.sleep(3600)
    os.kill(os.getpid(), signal.SIGKILL)
