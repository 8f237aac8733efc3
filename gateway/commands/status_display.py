"""The status document and a series chart on a terminal.

Strings that devices chose are escaped; nothing of the document is read as markup.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from gateway.humanize import escape_text, format_bytes, format_count, format_duration

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import RenderableType

    from gateway.query.series_chart import Chart
    from gateway.status.document import DestinationStatus, Status

_MARKS = {
    "critical": ("■", "bold red"),
    "warning": ("◆", "yellow"),
    "note": ("○", "dim"),
    "good": ("●", "green"),
}
_STATES = {"idle": "up to date", "sending": "sending", "waiting": "retrying", "held": "held"}
_BARS = "▁▂▃▄▅▆▇█"
_WIDE_COLUMNS = 100
_SPARK_WIDTH = 30
_ROWS_MAX = 5
_DAY_S = 86_400


def render_status(status: Status, width: int) -> RenderableType:
    """The whole document, for a terminal of `width` columns."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(ratio=1)
    for name, content in _sections(status, width):
        grid.add_row(name, content)
        grid.add_row("", "")
    return Group(_heading(status), *map(_render_advice, _severity_and_text(status)), Text(), grid)


def _heading(status: Status) -> Text:
    state = f"up {format_duration(status.uptime_s)}" if status.running else "not running; as of its spool"
    at = datetime.fromtimestamp(status.at_us / 1e6, UTC).astimezone()
    return Text.assemble(
        "gateway ",
        (escape_text(status.gateway_id), "bold"),
        f" {escape_text(status.version)}, {state}  ",
        (f"{at:%H:%M:%S}", "dim"),
    )


def _severity_and_text(status: Status) -> list[tuple[str, str]]:
    return [(remark.severity, remark.text) for remark in status.remarks]


def _render_advice(pair: tuple[str, str]) -> RenderableType:
    mark, style = _MARKS[pair[0]]
    line = Table.grid(padding=(0, 1))
    line.add_row(Text(mark, style), Text(escape_text(pair[1]), "" if pair[0] == "good" else style))
    return line


def _sections(status: Status, width: int) -> Iterator[tuple[str, RenderableType]]:
    if status.running:
        yield "coming in", _input_section(status)
    yield "going out", _destinations_section(status, width)
    yield "kept here", _spool_section(status)
    if status.running:
        yield "alerts", _alerts_section(status)
    yield "given up", _losses_section(status)
    yield "quarantine", _quarantine_section(status)
    if status.devices is not None:
        yield "silent", _silent_devices_section(status)


def _input_section(status: Status) -> RenderableType:
    ingress, devices, recent = status.ingress, status.devices, status.recent
    first = Text.assemble((format_count(ingress.readings_per_s), "bold"), " readings per second")
    if recent is not None and len(recent.readings_per_s) > 1:
        most = max(recent.readings_per_s)
        first.append(f"  {sparkline(recent.readings_per_s)}", "cyan")
        first.append(f"  at most {format_count(most)} in {_history_span(status)}", "dim")
    connections = _pluralize(ingress.connections, "connection", "connections")
    heard = connections
    if devices is not None:
        within = format_duration(devices.silent_after_s)
        heard = f"{format_count(devices.heard)} of {_pluralize(devices.known, 'device', 'devices')} heard"
        heard += f" within {within}, {connections}"
    return Group(
        first,
        Text(heard),
        Text(
            f"{format_count(ingress.acknowledged)} of {format_count(ingress.publishes)} "
            "publishes acknowledged; "
            f"{_pluralize(ingress.readings, 'reading', 'readings')} since start, "
            f"{format_count(ingress.duplicates) if ingress.duplicates else 'none'} came twice"
        ),
    )


def _history_span(status: Status) -> str:
    recent = status.recent
    assert recent is not None
    return format_duration((len(recent.readings_per_s) - 1) * recent.step_s)


def _destinations_section(status: Status, width: int) -> RenderableType:
    if not status.destinations:
        return Text("no destination is configured: readings stay here", "dim")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("destination", overflow="fold")
    table.add_column("state")
    wide = width >= _WIDE_COLUMNS
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
        last = [format_count(d.delivered), _local_time(d.last_receipt_at_us, status.at_us)] if wide else []
        table.add_row(
            Text.assemble(escape_text(d.name), (f" ({d.kind})", "dim")),
            Text(_STATES.get(d.state, d.state), style),
            format_count(d.backlog_readings),
            format_bytes(d.backlog_bytes),
            "-" if d.backlog_oldest_s is None else format_duration(d.backlog_oldest_s),
            _drain_text(d),
            *last,
        )
    faults = [
        Text(f"{escape_text(d.name)}: {escape_text(d.last_error)}", "yellow")
        for d in status.destinations
        if d.last_error
    ]
    return Group(table, *faults)


