"""`tidegate spool quarantine ...`: bad input, listed, shown, dropped, decoded again."""

from __future__ import annotations

import asyncio
import base64
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, NoReturn

import typer

from gateway.commands.asking import ask_gateway
from gateway.commands.failures import fail
from gateway.commands.progress import bar
from gateway.commands.spool_options import (
    EXIT_FOUND,
    ConfigOption,
    JsonOption,
    Named,
    SpoolArgument,
    console,
    named,
    print_json,
    spool_errors,
    table,
)
from gateway.ingress.formats.rules import Rules
from gateway.ingress.topics import TopicTemplate
from gateway.operate import quarantine_items
from gateway.operate.human import count_text
from gateway.operate.moments import moment_text
from gateway.operate.quarantine_retry import Retried
from gateway.operate.quarantine_retry import retry as retry_items
from gateway.operate.terminal import shown, shown_bytes
from gateway.settings import Ingress
from gateway.spool.errors import SpoolInUse
from gateway.spool.series import DEFAULT_MAX_SERIES

if TYPE_CHECKING:
    from gateway.operate.quarantine_items import Item

app = typer.Typer(add_completion=False, no_args_is_help=True)

_PREVIEW = 60
_LEFT_SHOWN = 20

TargetsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SPOOL] NO...", help="The spool's file, unless --config names it; then item numbers."
    ),
]
ReasonOption = Annotated[str | None, typer.Option(help="Only items of this reason, such as not_json.")]
AllOption = Annotated[bool, typer.Option("--all", help="Every item.")]


@app.callback()
def quarantine() -> None:
    """Bad input that was kept with its reason: list, show, retry or drop it.

    Newest items have the highest numbers; the spool keeps the newest 10,000.
    """


@app.command("list")
def list_(
    spool: SpoolArgument = None,
    *,
    config: ConfigOption = None,
    reason: ReasonOption = None,
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="At most so many.")] = 50,
    as_json: JsonOption = False,
) -> None:
    """List the newest items, and how many there are of each reason.

    Exit codes: 0, or 2 when the spool cannot be read.
    """
    which = named(spool, config)
    with spool_errors():
        reasons = quarantine_items.reasons_of(which.path)
        items = quarantine_items.items_of(which.path, reason=reason, limit=limit)
        if as_json:
            print_json(
                {"reasons": [r._asdict() for r in reasons], "items": [_document(item) for item in items]}
            )
            return
        out = console()
        rows = table("no", "received", "source", "topic", "reason", "bytes", "payload", right=("no", "bytes"))
        for item in items:
            rows.add_row(
                str(item.quarantine_no),
                moment_text(item.received_at_us),
                shown(item.source),
                shown(item.topic, _PREVIEW),
                shown(item.reason),
                str(item.payload_bytes),
                shown_bytes(item.payload, _PREVIEW),
            )
        if items:
            out.print(rows)
        counts = ", ".join(f"{count_text(r.items)} {shown(r.reason)}" for r in reasons) or "nothing"
        out.print(f"in quarantine: {counts}", soft_wrap=True)


