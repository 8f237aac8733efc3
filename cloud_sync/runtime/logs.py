"""How a program reports: logs for people, for the journal, or as JSON; and its state to systemd.

Under systemd a line begins with its priority and has no time (sd-daemon(3)). Repeats are limited to one
a minute with a count; control characters are escaped.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import TextIO

LogFormat = Literal["auto", "text", "json"]

_PRIORITY = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}
_MINUTE_S = 60.0
_MAX_COUNTS = 1000
_MAX_OF_A_FORM = 20


def configure_logging(level: str, form: LogFormat = "auto", stream: TextIO | None = None) -> None:
    """Log to `stream`, stderr by default, from `level` on. A second call replaces the first."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LogFormatter(form, journal=is_journal(stream or sys.stderr)))
    handler.addFilter(RepeatFilter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for talkative in ("httpx", "uvicorn.error"):
        logging.getLogger(talkative).setLevel(logging.WARNING)


def is_journal(stream: TextIO, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether systemd connected a stream to its journal (systemd.exec(5), JOURNAL_STREAM)."""
    try:
        there = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return environ.get("JOURNAL_STREAM", "") == f"{there.st_dev}:{there.st_ino}"


class LogFormatter(logging.Formatter):
    """A record as one line or more."""

    def __init__(self, form: LogFormat, *, journal: bool) -> None:
        super().__init__()
        self._form = form
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        """The record, its control characters escaped."""
        prefix = ""
        if self._journal:
            priority = next((number for level, number in _PRIORITY.items() if record.levelno >= level), 7)
            prefix = f"<{priority}>"
        if self._form == "json":
            return prefix + self._json(record)
        head = f"{record.name}: "
        if not self._journal:
            at = self.formatTime(record)
            head = f"{at} {record.levelname} {head}"
        text = record.getMessage() + (f"\n{self.formatException(record.exc_info)}" if record.exc_info else "")
        first, *others = _escape_controls(text).split("\n")
        return "\n".join([f"{prefix}{head}{first}", *(f"{prefix}  {line}" for line in others)])

    def _json(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        entry = {
            "at": at.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=True)


@dataclass(slots=True)
class _RepeatCount:
    since: float
    passed: int = 0
    suppressed: int = 0


class RepeatFilter(logging.Filter):
    """Passes the same message once a minute, of one form at most twenty; the next says how many it left out.

    Errors with a traceback always pass.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._counts: OrderedDict[tuple[str, str], _RepeatCount] = OrderedDict()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it passes; adds to its message how many were suppressed before."""
        if record.exc_info or record.levelno < logging.INFO:
            return True
        message = record.getMessage()
        same = self._allows((record.name, message), 1)
        form = self._allows((record.name, f"form {record.msg}"), _MAX_OF_A_FORM) if same is not None else None
        if same is None or form is None:
            return False
        if same or form:
            count = f"{same} more like this" if same else f"{form} more of this kind"
            record.msg, record.args = f"{message} ({count}, not shown)", ()
        return True

    def _allows(self, key: tuple[str, str], most: int) -> int | None:
        """How many were suppressed before this one, or None when it is suppressed too."""
        now = self._clock()
        count = self._counts.get(key)
        suppressed = 0
        if count is None or now - count.since >= _MINUTE_S:
            suppressed = 0 if count is None else count.suppressed
            count = self._counts[key] = _RepeatCount(now)
            self._counts.move_to_end(key)
            while len(self._counts) > _MAX_COUNTS:
                self._counts.popitem(last=False)
        if count.passed >= most:
            count.suppressed += 1
            return None
        count.passed += 1
        return suppressed


def _escape_controls(text: str) -> str:
    """Control characters as escapes; line breaks and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def notify_systemd(state: str) -> None:
    """Send a state such as "READY=1" or "STATUS=...", one assignment a line. Source: sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel, suppress(OSError):
        channel.sendto(state.encode(), address)
