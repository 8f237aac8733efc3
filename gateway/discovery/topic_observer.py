"""Topics and payloads observed, and the payload rules proposed for them. Pure.

Presets first: one is proposed where topics match what only its devices use and the payloads decode to
readings. Other topics are grouped by number of levels, first level and format; a level that varies becomes
a name. Every proposal is tried on everything observed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError

from gateway.discovery.payload_guess import (
    PayloadGuess,
    find_companion_members,
    find_device_member,
    find_time_member,
    guess_format,
    map_words_to_values,
)
from gateway.payloads.decoder_registry import RuleSet, preview_payload
from gateway.payloads.presets import PRESETS, build_preset_rules
from gateway.settings.reference import format_toml_value
from gateway.settings.sources import IngressRule

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from gateway.payloads.measurement import Fault, JsonObject, Measurement
    from gateway.payloads.rule import PayloadRule

RuleTable = dict[str, Any]
"""Keys of an `[[ingress.rule]]` table, in order."""
TOPICS_MAX: Final = 20_000
PAYLOADS_PER_TOPIC_MAX: Final = 5
PAYLOAD_MAX_BYTES: Final = 64 << 10
_EXAMPLES_MAX: Final = 3
_EXAMPLE_MAX_CHARACTERS: Final = 80
_PRESET_TOPIC_PATTERNS: Final[Mapping[str, re.Pattern[str]]] = {
    "zigbee2mqtt": re.compile(r"(.+)/bridge/(?:state|info|devices|logging|groups)"),
    "tasmota": re.compile(r"(?:(.+)/)?tele/[^/]+/(?:SENSOR|STATE|LWT)"),
    "esphome": re.compile(r"(?:(.+)/)?[^/]+/(?:sensor|binary_sensor|switch|number|light|fan)/[^/]+/state"),
    "shelly": re.compile(r"(?:(?:(.+)/)?[^/]+/events/rpc|shellies/.+)"),
    "sparkplug_b": re.compile(r"(spBv1\.0)/[^/]+/[ND](?:BIRTH|DATA|DEATH)/.+"),
    "homie": re.compile(r"(.+)/[^/]+/\$(?:state|homie|name)"),
    "ttn": re.compile(r"(v3)/[^/]+/devices/[^/]+/up"),
    "senml": re.compile(r"(senml)/.+"),
}


@dataclass(slots=True)
class RuleProposal:
    """A table of the configuration and its rules, tried on everything seen on the `topics` it matches."""

    table: RuleTable
    rules: Sequence[PayloadRule]
    topics: int = 0
    examples: list[str] = field(default_factory=list)
    readings: list[Measurement] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RuleProposals:
    """Proposals; `known` topics need none, for `unknown` ones none was found."""

    proposals: Sequence[RuleProposal]
    known: Sequence[str]
    unknown: Sequence[str]


class TopicObserver:
    """The topics seen, with the last payloads of each; bounded."""

    def __init__(self) -> None:
        self.topics: dict[str, list[bytes]] = {}
        self.publishes = 0
        self.left_out = 0

    def add(self, topic: bytes, payload: bytes) -> None:
        """Record one publish."""
        self.publishes += 1
        text = topic.decode("utf-8", "backslashreplace")
        payloads = self.topics.get(text)
        if payloads is None:
            if len(self.topics) >= TOPICS_MAX:
                self.left_out += 1
                return
            payloads = self.topics[text] = []
        if payload and len(payload) <= PAYLOAD_MAX_BYTES:
            payloads.append(payload)
            if len(payloads) > PAYLOADS_PER_TOPIC_MAX:
                del payloads[1]  # the first may be a birth


def propose_rules(seen: TopicObserver, present: RuleSet, *, now_us: int) -> RuleProposals:
    """Rules for the topics seen that present rules do not decode."""
    left = {
        topic: payloads for topic, payloads in sorted(seen.topics.items()) if not topic.startswith("$SYS/")
    }
    known = [topic for topic in left if _is_known(present, topic, left[topic], now_us)]
    for topic in known:
        del left[topic]
    tried = [_try_rules(table, rules, left, present, now_us) for table, rules in _iter_candidates(left)]
    return RuleProposals([proposal for proposal in tried if proposal is not None], known, sorted(left))


def _is_known(present: RuleSet, topic: str, payloads: Sequence[bytes], now_us: int) -> bool:
    if present.rule_for(topic) is not None:
        return True
    if present.template.match(topic) is None:
        return False
    return not any(preview_payload(present, topic, payload, now_us=now_us).faults for payload in payloads)


def _iter_candidates(
    left: Mapping[str, Sequence[bytes]],
) -> Iterator[tuple[RuleTable, Sequence[PayloadRule]]]:
    """Tables with their rules, for the topics left at the time: presets, then groups of topics."""
    for preset in PRESETS:
        matches = filter(None, map(_PRESET_TOPIC_PATTERNS[preset].fullmatch, left))
        for base in dict.fromkeys(match[1] for match in matches):
            if base in (None, preset, "spBv1.0", "v3"):  # the usual one
                yield {"preset": preset}, build_preset_rules(preset)
            else:
                yield {"preset": preset, "base": base}, build_preset_rules(preset, base)
    yield from _group_topics(left)


def _try_rules(
    table: RuleTable,
    rules: Sequence[PayloadRule],
    left: dict[str, list[bytes]],
    present: RuleSet,
    now_us: int,
) -> RuleProposal | None:
    """Try a table on the topics left, and remove those it matches; None when it makes no reading."""
    trial = RuleSet(present.template, rules)
    proposal = RuleProposal(table, rules)
    matched = [topic for topic in left if trial.rule_for(topic) is not None]
    for topic in sorted(matched, key=lambda topic: "BIRTH/" not in topic):
        for payload in left[topic]:
            preview = preview_payload(trial, topic, payload, now_us=now_us)
            proposal.readings += preview.measurements
            proposal.faults += preview.faults
    if not proposal.readings:
        return None
    proposal.topics, proposal.examples = len(matched), matched[:_EXAMPLES_MAX]
    for topic in matched:
        del left[topic]
    return proposal


def _group_topics(left: Mapping[str, Sequence[bytes]]) -> list[tuple[RuleTable, Sequence[PayloadRule]]]:
    """A table and its rules for every group of topics of one length, first level and format."""
    groups: dict[tuple[int, str, str], tuple[list[list[str]], list[PayloadGuess]]] = {}
    for topic, payloads in left.items():
        guesses = [guessed for payload in payloads if (guessed := guess_format(payload)) is not None]
        levels = topic.split("/")
        if not guesses or not all(levels) or any(sign in topic for sign in "{}+#\0"):
            continue
        what = guesses[-1].format if guesses[-1].format != "csv" else f"csv {len(guesses[-1].cells)}"
        listed, together = groups.setdefault((len(levels), levels[0], what), ([], []))
        listed.append(levels)
        together += guesses
    made = []
    for topics, guesses in groups.values():
        table = _build_rule_table(topics, guesses)
        try:
            made.append((table, IngressRule(**table).rules))
        except ValidationError:
            continue  # names nothing by which readings could be told apart
    return made


def _build_rule_table(topics: Sequence[Sequence[str]], guesses: Sequence[PayloadGuess]) -> RuleTable:
    format_ = guesses[-1].format
    records = [record for guessed in guesses for record in guessed.records if guessed.format == format_]
    device = find_device_member(records) if format_ == "fields" else None
    tags = format_ in ("line_protocol", "senml")
    varying = [i for i, level in enumerate(zip(*topics, strict=True)) if len(set(level)) > 1]
    names: dict[int, str] = {}
    last = len(topics[0]) - 1
    if format_ in ("number", "reading", "ndjson"):
        names[last] = "sensor_type"
        varying = [i for i in varying if i != last] or ([last - 1] if last else [])
    elif not varying and device is None and not tags:
        varying = [last]
    if device is None or varying:
        names |= {i: "sensor_id" if len(varying) == 1 else f"level_{i + 1}" for i in varying}
    pattern = "/".join(f"{{{names[i]}}}" if i in names else level for i, level in enumerate(topics[0]))
    table: RuleTable = {"topic": pattern, "format": format_}
    if len(varying) > 1:
        table["sensor_id"] = ".".join(f"{{{names[i]}}}" for i in varying)
    elif not varying and device is not None:
        table["sensor_id"] = f"{{{device}}}"
    if format_ == "csv":
        cells = guesses[-1].cells
        table["columns"] = [f"column_{n}" for n in range(1, len(cells) + 1)]
        table["separator"] = guesses[-1].separator
    if format_ == "fields":
        table |= _build_member_keys(records)
    return table


def _build_member_keys(records: Sequence[JsonObject]) -> RuleTable:
    table: RuleTable = {}
    time = find_time_member(records)
    if time is not None:
        table["time"] = time
    companions = {name: key for name, key in find_companion_members(records).items() if key != time}
    if companions:
        table["companions"] = companions
    values = map_words_to_values(
        text for record in records for text in record.values() if isinstance(text, str)
    )
    if values:
        table["values"] = values
    return table


def format_rule_table(proposal: RuleProposal) -> str:
    """A proposal as TOML, with a comment that lists topics."""
    count = "1 topic" if proposal.topics == 1 else f"{proposal.topics} topics"
    more = " ..." if proposal.topics > _EXAMPLES_MAX else ""
    printable = ("".join(sign if sign.isprintable() else "?" for sign in text) for text in proposal.examples)
    examples = ", ".join(text[:_EXAMPLE_MAX_CHARACTERS] for text in printable)
    lines = [f"# {count}: {examples}{more}", "[[ingress.rule]]"]
    lines += [f"{key} = {format_toml_value(value)}" for key, value in proposal.table.items()]
    return "\n".join(lines) + "\n"
