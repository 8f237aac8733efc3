"""`tidegate spool quarantine list | show | drop | retry`, and requests to a running gateway."""

from __future__ import annotations

import asyncio
import base64
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from gateway.commands.exit_errors import fail
from gateway.commands.options import (
    EXIT_FOUND,
    ConfigOption,
    JsonOption,
    NamedSpool,
    SpoolArgument,
    console,
    exit_on_spool_error,
    print_json,
    progress_bar,
    resolve_spool,
    table,
)
from gateway.humanize import escape_bytes, escape_text, format_count, format_time
from gateway.payloads.decoder_registry import RuleSet
from gateway.payloads.topics import TopicTemplate
from gateway.settings.sources import IngressSettings
from gateway.spool import quarantine_items
from gateway.spool.errors import SpoolInUseError
from gateway.spool.series_catalog import DEFAULT_MAX_SERIES
from gateway.spooltools.quarantine_retry import RetryResult
from gateway.spooltools.quarantine_retry import retry_stopped_spool as retry_items
from gateway.web.client import GatewayClientError, local_gateway_client

if TYPE_CHECKING:
    from gateway.spool.quarantine_items import StoredQuarantineItem

T = TypeVar("T")
_REQUEST_TIMEOUT_S = 3600.0


def post_to_gateway(which: NamedSpool, path: str, body: object, answer: type[T], fault: SpoolInUseError) -> T:
    """POST `body` to the gateway that runs on a spool; `fault` is why this command cannot write to it.

    Raises SpoolInUseError when the gateway's address is not known, or it does not answer there.
    """
    settings = which.settings
    client = None if settings is None else local_gateway_client(settings.status, _REQUEST_TIMEOUT_S)
    if client is None:
        raise SpoolInUseError(
            f"{fault}. Only the gateway writes to its spool: use --config, with [status] enabled, so that "
            "this command can ask the gateway to do it, or stop the gateway first"
        ) from fault
    try:
        return client.post(path, body, answer)
    except GatewayClientError as error:
        raise SpoolInUseError(f"{fault}, and does not answer: {error}") from error


app = typer.Typer(add_completion=False, no_args_is_help=True)

_PREVIEW_CHARS = 60
_LEFT_MAX = 20

TargetsArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SPOOL] NO...", help="The spool, unless --config names it, and item numbers."),
]
ReasonOption = Annotated[str | None, typer.Option(help="Only items of this reason, such as not_json.")]
AllOption = Annotated[bool, typer.Option("--all", help="Every item.")]


@app.callback()
def quarantine() -> None:
    """Input that could not be decoded or stored, with the reason: list, show, retry or drop it.

    The newest items have the highest numbers; the spool keeps the newest 10,000.
    """


@app.command("list")
def list_items(
    spool: SpoolArgument = None,
    *,
    config: ConfigOption = None,
    reason: ReasonOption = None,
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="Maximum number of items.")] = 50,
    as_json: JsonOption = False,
) -> None:
    """List the newest items, and count all items by reason.

    Exit codes: 0, or 2 when the spool cannot be read.
    """
    which = resolve_spool(spool, config)
    with exit_on_spool_error():
        reasons = quarantine_items.count_items_by_reason(which.path)
        items = quarantine_items.list_items(which.path, reason=reason, limit=limit)
        if as_json:
            documents = [_item_document(item) for item in items]
            print_json({"reasons": [reason._asdict() for reason in reasons], "items": documents})
            return
        out = console()
        rows = table("no", "received", "source", "topic", "reason", "bytes", "payload", right=("no", "bytes"))
        for item in items:
            rows.add_row(
                str(item.quarantine_no),
                format_time(item.received_at_us),
                escape_text(item.source),
                escape_text(item.topic, _PREVIEW_CHARS),
                escape_text(item.reason),
                str(item.payload_bytes),
                escape_bytes(item.payload, _PREVIEW_CHARS),
            )
        if items:
            out.print(rows)
        counts = ", ".join(f"{format_count(r.items)} {escape_text(r.reason)}" for r in reasons) or "nothing"
        out.print(f"in quarantine: {counts}", soft_wrap=True)


