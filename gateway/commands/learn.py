"""`tidegate learn`: listens for a while and proposes a configuration for what it heard."""

from __future__ import annotations

import asyncio
import os
import secrets
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cloud_sync.settings_file import SettingsFault
from gateway import settings
from gateway.commands.failures import fail
from gateway.commands.progress import bar
from gateway.commands.spool_options import EXIT_FOUND, console, table
from gateway.ingress.admission import Anonymous
from gateway.ingress.listener import Listener, ListenSettings
from gateway.ingress.subscriber import Subscriber
from gateway.ingress.subscription import SubscribeSettings
from gateway.operate.learning import Learnt, Seen, learn, table_text
from gateway.operate.terminal import shown
from gateway.settings import Ingress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.ingress.intake import Acknowledger
    from gateway.ingress.packets import Publish
    from gateway.operate.learning import Proposal

app = typer.Typer(add_completion=False)
_UNKNOWN_SHOWN = 20
_READINGS_SHOWN = 8


class _Ear:
    """Implements `Intake`: notes what it hears. Only a broker is told that a message has arrived.

    Devices are not: what they published is nowhere, so they are to keep it and send it to the gateway.
    """

    def __init__(self, *, acknowledges: bool) -> None:
        self.seen = Seen()
        self._acknowledges = acknowledges

    def publishes(self, source: Acknowledger, batch: list[Publish]) -> None:
        """Note a batch."""
        for publish in batch:
            self.seen.add(publish.topic, publish.payload)
        if self._acknowledges:
            source.acknowledge(batch)


