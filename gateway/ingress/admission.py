"""Who may connect, and what they may publish then: the seam for passwords, certificates and identities."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from gateway.ingress.packets import ReasonCode

if TYPE_CHECKING:
    from collections.abc import Container

    from gateway.ingress.packets import Publish
    from gateway.ingress.topics import Naming

_TOPICS_MAX: Final = 1000

Certificate = Mapping[str, Any]
"""A verified client certificate as `ssl.SSLSocket.getpeercert` describes it."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Someone who may connect.

    Attributes:
        name: who it is.
        may_publish: asked once per connection and topic (bytes, a valid topic name); None allows every topic.
        owns: asked about each sensor_id that a payload names by itself; None allows every one.
        scope: whose client identifiers are meant: the same one in another scope is another client, so that
            nobody takes over the session of somebody else.
        stands: asked about once a second; False (the device was removed, say) ends the connection.
    """

    name: str
    may_publish: Callable[[bytes], bool] | None = None
    scope: str = ""
    stands: Callable[[], bool] | None = None
    owns: Callable[[str], bool] | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Someone who may not connect, with the CONNACK reason code of MQTT 5 that says why."""

    reason_code: int = ReasonCode.NOT_AUTHORIZED


class Authenticator(Protocol):
    """Decides on every CONNECT."""

    def admit(
        self,
        client_id: str,
        username: str | None,
        password: bytes | None,
        certificate: Certificate | None,
        address: str,
    ) -> Identity | Refusal | Awaitable[Identity | Refusal]:
        """Decide at once, or return an awaitable when it takes long (a slow hash, in a thread).

        `client_id` is the one in effect, assigned when the client sent none; `address` is the peer's, without
        the port. Whatever the connection has sent after CONNECT waits for the answer.
        """
        ...


class Anonymous:
    """Admits everyone, as nobody in particular. For a listener on loopback or a network that is trusted."""

    def admit(
        self,
        client_id: str,
        username: str | None,  # noqa: ARG002 - the seam's signature
        password: bytes | None,  # noqa: ARG002 - the seam's signature
        certificate: Certificate | None,  # noqa: ARG002 - the seam's signature
        address: str,  # noqa: ARG002 - the seam's signature
    ) -> Identity:
        """Everyone is welcome under the name they give."""
        return Identity(client_id)


def owner_of(sensor_id: str) -> str:
    """The device a sensor_id belongs to: `pump-1` owns `pump-1` and `pump-1:flow`.

    No device's name holds a colon, so that no device owns what is another's.
    """
    return sensor_id.partition(":")[0]


def owned_by(name: str) -> Callable[[str], bool]:
    """The rule "only as itself", for sensor_ids."""
    return lambda sensor_id: owner_of(sensor_id) == name


def owned_by_none_of(devices: Callable[[], Container[str]]) -> Callable[[str], bool]:
    """The rule "as nobody in particular", for sensor_ids: all but those of the devices known at the time."""
    return lambda sensor_id: owner_of(sensor_id) not in devices()


def own_topics(name: str, naming: Naming) -> Callable[[bytes], bool]:
    """The rule "only as itself": topics whose sensor_id belongs to the device `name`.

    Topics whose payloads name their sensors are open to everyone: there each reading is asked about.
    """

    def rule(topic: bytes) -> bool:
        text = topic.decode("utf-8", "replace")
        sensor_id = naming.sensor_id_in(text)
        if naming.leaves_owner_open(text):
            return True
        return sensor_id is not None and owner_of(sensor_id) == name

    return rule


def not_owned_by(devices: Callable[[], Container[str]], naming: Naming) -> Callable[[bytes], bool]:
    """The rule "as nobody in particular": every topic but those of the devices known at the time."""

    def rule(topic: bytes) -> bool:
        sensor_id = naming.sensor_id_in(topic.decode("utf-8", "replace"))
        return sensor_id is None or owner_of(sensor_id) not in devices()

    return rule


class Permit:
    """What one connection may publish: its identity's rule, asked once per topic (of a bounded number)."""

    __slots__ = ("_answers", "_rule")

    def __init__(self, rule: Callable[[bytes], bool]) -> None:
        self._rule = rule
        self._answers: dict[bytes, bool] = {}

    def grants(self, topic: bytes) -> bool:
        """Whether `topic` may be published to."""
        answer = self._answers.get(topic)
        if answer is None:
            if len(self._answers) >= _TOPICS_MAX:
                self._answers.clear()
            answer = self._answers[topic] = self._rule(topic)
        return answer

    def forget(self) -> None:
        """What topics carry has changed: ask about each again."""
        self._answers.clear()

    def split(self, run: list[Publish]) -> tuple[list[Publish], list[Publish]]:
        """The publishes that are granted, and those that are denied, each in order."""
        granted: list[Publish] = []
        denied: list[Publish] = []
        for publish in run:
            (granted if self.grants(publish.topic) else denied).append(publish)
        return granted, denied
