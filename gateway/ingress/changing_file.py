"""Files that a person changes while the gateway runs: read again when they differ, unless they are wrong."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

T = TypeVar("T")

_log = logging.getLogger(__name__)
_LOOK_S: Final = 1.0

_Stamp = tuple[tuple[int, int, int] | None, ...]


class ChangingFile(Generic[T]):
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
        elif now_s - self._looked_s >= _LOOK_S:
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

    def _present(self) -> _Stamp:
        return tuple(_stamp_of(path) for path in self._paths)


def _stamp_of(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_mtime_ns, status.st_size, status.st_ino)
