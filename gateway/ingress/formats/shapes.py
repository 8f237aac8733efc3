"""The payload shapes by name, and the decoder of a topic under a rule. Pure.

A decoder is `(payload, now_us) -> (measurements, faults)`. It keeps what it has worked out about the names
that it saw, and nothing else; Sparkplug's aliases are in the `Births` that it is given.
Payloads compressed by gzip or zstd are expanded first, whatever the shape, within the rule's bound.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.ingress.formats import compressed, csv_line, fields, lines, named_reading, number, senml
from gateway.ingress.formats.births import Births
from gateway.ingress.formats.measurement import Fault, bounded

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gateway.ingress.formats.measurement import Decoded
    from gateway.ingress.formats.rule import Rule

    Decoder = Callable[[bytes, int], Decoded]

_DECODERS: Mapping[str, Callable[[Rule, Mapping[str, str]], Decoder]] = {
    "reading": named_reading.decoder,
    "ndjson": named_reading.decoder,
    "fields": fields.decoder,
    "number": number.decoder,
    "csv": csv_line.decoder,
    "senml": senml.decoder,
    "line_protocol": lines.decoder,
}


def decoder_of(rule: Rule, topic: str, births: Births | None = None) -> Decoder | None:
    """The decoder of a topic's payloads; None when the rule is not for this topic.

    `births` holds what Sparkplug's nodes said of themselves, on other topics than this one.
    """
    levels = rule.names_of(topic)
    if levels is None:
        return None
    if rule.format == "ignore":
        return _nothing
    if rule.format == "sparkplug_b":
        from gateway.ingress.formats import sparkplug  # noqa: PLC0415 - needs an extra

        inner = sparkplug.decoder(rule, levels, topic, Births() if births is None else births)
    else:
        inner = _DECODERS[rule.format](rule, levels)
    max_bytes = rule.max_payload_bytes

    def decode(payload: bytes, now_us: int) -> Decoded:
        if payload[:2] in compressed.BEGINNINGS:
            try:
                payload = compressed.expanded(payload, max_bytes)
            except compressed.CannotExpand as fault:
                return (), [Fault(fault.reason, str(fault), payload)]
        found, faults = inner(payload, now_us)
        return found, bounded(faults, payload) if faults else faults

    return decode


def decode(payload: bytes, topic: str, rule: Rule, *, now_us: int, births: Births | None = None) -> Decoded:
    """What one payload on one topic becomes under a rule.

    Raises:
        ValueError: the rule is not for this topic.
    """
    decoder = decoder_of(rule, topic, births)
    if decoder is None:
        raise ValueError(f"{topic!r} does not fit {rule.topic.pattern!r}")
    return decoder(payload, now_us)


def _nothing(payload: bytes, now_us: int) -> Decoded:  # noqa: ARG001 - of every decoder
    return (), []
