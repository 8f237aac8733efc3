"""Sparkplug B: births, data and deaths, topics `NAMESPACE/GROUP/TYPE/NODE[/DEVICE]`. Pure.

A birth explains the aliases that data uses, so that what a payload means depends on the births before it:
they are kept in `Births`. A metric that is a number or a boolean is a reading; texts count as in `fields`,
data sets, templates and files do not, nor do `bdSeq` and what is null. Births and deaths are readings of
`online`, 1 and 0. The property `Quality` (192 is good) becomes the quality, `engUnit` the unit. A bad metric
costs itself.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

from cloud_sync.instants import LATEST_US
from cloud_sync.records import Flag
from gateway.ingress.formats.births import SEQ_END, Alias, Births, Node, NodeId
from gateway.ingress.formats.measurement import MEMBERS_MAX, Fault, Measurement, NotDecodable
from gateway.ingress.formats.plans import PlanBook, number_of
from gateway.ingress.formats.sparkplug_messages import DecodeError, Payload

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gateway.ingress.formats.measurement import Decoded
    from gateway.ingress.formats.plans import Plans
    from gateway.ingress.formats.rule import Rule

REBIRTH: Final = "Node Control/Rebirth"
ONLINE: Final = "online"
_OF_NODES: Final = frozenset({"NBIRTH", "NDATA", "NDEATH"})
_OF_DEVICES: Final = frozenset({"DBIRTH", "DDATA", "DDEATH"})
_BIRTH_NO: Final = "bdSeq"
_GOOD: Final = 192
_SIGNED_BITS: Final[Mapping[int, int]] = {1: 8, 2: 16, 3: 32, 4: 64}
_HISTORICAL: Final = int(Flag.HISTORICAL)
_LATEST_MS: Final = LATEST_US // 1000
_BOOLEAN: Final = 11


def decoder(
    rule: Rule, levels: Mapping[str, str], topic: str, births: Births
) -> Callable[[bytes, int], Decoded]:
    """What decodes the payloads of one topic; `births` is shared by all topics of the rule."""
    parts = topic.split("/")
    type_ = parts[2] if len(parts) > 2 else ""  # noqa: PLR2004 - namespace, group, type
    expected = {4: _OF_NODES, 5: _OF_DEVICES}.get(len(parts), frozenset())
    if type_ not in expected or "" in parts:
        return _nothing if type_ in ("NCMD", "DCMD") or parts[1:2] == ["STATE"] else _no_topic(topic)
    told = _Topic(rule, levels, parts, births)

    def decode(payload: bytes, now_us: int) -> Decoded:
        message = Payload()
        try:
            message.ParseFromString(payload)
        except DecodeError:
            return (), [Fault("not_sparkplug", "no Sparkplug B payload, or cut short", payload)]
        if len(message.metrics) > MEMBERS_MAX:
            what = f"{len(message.metrics)} metrics; at most {MEMBERS_MAX} are taken"
            return (), [Fault("too_many_members", what, payload)]
        try:
            return told.read(message, now_us)
        except NotDecodable as fault:
            return (), [fault.fault(payload)]

    return decode


class _Topic:
    """Reads the messages of one topic."""

    def __init__(self, rule: Rule, levels: Mapping[str, str], parts: list[str], births: Births) -> None:
        self._type = parts[2]
        self._id = NodeId(parts[1], parts[3])
        self._device = parts[4] if len(parts) > 4 else ""  # noqa: PLR2004 - the fifth is the device
        self._births = births
        self._book = PlanBook(rule, levels)
        self._plans_of: dict[str, Plans] = {}

    def read(self, message: Any, now_us: int) -> Decoded:
        """The readings of one message, after what it says about the node's life."""
        births, type_ = self._births, self._type
        seq = message.seq % SEQ_END if message.HasField("seq") else None
        if type_ == "NBIRTH":
            births.born(self._id, _birth_no(message))
        elif type_ == "NDEATH":
            is_of_now = births.died(self._id, _birth_no(message))
            return (self._online(0, None) if is_of_now else ()), []
        births.heard(self._id, seq, now_us)
        if births.node(self._id) is None:
            births.ask(self._id, now_us)
        if type_ == "DDEATH":
            return self._online(0, _time_us(message)), []
        out: list[Measurement] = []
        faults: list[Fault] = []
        if type_.endswith("BIRTH"):
            out += self._online(1, _time_us(message))
        node = births.node(self._id) or Node()
        for position, metric in enumerate(message.metrics):
            try:
                self._metric(metric, message, node, out)
            except NotDecodable as fault:
                if fault.reason == "unknown_alias":
                    births.ask(self._id, now_us)
                part = Payload(timestamp=message.timestamp, metrics=[metric]).SerializeToString()
                faults.append(Fault(fault.reason, f"metric {position}: {fault}", part))
        return out, faults

    def _metric(self, metric: Any, message: Any, node: Node, out: list[Measurement]) -> None:
        alias = self._alias(metric, node)
        if alias.name == _BIRTH_NO or metric.is_null:
            return
        kind = metric.WhichOneof("value")
        plans = self._plans(alias.device)
        plan = plans.known(alias.name) or plans.of(alias.name)
        if kind is None or plan is None:
            return
        value = getattr(metric, kind)
        if kind in ("int_value", "long_value"):
            value = _whole(value, metric.datatype or alias.datatype)
        number = number_of(plan, alias.name, value)
        if number is None:
            return
        if not math.isfinite(number):
            raise NotDecodable("bad_member", f"{alias.name}: {number!r} is no value")
        time_us = _time_us(metric) if metric.HasField("timestamp") else _time_us(message)
        flags = _HISTORICAL if metric.is_historical else 0
        quality = _property(metric, "Quality") if metric.HasField("properties") else None
        out.append(
            Measurement(
                plan.name,
                number,
                time_us,
                None if not isinstance(quality, int) else 100.0 if quality == _GOOD else 0.0,
                unit=plan.unit or alias.unit,
                flags=flags,
            )
        )

    def _alias(self, metric: Any, node: Node) -> Alias:
        """What a metric is called; a birth is learnt from."""
        name, number = metric.name, metric.alias if metric.HasField("alias") else None
        if not isinstance(name, str):  # bytes, where protobuf did not find UTF-8
            raise NotDecodable("bad_metric", "its name is not UTF-8")
        if self._type.endswith("BIRTH"):
            if not name:
                raise NotDecodable("bad_metric", "a metric of a birth has no name")
            unit = _property(metric, "engUnit") if metric.HasField("properties") else None
            alias = Alias(self._device, name, metric.datatype, unit if isinstance(unit, str) else None)
            node.learn(number, alias)
            return alias
        if name:
            return node.named.get((self._device, name)) or Alias(self._device, name, metric.datatype, None)
        if number is None:
            raise NotDecodable("bad_metric", "it has neither a name nor an alias")
        found = node.aliases.get(number)
        if found is None or found.device != self._device:
            raise NotDecodable("unknown_alias", f"no birth that was seen explains alias {number}")
        return found

    def _plans(self, device: str) -> Plans:
        plans = self._plans_of.get(device)
        if plans is None:
            source = f"{self._id.node}:{device}" if device else self._id.node
            known = {**self._id._asdict(), "device": device, "source": source}
            plans = self._book.only or self._book.of(tuple(known[name] for name in self._book.names))
            self._plans_of[device] = plans
        return plans

    def _online(self, value: int, time_us: int | None) -> list[Measurement]:
        plans = self._plans(self._device)
        plan = plans.known(ONLINE) or plans.of(ONLINE)
        return [] if plan is None else [Measurement(plan.name, value, time_us)]


