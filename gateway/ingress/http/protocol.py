"""The connection of a device: slow heads are given up, and the client's certificate is at hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cloud_sync.ingest.heads import TimedHeads

if TYPE_CHECKING:
    import asyncio

CERTIFICATE: Final = "certificate"
"""The key under which a request's state has the client's certificate; absent when there was none."""


class DeviceProtocol(TimedHeads):
    """One connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Read the certificate once for all requests of the connection."""
        super().connection_made(transport)
        certificate = transport.get_extra_info("peercert")
        if certificate:
            self.app_state = {**self.app_state, CERTIFICATE: certificate}
