"""The status document on a terminal: the same as the status page shows, in as many columns as there are.

Texts that devices chose are made safe to print; nothing of the document is read as markup.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from gateway.operate.human import bytes_text, count_text, seconds_text
from gateway.operate.terminal import shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import RenderableType

    from gateway.operate.status import DestinationStatus, Status

_MARKS = {
    "critical": ("■", "bold red"),
    "warning": ("◆", "yellow"),
    "note": ("○", "dim"),
    "good": ("●", "green"),
}
_STATES = {"idle": "up to date", "sending": "sending", "waiting": "retrying", "held": "held"}
_BARS = "▁▂▃▄▅▆▇█"
_WIDE = 100
_SPARK = 30
_LISTED = 5
_DAY_S = 86_400


def display(status: Status, width: int) -> RenderableType:
    """The whole document, for a terminal of `width` columns."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(ratio=1)
    for name, content in _sections(status, width):
        grid.add_row(name, content)
        grid.add_row("", "")
    return Group(_heading(status), *map(_remark, _pairs(status)), Text(), grid)


def _heading(status: Status) -> Text:
    state = f"up {seconds_text(status.uptime_s)}" if status.running else "not running; as of its spool"
    at = datetime.fromtimestamp(status.at_us / 1e6, UTC).astimezone()
    return Text.assemble(
        "gateway ",
        (shown(status.gateway_id), "bold"),
        f" {shown(status.version)}, {state}  ",
        (f"{at:%H:%M:%S}", "dim"),
    )


def _pairs(status: Status) -> list[tuple[str, str]]:
    return [(remark.severity, remark.text) for remark in status.remarks]


def _remark(pair: tuple[str, str]) -> RenderableType:
    mark, style = _MARKS[pair[0]]
    line = Table.grid(padding=(0, 1))
    line.add_row(Text(mark, style), Text(shown(pair[1]), "" if pair[0] == "good" else style))
    return line


def _sections(status: Status, width: int) -> Iterator[tuple[str, RenderableType]]:
    if status.running:
        yield "coming in", _input(status)
    yield "going out", _destinations(status, width)
    yield "kept here", _kept(status)
    if status.running:
        yield "alerts", _alerts(status)
    yield "given up", _losses(status)
    yield "quarantine", _quarantine(status)
    if status.devices is not None:
        yield "silent", _silent(status)


def _input(status: Status) -> RenderableType:
    ingress, devices, recent = status.ingress, status.devices, status.recent
    first = Text.assemble((count_text(ingress.readings_per_s), "bold"), " readings per second")
    if recent is not None and len(recent.readings_per_s) > 1:
        most = max(recent.readings_per_s)
        first.append(f"  {spark(recent.readings_per_s)}", "cyan")
        first.append(f"  at most {count_text(most)} in {_span(status)}", "dim")
    connections = _counted(ingress.connections, "connection", "connections")
    heard = connections
    if devices is not None:
        within = seconds_text(devices.silent_after_s)
        heard = f"{count_text(devices.heard)} of {_counted(devices.known, 'device', 'devices')} heard"
        heard += f" within {within}, {connections}"
    return Group(
        first,
        Text(heard),
        Text(
            f"{count_text(ingress.acknowledged)} of {count_text(ingress.publishes)} publishes acknowledged; "
            f"{_counted(ingress.readings, 'reading', 'readings')} since start, "
            f"{count_text(ingress.duplicates) if ingress.duplicates else 'none'} came twice"
        ),
    )


def _span(status: Status) -> str:
    recent = status.recent
    assert recent is not None
    return seconds_text((len(recent.readings_per_s) - 1) * recent.step_s)


