"""What outlives a connection: sessions (section 4.1) of clients that only publish.

Nothing is sent to such a client, so a session is its existence and the QoS 2 packet identifiers it has not
released. It matters all the same: a client that is told its session is gone discards what it has not yet had
acknowledged (MQTT-3.2.2-5); one that finds it present sends that again. Sessions live in memory only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from gateway.ingress.reception import Reception

NEVER: Final = 0xFFFF_FFFF
"""Session Expiry Interval of a session that does not expire (section 3.1.2.11.2)."""


class Session:
    """One client's session.

    Attributes:
        unreleased: QoS 2 packet identifiers awaiting PUBREL; True once durable, False while being committed.
        connection: the connection that holds it now, if any.
        expires_at_s: when it ends without a connection, in the listener's monotonic seconds.
    """

    __slots__ = ("connection", "expires_at_s", "unreleased")

    def __init__(self) -> None:
        self.unreleased: dict[int, bool] = {}
        self.connection: Reception | None = None
        self.expires_at_s = 0.0


class SessionTable:
    """Sessions without a connection, by client identifier. Beyond `limit` the longest idle is forgotten."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._idle: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._idle)

    def claim(self, client_id: str) -> Session | None:
        """Take the idle session of a client out of the table, if there is one."""
        return self._idle.pop(client_id, None)

    def keep(self, client_id: str, session: Session, *, expires_at_s: float) -> None:
        """Put aside a session whose connection has ended."""
        session.connection = None
        session.expires_at_s = expires_at_s
        self._idle[client_id] = session
        if len(self._idle) > self._limit:
            del self._idle[next(iter(self._idle))]

    def expire(self, *, now_s: float) -> None:
        """Forget what has expired."""
        for client_id in [name for name, session in self._idle.items() if session.expires_at_s <= now_s]:
            del self._idle[client_id]
