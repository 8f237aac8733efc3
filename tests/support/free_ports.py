"""Ports that stay free until the server that is to have them starts."""

from __future__ import annotations

import random
import socket

_chosen: set[int] = set()
_chance = random.SystemRandom()


def free_port() -> int:
    """A TCP port of the loopback address that nobody listens on, nor is given out again.

    It lies below those that the kernel gives to outgoing connections, which would take it in the meantime.
    """
    while True:
        port = _chance.randrange(15_000, 32_000)
        if port in _chosen:
            continue
        _chosen.add(port)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
