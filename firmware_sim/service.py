"""What a simulated fleet says to systemd (sd_notify(3)). Without systemd it says nothing."""

from __future__ import annotations

import os
import socket


class Service:
    """READY at the first word, a fed watchdog and a status text with each."""

    def __init__(self) -> None:
        self._said = False

    def tell(self, status: str) -> None:
        """The fleet is alive and this is how it does."""
        ready, self._said = "" if self._said else "READY=1\n", True
        notify(f"{ready}WATCHDOG=1\nSTATUS={status}")


def notify(state: str) -> None:
    """Send assignments, one a line."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        try:
            channel.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
        except OSError:
            return