@app.command()
def show(
    targets: TargetsArgument = None,
    *,
    config: ConfigOption = None,
    raw: Annotated[bool, typer.Option("--raw", help="Only the payload's bytes, as they are.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show items with all that was kept of their payloads.

    Exit codes: 0; 1 when there is no such item; 2 when the spool cannot be read.
    """
    which, numbers = _targets(targets, config)
    if not numbers:
        fail("say which item: its number, as `quarantine list` shows it")
    with spool_errors():
        items = [quarantine_items.item_of(which.path, number) for number in numbers]
        kept = [item for item in items if item is not None]
        if raw:
            for item in kept:
                sys.stdout.buffer.write(item.payload)
            sys.stdout.buffer.flush()
        elif as_json:
            print_json([_document(item) for item in kept])
        else:
            for item in kept:
                _show(item)
    if missing := [str(n) for n, item in zip(numbers, items, strict=True) if item is None]:
        _not_there(missing)


@app.command()
def drop(
    targets: TargetsArgument = None,
    *,
    config: ConfigOption = None,
    reason: ReasonOption = None,
    everything: AllOption = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete items for good: by number, by --reason, or --all. Works while the gateway runs.

    Asks on a terminal; elsewhere it wants --yes.

    Exit codes: 0; 1 when an item was not there, or the answer was no; 2 when it cannot be done.
    """
    which, numbers = _targets(targets, config)
    with spool_errors():
        wanted = _wanted(which, numbers, reason, everything=everything)
        if wanted and not yes:
            _ask(f"Drop {count_text(len(wanted))} items for good?")
        dropped = quarantine_items.drop(which.path, wanted)
    if as_json:
        print_json({"dropped": dropped})
    else:
        typer.echo(f"{count_text(dropped)} items dropped")
    if numbers and dropped < len(wanted):
        raise typer.Exit(EXIT_FOUND)


@app.command()
def retry(
    targets: TargetsArgument = None,
    *,
    config: ConfigOption = None,
    reason: ReasonOption = None,
    everything: AllOption = False,
    topic: Annotated[
        str | None, typer.Option(help="The topic template, when not --config but the file names the spool.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Decode items again by the rules and the topic template of today.

    On the spool of a running gateway, name it by --config: the gateway itself does it.

    Where all of a payload makes readings they are stored, as of the time it came in, and the item is gone;
    other items stay as they are. Payloads of which only the first bytes were kept cannot be decoded.
    Readings that a destination refused are sent to it once more.

    Exit codes: 0 when every item became readings; 1 when some stay; 2 when it cannot be done.
    """
    which, numbers = _targets(targets, config)
    ingress = Ingress() if which.settings is None else which.settings.ingress
    try:
        rules = Rules(TopicTemplate(topic), ingress.rules.rules) if topic else ingress.rules
    except ValueError as fault:
        fail(f"--topic: {fault}")
    max_series = DEFAULT_MAX_SERIES if which.settings is None else which.settings.spool.max_series
    with spool_errors():
        wanted = _wanted(which, numbers, reason, everything=everything)
        try:
            with bar("decoding again") as watcher:
                result = asyncio.run(
                    retry_items(which.path, wanted, rules, max_series=max_series, watcher=watcher)
                )
        except SpoolInUse as fault:
            result = ask_gateway(which, "/quarantine/retry", {"numbers": wanted}, Retried, fault)
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
        for number, why in result.left[:_LEFT_SHOWN]:
            typer.echo(f"{number} stays: {shown(why)}")
        if len(result.left) > _LEFT_SHOWN:
            typer.echo(f"... and {count_text(len(result.left) - _LEFT_SHOWN)} more stay")
        typer.echo(
            f"{count_text(result.items - result.sent_again)} items became readings: "
            f"{count_text(result.stored)} stored, {count_text(result.duplicates)} known already, "
            f"{count_text(result.conflicts)} in conflict"
        )
        if result.sent_again:
            typer.echo(f"{count_text(result.sent_again)} refused readings go to their destination again")
    if result.left:
        raise typer.Exit(EXIT_FOUND)


class _Targets(NamedTuple):
    which: Named
    numbers: list[int]


def _targets(targets: list[str] | None, config: Path | None) -> _Targets:
    """The spool and the numbers among the arguments: what is no number is the spool's file."""
    numbers = [int(text) for text in targets or () if text.isascii() and text.isdigit()]
    others = [text for text in targets or () if not (text.isascii() and text.isdigit())]
    if len(others) > 1:
        fail(f"{others[1]!r} is neither an item's number nor the one spool")
    return _Targets(named(Path(others[0]) if others else None, config), numbers)


def _wanted(which: Named, numbers: list[int], reason: str | None, *, everything: bool) -> list[int]:
    if sum((bool(numbers), reason is not None, everything)) != 1:
        fail("say which items: their numbers, or --reason REASON, or --all")
    return numbers or quarantine_items.numbers_of(which.path, reason=reason)


def _ask(question: str) -> None:
    if not sys.stdin.isatty():
        fail(f"{question} Say --yes, as there is no terminal to ask on")
    if not typer.confirm(question):
        raise typer.Exit(EXIT_FOUND)


def _not_there(missing: list[str]) -> NoReturn:
    typer.echo(f"tidegate: there is no item {', '.join(missing)} in quarantine", err=True)
    raise typer.Exit(EXIT_FOUND)


def _document(item: Item) -> dict[str, Any]:
    return {
        **item._asdict(),
        "payload": base64.b64encode(item.payload).decode(),
        "payload_text": item.payload.decode("utf-8", "backslashreplace"),
        "is_cut": item.is_cut,
    }


def _show(item: Item) -> None:
    cut = f", of which the first {len(item.payload)} were kept" if item.is_cut else ""
    for line in (
        f"item      {item.quarantine_no}",
        f"received  {moment_text(item.received_at_us)} by {shown(item.source)}",
        f"topic     {shown(item.topic)}",
        f"reason    {shown(item.reason)}: {shown(item.detail)}",
        f"payload   {item.payload_bytes} bytes{cut}",
        f"          {shown_bytes(item.payload)}",
    ):
        typer.echo(line)
