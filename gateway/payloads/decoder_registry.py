"""Payload formats by name, the decoder for a topic, and the gateway's ordered set of rules. Pure.

The first rule whose topic matches applies; a topic no rule matches carries JSON readings on the gateway's
topic template. A decoder is `(payload, now_us) -> (measurements, faults)`; it caches names and holds no
other state, except Sparkplug's births, which are passed in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway.payloads import measurement
from gateway.payloads.formats import fields, json_reading, line_protocol, senml
from gateway.payloads.formats.sparkplug_births import SparkplugBirths
from gateway.payloads.measurement import Fault, limit_faults
from gateway.payloads.rule import PayloadRule
from gateway.payloads.topics import find_series_name_fault

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gateway.payloads.measurement import DecodeResult

    Decoder = Callable[[bytes, int], DecodeResult]
    from collections.abc import Sequence

    from gateway.payloads.measurement import Measurement
    from gateway.payloads.topics import TopicTemplate

_DECODERS: Mapping[str, Callable[[PayloadRule, Mapping[str, str]], Decoder]] = {
    "reading": json_reading.build_named_reading_decoder,
    "ndjson": json_reading.build_named_reading_decoder,
    "fields": fields.build_fields_decoder,
    "number": fields.build_number_decoder,
    "csv": fields.build_csv_decoder,
    "senml": senml.build_senml_decoder,
    "line_protocol": line_protocol.build_line_protocol_decoder,
}


def build_decoder(rule: PayloadRule, topic: str, births: SparkplugBirths | None = None) -> Decoder | None:
    """The decoder of a topic's payloads; None when the rule is not for this topic.

    `births` holds what Sparkplug's nodes said of themselves, on other topics than this one.
    """
    levels = rule.topic_pattern.match(topic)
    if levels is None:
        return None
    if rule.format == "ignore":
        return _decode_nothing
    if rule.format == "sparkplug_b":
        from gateway.payloads.formats import sparkplug  # noqa: PLC0415 - needs an extra

        inner = sparkplug.build_sparkplug_decoder(
            rule, levels, topic, SparkplugBirths() if births is None else births
        )
    else:
        inner = _DECODERS[rule.format](rule, levels)
    max_bytes = rule.max_payload_bytes

    def decode(payload: bytes, now_us: int) -> DecodeResult:
        if payload[:2] in measurement.COMPRESSION_MAGIC:
            try:
                payload = measurement.decompress_payload(payload, max_bytes)
            except measurement.PayloadDecompressionError as fault:
                return (), [Fault(fault.reason, str(fault), payload)]
        found, faults = inner(payload, now_us)
        return found, limit_faults(faults, payload) if faults else faults

    return decode


def decode_payload(
    payload: bytes, topic: str, rule: PayloadRule, *, now_us: int, births: SparkplugBirths | None = None
) -> DecodeResult:
    """What one payload on one topic becomes under a rule.

    Raises:
        ValueError: the rule is not for this topic.
    """
    decoder = build_decoder(rule, topic, births)
    if decoder is None:
        raise ValueError(f"{topic!r} does not fit {rule.topic!r}")
    return decoder(payload, now_us)


def _decode_nothing(payload: bytes, now_us: int) -> DecodeResult:  # noqa: ARG001 - of every decoder
    return (), []


class RuleSet:
    """What a gateway is told about topics: its template, and rules that go before it. A `Naming`.

    `births` is what Sparkplug's nodes said of themselves on the topics decoded here.
    """

    def __init__(
        self,
        template: TopicTemplate,
        rules: Sequence[PayloadRule] = (),
        births: SparkplugBirths | None = None,
    ) -> None:
        self.template = template
        self.rules = tuple(rules)
        self.births = SparkplugBirths() if births is None else births

    def replace(self, rules: Sequence[PayloadRule]) -> None:
        """Go on with other rules. What was asked about topics before is to be asked again."""
        self.rules = tuple(rules)

    def rule_for(self, topic: str) -> PayloadRule | None:
        """The first rule for a topic; None when the template is for it."""
        return next((rule for rule in self.rules if rule.topic_pattern.match(topic) is not None), None)

    def decoder_for(self, topic: str) -> Decoder | None:
        """What decodes the payloads of a topic; None when the template is for it."""
        rule = self.rule_for(topic)
        return None if rule is None else build_decoder(rule, topic, self.births)

    def sensor_id_from_topic(self, topic: str) -> str | None:
        """The sensor_id that the topic alone names, None when it names none."""
        rule = self.rule_for(topic)
        if rule is None:
            return self.template.sensor_id_from_topic(topic)
        return rule.sensor_id_template.filled(rule.topic_pattern.match(topic) or {}).text

    def has_sensor_id_in_payload(self, topic: str) -> bool:
        """Whether a rule is for this topic that takes the sensor_id from payloads, or takes nothing."""
        rule = self.rule_for(topic)
        return rule is not None and (rule.format == "ignore" or self.sensor_id_from_topic(topic) is None)


@dataclass(frozen=True, slots=True)
class PayloadPreview:
    """What would become of a payload.

    Attributes:
        rule_no: of the rule that is for the topic, from 1 in the order they are tried; None when none is.
        rule: that rule; the listener's topic as a rule when none is for it, None when that does not fit.
        measurements: the readings.
        faults: what would go into quarantine.
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
        what = f"no rule is for this topic, and it does not fit {rules.template.template!r}"
        return PayloadPreview(None, None, (), (Fault("unknown_topic", what, payload),))
    found, faults = decoder(payload, now_us)
    taken, bad = [], list(faults)
    for each in found:
        fault = find_series_name_fault(each.name)
        if fault is None:
            taken.append(each)
        else:
            bad.append(Fault("bad_name", fault, payload))
    return PayloadPreview(rule_no, rule, taken, bad)