def _drain_text(destination: DestinationStatus) -> str:
    if destination.backlog_readings == 0:
        return "-"
    return "unknown" if destination.drain_s is None else format_duration(destination.drain_s)


def _spool_section(status: Status) -> RenderableType:
    spool, wear = status.spool, status.wear
    ever = (
        f" of {format_count(spool.readings_ever)} ever" if spool.readings_ever > spool.readings_kept else ""
    )
    lines = [
        f"{_pluralize(spool.readings_kept, 'reading', 'readings')}{ever} in {format_bytes(spool.size_bytes)}"
    ]
    if spool.room_days is not None:
        lines[0] += f"; room for {format_duration(spool.room_days * _DAY_S)} if nothing were delivered"
    lines[0] += f" ({format_bytes(spool.room_bytes if status.running else spool.free_bytes)} free)"
    if spool.damaged_readings:
        lines.append(
            f"{_pluralize(spool.damaged_readings, 'reading', 'readings')} in damaged segments, set aside"
        )
    if wear is not None and wear.written_bytes_per_day is not None:
        times = "" if wear.amplification is None else f", {wear.amplification:.3g} times what readings take"
        lines.append(
            f"{format_bytes(wear.written_bytes_per_day)} a day written to flash by this gateway{times}"
        )
        if wear.disk_written_bytes_per_day is not None:
            lines.append(f"{format_bytes(wear.disk_written_bytes_per_day)} a day to {wear.disk} by everyone")
    if wear is not None and wear.years_left is not None and wear.endurance_bytes is not None:
        left = format_duration(wear.years_left * 365 * _DAY_S)
        lines.append(f"the flash lasts {left} of {format_bytes(wear.endurance_bytes)} at this rate")
    if status.processing is not None:
        rolled = status.processing
        behind = f", {format_duration(rolled.lag_s)} behind" if rolled.lag_s > 1 else ""
        lines.append(
            f"{_pluralize(rolled.rollups, 'rollup', 'rollups')} made since start, "
            f"{format_count(rolled.revisions)} of them revisions; "
            f"{_pluralize(rolled.windows_open, 'window', 'windows')} open{behind}"
        )
    return Group(*map(Text, lines))


def _alerts_section(status: Status) -> RenderableType:
    alerts = status.alerts
    if alerts is None or not alerts.newest:
        return Text("nothing is alerting", "dim")
    rows = []
    for alert in alerts.newest[:_ROWS_MAX]:
        _, style = _MARKS.get(alert.severity, _MARKS["note"])
        rows.append(
            (
                Text(alert.severity, style) if alert.firing else Text("over", "dim"),
                Text(f"{escape_text(alert.subject, 60)}  {escape_text(alert.text or alert.rule, 120)}"),
                _local_time(alert.since_us, status.at_us),
            )
        )
    return _list_table(rows, len(alerts.newest))


def _losses_section(status: Status) -> RenderableType:
    losses = status.losses
    if losses is None or not losses.newest:
        return Text("nothing: what came in is delivered, or still here", "dim")
    return _list_table(
        [
            (
                Text(format_count(loss.records)),
                Text(
                    f"{loss.what}s{f' for {escape_text(loss.destination)}' if loss.destination else ''}: "
                    f"{loss.reason.replace('_', ' ')}; "
                    f"{f'what remains: {loss.remains}' if loss.remains else 'nothing remains'}"
                ),
                _local_time(loss.declared_at_us, status.at_us),
            )
            for loss in losses.newest[:_ROWS_MAX]
        ],
        losses.entries,
    )


def _quarantine_section(status: Status) -> RenderableType:
    quarantine = status.quarantine
    if quarantine is None or not quarantine.reasons:
        return Text("empty", "dim")
    return _list_table(
        [
            (
                Text(format_count(reason.items)),
                Text.assemble(
                    reason.reason.replace("_", " "),
                    (f"  {escape_text(': '.join(filter(None, (reason.topic, reason.detail))), 120)}", "dim"),
                ),
                _local_time(reason.newest_at_us, status.at_us),
            )
            for reason in quarantine.reasons[:_ROWS_MAX]
        ],
        len(quarantine.reasons),
    )


def _silent_devices_section(status: Status) -> RenderableType:
    devices = status.devices
    assert devices is not None
    if not devices.silent:
        return Text("none" if devices.known else "no device has sent a reading yet", "dim")
    return _list_table(
        [
            (
                Text(escape_text(device.sensor_id, 60)),
                Text(_pluralize(device.series, "series", "series"), "dim"),
                f"{format_duration((status.at_us - device.heard_at_us) / 1e6)} ago",
            )
            for device in devices.silent_devices[:_ROWS_MAX]
        ],
        devices.silent,
    )


