"""Files that change while the program runs: reloaded when they differ, kept when they are invalid.

`CertReloader` does so for TLS: new connections get the current certificate, open ones go on. Files are
checked at most once a second, and count only when all of them fit together, so they can be replaced one
after the other.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final, Generic, TypeVar

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Sequence
    from pathlib import Path

T = TypeVar("T")

_log = logging.getLogger(__name__)
_CHECK_INTERVAL_S: Final = 1.0

_FileStamps = tuple[tuple[int, int, int] | None, ...]


class WatchedFiles(Generic[T]):
    """What one or several files say, as of the last time they made sense.

    Args:
        paths: the files.
        load: reads them; raises `fault` when they make no sense (yet: two files that belong together are
            replaced one after the other).
        fault: the only exception `load` raises.

    Raises:
        Exception: `fault`, when the files make no sense from the beginning.
    """

    def __init__(self, paths: Sequence[Path], load: Callable[[], T], fault: type[Exception]) -> None:
        self._paths = tuple(paths)
        self._load = load
        self._fault = fault
        self._stamp = self._present()
        self._looked_s: float | None = None
        self._value = load()

    def current(self, now_s: float) -> T:
        """What the files say. They are looked at once a second at most; `now_s` is monotonic seconds."""
        if self._looked_s is None:
            self._looked_s = now_s
        elif now_s - self._looked_s >= _CHECK_INTERVAL_S:
            self._looked_s = now_s
            stamp = self._present()
            if stamp != self._stamp:
                self._stamp = stamp
                self._reload()
        return self._value

    def _reload(self) -> None:
        names = ", ".join(map(str, self._paths))
        try:
            self._value = self._load()
        except self._fault as fault:
            _log.error("what was read before stays in force: %s", fault)
        else:
            _log.info("read again: %s", names)

    def _present(self) -> _FileStamps:
        return tuple(_read_stamp(path) for path in self._paths)


def _read_stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_mtime_ns, status.st_size, status.st_ino)


_CERT_LOOK_S: Final = 1.0


class CertReloader:
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
        self.context.sni_callback = self._switch_context

    def current(self) -> ssl.SSLContext:
        """The context in force; the files are looked at before."""
        now_s = self._clock()
        if now_s - self._looked_s >= _CERT_LOOK_S:
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

    def _switch_context(
        self, connection: ssl.SSLSocket | ssl.SSLObject, _name: str, _context: ssl.SSLContext
    ) -> None:
        connection.context = self.current()

    def _present(self) -> list[tuple[int, int, int] | None]:
        return [_file_stamp(path) for path in self._files]


def _file_stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
