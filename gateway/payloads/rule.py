"""A payload rule: which topics carry which format, and how fields become series. Pure.

Names that templates may use besides topic levels:

    reading, ndjson   sensor_id, sensor_type: members of the reading
    fields, csv       member: the dotted path (or column); any other path: the text found there
    senml             base: the base name; member: the name after it
    line_protocol     member: measurement, then .field unless it is `value`; any other: the tag of that name
    sparkplug_b       group, node, device ("" for the node itself), source: node or node:device;
                      member: the metric's name
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Final, Literal

from cloud_sync.model.reading_builder import TIME_UNITS
from gateway.payloads.topics import NameTemplate, TopicPattern

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import tzinfo

PayloadFormat = Literal[
    "reading", "ndjson", "fields", "number", "csv", "senml", "line_protocol", "sparkplug_b", "ignore"
]
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
_SINGLE_VALUE_FORMATS: Final = ("reading", "ndjson", "number")
_RECORD_FORMATS: Final = ("fields", "csv")
_MULTI_FIELD_FORMATS: Final = (*_RECORD_FORMATS, "senml", "line_protocol", "sparkplug_b")


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldConversion:
    """A member becomes value * scale + offset, in `unit`, named `name`; `values` are numbers for texts."""

    name: str | None = None
    unit: str | None = None
    scale: float = 1.0
    offset: float = 0.0
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PayloadRule:
    """A rule as it is configured, complete; raises ValueError for values that do not go together.

    `members`, `include` and `exclude` are paths or columns, where * stands for any text; without `include`
    every member that is a number counts. Text that is a number counts where a member is named in `include`
    (without *) or in `members`. `unit`, `scale`, `offset` and `values` are of members without their own.
    Without a `time` the time of receipt counts. Paths of measurements begin at the member `root`.
    """

    topic: str
    format: PayloadFormat
    _: KW_ONLY
    sensor_id: str | None = None
    sensor_type: str | None = None
    unit: str | None = None
    scale: float = 1.0
    offset: float = 0.0
    values: Mapping[str, float] = field(default_factory=dict)
    members: Mapping[str, FieldConversion] = field(default_factory=dict)
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    companions: Mapping[str, str] = field(default_factory=dict)
    time: str | None = None
    time_unit: str = "auto"
    time_zone: tzinfo | None = None
    root: str | None = None
    may_be_empty: bool = False
    columns: Sequence[str] = ()
    separator: str = ","
    max_payload_bytes: int = MAX_PAYLOAD_BYTES

    def __post_init__(self) -> None:
        _check_template_names(self)
        _check_values(self)

    @cached_property
    def topic_pattern(self) -> TopicPattern:
        """The compiled topic."""
        try:
            return TopicPattern(self.topic)
        except ValueError as fault:
            raise ValueError(f"topic = {self.topic!r}: {fault}") from None

    @cached_property
    def sensor_id_template(self) -> NameTemplate:
        """The template of sensor_ids, the default filled in."""
        if self.sensor_id is not None:
            return NameTemplate(self.sensor_id)
        names_device = "sensor_id" in self.topic_pattern.names
        return NameTemplate(
            "{sensor_id}" if names_device else _DEFAULT_SENSOR_IDS.get(self.format, "{sensor_id}")
        )

    @cached_property
    def sensor_type_template(self) -> NameTemplate:
        """The template of sensor_types, the default filled in."""
        if self.sensor_type is not None:
            return NameTemplate(self.sensor_type)
        plain = "sensor_type" in self.topic_pattern.names or self.format in _SINGLE_VALUE_FORMATS
        return NameTemplate("{sensor_type}" if plain else "{member}")

    @cached_property
    def default_conversion(self) -> FieldConversion:
        """What members become that have no conversion of their own."""
        return FieldConversion(unit=self.unit, scale=self.scale, offset=self.offset, values=self.values)


def _check_template_names(rule: PayloadRule) -> None:
    """Reject names that neither the topic nor the format knows."""
    known = _PAYLOAD_NAMES[rule.format]
    topic_names, sensor_id = rule.topic_pattern.names, rule.sensor_id_template
    for key, template in (("sensor_id", sensor_id), ("sensor_type", rule.sensor_type_template)):
        if rule.format == "ignore" or known is None:
            continue
        unknown = [name for name in template.names if name not in topic_names and name not in known]
        if unknown:
            listed = ", ".join([*topic_names, *sorted(known)]) or "nothing"
            raise ValueError(
                f"{key} = {template.template!r} needs {unknown[0]!r}, but format {rule.format!r} on this "
                f"topic knows {listed}; name a level of the topic like {{{unknown[0]}}}"
            )
    if "member" in sensor_id.names and "member" not in topic_names:
        raise ValueError("sensor_id cannot be made of {member}: a device has many")


def _check_values(rule: PayloadRule) -> None:
    """Reject what a format does not know."""
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
        absent = sorted({rule.time or "", *rule.companions.values()} - {"", *rule.columns})
        if absent:
            raise ValueError(f"{absent[0]!r} is not one of the columns")


def _check_members(rule: PayloadRule) -> None:
    """Reject what only formats with members know."""
    if rule.format not in _RECORD_FORMATS and (rule.companions or rule.time):
        raise ValueError(
            f"time and companions are for {' and '.join(_RECORD_FORMATS)}; {rule.format} says its own"
        )
    if rule.format != "fields" and rule.root is not None:
        raise ValueError('root is for format "fields"')
    if rule.format not in ("fields", "number") and rule.may_be_empty:
        raise ValueError('may_be_empty is for formats "fields" and "number"')
    if rule.format not in _MULTI_FIELD_FORMATS and (rule.include or rule.exclude or rule.members):
        raise ValueError(f"include, exclude and members are for {', '.join(_MULTI_FIELD_FORMATS)}")
