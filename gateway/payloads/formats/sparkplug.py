"""Sparkplug B: births, data and deaths on `NAMESPACE/GROUP/TYPE/NODE[/DEVICE]`. Pure.

The protobuf messages are declared here (Eclipse Sparkplug 3.0, section 6.4.1), without data sets, templates
and files. Data is read with the aliases of earlier births, kept in `SparkplugBirths`. Numeric and boolean
metrics are readings, text as in `fields`; null metrics and `bdSeq` are not. Births and deaths are readings
of `online`, 1 and 0. The property `Quality` (192 is good) becomes the quality, `engUnit` the unit. An
invalid metric costs only itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from cloud_sync.model.reading_builder import MAX_TIME_US
from cloud_sync.model.records import Flag
from gateway.payloads.formats.sparkplug_births import (
    SEQ_MODULUS,
    MetricAlias,
    SparkplugBirths,
    SparkplugNode,
    SparkplugNodeId,
)
from gateway.payloads.measurement import (
    Fault,
    FieldMap,
    Measurement,
    PayloadDecodeError,
    check_member_count,
    convert_field_value,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gateway.payloads.measurement import Decoder, DecodeResult, DeviceFields
    from gateway.payloads.rule import PayloadRule

__all__ = ["DecodeError", "Payload"]

_Message = Any  # of classes that protobuf makes at run time
_PROTOBUF_PACKAGE: Final = "tidegate.sparkplug_b"
_FieldDescriptor = descriptor_pb2.FieldDescriptorProto
_SCALAR_TYPES: Final = {
    "uint64": _FieldDescriptor.TYPE_UINT64,
    "uint32": _FieldDescriptor.TYPE_UINT32,
    "float": _FieldDescriptor.TYPE_FLOAT,
    "double": _FieldDescriptor.TYPE_DOUBLE,
    "bool": _FieldDescriptor.TYPE_BOOL,
    "string": _FieldDescriptor.TYPE_STRING,
}
_VALUE_FIELDS: Final = (
    ("int_value", "uint32"),
    ("long_value", "uint64"),
    ("float_value", "float"),
    ("double_value", "double"),
    ("boolean_value", "bool"),
    ("string_value", "string"),
)


def _number_values(first: int) -> list[tuple[int, str, str]]:
    """The values of which a message holds one, numbered from `first`."""
    return [(number, name, f"|{kind}") for number, (name, kind) in enumerate(_VALUE_FIELDS, start=first)]


_MESSAGE_FIELDS: Final = {
    "PropertyValue": [(1, "type", "uint32"), (2, "is_null", "bool"), *_number_values(3)],
    "PropertySet": [(1, "keys", "*string"), (2, "values", "*PropertyValue")],
    "Metric": [
        (1, "name", "string"),
        (2, "alias", "uint64"),
        (3, "timestamp", "uint64"),
        (4, "datatype", "uint32"),
        (5, "is_historical", "bool"),
        (6, "is_transient", "bool"),
        (7, "is_null", "bool"),
        (9, "properties", "PropertySet"),
        *_number_values(10),
    ],
    "Payload": [(1, "timestamp", "uint64"), (2, "metrics", "*Metric"), (3, "seq", "uint64")],
}
"""(number, name, kind) of each field: a scalar or message, after `*` when repeated, `|` in the oneof."""


def _build_file_descriptor() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="tidegate/sparkplug_b.proto", package=_PROTOBUF_PACKAGE)
    for name, fields in _MESSAGE_FIELDS.items():
        message = file.message_type.add(name=name)
        for number, field, kind in fields:
            bare = kind.lstrip("*|")
            is_repeated = kind.startswith("*")
            added = message.field.add(
                name=field,
                number=number,
                label=_FieldDescriptor.LABEL_REPEATED if is_repeated else _FieldDescriptor.LABEL_OPTIONAL,
                type=_SCALAR_TYPES.get(bare, _FieldDescriptor.TYPE_MESSAGE),
            )
            if bare not in _SCALAR_TYPES:
                added.type_name = f".{_PROTOBUF_PACKAGE}.{bare}"
            if kind.startswith("|"):
                added.oneof_index = 0
        if any(kind.startswith("|") for _, _, kind in fields):
            message.oneof_decl.add(name="value")
    return file


_descriptor_pool = descriptor_pool.DescriptorPool()  # our own: a package may describe the same messages
_descriptor_pool.Add(_build_file_descriptor())
Payload: Any = message_factory.GetMessageClass(
    _descriptor_pool.FindMessageTypeByName(f"{_PROTOBUF_PACKAGE}.Payload")
)
"""A payload: timestamp (ms), metrics, seq."""


REBIRTH_METRIC: Final = "Node Control/Rebirth"
ONLINE_MEMBER: Final = "online"
_NODE_MESSAGE_TYPES: Final = frozenset({"NBIRTH", "NDATA", "NDEATH"})
_DEVICE_MESSAGE_TYPES: Final = frozenset({"DBIRTH", "DDATA", "DDEATH"})
_BD_SEQ_METRIC: Final = "bdSeq"
_QUALITY_GOOD: Final = 192
_SIGNED_BITS: Final[Mapping[int, int]] = {1: 8, 2: 16, 3: 32, 4: 64}
_HISTORICAL_FLAG: Final = int(Flag.HISTORICAL)
_LATEST_MS: Final = MAX_TIME_US // 1000
_DATATYPE_BOOLEAN: Final = 11


def build_sparkplug_decoder(
    rule: PayloadRule, levels: Mapping[str, str], topic: str, births: SparkplugBirths
) -> Decoder:
    """Decodes one topic; `births` is shared by all topics of the gateway."""
    parts = topic.split("/")
    type_ = parts[2] if len(parts) > 2 else ""  # noqa: PLR2004 - namespace, group, type
    expected = {4: _NODE_MESSAGE_TYPES, 5: _DEVICE_MESSAGE_TYPES}.get(len(parts), frozenset())
    if type_ in expected and "" not in parts:
        return _TopicDecoder(rule, levels, parts, births).decode
    if type_ in ("NCMD", "DCMD") or parts[1:2] == ["STATE"]:
        return lambda _payload, _now_us: ((), [])
    what = f"{topic[:80]!r} is not NAMESPACE/GROUP/TYPE/NODE or, of devices, NAMESPACE/GROUP/TYPE/NODE/DEVICE"
    return lambda payload, _now_us: ((), [Fault("bad_topic", what, payload)])


class _TopicDecoder:
    """Decodes the messages of one topic."""

    def __init__(
        self, rule: PayloadRule, levels: Mapping[str, str], parts: list[str], births: SparkplugBirths
    ) -> None:
        self._type = parts[2]
        self._id = SparkplugNodeId(parts[1], parts[3])
        self._device = parts[4] if len(parts) > 4 else ""  # noqa: PLR2004 - the fifth is the device
        self._births = births
        self._fields = FieldMap(rule, levels)
        self._fields_by_device: dict[str, DeviceFields] = {}

    def decode(self, payload: bytes, now_us: int) -> DecodeResult:
        """The readings of one message, after what it says of the node's life is recorded."""
        message = Payload()
        try:
            message.ParseFromString(payload)
        except DecodeError:
            raise PayloadDecodeError("not_sparkplug", "not a Sparkplug B payload, or cut short") from None
        check_member_count(len(message.metrics), "metrics")
        births, type_ = self._births, self._type
        seq = message.seq % SEQ_MODULUS if message.HasField("seq") else None
        if type_ == "NBIRTH":
            births.record_birth(self._id, _read_bd_seq(message))
        elif type_ == "NDEATH":
            is_current_birth = births.record_death(self._id, _read_bd_seq(message))
            return (self._online(0, None) if is_current_birth else ()), []
        births.check_sequence(self._id, seq, now_us)
        node = births.node(self._id)
        if node is None:
            births.request_rebirth(self._id, now_us)
            node = SparkplugNode()
        if type_ == "DDEATH":
            return self._online(0, _read_time_us(message)), []
        measurements, faults = self._read_metrics(message, node, now_us)
        if type_.endswith("BIRTH"):
            measurements = self._online(1, _read_time_us(message)) + measurements
        return measurements, faults

    def _read_metrics(
        self, message: _Message, node: SparkplugNode, now_us: int
    ) -> tuple[list[Measurement], list[Fault]]:
        measurements, faults = [], []
        for position, metric in enumerate(message.metrics):
            try:
                measurement = self._read_metric(metric, message, node)
            except PayloadDecodeError as fault:
                if fault.reason == "unknown_alias":
                    self._births.request_rebirth(self._id, now_us)
                part = Payload(timestamp=message.timestamp, metrics=[metric]).SerializeToString()
                faults.append(Fault(fault.reason, f"metric {position}: {fault}", part))
                continue
            if measurement is not None:
                measurements.append(measurement)
        return measurements, faults

    def _read_metric(self, metric: _Message, message: _Message, node: SparkplugNode) -> Measurement | None:
        alias = self._find_alias(metric, node)
        kind = metric.WhichOneof("value")
        if alias.name == _BD_SEQ_METRIC or metric.is_null or kind is None:
            return None
        mapping = self._device_fields(alias.device)[alias.name]
        if mapping is None:
            return None
        value = getattr(metric, kind)
        if kind in ("int_value", "long_value"):
            value = _to_signed(value, metric.datatype or alias.datatype)
        number = convert_field_value(mapping, alias.name, value)
        if number is None:
            return None
        quality = _read_property(metric, "Quality") if metric.HasField("properties") else None
        return Measurement(
            mapping.name,
            number,
            _read_time_us(metric if metric.HasField("timestamp") else message),
            None if not isinstance(quality, int) else 100.0 if quality == _QUALITY_GOOD else 0.0,
            unit=mapping.unit or alias.unit,
            flags=_HISTORICAL_FLAG if metric.is_historical else 0,
        )

    def _find_alias(self, metric: _Message, node: SparkplugNode) -> MetricAlias:
        """The declaration of a metric; a birth adds its own."""
        name, number = metric.name, metric.alias if metric.HasField("alias") else None
        if not isinstance(name, str):  # bytes, where protobuf did not find UTF-8
            raise PayloadDecodeError("bad_metric", "its name is not UTF-8")
        if self._type.endswith("BIRTH"):
            if not name:
                raise PayloadDecodeError("bad_metric", "a metric of a birth has no name")
            unit = _read_property(metric, "engUnit") if metric.HasField("properties") else None
            alias = MetricAlias(self._device, name, metric.datatype, unit if isinstance(unit, str) else None)
            node.add_metric(number, alias)
            return alias
        if name:
            return node.named.get((self._device, name)) or MetricAlias(
                self._device, name, metric.datatype, None
            )
        if number is None:
            raise PayloadDecodeError("bad_metric", "it has neither a name nor an alias")
        declared = node.aliases.get(number)
        if declared is None or declared.device != self._device:
            raise PayloadDecodeError("unknown_alias", f"no birth received declares alias {number}")
        return declared

    def _device_fields(self, device: str) -> DeviceFields:
        fields = self._fields_by_device.get(device)
        if fields is None:
            source = f"{self._id.node}:{device}" if device else self._id.node
            names = {**self._id._asdict(), "device": device, "source": source}
            fields = self._fields_by_device[device] = self._fields.find_device(names.__getitem__)
        return fields

    def _online(self, value: int, time_us: int | None) -> list[Measurement]:
        mapping = self._device_fields(self._device)[ONLINE_MEMBER]
        return [] if mapping is None else [Measurement(mapping.name, value, time_us)]


