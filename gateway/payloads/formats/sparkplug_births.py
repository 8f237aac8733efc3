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

_REBIRTH_INTERVAL_US: Final = 30_000_000
_KNOWN_NODES_MAX: Final = 10_000
_METRICS_PER_NODE_MAX: Final = 100_000
SEQ_MODULUS: Final = 256


class SparkplugNodeId(NamedTuple):
    """A node of a group."""

    group: str
    node: str


class MetricAlias(NamedTuple):
    """What a birth says of a metric: `device` is "" for the node's own."""

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

    def learn(self, number: int | None, alias: MetricAlias) -> None:
        """Remember a metric of a birth."""
        if len(self.named) < _METRICS_PER_NODE_MAX:
            self.named[alias.device, alias.name] = alias
            if number is not None:
                self.aliases[number] = alias


class SparkplugBirths:
    """The nodes that were born, by id.

    Attributes:
        rebirths: nodes to be asked for a new birth; whoever asks takes them out.
        seq_gaps: messages that were not the next one.
    """

    def __init__(self) -> None:
        self.rebirths: dict[SparkplugNodeId, None] = {}
        self.seq_gaps = 0
        self._nodes: dict[SparkplugNodeId, SparkplugNode] = {}
        self._requested_us: dict[SparkplugNodeId, int] = {}
        self._replaying = False

    def for_replay(self) -> SparkplugBirths:
        """The same knowledge for messages that are decoded again: nothing is learnt of their order."""
        copy = SparkplugBirths()
        copy._nodes, copy._replaying = self._nodes, True
        return copy

    def node(self, node_id: SparkplugNodeId) -> SparkplugNode | None:
        """A node that was born and has not died."""
        return self._nodes.get(node_id)

    def born(self, node_id: SparkplugNodeId, bd_seq: int | None) -> SparkplugNode:
        """Begin anew with a node, `birth_no` being its bdSeq."""
        node = SparkplugNode(bd_seq=bd_seq)
        if self._replaying:
            return node
        if len(self._nodes) >= _KNOWN_NODES_MAX and node_id not in self._nodes:
            del self._nodes[next(iter(self._nodes))]
        self._nodes[node_id] = node
        self.rebirths.pop(node_id, None)
        return node

    def record_death(self, node_id: SparkplugNodeId, bd_seq: int | None) -> bool:
        """Forget a node; False when the death is of an earlier birth than the one that is known."""
        node = self._nodes.get(node_id)
        if node is not None and None not in (bd_seq, node.bd_seq) and bd_seq != node.bd_seq:
            return False
        if not self._replaying:
            self._nodes.pop(node_id, None)
        return True

    def heard(self, node_id: SparkplugNodeId, seq: int | None, now_us: int) -> None:
        """Look at the number of a message; numbers that are not the next one ask for a rebirth."""
        node = self._nodes.get(node_id)
        if self._replaying or node is None or seq is None:
            return
        if node.seq is not None and seq != (node.seq + 1) % SEQ_MODULUS:
            self.seq_gaps += 1
            self.ask(node_id, now_us)
        node.seq = seq

    def ask(self, node_id: SparkplugNodeId, now_us: int) -> None:
        """Want a new birth of a node, unless it was asked a moment ago."""
        asked_us = self._requested_us.get(node_id)
        if self._replaying or (asked_us is not None and 0 <= now_us - asked_us < _REBIRTH_INTERVAL_US):
            return
        if len(self._requested_us) >= _KNOWN_NODES_MAX:
            self._requested_us.clear()
        self._requested_us[node_id] = now_us
        self.rebirths[node_id] = None


_log = logging.getLogger(__name__)
_SPARKPLUG_NAMESPACE = "spBv1.0"


class RebirthRequester:
    """Takes nodes out of `Births.rebirths` and sends each a command.

    Args:
        births: what the decoders noticed.
        ways: publish a message (topic, payload) and say whether anyone may get it.
        clock_us: wall time, which stamps the command.
    """

    def __init__(
        self,
        births: SparkplugBirths,
        ways: Sequence[Callable[[bytes, bytes], bool]],
        *,
        clock_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        self._births = births
        self._ways = ways
        self._clock_us = clock_us
        self.requested_total = 0
        self.undelivered_total = 0

    def ask(self) -> None:
        """Ask every node that is to be asked."""
        from gateway.payloads.formats.sparkplug import encode_rebirth_command  # noqa: PLC0415 - needs an extra

        births = self._births
        while births.rebirths:
            node_id = next(iter(births.rebirths))
            del births.rebirths[node_id]
            topic = f"{_SPARKPLUG_NAMESPACE}/{node_id.group}/NCMD/{node_id.node}"
            command = encode_rebirth_command(self._clock_us())
            heard = [way(topic.encode(), command) for way in self._ways]
            self.requested_total += 1
            if any(heard):
                _log.info("asked Sparkplug node %s of group %s for a rebirth", node_id.node, node_id.group)
            else:
                self.undelivered_total += 1
                _log.warning(
                    "Sparkplug node %s of group %s should be born again, but nothing is subscribed to %s",
                    node_id.node,
                    node_id.group,
                    topic,
                )