@app.command()
def show(
    targets: TargetsArgument = None,
    *,
    config: ConfigOption = None,
    raw: Annotated[bool, typer.Option("--raw", help="Print only the payload's bytes.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show items with their payloads, as far as these were kept.

    Exit codes: 0; 1 when there is no such item; 2 when the spool cannot be read.
    """
    which, numbers = _parse_targets(targets, config)
    if not numbers:
        fail("name the item by its number, as `quarantine list` shows it")
    with exit_on_spool_error():
        items = [quarantine_items.find_item(which.path, number) for number in numbers]
        found = [item for item in items if item is not None]
        if raw:
            for item in found:
                sys.stdout.buffer.write(item.payload)
            sys.stdout.buffer.flush()
        elif as_json:
            print_json([_item_document(item) for item in found])
        else:
            for item in found:
                _print_item(item)
    if missing := [str(n) for n, item in zip(numbers, items, strict=True) if item is None]:
        typer.echo(f"tidegate: there is no item {', '.join(missing)} in quarantine", err=True)
        raise typer.Exit(EXIT_FOUND)


@app.command()
def drop(
    targets: TargetsArgument = None,
    *,
    config: ConfigOption = None,
    reason: ReasonOption = None,
    everything: AllOption = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not prompt.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete items permanently: by number, by --reason, or --all. Works while the gateway runs.

    Prompts on a terminal; elsewhere --yes is required.

    Exit codes: 0; 1 when an item does not exist, or the answer was no; 2 on an error.
    """
    which, numbers = _parse_targets(targets, config)
    with exit_on_spool_error():
        selected = _select_numbers(which, numbers, reason, everything=everything)
        if selected and not yes:
            question = f"Drop {format_count(len(selected))} items permanently?"
            if not sys.stdin.isatty():
                fail(f"{question} Use --yes: there is no terminal to prompt on")
            if not typer.confirm(question):
                raise typer.Exit(EXIT_FOUND)
        dropped = quarantine_items.drop_items(which.path, selected)
    if as_json:
        print_json({"dropped": dropped})
    else:
        typer.echo(f"{format_count(dropped)} items dropped")
    if numbers and dropped < len(selected):
        raise typer.Exit(EXIT_FOUND)


@app.command()
def retry(
    targets: TargetsArgument = None,
    *,
    config: ConfigOption = None,
    reason: ReasonOption = None,
    everything: AllOption = False,
    topic: Annotated[str | None, typer.Option(help="The topic template, when --config is not given.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Decode items again with the present rules and topic template.

    For the spool of a running gateway use --config: the gateway itself does it.

    When all of a payload decodes, its readings are stored with the time of receipt, and the item is removed;
    other items stay. Payloads of which only the first bytes were kept cannot be decoded. Readings that a
    destination refused are sent to it once more.

    Exit codes: 0 when every item was decoded; 1 when some stay; 2 on an error.
    """
    which, numbers = _parse_targets(targets, config)
    ingress = IngressSettings() if which.settings is None else which.settings.ingress
    try:
        rules = RuleSet(TopicTemplate(topic), ingress.rules.rules) if topic else ingress.rules
    except ValueError as fault:
        fail(f"--topic: {fault}")
    max_series = DEFAULT_MAX_SERIES if which.settings is None else which.settings.spool.max_series
    with exit_on_spool_error():
        selected = _select_numbers(which, numbers, reason, everything=everything)
        try:
            with progress_bar("decoding again") as progress:
                result = asyncio.run(
                    retry_items(which.path, selected, rules, max_series=max_series, progress=progress)
                )
        except SpoolInUseError as fault:
            result = post_to_gateway(which, "/quarantine/retry", {"numbers": selected}, RetryResult, fault)
    if as_json:
        print_json(
            {
                "items": result.items,
                "stored": result.stored,
                "duplicates": result.duplicates,
                "conflicts": result.conflicts,
                "sent_again": result.sent_again,
                "left": [{"quarantine_no": number, "why": why} for number, why in result.left],
            }
        )
    else:
        for number, why in result.left[:_LEFT_MAX]:
            typer.echo(f"{number} stays: {escape_text(why)}")
        if len(result.left) > _LEFT_MAX:
            typer.echo(f"... and {format_count(len(result.left) - _LEFT_MAX)} more stay")
        typer.echo(
            f"{format_count(result.items - result.sent_again)} items decoded: "
            f"{format_count(result.stored)} stored, {format_count(result.duplicates)} duplicates, "
            f"{format_count(result.conflicts)} conflicts"
        )
        if result.sent_again:
            typer.echo(f"{format_count(result.sent_again)} refused readings are sent again")
    if result.left:
        raise typer.Exit(EXIT_FOUND)


def _parse_targets(targets: list[str] | None, config: Path | None) -> tuple[NamedSpool, list[int]]:
    """The spool and the item numbers; an argument that is not a number is the spool's file."""
    numbers = [int(text) for text in targets or () if text.isascii() and text.isdigit()]
    others = [text for text in targets or () if not (text.isascii() and text.isdigit())]
    if len(others) > 1:
        fail(f"{others[1]!r} is not an item number, and the spool was named already")
    return resolve_spool(Path(others[0]) if others else None, config), numbers


def _select_numbers(
    which: NamedSpool, numbers: list[int], reason: str | None, *, everything: bool
) -> list[int]:
    if sum((bool(numbers), reason is not None, everything)) != 1:
        fail("name the items: their numbers, or --reason REASON, or --all")
    return numbers or quarantine_items.list_item_numbers(which.path, reason=reason)


def _item_document(item: StoredQuarantineItem) -> dict[str, Any]:
    return {
        **item._asdict(),
        "payload": base64.b64encode(item.payload).decode(),
        "payload_text": item.payload.decode("utf-8", "backslashreplace"),
        "is_cut": item.is_cut,
    }


def _print_item(item: StoredQuarantineItem) -> None:
    cut = f", of which the first {len(item.payload)} were kept" if item.is_cut else ""
    for line in (
        f"item      {item.quarantine_no}",
        f"received  {format_time(item.received_at_us)} by {escape_text(item.source)}",
        f"topic     {escape_text(item.topic)}",
        f"reason    {escape_text(item.reason)}: {escape_text(item.detail)}",
        f"payload   {item.payload_bytes} bytes{cut}",
        f"          {escape_bytes(item.payload)}",
    ):
        typer.echo(line)