def encode_rebirth_command(now_us: int) -> bytes:
    """The payload of the NCMD that requests a rebirth."""
    message = Payload(timestamp=now_us // 1000)
    message.metrics.add(
        name=REBIRTH_METRIC, datatype=_DATATYPE_BOOLEAN, timestamp=now_us // 1000, boolean_value=True
    )
    return bytes(message.SerializeToString())


def _read_bd_seq(message: _Message) -> int | None:
    for metric in message.metrics:
        if metric.name == _BD_SEQ_METRIC and metric.WhichOneof("value") in ("int_value", "long_value"):
            return int(getattr(metric, metric.WhichOneof("value")))
    return None


def _read_time_us(stamped: _Message) -> int | None:
    """The time of a metric or message; None when it has none."""
    if not stamped.HasField("timestamp"):
        return None
    if stamped.timestamp > _LATEST_MS:
        raise PayloadDecodeError("bad_time", f"{stamped.timestamp} ms lies outside 1677..2262")
    return int(stamped.timestamp) * 1000


def _to_signed(value: int, datatype: int) -> int:
    """A signed integer out of the unsigned field that carries it."""
    bits = _SIGNED_BITS.get(datatype)
    if bits is None:
        return value
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _read_property(metric: _Message, name: str) -> object:
    for key, value in zip(metric.properties.keys, metric.properties.values, strict=False):
        if key == name and not value.is_null and value.WhichOneof("value"):
            return getattr(value, value.WhichOneof("value"))
    return None
