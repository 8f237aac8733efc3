"""`tidegate decode FILE|-`: what a payload would become, and why not."""

from __future__ import annotations

import sys
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from cloud_sync.settings_file import SettingsFault
from gateway import settings
from gateway.commands.failures import fail
from gateway.commands.spool_options import EXIT_FOUND, console, print_json, table
from gateway.ingress.formats.presets import PRESETS
from gateway.ingress.formats.rules import Rules
from gateway.operate.moments import moment_text
from gateway.operate.preview import Preview, preview
from gateway.operate.terminal import shown, shown_bytes
from gateway.settings import Ingress, IngressRule

if TYPE_CHECKING:
    from gateway.ingress.formats.measurement import Measurement

app = typer.Typer(add_completion=False)
_PAYLOAD_MAX_BYTES = 256 << 20
_ROWS_SHOWN = 200
_PART_SHOWN = 60
_COMPANIONS = ("quality", "battery_level", "signal_strength", "seq")


@app.command()
def decode(  # noqa: PLR0917 - a command line
    file: Annotated[str, typer.Argument(metavar="FILE|-", help="The payload; - reads it from stdin.")],
    topic: Annotated[str, typer.Option("--topic", "-t", help="The topic it was published on.")],
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="The gateway's TOML file, whose rules count.")
    ] = None,
    preset: Annotated[
        list[str] | None, typer.Option(help=f"Rules of a preset instead: {', '.join(PRESETS)}. Repeatable.")
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TOML",
            help='A rule to try, before all others: \'{ topic = "up/{sensor_id}", format = "fields" }\'.',
        ),
    ] = None,
    after: Annotated[
        list[str] | None,
        typer.Option(metavar="TOPIC=FILE", help="What came before, such as a Sparkplug birth. Repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,  # noqa: FBT002 - typer's way
) -> None:
    """Show which readings a payload would become, under which rule, and what would go into quarantine.

    Without --config, --preset or --rule a payload is JSON readings on sensors/{sensor_id}/{sensor_type}.

    Exit codes: 0 when all of it becomes readings (or is ignored by a rule); 1 when something would go into
    quarantine; 2 when the payload or the rules cannot be read.
    """
    rules = _rules(config, preset or [], rule or [])
    now_us = time.time_ns() // 1000
    for earlier in after or []:
        name, separator, path = earlier.rpartition("=")
        if not separator:
            fail(f"--after {earlier}: expected TOPIC=FILE")
        preview(rules, name, _payload(path), now_us=now_us)
    found = preview(rules, topic, _payload(file), now_us=now_us)
    if as_json:
        print_json(_document(found))
    else:
        _show(found, rules)
    if found.faults:
        raise typer.Exit(EXIT_FOUND)


def _rules(config: Path | None, presets: list[str], texts: list[str]) -> Rules:
    ingress = Ingress()
    if config is not None:
        try:
            ingress = settings.read(config).ingress
        except SettingsFault as fault:
            fail(str(fault))
    tables = [_table(f"--rule {text}", text) for text in texts]
    tables += [_table(f"--preset {name}", f'{{ preset = "{name}" }}') for name in presets]
    made = [rule for given in tables for rule in given.rules]
    return Rules(ingress.rules.template, [*made, *ingress.rules.rules])


def _table(what: str, text: str) -> IngressRule:
    try:
        return IngressRule(**tomllib.loads(f"rule = {text}")["rule"])
    except tomllib.TOMLDecodeError as fault:
        fail(f"{what}: is no TOML table: {fault}")
    except TypeError:
        fail(f"{what}: is no TOML table")
    except ValidationError as fault:
        told = fault.errors(include_url=False)[0]
        where = ".".join(map(str, told["loc"]))
        fail(f"{what}: {where + ': ' if where else ''}{told['msg'].removeprefix('Value error, ')}")


def _payload(file: str) -> bytes:
    try:
        if file == "-":
            return sys.stdin.buffer.read(_PAYLOAD_MAX_BYTES)
        with Path(file).open("rb") as opened:
            return opened.read(_PAYLOAD_MAX_BYTES)
    except OSError as fault:
        fail(f"{file}: cannot be read: {fault.strerror or fault}")


def _which(found: Preview, rules: Rules) -> str:
    if found.rule is None:
        return "no rule"
    what = f"topic {found.rule.topic.pattern}, format {found.rule.format}"
    if found.rule_no is None:
        return f"no rule; by default {what}"
    return f"rule {found.rule_no} of {len(rules.rules)}: {what}"


def _show(found: Preview, rules: Rules) -> None:
    out = console()
    out.print(_which(found, rules), markup=False)
    if found.measurements:
        rows = table("sensor_id", "sensor_type", "value", "unit", "time", "with it", right=("value",))
        for m in found.measurements[:_ROWS_SHOWN]:
            rows.add_row(
                shown(m.name.sensor_id), shown(m.name.sensor_type), f"{m.value:.12g}", shown(m.unit or ""),
                "of receipt" if m.time_us is None else moment_text(m.time_us), _with_it(m),
            )  # fmt: skip
        out.print(rows)
        if len(found.measurements) > _ROWS_SHOWN:
            out.print(f"... {len(found.measurements) - _ROWS_SHOWN} more")
    elif not found.faults:
        out.print("nothing of it is taken")
    for fault in found.faults:
        out.print(f"quarantine: {fault.reason}: {shown(fault.detail)}", markup=False)
        out.print(f"            {shown_bytes(fault.part, _PART_SHOWN)}", markup=False)
    out.print(f"{len(found.measurements)} readings, {len(found.faults)} for quarantine")


def _with_it(m: Measurement) -> str:
    told = [f"{name} {getattr(m, name):g}" for name in _COMPANIONS if getattr(m, name) is not None]
    told += [
        f"{name} {shown(text)}"
        for name in ("location", "manufacturer", "firmware_version")
        if (text := getattr(m, name)) is not None
    ]
    return ", ".join(told)


def _document(found: Preview) -> dict[str, Any]:
    rule = found.rule
    return {
        "rule_no": found.rule_no,
        "topic": None if rule is None else rule.topic.pattern,
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
