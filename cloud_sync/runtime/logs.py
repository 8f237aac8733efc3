"""How a program logs: for people, for the journal, or as JSON.

Under systemd a line begins with its priority and has no time (sd-daemon(3)). Repeats are limited to one
a minute with a count; control characters are escaped.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import TextIO

LogFormat = Literal["auto", "text", "json"]

_PRIORITY = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}
_MINUTE_S = 60.0
_MAX_KINDS = 1000
_MAX_OF_A_KIND = 20


def configure_logging(level: str, form: LogFormat = "auto", stream: TextIO | None = None) -> None:
    """Log to `stream`, stderr by default, from `level` on. A second call replaces the first."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LogFormatter(form, journal=is_journal(stream or sys.stderr)))
    handler.addFilter(RepeatFilter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for talkative in ("httpx", "uvicorn.error"):
        logging.getLogger(talkative).setLevel(logging.WARNING)


def is_journal(stream: TextIO, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether systemd has connected a stream to its journal. Source: systemd.exec(5), JOURNAL_STREAM."""
    try:
        there = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return environ.get("JOURNAL_STREAM", "") == f"{there.st_dev}:{there.st_ino}"


class LogFormatter(logging.Formatter):
    """One record as lines."""

    def __init__(self, form: LogFormat, *, journal: bool) -> None:
        super().__init__()
        self._form = form
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        """The record, without control characters that are not ours."""
        prefix = f"<{_priority(record.levelno)}>" if self._journal else ""
        if self._form == "json":
            return prefix + self._json(record)
        head = f"{record.name}: "
        if not self._journal:
            at = self.formatTime(record)
            head = f"{at} {record.levelname} {head}"
        first, *others = self._whole(record).split("\n")
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

    def _whole(self, record: logging.LogRecord) -> str:
        text = _escape_controls(record.getMessage())
        return (
            f"{text}\n{_escape_controls(self.formatException(record.exc_info))}" if record.exc_info else text
        )


@dataclass(slots=True)
class _RepeatCount:
    since: float
    said: int = 0
    kept_back: int = 0


class RepeatFilter(logging.Filter):
    """Lets the same message through once a minute, and of messages of one form at most twenty.

    What was kept back is counted in the next that goes through. Errors with a traceback always go through.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._kinds: OrderedDict[tuple[str, str], _RepeatCount] = OrderedDict()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to say it; adds to its message what was kept back before."""
        if record.exc_info or record.levelno < logging.INFO:
            return True
        message = record.getMessage()
        same = self._allows((record.name, message), 1)
        form = self._allows((record.name, f"form {record.msg}"), _MAX_OF_A_KIND) if same is not None else None
        if same is None or form is None:
            return False
        if same or form:
            count = f"{same} more like this" if same else f"{form} more of this kind"
            record.msg, record.args = f"{message} ({count}, not shown)", ()
        return True

    def _allows(self, key: tuple[str, str], most: int) -> int | None:
        """How many were kept back before this one, or None when it is kept back too."""
        now = self._clock()
        kind = self._kinds.get(key)
        kept_back = 0
        if kind is None or now - kind.since >= _MINUTE_S:
            kept_back = 0 if kind is None else kind.kept_back
            kind = self._kinds[key] = _RepeatCount(now)
            self._kinds.move_to_end(key)
            while len(self._kinds) > _MAX_KINDS:
                self._kinds.popitem(last=False)
        if kind.said >= most:
            kind.kept_back += 1
            return None
        kind.said += 1
        return kept_back


def _priority(level: int) -> int:
    return next((number for known, number in _PRIORITY.items() if level >= known), 7)


def _escape_controls(text: str) -> str:
    """Control characters as escapes; line breaks and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)
