"""Topics that the gateway itself serves: commands that Sparkplug nodes wait for. All else is refused.

A node subscribes to `spBv1.0/GROUP/NCMD/NODE`, or to all below it. A subscription lasts as long as its
connection; commands go out at QoS 0, as the specification has it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

from gateway.ingress.packets import ReasonCode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Protocol

    from gateway.ingress.formats.rules import Rules

    class Subscribed(Protocol):
        """Whom a command is delivered to."""

        def deliver(self, topic: bytes, payload: bytes) -> None:
            """Send one message at QoS 0."""
            ...


_SUBSCRIPTIONS_MAX: Final = 20_000
_COMMANDS: Final = re.compile(r"(spBv1\.0)/([^/+#]+)/NCMD/([^/+#]+)(?:/#)?")


class _Asked(NamedTuple):
    topic: bytes
    owner: str


class Served:
    """Who has subscribed to what the gateway serves. Without `rules` that is nothing."""

    def __init__(self, rules: Rules | None = None) -> None:
        self._rules = rules
        self._subscribed: dict[bytes, Subscribed] = {}

    def answer(
        self,
        connection: Subscribed,
        filters: Sequence[str],
        refusals: Sequence[int],
        owns: Callable[[str], bool] | None,
    ) -> tuple[int, ...]:
        """The codes for a SUBSCRIBE: QoS 0 where it is served and the node's own, else the refusal."""
        codes = []
        for name, refusal in zip(filters, refusals, strict=True):
            asked = self._asked(name)
            if asked is None:
                codes.append(refusal)
            elif owns is not None and not owns(asked.owner):
                codes.append(int(ReasonCode.NOT_AUTHORIZED))
            elif len(self._subscribed) >= _SUBSCRIPTIONS_MAX and asked.topic not in self._subscribed:
                codes.append(int(ReasonCode.QUOTA_EXCEEDED))
            else:
                self._subscribed[asked.topic] = connection
                codes.append(0)
        return tuple(codes)

    def withdraw(self, connection: Subscribed, filters: Sequence[str]) -> tuple[int, ...]:
        """The codes for an UNSUBSCRIBE."""
        codes = []
        for name in filters:
            asked = self._asked(name)
            had = asked is not None and self._subscribed.get(asked.topic) is connection
            if had and asked is not None:
                del self._subscribed[asked.topic]
            codes.append(0 if had else int(ReasonCode.NO_SUBSCRIPTION_EXISTED))
        return tuple(codes)

    def forget(self, connection: Subscribed) -> None:
        """Drop what a connection subscribed to."""
        for topic in [topic for topic, other in self._subscribed.items() if other is connection]:
            del self._subscribed[topic]

    def publish(self, topic: bytes, payload: bytes) -> bool:
        """Deliver a message; whether anyone had subscribed to it."""
        connection = self._subscribed.get(topic)
        if connection is not None:
            connection.deliver(topic, payload)
        return connection is not None

    def __bool__(self) -> bool:
        return bool(self._subscribed)

    def _asked(self, name: str) -> _Asked | None:
        found = _COMMANDS.fullmatch(name)
        if found is None or self._rules is None:
            return None
        namespace, group, node = found.groups()
        rule = self._rules.rule_for(f"{namespace}/{group}/NDATA/{node}")
        if rule is None or rule.format != "sparkplug_b":
            return None
        return _Asked(f"{namespace}/{group}/NCMD/{node}".encode(), f"{group}.{node}")
