"""Files that change while the program runs: read again when they differ, kept as they were when invalid.

`CertReloader` does so for TLS: new connections get the current certificate, open ones keep theirs. Files
that belong together may be replaced one after the other: they count once all of them fit.
"""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Sequence
    from pathlib import Path

T = TypeVar("T")

_log = logging.getLogger(__name__)

FileStamp = tuple[int, int, int] | None


def file_stamp(path: Path) -> FileStamp:
    """Modification time, size and inode; None when the file cannot be seen."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


class WatchedFile(Generic[T]):
    """The last valid content of one or several files, looked at again every `check_interval_s` at most.

    `read` raises `error` and nothing else; at the start it passes.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        read: Callable[[], T],
        error: type[Exception],
        *,
        check_interval_s: float = 1.0,
    ) -> None:
        self._paths = tuple(paths)
        self._read = read
        self._error = error
        self._check_interval_s = check_interval_s
        self._stamps = self._read_stamps()
        self._checked_s = -math.inf
        self._content = read()

    def current(self, now_s: float) -> T:
        """The last valid content; `now_s` is monotonic seconds."""
        if now_s - self._checked_s >= self._check_interval_s:
            self._checked_s = now_s
            stamps = self._read_stamps()
            if stamps != self._stamps:
                self._stamps = stamps
                self._reload()
        return self._content

    def _reload(self) -> None:
        names = ", ".join(map(str, self._paths))
        try:
            self._content = self._read()
        except self._error as fault:
            _log.error("%s: changed, but invalid; the previous content stays in use: %s", names, fault)
        else:
            _log.info("%s: changed, and read again", names)

    def _read_stamps(self) -> tuple[FileStamp, ...]:
        return tuple(map(file_stamp, self._paths))


class CertReloader:
    """A server's TLS context, rebuilt when its files change."""

    def __init__(
        self,
        build: Callable[[], ssl.SSLContext],
        paths: Sequence[Path],
        error: type[Exception],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._watched = WatchedFile(paths, build, error)
        self._clock = clock
        self.context = build()
        self.context.sni_callback = self._use_current_context

    def current(self) -> ssl.SSLContext:
        """The context for a connection that begins now."""
        return self._watched.current(self._clock())

    def _use_current_context(
        self, connection: ssl.SSLSocket | ssl.SSLObject, _name: str, _context: ssl.SSLContext
    ) -> None:
        connection.context = self.current()
