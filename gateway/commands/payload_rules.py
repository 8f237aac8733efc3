"""`tidegate decode` and `tidegate learn`: try payload rules, propose rules for observed topics."""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from cloud_sync.runtime.files import replace_file
from cloud_sync.runtime.settings_file import InvalidSettingsError
from gateway.auth.authenticator import AnonymousAuthenticator
from gateway.commands.exit_errors import fail
from gateway.commands.options import (
    EXIT_FOUND,
    JsonOption,
    add_command,
    console,
    parse_settings_or_exit,
    print_json,
    progress_bar,
    table,
)
from gateway.discovery.topic_observer import RuleProposals, TopicObserver, format_rule_table, propose_rules
from gateway.humanize import escape_bytes, escape_text, format_time
from gateway.mqtt.broker_session import SubscriberOptions
from gateway.mqtt.context import MqttServerOptions
from gateway.mqtt.server import MqttServer
from gateway.mqtt.subscriber import Subscriber
from gateway.payloads.decoder_registry import PayloadPreview, RuleSet, preview_payload
from gateway.payloads.presets import PRESETS
from gateway.settings import gateway_settings
from gateway.settings.sources import IngressRule, IngressSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.discovery.topic_observer import RuleProposal
    from gateway.ingress.source import Acknowledger
    from gateway.mqtt.codec.packets import Publish
    from gateway.payloads.measurement import Measurement

decode_app = typer.Typer(add_completion=False)
_PAYLOAD_MAX_BYTES = 256 << 20
_ROWS_MAX = 200
_PART_MAX_CHARS = 60
_COMPANIONS = ("quality", "battery_level", "signal_strength", "seq")


