"""Payload formats by name, the decoder for a topic, and the gateway's ordered set of rules. Pure.

The first rule whose topic matches applies; a topic no rule matches carries JSON readings on the gateway's
topic template. A decoder is `(payload, now_us) -> (measurements, faults)`; it caches names and holds no
other state, except Sparkplug's births, which are passed in. Compression is removed before it, and the number
of faults limited after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from gateway.payloads.formats import fields, json_reading, line_protocol, senml
from gateway.payloads.formats.sparkplug_births import SparkplugBirths
from gateway.payloads.measurement import (
    COMPRESSION_MAGIC,
    JSON_ERRORS,
    Decoder,
    Fault,
    PayloadDecodeError,
    decompress_payload,
    limit_faults,
)
from gateway.payloads.rule import MAX_PAYLOAD_BYTES, PayloadRule
from gateway.payloads.topics import SeriesName, find_series_name_fault

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from gateway.payloads.formats.json_reading import JsonReading
    from gateway.payloads.measurement import DecodeResult, Measurement
    from gateway.payloads.topics import TopicTemplate

T = TypeVar("T")

_BUILDERS: Mapping[str, Callable[[PayloadRule, Mapping[str, str]], Decoder]] = {
    "reading": json_reading.build_reading_decoder,
    "ndjson": json_reading.build_reading_decoder,
    "fields": fields.build_fields_decoder,
    "number": fields.build_number_decoder,
    "csv": fields.build_csv_decoder,
    "senml": senml.build_senml_decoder,
    "line_protocol": line_protocol.build_line_protocol_decoder,
    "ignore": lambda _rule, _levels: lambda _payload, _now_us: ((), []),
}


class SingleSeriesDecoder(NamedTuple):
    """The fast path: a topic without a rule, all of whose readings are of series `name`."""

    name: SeriesName
    decode: Callable[[bytes, int], tuple[Sequence[JsonReading], list[Fault]]]


def build_decoder(rule: PayloadRule, topic: str, births: SparkplugBirths | None = None) -> Decoder | None:
    """The decoder of a topic's payloads, None when the rule is not for it; `births` are of all topics."""
    levels = rule.topic_pattern.match(topic)
    if levels is None:
        return None
    if rule.format == "sparkplug_b":
        from gateway.payloads.formats import sparkplug  # noqa: PLC0415 - needs an extra

        decoder = sparkplug.build_sparkplug_decoder(rule, levels, topic, births or SparkplugBirths())
    else:
        decoder = _BUILDERS[rule.format](rule, levels)
    return _with_limits(decoder, rule.max_payload_bytes)


def encode_rebirth_command(now_us: int) -> bytes:
    """The payload of a Sparkplug rebirth command; a rule with that format must exist."""
    from gateway.payloads.formats import sparkplug  # noqa: PLC0415 - needs an extra

    return sparkplug.encode_rebirth_command(now_us)


def build_failing_decoder(reason: str, detail: str) -> Decoder:
    """For topics none of whose payloads can be read."""
    return lambda payload, _: ((), [Fault(reason, detail, payload)])


def decode_payload(
    payload: bytes, topic: str, rule: PayloadRule, *, now_us: int, births: SparkplugBirths | None = None
) -> DecodeResult:
    """What one payload on one topic becomes under a rule; ValueError when that is not for the topic."""
    decoder = build_decoder(rule, topic, births)
    if decoder is None:
        raise ValueError(f"{topic!r} does not fit {rule.topic!r}")
    return decoder(payload, now_us)


def _with_limits(
    decoder: Callable[[bytes, int], tuple[Sequence[T], list[Fault]]], max_bytes: int
) -> Callable[[bytes, int], tuple[Sequence[T], list[Fault]]]:
    def decode(payload: bytes, now_us: int) -> tuple[Sequence[T], list[Fault]]:
        try:
            if payload[:2] in COMPRESSION_MAGIC:
                payload = decompress_payload(payload, max_bytes)
            decoded, faults = decoder(payload, now_us)
        except PayloadDecodeError as fault:
            return (), [fault.fault(payload)]
        return decoded, limit_faults(faults, payload) if faults else faults

    return decode


