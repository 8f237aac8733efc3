"""Asks Sparkplug nodes to be born again, through whatever connects the gateway with them."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gateway.ingress.formats.births import Births

_log = logging.getLogger(__name__)
_NAMESPACE = "spBv1.0"


class Rebirths:
    """Takes nodes out of `Births.rebirths` and sends each a command.

    Args:
        births: what the decoders noticed.
        ways: publish a message (topic, payload) and say whether anyone may get it.
        clock_us: wall time, which stamps the command.
    """

    def __init__(
        self,
        births: Births,
        ways: Sequence[Callable[[bytes, bytes], bool]],
        *,
        clock_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        self._births = births
        self._ways = ways
        self._clock_us = clock_us
        self.asked_total = 0
        self.unheard_total = 0

    def ask(self) -> None:
        """Ask every node that is to be asked."""
        from gateway.ingress.formats.sparkplug import rebirth  # noqa: PLC0415 - needs an extra

        births = self._births
        while births.rebirths:
            node_id = next(iter(births.rebirths))
            del births.rebirths[node_id]
            topic = f"{_NAMESPACE}/{node_id.group}/NCMD/{node_id.node}"
            command = rebirth(self._clock_us())
            heard = [way(topic.encode(), command) for way in self._ways]
            self.asked_total += 1
            if any(heard):
                _log.info("asked Sparkplug node %s of group %s for a rebirth", node_id.node, node_id.group)
            else:
                self.unheard_total += 1
                _log.warning(
                    "Sparkplug node %s of group %s should be born again, but nothing is subscribed to %s",
                    node_id.node,
                    node_id.group,
                    topic,
                )