@app.command("learn")
def learn_command(  # noqa: PLR0917 - a command line
    broker: Annotated[
        str | None, typer.Option(metavar="URL", help="Listen at this broker: mqtt://HOST or mqtts://HOST.")
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Or be the server devices publish to, e.g. 0.0.0.0:1883."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to listen.")] = 60,
    filters: Annotated[
        list[str] | None, typer.Option("--filter", help="Topic filters for the broker. Repeatable.")
    ] = None,
    username: Annotated[str | None, typer.Option(help="For the broker.")] = None,
    password_file: Annotated[
        Path | None, typer.Option(help="For the broker: a file whose first line is the password.")
    ] = None,
    ca_file: Annotated[Path | None, typer.Option(help="For mqtts://: the authority, PEM.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", "-c", help="The gateway's TOML file: propose what its rules do not take yet."
        ),
    ] = None,
    write: Annotated[  # noqa: FBT002 - typer's way
        bool, typer.Option("--write", help="Add what is proposed to --config.")
    ] = False,
) -> None:
    """Listen for a while, and propose rules for the topics and payloads that are seen.

    At a broker it has a session of its own, which ends with it. As a server it acknowledges nothing: devices
    with QoS 1 send again to the gateway what they published meanwhile.

    Exit codes: 0; 1 when nothing was seen, or some of it would go into quarantine; 2 when it cannot be done.
    """
    if (broker is None) == (listen is None):
        fail("say where to listen: --broker URL, or --listen HOST:PORT")
    if write and config is None:
        fail("--write needs --config: the file to add to")
    ingress = Ingress()
    if config is not None:
        try:
            ingress = settings.read(config).ingress
        except SettingsFault as fault:
            fail(str(fault))
    ear = _Ear(acknowledges=broker is not None)
    try:
        if broker is not None:
            told = SubscribeSettings(
                url=broker,
                client_id=f"tidegate-learn-{secrets.token_hex(6)}",
                filters=tuple(filters or ["#"]),
                retained=True,
                username=username,
                password_file=password_file,
                ca_file=ca_file,
                session_expiry_s=0,
                broker_reviewed=True,
            )
            asyncio.run(_at_broker(told, ear, seconds))
        else:
            host, _, port = (listen or "").rpartition(":")
            asyncio.run(_as_server(ListenSettings(host=host or "127.0.0.1", port=int(port)), ear, seconds))
    except ValueError as fault:
        fail(f"{broker or listen}: {fault}")
    except OSError as fault:
        fail(f"{broker or listen}: {fault.strerror or fault}")
    learnt = learn(ear.seen, ingress.rules, now_us=time.time_ns() // 1000)
    _show(ear.seen, learnt)
    if write and config is not None and learnt.proposals:
        _add(config, learnt.proposals)
    if not ear.seen.topics or learnt.unknown or any(p.faults for p in learnt.proposals):
        raise typer.Exit(EXIT_FOUND)


async def _at_broker(told: SubscribeSettings, ear: _Ear, seconds: float) -> None:
    subscriber, stop = Subscriber(told, ear), asyncio.Event()
    running = asyncio.create_task(subscriber.run(stop), name="subscriber")
    await _listen(seconds, running)
    stop.set()
    subscriber.stop_reading()
    await subscriber.close()
    await running


async def _as_server(told: ListenSettings, ear: _Ear, seconds: float) -> None:
    listener = Listener(told, ear, Anonymous())
    await listener.start()
    try:
        await _listen(seconds, None)
        listener.stop_reading()
    finally:
        await listener.close()


async def _listen(seconds: float, running: asyncio.Task[None] | None) -> None:
    """Wait; the bar shows how much is over."""
    ends = time.monotonic() + seconds
    with bar("listening") as watcher:
        watcher.total(int(seconds * 10))
        while (left_s := ends - time.monotonic()) > 0 and (running is None or not running.done()):
            await asyncio.sleep(min(0.1, left_s))
            watcher.advance()


def _show(seen: Seen, learnt: Learnt) -> None:
    out = console()
    typer.echo(f"{seen.publishes} messages on {len(seen.topics)} topics", err=True)
    if learnt.known:
        typer.echo(f"{len(learnt.known)} topics are taken already", err=True)
    for proposal in learnt.proposals:
        out.print(table_text(proposal), markup=False, highlight=False, soft_wrap=True)
        rows = table("sensor_id", "sensor_type", "value", "unit", "time", right=("value",))
        for m in proposal.readings[:_READINGS_SHOWN]:
            time_text = "of receipt" if m.time_us is None else "its own"
            names = shown(m.name.sensor_id), shown(m.name.sensor_type)
            rows.add_row(*names, f"{m.value:.12g}", shown(m.unit or ""), time_text)
        out.print(rows)
        out.print(f"# {len(proposal.readings)} readings, {len(proposal.faults)} for quarantine")
        reasons = sorted({f"{fault.reason}: {fault.detail}" for fault in proposal.faults})
        for reason in reasons[:_READINGS_SHOWN]:
            out.print(f"#   {shown(reason)}", markup=False, soft_wrap=True)
        out.print()
    if learnt.unknown:
        out.print(f"# {len(learnt.unknown)} topics that no rule was found for:")
        for topic in learnt.unknown[:_UNKNOWN_SHOWN]:
            out.print(f"#   {shown(topic)}", markup=False, soft_wrap=True)


def _add(config: Path, proposals: Sequence[Proposal]) -> None:
    """Add tables to a configuration, if it is one with them; as a whole or not at all."""
    text = config.read_text(encoding="utf-8").rstrip("\n")
    text += "\n\n\n" + "\n".join(map(table_text, proposals))
    descriptor, name = tempfile.mkstemp(dir=config.parent, prefix=f".{config.name}.")
    draft = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.chmod(config.stat().st_mode & 0o777)
        settings.read(draft)
        draft.replace(config)
    except SettingsFault as fault:
        fail(f"nothing was written: {fault}")
    except OSError as fault:
        fail(f"{config}: cannot be written: {fault.strerror}")
    finally:
        draft.unlink(missing_ok=True)
    typer.echo(f"{config}: {len(proposals)} rules added; restart the gateway to use them", err=True)
