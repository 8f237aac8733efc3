"""What `systemctl status` shows of a gateway: one line, made from counters, without a look at the disk."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from gateway.operate.human import count_text

if TYPE_CHECKING:
    from gateway.parts import Parts

_SHOWN_CHARACTERS = 80


def service_text(parts: Parts) -> str:
    """Where it listens, what comes in, whether it holds, and how each destination is doing."""
    listen, counters = parts.settings.ingress.listen, parts.committer.counters
    readings_per_s = count_text(counters.rate.per_s(time.monotonic()))
    said = [
        f"listening on {listen.host}:{parts.listener.port}",
        f"{readings_per_s} readings/s from {parts.listener.counters.connections_open} connections",
    ]
    if counters.holding_reason:
        said.insert(0, f"HOLDING: {counters.holding_reason}")
    for shipper in parts.shippers:
        error = shipper.counters.last_error[:_SHOWN_CHARACTERS]
        said.append(f"{shipper.name} {shipper.counters.state}" + (f" ({error})" if error else ""))
    return "; ".join(said)