@decode_app.command()
def decode(
    file: Annotated[str, typer.Argument(metavar="FILE|-", help="The payload's file; - for stdin.")],
    *,
    topic: Annotated[str, typer.Option("--topic", "-t", help="The topic it was published on.")],
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="The gateway's file, for rules.")
    ] = None,
    preset: Annotated[
        list[str] | None, typer.Option(help=f"Preset rules: {', '.join(PRESETS)}. Repeatable.")
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TOML",
            help='A rule, tried before all others: \'{ topic = "up/{sensor_id}", format = "fields" }\'.',
        ),
    ] = None,
    after: Annotated[
        list[str] | None,
        typer.Option(metavar="TOPIC=FILE", help="An earlier payload, such as a Sparkplug birth. Repeatable."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the readings that a payload decodes to, the matching rule, and what would be quarantined.

    Without --config, --preset or --rule the default rule applies: JSON on sensors/{sensor_id}/{sensor_type}.

    Exit codes: 0 when everything decodes (or is ignored by a rule); 1 when something would be quarantined; 2
    when the payload or the rules cannot be read.
    """
    rules = _build_rules(config, preset or [], rule or [])
    now_us = time.time_ns() // 1000
    for earlier in after or []:
        name, separator, path = earlier.rpartition("=")
        if not separator:
            fail(f"--after {earlier}: expected TOPIC=FILE")
        preview_payload(rules, name, _read_payload(path), now_us=now_us)
    found = preview_payload(rules, topic, _read_payload(file), now_us=now_us)
    if as_json:
        print_json(_preview_document(found))
    else:
        _print_preview(found, rules)
    if found.faults:
        raise typer.Exit(EXIT_FOUND)


def _build_rules(config: Path | None, presets: list[str], texts: list[str]) -> RuleSet:
    ingress = IngressSettings() if config is None else parse_settings_or_exit(config).ingress
    tables = [_parse_rule(f"--rule {text}", text) for text in texts]
    tables += [_parse_rule(f"--preset {name}", f'{{ preset = "{name}" }}') for name in presets]
    rules = [rule for table in tables for rule in table.rules]
    return RuleSet(ingress.rules.template, [*rules, *ingress.rules.rules])


def _parse_rule(what: str, text: str) -> IngressRule:
    try:
        return IngressRule(**tomllib.loads(f"rule = {text}")["rule"])
    except tomllib.TOMLDecodeError as error:
        fail(f"{what}: not a TOML table: {error}")
    except TypeError:
        fail(f"{what}: not a TOML table")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        fail(f"{what}: {where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}")


def _read_payload(file: str) -> bytes:
    try:
        if file == "-":
            return sys.stdin.buffer.read(_PAYLOAD_MAX_BYTES)
        with Path(file).open("rb") as opened:
            return opened.read(_PAYLOAD_MAX_BYTES)
    except OSError as fault:
        fail(f"{file}: cannot be read: {fault.strerror or fault}")


def _print_preview(found: PayloadPreview, rules: RuleSet) -> None:
    out = console()
    number = "no rule" if found.rule_no is None else f"rule {found.rule_no} of {len(rules.rules)}"
    if found.rule is None:
        out.print(number)
    else:
        default = "; default" if found.rule_no is None else ""
        out.print(f"{number}{default}: topic {found.rule.topic}, format {found.rule.format}", markup=False)
    if found.measurements:
        rows = table("sensor_id", "sensor_type", "value", "unit", "time", "other", right=("value",))
        for m in found.measurements[:_ROWS_MAX]:
            at = "of receipt" if m.time_us is None else format_time(m.time_us)
            rows.add_row(*_value_cells(m), at, _companion_text(m))
        out.print(rows)
        if len(found.measurements) > _ROWS_MAX:
            out.print(f"... {len(found.measurements) - _ROWS_MAX} more")
    elif not found.faults:
        out.print("no readings")
    for fault in found.faults:
        out.print(f"quarantine: {fault.reason}: {escape_text(fault.detail)}", markup=False)
        out.print(f"            {escape_bytes(fault.part, _PART_MAX_CHARS)}", markup=False)
    out.print(f"{len(found.measurements)} readings, {len(found.faults)} quarantined")


def _value_cells(m: Measurement) -> tuple[str, str, str, str]:
    sensor_id, sensor_type = escape_text(m.name.sensor_id), escape_text(m.name.sensor_type)
    return sensor_id, sensor_type, f"{m.value:.12g}", escape_text(m.unit or "")


def _companion_text(m: Measurement) -> str:
    parts = [f"{name} {getattr(m, name):g}" for name in _COMPANIONS if getattr(m, name) is not None]
    parts += [
        f"{name} {escape_text(text)}"
        for name in ("location", "manufacturer", "firmware_version")
        if (text := getattr(m, name)) is not None
    ]
    return ", ".join(parts)


def _preview_document(found: PayloadPreview) -> dict[str, Any]:
    rule = found.rule
    return {
        "rule_no": found.rule_no,
        "topic": None if rule is None else rule.topic,
        "format": None if rule is None else rule.format,
        "readings": [
            {
                "sensor_id": m.name.sensor_id,
                "sensor_type": m.name.sensor_type,
                "value": m.value,
                "time_us": m.time_us,
                "unit": m.unit,
                **{name: getattr(m, name) for name in _COMPANIONS},
                "flags": m.flags,
            }
            for m in found.measurements
        ],
        "faults": [
            {"reason": f.reason, "detail": f.detail, "part": f.part.decode(errors="backslashreplace")}
            for f in found.faults
        ],
    }


learn_app = typer.Typer(add_completion=False)
_UNKNOWN_TOPICS_MAX = 20
_EXAMPLE_READINGS_MAX = 8


class _TopicRecorder:
    """A `PublishSink` that records topics and payloads.

    It acknowledges to a broker only: devices keep what they publish here and send it to the gateway again.
    """

    def __init__(self, *, acknowledges: bool) -> None:
        self.seen = TopicObserver()
        self._acknowledges = acknowledges

    def submit_publishes(self, source: Acknowledger, batch: list[Publish]) -> None:
        """Record a batch."""
        for publish in batch:
            self.seen.add(publish.topic, publish.payload)
        if self._acknowledges:
            source.acknowledge(batch)


@dataclass(frozen=True, kw_only=True)
class LearnOptions:
    """Where `tidegate learn` listens."""

    broker: Annotated[
        str | None, typer.Option(metavar="URL", help="Subscribe at this broker: mqtt://HOST or mqtts://HOST.")
    ] = None
    listen: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Or be the server that devices publish to: 0.0.0.0:1883."),
    ] = None
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to listen.")] = 60
    filters: Annotated[list[str] | None, typer.Option("--filter", help="A topic filter. Repeatable.")] = None
    username: Annotated[str | None, typer.Option(help="For the broker.")] = None
    password_file: Annotated[Path | None, typer.Option(help="File with the password for it.")] = None
    ca_file: Annotated[Path | None, typer.Option(help="For mqtts://: the CA certificate, PEM.")] = None
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="The gateway's TOML file: propose rules only for other topics."),
    ] = None
    write: Annotated[bool, typer.Option("--write", help="Add the proposed rules to --config.")] = False


def learn(options: LearnOptions) -> None:
    """Listen for a while, and propose rules for the topics and payloads that are seen.

    At a broker it uses a session of its own, which ends with it. As a server it acknowledges nothing: devices
    with QoS 1 send to the gateway again what they published meanwhile.

    Exit codes: 0; 1 when nothing was seen, or some of it would be quarantined; 2 on an error.
    """
    if (options.broker is None) == (options.listen is None):
        fail("name where to listen: --broker URL, or --listen HOST:PORT")
    if options.write and options.config is None:
        fail("--write needs --config: the file to add the rules to")
    config = options.config
    ingress = IngressSettings() if config is None else parse_settings_or_exit(config).ingress
    recorder = _TopicRecorder(acknowledges=options.broker is not None)
    try:
        asyncio.run(_listen(_build_source(options, recorder), options.seconds))
    except ValueError as error:
        fail(f"{options.broker or options.listen}: {error}")
    except OSError as error:
        fail(f"{options.broker or options.listen}: {error.strerror or error}")
    proposed = propose_rules(recorder.seen, ingress.rules, now_us=time.time_ns() // 1000)
    _print_proposals(recorder.seen, proposed)
    if options.write and config is not None and proposed.proposals:
        _append_rules(config, proposed.proposals)
    if not recorder.seen.topics or proposed.unknown or any(p.faults for p in proposed.proposals):
        raise typer.Exit(EXIT_FOUND)


add_command(learn_app, learn, LearnOptions)


def _build_source(options: LearnOptions, recorder: _TopicRecorder) -> Subscriber | MqttServer:
    if options.broker is None:
        host, _, port = (options.listen or "").rpartition(":")
        server = MqttServerOptions(host=host or "127.0.0.1", port=int(port))
        return MqttServer(server, recorder, AnonymousAuthenticator())
    subscription = SubscriberOptions(
        url=options.broker,
        client_id=f"tidegate-learn-{secrets.token_hex(6)}",
        filters=tuple(options.filters or ["#"]),
        retained=True,
        username=options.username,
        password_file=options.password_file,
        ca_file=options.ca_file,
        session_expiry_s=0,
        broker_reviewed=True,
    )
    return Subscriber(subscription, recorder)


async def _listen(source: Subscriber | MqttServer, seconds: float) -> None:
    ends = time.monotonic() + seconds
    async with asyncio.TaskGroup() as tasks:
        await source.start(tasks)
        try:
            with progress_bar("listening") as progress:
                progress.total(int(seconds * 10))
                while (left_s := ends - time.monotonic()) > 0:
                    await asyncio.sleep(min(0.1, left_s))
                    progress.advance()
        finally:
            await source.close()


def _print_proposals(seen: TopicObserver, proposed: RuleProposals) -> None:
    out = console()
    typer.echo(f"{seen.publishes} messages on {len(seen.topics)} topics", err=True)
    if proposed.known:
        typer.echo(f"{len(proposed.known)} topics match existing rules", err=True)
    for proposal in proposed.proposals:
        out.print(format_rule_table(proposal), markup=False, highlight=False, soft_wrap=True)
        rows = table("sensor_id", "sensor_type", "value", "unit", "time", right=("value",))
        for m in proposal.readings[:_EXAMPLE_READINGS_MAX]:
            rows.add_row(*_value_cells(m), "of receipt" if m.time_us is None else "its own")
        out.print(rows)
        out.print(f"# {len(proposal.readings)} readings, {len(proposal.faults)} quarantined")
        reasons = sorted({f"{fault.reason}: {fault.detail}" for fault in proposal.faults})
        for reason in reasons[:_EXAMPLE_READINGS_MAX]:
            out.print(f"#   {escape_text(reason)}", markup=False, soft_wrap=True)
        out.print()
    if proposed.unknown:
        out.print(f"# {len(proposed.unknown)} topics without a matching rule:")
        for topic in proposed.unknown[:_UNKNOWN_TOPICS_MAX]:
            out.print(f"#   {escape_text(topic)}", markup=False, soft_wrap=True)


def _append_rules(config: Path, proposals: Sequence[RuleProposal]) -> None:
    text = config.read_text(encoding="utf-8").rstrip("\n")
    text += "\n\n\n" + "\n".join(map(format_rule_table, proposals))
    draft = config.with_name(f".{config.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        gateway_settings.parse_settings_file(draft)
        replace_file(config, text.encode(), config.stat().st_mode & 0o777)
    except InvalidSettingsError as error:
        fail(f"nothing was written: {error}")
    except OSError as error:
        fail(f"{config}: cannot be written: {error.strerror}")
    finally:
        draft.unlink(missing_ok=True)
    typer.echo(f"{config}: {len(proposals)} rules added; restart the gateway to use them", err=True)