class RuleSet:
    """A gateway's payload rules and, for topics without one, its topic template. A `TopicResolver`."""

    def __init__(
        self,
        template: TopicTemplate,
        rules: Sequence[PayloadRule] = (),
        births: SparkplugBirths | None = None,
    ) -> None:
        self.template = template
        self.rules = tuple(rules)
        self.births = births or SparkplugBirths()

    def replace(self, rules: Sequence[PayloadRule]) -> None:
        """Use other rules; answers about topics that were cached before are no longer valid."""
        self.rules = tuple(rules)

    def rule_for(self, topic: str) -> PayloadRule | None:
        """The first rule that matches a topic; None when the template is for it."""
        return next((rule for rule in self.rules if rule.topic_pattern.match(topic) is not None), None)

    def decoder_for(self, topic: str) -> Decoder | SingleSeriesDecoder:
        """The decoder of a topic's payloads; one that always fails when nothing matches the topic."""
        rule = self.rule_for(topic)
        decoder = None if rule is None else build_decoder(rule, topic, self.births)
        if decoder is not None:
            return decoder
        name = self.template.match(topic)
        if name is None:
            detail = f"the topic does not fit {self.template.template!r}"
            return build_failing_decoder("unknown_topic", detail)
        return SingleSeriesDecoder(name, _decode_single_series)

    def sensor_id_from_topic(self, topic: str) -> str | None:
        """The sensor_id if the topic alone says it."""
        rule = self.rule_for(topic)
        if rule is None:
            return self.template.sensor_id_from_topic(topic)
        return rule.sensor_id_template.fill(rule.topic_pattern.match(topic) or {}).text

    def has_sensor_id_in_payload(self, topic: str, /) -> bool:
        """Whether a rule matches that finds the sensor_id in payloads, or that ignores them."""
        rule = self.rule_for(topic)
        return rule is not None and (rule.format == "ignore" or self.sensor_id_from_topic(topic) is None)


_decode_readings = _with_limits(lambda payload, _: json_reading.decode_readings(payload), MAX_PAYLOAD_BYTES)


def _decode_single_series(payload: bytes, now_us: int) -> tuple[Sequence[JsonReading], list[Fault]]:
    try:
        return (json_reading.decode_reading(payload),), []  # nearly always: one valid reading
    except JSON_ERRORS:
        return _decode_readings(payload, now_us)


@dataclass(frozen=True, slots=True)
class PayloadPreview:
    """What would become of a payload.

    `rule` is the rule that matches the topic and `rule_no` its number, from 1. Without one, `rule` stands for
    the listener's topic template; it is None when that does not match either.
    """

    rule_no: int | None
    rule: PayloadRule | None
    measurements: Sequence[Measurement]
    faults: Sequence[Fault]


def preview_payload(rules: RuleSet, topic: str, payload: bytes, *, now_us: int) -> PayloadPreview:
    """What one payload on one topic would become."""
    rule = rules.rule_for(topic)
    rule_no = None if rule is None else next(n for n, r in enumerate(rules.rules, 1) if r is rule)
    if rule is None:
        rule = PayloadRule(rules.template.template, "reading")
    decoder = build_decoder(rule, topic, rules.births)
    if decoder is None:
        what = f"no rule matches this topic, and it does not fit {rules.template.template!r}"
        return PayloadPreview(None, None, (), (Fault("unknown_topic", what, payload),))
    decoded, faults = decoder(payload, now_us)
    name_faults = [find_series_name_fault(measurement.name) for measurement in decoded]
    measurements = [one for one, fault in zip(decoded, name_faults, strict=True) if fault is None]
    faults += [Fault("bad_name", fault, payload) for fault in name_faults if fault is not None]
    return PayloadPreview(rule_no, rule, measurements, faults)
