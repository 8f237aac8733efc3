"""A payload rule: which topics carry which format, and how fields become series. Pure.

`build_rule` fills in defaults and rejects invalid combinations. Names that templates may use besides topic
levels:

    reading, ndjson   sensor_id, sensor_type: members of the reading
    fields, csv       member: the dotted path (or column); any other path: the text found there
    senml             base: the base name; member: the name after it
    line_protocol     member: measurement, then .field unless it is `value`; any other: the tag of that name
    sparkplug_b       group, node, device ("" for the node itself), source: node or node:device;
                      member: the metric's name
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, get_args

from cloud_sync.model.reading_builder import TIME_UNITS
from gateway.payloads.topics import NameTemplate, TopicPattern

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import tzinfo

PayloadFormat = Literal[
    "reading", "ndjson", "fields", "number", "csv", "senml", "line_protocol", "sparkplug_b", "ignore"
]
PAYLOAD_FORMATS: Final = get_args(PayloadFormat)
COMPANION_FIELDS: Final = (
    "quality",
    "battery_level",
    "signal_strength",
    "seq",
    "location",
    "manufacturer",
    "firmware_version",
)
"""What may go with every reading of a payload, in the order of `Measurement`."""
MAX_PAYLOAD_BYTES: Final = 8 << 20

_DEFAULT_SENSOR_IDS: Final = {"senml": "{base}", "sparkplug_b": "{group}.{source}"}
_PAYLOAD_NAMES: Final[dict[str, frozenset[str] | None]] = {
    "reading": frozenset({"sensor_id", "sensor_type"}),
    "ndjson": frozenset({"sensor_id", "sensor_type"}),
    "fields": None,
    "number": frozenset(),
    "csv": None,
    "senml": frozenset({"base", "member"}),
    "line_protocol": None,
    "sparkplug_b": frozenset({"group", "node", "device", "source", "member"}),
    "ignore": frozenset(),
}
_RECORD_FORMATS: Final = ("fields", "csv")
_MULTI_FIELD_FORMATS: Final = (*_RECORD_FORMATS, "senml", "line_protocol", "sparkplug_b")


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldConversion:
    """What one measured member becomes: value * scale + offset, in `unit`, called `name`.

    `values` gives texts (and "true", "false") their numbers.
    """

    name: str | None = None
    unit: str | None = None
    scale: float = 1.0
    offset: float = 0.0
    values: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_identity(self) -> bool:
        """Whether values stay as they are."""
        return self.scale == 1.0 and self.offset == 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PayloadRule:
    """One rule, complete. See `rule_of` for what the parts mean."""

    topic: TopicPattern
    format: PayloadFormat
    sensor_id: NameTemplate
    sensor_type: NameTemplate
    otherwise: FieldConversion
    members: Mapping[str, FieldConversion]
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    companions: Mapping[str, str]
    time: str | None
    time_unit: str
    time_zone: tzinfo | None
    root: tuple[str, ...]
    may_be_empty: bool
    columns: tuple[str, ...]
    separator: str
    max_payload_bytes: int

    def names_of(self, topic: str) -> dict[str, str] | None:
        """The named levels of a topic; None when this rule is not for it."""
        return self.topic.match(topic)


def build_rule(
    topic: str,
    format: PayloadFormat,  # noqa: A002 - the configuration's word
    *,
    sensor_id: str | None = None,
    sensor_type: str | None = None,
    unit: str | None = None,
    scale: float = 1.0,
    offset: float = 0.0,
    values: Mapping[str, float] | None = None,
    members: Mapping[str, FieldConversion] | None = None,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    companions: Mapping[str, str] | None = None,
    time: str | None = None,
    time_unit: str = "auto",
    time_zone: tzinfo | None = None,
    root: str | None = None,
    may_be_empty: bool = False,
    columns: tuple[str, ...] = (),
    separator: str = ",",
    max_payload_bytes: int = MAX_PAYLOAD_BYTES,
) -> PayloadRule:
    """A rule, with defaults for what is not given.

    Args:
        topic: a topic pattern, such as `tele/{sensor_id}/SENSOR`.
        format: one of `FORMATS`; "ignore" acknowledges and takes nothing.
        sensor_id: a template; `{sensor_id}` unless the shape knows better.
        sensor_type: a template; `{sensor_type}` where the topic names it, else `{member}`.
        unit: of every member without one of its own; so are scale, offset and values.
        scale: see `Member`.
        offset: see `Member`.
        values: see `Member`.
        members: by dotted path or column, * for any text.
        include: paths to take, with *; all that hold numbers when there are none. Text that is a number
            counts where a member is named here (without *) or in `members`.
        exclude: paths to leave out, with *.
        companions: where the payload has what is in `COMPANIONS`.
        time: the path of the time; without it, or where it is absent, the time of receipt counts.
        time_unit: one of `reading_builder.TIME_UNITS`, of line protocol's timestamps too ("auto": ns).
        time_zone: of times that are text without an offset.
        root: of fields, the path of the member that holds the measurements; their paths begin there.
        may_be_empty: of fields and number, whether a payload without any reading is as it should be.
        columns: of csv, in order; an empty name skips the column.
        separator: of csv, one character.
        max_payload_bytes: when a payload is decompressed.

    Raises:
        ValueError: what does not go together, in words.
    """
    try:
        pattern = TopicPattern(topic)
    except ValueError as fault:
        raise ValueError(f"topic = {topic!r}: {fault}") from None
    if sensor_id is None:
        sensor_id = (
            "{sensor_id}" if "sensor_id" in pattern.names else _DEFAULT_SENSOR_IDS.get(format, "{sensor_id}")
        )
    if sensor_type is None:
        plain = "sensor_type" in pattern.names or format in ("reading", "ndjson", "number")
        sensor_type = "{sensor_type}" if plain else "{member}"
    templates = NameTemplate(sensor_id), NameTemplate(sensor_type)
    _check_template_names(format, pattern, *templates)
    made = PayloadRule(
        topic=pattern,
        format=format,
        sensor_id=templates[0],
        sensor_type=templates[1],
        otherwise=FieldConversion(unit=unit, scale=scale, offset=offset, values=values or {}),
        members=dict(members or {}),
        include=tuple(include),
        exclude=tuple(exclude),
        companions=dict(companions or {}),
        time=time,
        time_unit=time_unit,
        time_zone=time_zone,
        root=() if root is None else tuple(root.split(".")),
        may_be_empty=may_be_empty,
        columns=tuple(columns),
        separator=separator,
        max_payload_bytes=max_payload_bytes,
    )
    _check_rule(made)
    return made


def _check_template_names(
    format_: PayloadFormat, pattern: TopicPattern, sensor_id: NameTemplate, sensor_type: NameTemplate
) -> None:
    """Refuse names that neither the topic nor the format knows."""
    payload = _PAYLOAD_NAMES[format_]
    for key, template in (("sensor_id", sensor_id), ("sensor_type", sensor_type)):
        if format_ == "ignore" or payload is None:
            continue
        unknown = [name for name in template.names if name not in pattern.names and name not in payload]
        if unknown:
            known = ", ".join([*pattern.names, *sorted(payload)]) or "nothing"
            raise ValueError(
                f"{key} = {template.template!r} needs {unknown[0]!r}, but format {format_!r} on this topic "
                f"knows {known}; name a level of the topic like {{{unknown[0]}}}"
            )
    if "member" in sensor_id.names and "member" not in pattern.names:
        raise ValueError("sensor_id cannot be made of {member}: a device has many")


def _check_rule(rule: PayloadRule) -> None:
    """Refuse what a format does not know."""
    if rule.time_unit not in TIME_UNITS:
        raise ValueError(f"time_unit = {rule.time_unit!r} must be one of {', '.join(TIME_UNITS)}")
    if (rule.format == "csv") != bool(rule.columns):
        raise ValueError('columns go with format "csv", which needs them')
    if len(rule.separator) != 1:
        raise ValueError("separator is one character")
    unknown = sorted(set(rule.companions) - set(COMPANION_FIELDS))
    if unknown:
        raise ValueError(f"companions: {unknown[0]!r} is none of {', '.join(COMPANION_FIELDS)}")
    _check_members(rule)
    if rule.format == "csv":
        named = {rule.time, *rule.companions.values()} - {None}
        absent = sorted(str(name) for name in named - set(rule.columns))
        if absent:
            raise ValueError(f"{absent[0]!r} is not one of the columns")


def _check_members(rule: PayloadRule) -> None:
    """Refuse what only formats with members know."""
    if rule.format not in _RECORD_FORMATS and (rule.companions or rule.time):
        raise ValueError(
            f"time and companions are for {' and '.join(_RECORD_FORMATS)}; {rule.format} says its own"
        )
    if rule.format != "fields" and rule.root:
        raise ValueError('root is for format "fields"')
    if rule.format not in ("fields", "number") and rule.may_be_empty:
        raise ValueError('may_be_empty is for formats "fields" and "number"')
    if rule.format not in _MULTI_FIELD_FORMATS and (rule.include or rule.exclude or rule.members):
        raise ValueError(f"include, exclude and members are for {', '.join(_MULTI_FIELD_FORMATS)}")
