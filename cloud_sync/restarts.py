"""Waits that grow while starts fail in a row, kept across restarts in the service's runtime directory.

systemd before 254 restarts after the same pause for ever. A start is counted as failed until it has been
steady for a minute or has been stopped in order; the first failure costs no wait, the next 2, 4, 8 ... s.
The directory is `RuntimeDirectory=` of the unit, with `RuntimeDirectoryPreserve=restart`; without it nothing
waits.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from cloud_sync.service import notify

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

STEADY_S = 60.0
_CEILING_S = 60.0


class Restarts:
    """Starts that failed in a row."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        folder = environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
        self._file = Path(folder) / "failed-starts" if folder else None

    def begin(self, sleep: Callable[[float], None] = time.sleep) -> float:
        """Count this start and wait for what the failures before it ask for; returns the seconds waited."""
        if self._file is None:
            return 0.0
        failed = self._failed()
        with suppress(OSError):
            self._file.write_text(f"{failed + 1}\n", encoding="ascii")
        wait_s = min(_CEILING_S, 2.0 ** (failed - 1)) if failed > 1 else 0.0
        if wait_s:
            notify(f"EXTEND_TIMEOUT_USEC={round((wait_s + 60) * 1e6)}")
            notify(f"STATUS=waits {wait_s:.0f} s after {failed} failed starts in a row")
            sleep(wait_s)
        return wait_s

    def succeeded(self) -> None:
        """This start was a good one."""
        if self._file is not None:
            with suppress(OSError):
                self._file.unlink(missing_ok=True)

    def _failed(self) -> int:
        assert self._file is not None
        try:
            return min(int(self._file.read_text(encoding="ascii")), 1000)
        except (OSError, ValueError):
            return 0
