"""Sparkplug node state from births (aliases, message sequence), and rebirth requests.

A node numbers its messages 0 to 255 cyclically. A gap, an unknown alias, or data before a birth means
something was missed: the node is listed in `rebirths`, at most once every `_REBIRTH_INTERVAL_US`, and sent
a rebirth command.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_log = logging.getLogger(__name__)
_SPARKPLUG_NAMESPACE = "spBv1.0"
_REBIRTH_INTERVAL_US: Final = 30_000_000
_KNOWN_NODES_MAX: Final = 10_000
_METRICS_PER_NODE_MAX: Final = 100_000
SEQ_MODULUS: Final = 256


class SparkplugNodeId(NamedTuple):
    """A node is named within its group."""

    group: str
    node: str


class MetricAlias(NamedTuple):
    """A metric as its birth declares it; `device` is "" for the node's own."""

    device: str
    name: str
    datatype: int
    unit: str | None


@dataclass(slots=True)
class SparkplugNode:
    """A node since its birth."""

    aliases: dict[int, MetricAlias] = field(default_factory=dict)
    named: dict[tuple[str, str], MetricAlias] = field(default_factory=dict)
    bd_seq: int | None = None
    seq: int | None = None

    def add_metric(self, number: int | None, alias: MetricAlias) -> None:
        """Add a metric of its birth, or of a birth of its device."""
        if len(self.named) < _METRICS_PER_NODE_MAX:
            self.named[alias.device, alias.name] = alias
            if number is not None:
                self.aliases[number] = alias


class SparkplugBirths:
    """The nodes that are alive; `rebirths` are to be sent a command, whose sender removes them from it."""

    def __init__(self) -> None:
        self.rebirths: dict[SparkplugNodeId, None] = {}
        self.seq_gaps = 0
        self._nodes: dict[SparkplugNodeId, SparkplugNode] = {}
        self._requested_us: dict[SparkplugNodeId, int] = {}
        self._replaying = False

    def for_replay(self) -> SparkplugBirths:
        """The same nodes for messages that are decoded again: these change nothing."""
        copy = SparkplugBirths()
        copy._nodes, copy._replaying = self._nodes, True
        return copy

    def node(self, node_id: SparkplugNodeId) -> SparkplugNode | None:
        """A node that is alive."""
        return self._nodes.get(node_id)

    def record_birth(self, node_id: SparkplugNodeId, bd_seq: int | None) -> None:
        """Start a node anew."""
        if self._replaying:
            return
        if len(self._nodes) >= _KNOWN_NODES_MAX and node_id not in self._nodes:
            del self._nodes[next(iter(self._nodes))]
        self._nodes[node_id] = SparkplugNode(bd_seq=bd_seq)
        self.rebirths.pop(node_id, None)

    def record_death(self, node_id: SparkplugNodeId, bd_seq: int | None) -> bool:
        """Remove a node; False when the death belongs to an earlier birth than the last one."""
        node = self._nodes.get(node_id)
        if node is not None and None not in (bd_seq, node.bd_seq) and bd_seq != node.bd_seq:
            return False
        if not self._replaying:
            self._nodes.pop(node_id, None)
        return True

    def check_sequence(self, node_id: SparkplugNodeId, seq: int | None, now_us: int) -> None:
        """Request a rebirth when the number of a message is not the next one."""
        node = self._nodes.get(node_id)
        if self._replaying or node is None or seq is None:
            return
        if node.seq is not None and seq != (node.seq + 1) % SEQ_MODULUS:
            self.seq_gaps += 1
            self.request_rebirth(node_id, now_us)
        node.seq = seq

    def request_rebirth(self, node_id: SparkplugNodeId, now_us: int) -> None:
        """List a node in `rebirths`, unless that was done within the interval."""
        requested_us = self._requested_us.get(node_id)
        if self._replaying or (
            requested_us is not None and 0 <= now_us - requested_us < _REBIRTH_INTERVAL_US
        ):
            return
        if len(self._requested_us) >= _KNOWN_NODES_MAX:
            self._requested_us.clear()
        self._requested_us[node_id] = now_us
        self.rebirths[node_id] = None


class RebirthRequester:
    """Sends rebirth commands to the nodes listed in `SparkplugBirths.rebirths`.

    Each of `publishers` publishes (topic, payload), and returns True when a client is subscribed to it.
    """

    def __init__(
        self,
        births: SparkplugBirths,
        encode_command: Callable[[int], bytes],
        publishers: Sequence[Callable[[bytes, bytes], bool]],
        *,
        clock_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        self._births = births
        self._encode_command = encode_command
        self._publishers = publishers
        self._clock_us = clock_us
        self.requested_total = 0
        self.undelivered_total = 0

    def send_requests(self) -> None:
        """Send a command to every listed node."""
        births = self._births
        while births.rebirths:
            node_id = next(iter(births.rebirths))
            del births.rebirths[node_id]
            topic = f"{_SPARKPLUG_NAMESPACE}/{node_id.group}/NCMD/{node_id.node}"
            command = self._encode_command(self._clock_us())
            delivered = [publish(topic.encode(), command) for publish in self._publishers]
            self.requested_total += 1
            if any(delivered):
                _log.info("requested a rebirth of Sparkplug node %s, group %s", *reversed(node_id))
            else:
                self.undelivered_total += 1
                _log.warning(
                    "Sparkplug node %s, group %s, needs a rebirth, but nothing is subscribed to %s",
                    *reversed(node_id),
                    topic,
                )
