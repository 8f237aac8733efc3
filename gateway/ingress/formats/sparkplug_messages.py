"""Sparkplug B payloads as protobuf messages, described here: no compiler of .proto files is needed.

Field numbers and types are those of the specification (Eclipse Sparkplug 3.0, section 6.4.1). What
measurements do not need (data sets, templates, files) is left out, and passed over as unknown fields.
"""

from __future__ import annotations

from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

__all__ = ["DecodeError", "Payload"]

_PACKAGE: Final = "tidegate.sparkplug_b"
_Field = descriptor_pb2.FieldDescriptorProto
_KINDS: Final = {
    "uint64": _Field.TYPE_UINT64,
    "uint32": _Field.TYPE_UINT32,
    "float": _Field.TYPE_FLOAT,
    "double": _Field.TYPE_DOUBLE,
    "bool": _Field.TYPE_BOOL,
    "string": _Field.TYPE_STRING,
}
_VALUES: Final = (
    ("int_value", "uint32"),
    ("long_value", "uint64"),
    ("float_value", "float"),
    ("double_value", "double"),
    ("boolean_value", "bool"),
    ("string_value", "string"),
)


def _message(file: descriptor_pb2.FileDescriptorProto, name: str, fields: list[tuple[int, str, str]]) -> Any:
    """Add a message; a kind is a scalar's name or a message's, after `*` when it is repeated."""
    message = file.message_type.add(name=name)
    for number, field, kind in fields:
        scalar = kind.lstrip("*")
        added = message.field.add(
            name=field,
            number=number,
            label=_Field.LABEL_REPEATED if kind.startswith("*") else _Field.LABEL_OPTIONAL,
            type=_KINDS.get(scalar, _Field.TYPE_MESSAGE),
        )
        if scalar not in _KINDS:
            added.type_name = f".{_PACKAGE}.{scalar}"
    return message


def _with_value(message: Any, first: int) -> None:
    """Add the values a message may hold one of, numbered from `first`."""
    message.oneof_decl.add(name="value")
    for number, (field, kind) in enumerate(_VALUES, start=first):
        message.field.add(
            name=field, number=number, label=_Field.LABEL_OPTIONAL, type=_KINDS[kind], oneof_index=0
        )


def _described() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="tidegate/sparkplug_b.proto", package=_PACKAGE)
    value = _message(file, "PropertyValue", [(1, "type", "uint32"), (2, "is_null", "bool")])
    _with_value(value, 3)
    _message(file, "PropertySet", [(1, "keys", "*string"), (2, "values", "*PropertyValue")])
    metric = _message(
        file,
        "Metric",
        [
            (1, "name", "string"),
            (2, "alias", "uint64"),
            (3, "timestamp", "uint64"),
            (4, "datatype", "uint32"),
            (5, "is_historical", "bool"),
            (6, "is_transient", "bool"),
            (7, "is_null", "bool"),
            (9, "properties", "PropertySet"),
        ],
    )
    _with_value(metric, 10)
    _message(file, "Payload", [(1, "timestamp", "uint64"), (2, "metrics", "*Metric"), (3, "seq", "uint64")])
    return file


_pool = descriptor_pool.DescriptorPool()  # of our own: another package may describe the same messages
_pool.Add(_described())
Payload: Any = message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"{_PACKAGE}.Payload"))
"""A payload: timestamp (ms), metrics, seq."""