def rebirth(now_us: int) -> bytes:
    """The payload of the NCMD that asks a node for a new birth."""
    message = Payload(timestamp=now_us // 1000)
    message.metrics.add(name=REBIRTH, datatype=_BOOLEAN, timestamp=now_us // 1000, boolean_value=True)
    return bytes(message.SerializeToString())


def _birth_no(message: Any) -> int | None:
    for metric in message.metrics:
        if metric.name == _BIRTH_NO and metric.WhichOneof("value") in ("int_value", "long_value"):
            return int(getattr(metric, metric.WhichOneof("value")))
    return None


def _time_us(stamped: Any) -> int | None:
    """The time of a metric or payload; None when there is none."""
    if not stamped.HasField("timestamp"):
        return None
    if stamped.timestamp > _LATEST_MS:
        raise NotDecodable("bad_time", f"{stamped.timestamp} ms lies outside 1677..2262")
    return int(stamped.timestamp) * 1000


def _whole(value: int, datatype: int) -> int:
    """A whole number as it was before it was put into an unsigned field."""
    bits = _SIGNED_BITS.get(datatype)
    if bits is None:
        return value
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _property(metric: Any, name: str) -> Any:
    for key, value in zip(metric.properties.keys, metric.properties.values, strict=False):
        if key == name and not value.is_null and value.WhichOneof("value"):
            return getattr(value, value.WhichOneof("value"))
    return None


def _nothing(payload: bytes, now_us: int) -> Decoded:  # noqa: ARG001 - of every decoder
    return (), []


def _no_topic(topic: str) -> Callable[[bytes, int], Decoded]:
    what = f"{topic[:80]!r} is not NAMESPACE/GROUP/TYPE/NODE or, of devices, NAMESPACE/GROUP/TYPE/NODE/DEVICE"
    return lambda payload, _: ((), [Fault("bad_topic", what, payload)])