def _list_table(rows: Sequence[tuple[Text, Text, str]], total: int) -> RenderableType:
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(overflow="fold")
    table.add_column(ratio=1, overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    for first, second, moment in rows:
        table.add_row(first, second, Text(moment, "dim"))
    if total > len(rows):
        table.add_row(Text(f"and {format_count(total - len(rows))} more", "dim"), "", "")
    return table


def sparkline(values: Sequence[float]) -> str:
    """The last values as a line of bars, each in proportion to the greatest of all."""
    most = max(values, default=0)
    top = len(_BARS) - 1
    return "".join(_BARS[round(value / most * top) if most else 0] for value in values[-_SPARK_WIDTH:])


def _pluralize(count: float, one: str, many: str) -> str:
    return f"{format_count(count)} {one if count == 1 else many}"


def _local_time(at_us: int | None, now_us: int) -> str:
    """The time of today, the date and time before that, in local time."""
    if at_us is None:
        return "none yet"
    at, now = (datetime.fromtimestamp(us / 1e6, UTC).astimezone() for us in (at_us, now_us))
    return f"{at:%H:%M}" if at.date() == now.date() else f"{at:%Y-%m-%d %H:%M}"


_BRAILLE = 0x2800
_BRAILLE_BITS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""The bit of each dot, by column and by row from the top. Source: Unicode, Braille Patterns."""
_CHART_LINES = 8
_CHART_MARGIN = 10


def render_chart(chart: Chart, width: int) -> RenderableType:
    """The chart with its least and greatest value and the times of both ends."""
    name = escape_text(f"{chart.sensor_id}/{chart.sensor_type}", 80)
    if not chart.readings:
        return Text(f"{name}: no readings in the last 24 hours", "dim")
    least, greatest = min(chart.least), max(chart.greatest)
    unit = f" {escape_text(chart.unit, 20)}" if chart.unit else ""
    part = "" if chart.complete else "; earlier ones could not be read in time"
    title = Text.assemble(
        (name, "bold"),
        f"  latest {format_value(chart.mean[-1], greatest - least)}{unit}, between "
        f"{format_value(least, greatest - least)} and {format_value(greatest, greatest - least)}{unit}, "
        f"{format_count(chart.readings)} readings, {format_count(sum(chart.flagged))} flagged{part}",
    )
    columns = max(20, width - _CHART_MARGIN)
    lines = braille_lines(chart, columns, _CHART_LINES)
    labels = {
        0: format_value(greatest, greatest - least),
        len(lines) - 1: format_value(least, greatest - least),
    }
    drawn = [
        Text.assemble((f"{labels.get(row, ''):>{_CHART_MARGIN - 2}}  ", "dim"), (line, "cyan"))
        for row, line in enumerate(lines)
    ]
    first, last = (
        datetime.fromtimestamp(us / 1e6, UTC).astimezone() for us in (chart.since_us, chart.until_us)
    )
    ends = Text(f"{'':{_CHART_MARGIN}}{first:%H:%M}{f'{last:%H:%M}':>{columns - 5}}", "dim")
    return Group(title, *drawn, ends)


def braille_lines(chart: Chart, columns: int, lines: int) -> list[str]:
    """The span from least to greatest of each step as a column of dots; lines from the top."""
    low, high = min(chart.least), max(chart.greatest)
    height, wide = lines * 4, columns * 2
    cells = [[0] * columns for _ in range(lines)]

    def row_of(value: float) -> int:
        return round((high - value) / (high - low) * (height - 1)) if high > low else height // 2

    for at_us, least, greatest in zip(chart.at_us, chart.least, chart.greatest, strict=True):
        x = min(wide - 1, int((at_us - chart.since_us) / (chart.until_us - chart.since_us) * wide))
        for y in range(row_of(greatest), row_of(least) + 1):
            cells[y // 4][x // 2] |= _BRAILLE_BITS[x % 2][y % 4]
    return ["".join(chr(_BRAILLE + cell) for cell in row) for row in cells]


def format_value(value: float, span: float) -> str:
    """A measured value with as many digits as its span makes sensible."""
    if not math.isfinite(span) or abs(value) >= 1e9:  # noqa: PLR2004 - ten digits
        return f"{value:.4g}"
    digits = max(0, min(6, 2 - math.floor(math.log10(span)))) if span > 0 else 2
    return f"{value:.{digits}f}"
