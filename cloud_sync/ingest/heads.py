"""uvicorn's HTTP/1.1 connection with a bound on how long the head of a request may take.

uvicorn waits without end for it; here a head that has begun, or the first one of a connection, has to be
whole within `HEAD_WITHIN_S`. So connections that send a byte now and then (slowloris) do not last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

if TYPE_CHECKING:
    import asyncio

HEAD_WITHIN_S = 10.0


class TimedHeads(H11Protocol):
    """One connection."""

    _head_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Wait for the first head."""
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Take bytes; between requests they are those of a head."""
        super().data_received(data)
        cycle: RequestResponseCycle | None = (
            self.cycle
        )  # None before the first request, whatever its type says
        if cycle is None or cycle.response_complete:
            self._await_head()
        else:
            self._end_wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._end_wait()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        if self._head_due is None:
            self._head_due = self.loop.call_later(HEAD_WITHIN_S, self.transport.close)

    def _end_wait(self) -> None:
        if self._head_due is not None:
            self._head_due.cancel()
            self._head_due = None
