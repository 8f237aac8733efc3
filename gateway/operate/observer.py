"""Watches the running gateway from within: keeps what takes time to know, and makes the whole document.

`observe_once` is its step: a sample of the rates and of what was written. It reads; it never stops the
program.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from gateway.operate.devices import devices_of
from gateway.operate.losses_summary import losses_of
from gateway.operate.quarantine_summary import QuarantineStatus, quarantine_of
from gateway.operate.recent import Recent
from gateway.operate.records_summary import LossesStatus
from gateway.operate.remarks import remarks_of
from gateway.operate.status import status_of
from gateway.operate.wear import Wear
from gateway.spool.errors import SpoolError

if TYPE_CHECKING:
    from gateway.operate.status import Status
    from gateway.parts import Parts

_log = logging.getLogger(__name__)
_EVERY_S = 5.0
_FRESH_S = 0.5
_RECORDS_FRESH_S = 5.0
_USUAL_SAMPLES = 15


class Observer:
    """Of one gateway's parts. Many may ask for the document at once: it is made twice a second at most."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        settings = parts.settings
        self._wear = Wear(settings.spool.path.parent, settings.spool.flash_endurance_tb)
        self._recent = Recent()
        self._turn = asyncio.Lock()
        self._document: Status | None = None
        self._document_at_s = float("-inf")
        self._quarantine = QuarantineStatus(0, 0, [])
        self._losses = LossesStatus(0, 0, [])
        self._records_at_s = float("-inf")

    async def run(self, stop: asyncio.Event) -> None:
        """Observe until `stop` is set."""
        while not stop.is_set():
            try:
                await self.observe_once(time.monotonic())
            except SpoolError as fault:
                _log.warning("the spool cannot be looked at: %s", fault)
            try:
                async with asyncio.timeout(_EVERY_S):
                    await stop.wait()
            except TimeoutError:
                continue

    async def observe_once(self, now_s: float) -> None:
        """Take the samples that are due; `now_s` is monotonic seconds."""
        self._wear.note(self._wear.look(self._parts.segments.appended_bytes, now_s))
        if self._recent.is_due(now_s):
            document = await status_of(self._parts)
            self._recent.note(
                document.ingress.readings_per_s,
                {d.name: d.backlog_readings for d in document.destinations},
                now_us=document.at_us,
                now_s=now_s,
            )

    async def status(self) -> Status:
        """The whole document.

        Raises:
            SpoolError: the spool cannot be read.
        """
        async with self._turn:
            now_s = time.monotonic()
            if self._document is None or now_s - self._document_at_s >= _FRESH_S:
                self._document = await self._made(now_s)
                self._document_at_s = now_s
            return self._document

    async def _made(self, now_s: float) -> Status:
        parts = self._parts
        recent = self._recent.status()
        rates = recent.readings_per_s
        document = await status_of(
            parts, usual_per_s=sum(rates) / len(rates) if len(rates) >= _USUAL_SAMPLES else None
        )
        if now_s - self._records_at_s >= _RECORDS_FRESH_S:
            self._quarantine = await parts.database.read(quarantine_of)
            self._losses = await parts.database.read(losses_of)
            self._records_at_s = now_s
        document.recent = recent
        document.quarantine = self._quarantine
        document.losses = self._losses
        document.devices = devices_of(
            parts.appender.presence.heard(parts.duplicates, document.at_us),
            document.at_us,
            parts.settings.status.silent_after_s,
        )
        document.wear = self._wear.status(self._wear.look(parts.segments.appended_bytes, now_s))
        document.remarks = remarks_of(document)
        return document
