"""A rule: which topics carry which payload shape, and what its members are called. Pure.

`rule_of` fills in what a configuration leaves out and refuses what makes no sense together. The names that
templates may use beside the levels of the topic:

    reading, ndjson   sensor_id, sensor_type: members of the reading
    fields, csv       member: the dotted path (or column) measured; any other path: that member's text
    senml             base: the base name; member: the name after it
    line_protocol     member: measurement, then .field unless it is `value`; any other: that tag's text
    sparkplug_b       group, node, device ("" of the node itself), source: node or node:device;
                      member: the metric's name
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, get_args

from cloud_sync.instants import TIME_UNITS
from gateway.ingress.formats.naming import Template, TopicPattern

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import tzinfo

Format = Literal[
    "reading", "ndjson", "fields", "number", "csv", "senml", "line_protocol", "sparkplug_b", "ignore"
]
FORMATS: Final = get_args(Format)
COMPANIONS: Final = (
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

_SENSOR_ID: Final = {"senml": "{base}", "sparkplug_b": "{group}.{source}"}
_OF_PAYLOAD: Final[dict[str, frozenset[str] | None]] = {
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
_RECORDS: Final = ("fields", "csv")
_MANY: Final = (*_RECORDS, "senml", "line_protocol", "sparkplug_b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """What one measured member becomes: value * scale + offset, in `unit`, called `name`.

    `values` gives texts (and "true", "false") their numbers.
    """

    name: str | None = None
    unit: str | None = None
    scale: float = 1.0
    offset: float = 0.0
    values: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Whether values stay as they are."""
        return self.scale == 1.0 and self.offset == 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule, complete. See `rule_of` for what the parts mean."""

    topic: TopicPattern
    format: Format
    sensor_id: Template
    sensor_type: Template
    otherwise: Member
    members: Mapping[str, Member]
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


def rule_of(
    topic: str,
    format: Format,  # noqa: A002 - the configuration's word
    *,
    sensor_id: str | None = None,
    sensor_type: str | None = None,
    unit: str | None = None,
    scale: float = 1.0,
    offset: float = 0.0,
    values: Mapping[str, float] | None = None,
    members: Mapping[str, Member] | None = None,
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
) -> Rule:
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
        time_unit: one of `cloud_sync.instants.TIME_UNITS`, of line protocol's timestamps too ("auto": ns).
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
        sensor_id = "{sensor_id}" if "sensor_id" in pattern.names else _SENSOR_ID.get(format, "{sensor_id}")
    if sensor_type is None:
        plain = "sensor_type" in pattern.names or format in ("reading", "ndjson", "number")
        sensor_type = "{sensor_type}" if plain else "{member}"
    templates = Template(sensor_id), Template(sensor_type)
    _check_names(format, pattern, *templates)
    made = Rule(
        topic=pattern,
        format=format,
        sensor_id=templates[0],
        sensor_type=templates[1],
        otherwise=Member(unit=unit, scale=scale, offset=offset, values=values or {}),
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
    _check(made)
    return made


def _check_names(format_: Format, pattern: TopicPattern, sensor_id: Template, sensor_type: Template) -> None:
    """Refuse names that neither the topic nor the format knows."""
    payload = _OF_PAYLOAD[format_]
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


def _check(rule: Rule) -> None:
    """Refuse what a format does not know."""
    if rule.time_unit not in TIME_UNITS:
        raise ValueError(f"time_unit = {rule.time_unit!r} must be one of {', '.join(TIME_UNITS)}")
    if (rule.format == "csv") != bool(rule.columns):
        raise ValueError('columns go with format "csv", which needs them')
    if len(rule.separator) != 1:
        raise ValueError("separator is one character")
    unknown = sorted(set(rule.companions) - set(COMPANIONS))
    if unknown:
        raise ValueError(f"companions: {unknown[0]!r} is none of {', '.join(COMPANIONS)}")
    _check_members(rule)
    if rule.format == "csv":
        named = {rule.time, *rule.companions.values()} - {None}
        absent = sorted(str(name) for name in named - set(rule.columns))
        if absent:
            raise ValueError(f"{absent[0]!r} is not one of the columns")


def _check_members(rule: Rule) -> None:
    """Refuse what only formats with members know."""
    if rule.format not in _RECORDS and (rule.companions or rule.time):
        raise ValueError(f"time and companions are for {' and '.join(_RECORDS)}; {rule.format} says its own")
    if rule.format != "fields" and rule.root:
        raise ValueError('root is for format "fields"')
    if rule.format not in ("fields", "number") and rule.may_be_empty:
        raise ValueError('may_be_empty is for formats "fields" and "number"')
    if rule.format not in _MANY and (rule.include or rule.exclude or rule.members):
        raise ValueError(f"include, exclude and members are for {', '.join(_MANY)}")
