"""What Sparkplug nodes said at their birth: names behind aliases, and the sequence of their messages. Pure.

A node numbers its messages 0 to 255 round and round. A number that is not the next one, an alias that no
birth explained, or data before a birth mean that something is missing: `rebirths` then holds the node, for
whoever can ask it to be born again, not more often than every `_ASK_EVERY_US`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, NamedTuple

_ASK_EVERY_US: Final = 30_000_000
_NODES_MAX: Final = 10_000
_METRICS_MAX: Final = 100_000
SEQ_END: Final = 256


class NodeId(NamedTuple):
    """A node of a group."""

    group: str
    node: str


class Alias(NamedTuple):
    """What a birth says of a metric: `device` is "" for the node's own."""

    device: str
    name: str
    datatype: int
    unit: str | None


@dataclass(slots=True)
class Node:
    """A node since its birth."""

    aliases: dict[int, Alias] = field(default_factory=dict)
    named: dict[tuple[str, str], Alias] = field(default_factory=dict)
    birth_no: int | None = None
    seq: int | None = None

    def learn(self, number: int | None, alias: Alias) -> None:
        """Remember a metric of a birth."""
        if len(self.named) < _METRICS_MAX:
            self.named[alias.device, alias.name] = alias
            if number is not None:
                self.aliases[number] = alias


class Births:
    """The nodes that were born, by id.

    Attributes:
        rebirths: nodes to be asked for a new birth; whoever asks takes them out.
        seq_gaps: messages that were not the next one.
    """

    def __init__(self) -> None:
        self.rebirths: dict[NodeId, None] = {}
        self.seq_gaps = 0
        self._nodes: dict[NodeId, Node] = {}
        self._asked_us: dict[NodeId, int] = {}
        self._is_replay = False

    def replayed(self) -> Births:
        """The same knowledge for messages that are decoded again: nothing is learnt of their order."""
        copy = Births()
        copy._nodes, copy._is_replay = self._nodes, True
        return copy

    def node(self, node_id: NodeId) -> Node | None:
        """A node that was born and has not died."""
        return self._nodes.get(node_id)

    def born(self, node_id: NodeId, birth_no: int | None) -> Node:
        """Begin anew with a node, `birth_no` being its bdSeq."""
        node = Node(birth_no=birth_no)
        if self._is_replay:
            return node
        if len(self._nodes) >= _NODES_MAX and node_id not in self._nodes:
            del self._nodes[next(iter(self._nodes))]
        self._nodes[node_id] = node
        self.rebirths.pop(node_id, None)
        return node

    def died(self, node_id: NodeId, birth_no: int | None) -> bool:
        """Forget a node; False when the death is of an earlier birth than the one that is known."""
        node = self._nodes.get(node_id)
        if node is not None and None not in (birth_no, node.birth_no) and birth_no != node.birth_no:
            return False
        if not self._is_replay:
            self._nodes.pop(node_id, None)
        return True

    def heard(self, node_id: NodeId, seq: int | None, now_us: int) -> None:
        """Look at the number of a message; numbers that are not the next one ask for a rebirth."""
        node = self._nodes.get(node_id)
        if self._is_replay or node is None or seq is None:
            return
        if node.seq is not None and seq != (node.seq + 1) % SEQ_END:
            self.seq_gaps += 1
            self.ask(node_id, now_us)
        node.seq = seq

    def ask(self, node_id: NodeId, now_us: int) -> None:
        """Want a new birth of a node, unless it was asked a moment ago."""
        asked_us = self._asked_us.get(node_id)
        if self._is_replay or (asked_us is not None and 0 <= now_us - asked_us < _ASK_EVERY_US):
            return
        if len(self._asked_us) >= _NODES_MAX:
            self._asked_us.clear()
        self._asked_us[node_id] = now_us
        self.rebirths[node_id] = None
