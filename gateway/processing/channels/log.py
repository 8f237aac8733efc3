"""The log as a channel: always there, never fails."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from cloud_sync.notices import Severity

if TYPE_CHECKING:
    from gateway.processing.messages import Message

_log = logging.getLogger("gateway.alerts")
_LEVELS = {Severity.INFO: logging.INFO, Severity.WARNING: logging.WARNING, Severity.CRITICAL: logging.ERROR}


class LogChannel:
    """Implements `Channel`: one line a message, an end of alerts as information."""

    def __init__(self, name: str = "log") -> None:
        self.name = name

    async def send(self, message: Message) -> None:
        """Write it."""
        level = _LEVELS[message.severity] if message.firing else logging.INFO
        _log.log(level, "%s", message.text.replace("\n", " | "))

    async def aclose(self) -> None:
        """Nothing is held."""
