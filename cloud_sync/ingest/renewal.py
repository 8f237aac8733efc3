"""TLS of a server whose files change while it runs: new connections get what the files hold then.

The files are looked at once a second at most, when a connection arrives. They count only when all of them fit
together, so they can be replaced one after the other. Connections that are open go on.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Sequence
    from pathlib import Path

_log = logging.getLogger(__name__)
_LOOK_S: Final = 1.0


class Renewal:
    """Owns the context in force.

    Args:
        make: a context from the files; raises `fault` when they cannot be used.
        files: to be looked at.
        fault: what `make` raises.
        clock: monotonic seconds.

    Attributes:
        context: to serve with; it hands every connection on to the context in force.
    """

    def __init__(
        self,
        make: Callable[[], ssl.SSLContext],
        files: Sequence[Path],
        fault: type[Exception],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._make, self._files, self._fault, self._clock = make, tuple(files), fault, clock
        self._stamps = self._present()
        self._looked_s = clock()
        self._current = make()
        self.context = make()
        self.context.sni_callback = self._hand_on

    def current(self) -> ssl.SSLContext:
        """The context in force; the files are looked at before."""
        now_s = self._clock()
        if now_s - self._looked_s >= _LOOK_S:
            self._looked_s = now_s
            stamps = self._present()
            if stamps != self._stamps:
                self._stamps = stamps
                self._renew()
        return self._current

    def _renew(self) -> None:
        try:
            self._current = self._make()
        except self._fault as fault:
            _log.error("the certificate that was read before stays in force: %s", fault)
        else:
            _log.info("certificate read again: %s", ", ".join(map(str, self._files)))

    def _hand_on(
        self, connection: ssl.SSLSocket | ssl.SSLObject, _name: str, _context: ssl.SSLContext
    ) -> None:
        connection.context = self.current()

    def _present(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(path) for path in self._files]


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