def _destinations(status: Status, width: int) -> RenderableType:
    if not status.destinations:
        return Text("no destination is configured: readings stay here", "dim")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("destination", overflow="fold")
    table.add_column("state")
    wide = width >= _WIDE
    for heading in (
        "waiting",
        "size",
        "oldest",
        "drains in",
        *(("delivered", "last receipt") if wide else ()),
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for d in status.destinations:
        style = {"waiting": "yellow", "held": "bold red"}.get(d.state, "")
        last = [count_text(d.delivered), _moment(d.last_receipt_at_us, status.at_us)] if wide else []
        table.add_row(
            Text.assemble(shown(d.name), (f" ({d.kind})", "dim")),
            Text(_STATES.get(d.state, d.state), style),
            count_text(d.backlog_readings),
            bytes_text(d.backlog_bytes),
            "-" if d.backlog_oldest_s is None else seconds_text(d.backlog_oldest_s),
            _drain(d),
            *last,
        )
    faults = [
        Text(f"{shown(d.name)}: {shown(d.last_error)}", "yellow") for d in status.destinations if d.last_error
    ]
    return Group(table, *faults)


def _drain(destination: DestinationStatus) -> str:
    if destination.backlog_readings == 0:
        return "-"
    return "unknown" if destination.drain_s is None else seconds_text(destination.drain_s)


def _kept(status: Status) -> RenderableType:
    spool, wear = status.spool, status.wear
    ever = f" of {count_text(spool.readings_ever)} ever" if spool.readings_ever > spool.readings_kept else ""
    lines = [
        f"{_counted(spool.readings_kept, 'reading', 'readings')}{ever} in {bytes_text(spool.size_bytes)}"
    ]
    if spool.room_days is not None:
        lines[0] += f"; room for {seconds_text(spool.room_days * _DAY_S)} if nothing were delivered"
    lines[0] += f" ({bytes_text(spool.room_bytes if status.running else spool.free_bytes)} free)"
    if spool.damaged_readings:
        lines.append(
            f"{_counted(spool.damaged_readings, 'reading', 'readings')} in damaged segments, set aside"
        )
    if wear is not None and wear.written_bytes_per_day is not None:
        times = "" if wear.amplification is None else f", {wear.amplification:.3g} times what readings take"
        lines.append(
            f"{bytes_text(wear.written_bytes_per_day)} a day written to flash by this gateway{times}"
        )
        if wear.disk_written_bytes_per_day is not None:
            lines.append(f"{bytes_text(wear.disk_written_bytes_per_day)} a day to {wear.disk} by everyone")
    if wear is not None and wear.years_left is not None and wear.endurance_bytes is not None:
        left = seconds_text(wear.years_left * 365 * _DAY_S)
        lines.append(f"the flash lasts {left} of {bytes_text(wear.endurance_bytes)} at this rate")
    if status.processing is not None:
        rolled = status.processing
        behind = f", {seconds_text(rolled.lag_s)} behind" if rolled.lag_s > 1 else ""
        lines.append(
            f"{_counted(rolled.rollups, 'rollup', 'rollups')} made since start, "
            f"{count_text(rolled.revisions)} of them revisions; "
            f"{_counted(rolled.windows_open, 'window', 'windows')} open{behind}"
        )
    return Group(*map(Text, lines))


def _alerts(status: Status) -> RenderableType:
    alerts = status.alerts
    if alerts is None or not alerts.newest:
        return Text("nothing is alerting", "dim")
    rows = []
    for alert in alerts.newest[:_LISTED]:
        _, style = _MARKS.get(alert.severity, _MARKS["note"])
        rows.append(
            (
                Text(alert.severity, style) if alert.firing else Text("over", "dim"),
                Text(f"{shown(alert.subject, 60)}  {shown(alert.text or alert.rule, 120)}"),
                _moment(alert.since_us, status.at_us),
            )
        )
    return _rows(rows, len(alerts.newest))


def _losses(status: Status) -> RenderableType:
    losses = status.losses
    if losses is None or not losses.newest:
        return Text("nothing: what came in is delivered, or still here", "dim")
    return _rows(
        [
            (
                Text(count_text(loss.records)),
                Text(
                    f"{loss.what}s{f' for {shown(loss.destination)}' if loss.destination else ''}: "
                    f"{loss.reason.replace('_', ' ')}; "
                    f"{f'what remains: {loss.remains}' if loss.remains else 'nothing remains'}"
                ),
                _moment(loss.declared_at_us, status.at_us),
            )
            for loss in losses.newest[:_LISTED]
        ],
        losses.entries,
    )


def _quarantine(status: Status) -> RenderableType:
    quarantine = status.quarantine
    if quarantine is None or not quarantine.reasons:
        return Text("empty", "dim")
    return _rows(
        [
            (
                Text(count_text(reason.items)),
                Text.assemble(
                    reason.reason.replace("_", " "),
                    (f"  {shown(': '.join(filter(None, (reason.topic, reason.detail))), 120)}", "dim"),
                ),
                _moment(reason.newest_at_us, status.at_us),
            )
            for reason in quarantine.reasons[:_LISTED]
        ],
        len(quarantine.reasons),
    )


def _silent(status: Status) -> RenderableType:
    devices = status.devices
    assert devices is not None
    if not devices.silent:
        return Text("none" if devices.known else "no device has sent a reading yet", "dim")
    return _rows(
        [
            (
                Text(shown(device.sensor_id, 60)),
                Text(_counted(device.series, "series", "series"), "dim"),
                f"{seconds_text((status.at_us - device.heard_at_us) / 1e6)} ago",
            )
            for device in devices.silent_devices[:_LISTED]
        ],
        devices.silent,
    )


def _rows(rows: Sequence[tuple[Text, Text, str]], total: int) -> RenderableType:
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(overflow="fold")
    table.add_column(ratio=1, overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    for first, second, moment in rows:
        table.add_row(first, second, Text(moment, "dim"))
    if total > len(rows):
        table.add_row(Text(f"and {count_text(total - len(rows))} more", "dim"), "", "")
    return table


def spark(values: Sequence[float]) -> str:
    """The last values as a line of bars, each in proportion to the greatest of all."""
    most = max(values, default=0)
    top = len(_BARS) - 1
    return "".join(_BARS[round(value / most * top) if most else 0] for value in values[-_SPARK:])


def _counted(count: float, one: str, many: str) -> str:
    return f"{count_text(count)} {one if count == 1 else many}"


def _moment(at_us: int | None, now_us: int) -> str:
    """The time of today, the date and time before that, in local time."""
    if at_us is None:
        return "none yet"
    at, now = (datetime.fromtimestamp(us / 1e6, UTC).astimezone() for us in (at_us, now_us))
    return f"{at:%H:%M}" if at.date() == now.date() else f"{at:%Y-%m-%d %H:%M}"
