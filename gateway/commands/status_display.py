"""The status document and a series chart on a terminal.

Strings that devices chose are escaped; nothing of the document is read as markup.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from gateway.humanize import escape_text, format_bytes, format_count, format_duration, pluralize
from gateway.query.series_chart import draw_line_chart
from gateway.status.advice import STATE_TEXTS, drain_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import RenderableType

    from gateway.query.series_chart import Chart
    from gateway.status.document import Status

_MARKS = {
    "critical": ("■", "bold red"),
    "warning": ("◆", "yellow"),
    "note": ("○", "dim"),
    "good": ("●", "green"),
}
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
    advice = []
    for remark in status.remarks:
        mark, style = _MARKS[remark.severity]
        line = Table.grid(padding=(0, 1))
        text_style = "" if remark.severity == "good" else style
        line.add_row(Text(mark, style), Text(escape_text(remark.text), text_style))
        advice.append(line)
    return Group(_heading(status), *advice, Text(), grid)


def _heading(status: Status) -> Text:
    state = f"up {format_duration(status.uptime_s)}" if status.running else "not running; read from its spool"
    at = datetime.fromtimestamp(status.at_us / 1e6, UTC).astimezone()
    return Text.assemble(
        "gateway ",
        (escape_text(status.gateway_id), "bold"),
        f" {escape_text(status.version)}, {state}  ",
        (f"{at:%H:%M:%S}", "dim"),
    )


def _sections(status: Status, width: int) -> Iterator[tuple[str, RenderableType]]:
    if status.running:
        yield "ingress", _input_section(status)
    yield "delivery", _destinations_section(status, width)
    yield "spool", _spool_section(status)
    if status.running:
        yield "alerts", _alerts_section(status)
    yield "losses", _losses_section(status)
    yield "quarantine", _quarantine_section(status)
    if status.devices is not None:
        yield "silent", _silent_devices_section(status)


def _input_section(status: Status) -> RenderableType:
    ingress, devices, recent = status.ingress, status.devices, status.recent
    first = Text.assemble((format_count(ingress.readings_per_s), "bold"), " readings per second")
    if recent is not None and len(recent.readings_per_s) > 1:
        span = format_duration((len(recent.readings_per_s) - 1) * recent.step_s)
        first.append(f"  {sparkline(recent.readings_per_s)}", "cyan")
        first.append(f"  at most {format_count(max(recent.readings_per_s))} in the last {span}", "dim")
    sources = pluralize(ingress.connections, "connection", "connections")
    if devices is not None:
        within = format_duration(devices.silent_after_s)
        known = pluralize(devices.known, "device", "devices")
        sources = f"{format_count(devices.heard)} of {known} heard within {within}, {sources}"
    acknowledged = f"{format_count(ingress.acknowledged)} of {format_count(ingress.publishes)}"
    readings = pluralize(ingress.readings, "reading", "readings")
    duplicates = pluralize(ingress.duplicates, "duplicate", "duplicates")
    counts = f"{acknowledged} publishes acknowledged; {readings} since start, {duplicates}"
    return Group(first, Text(sources), Text(counts))


def _destinations_section(status: Status, width: int) -> RenderableType:
    if not status.destinations:
        return Text("no destination is configured: readings stay in the spool", "dim")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("destination", overflow="fold")
    table.add_column("state")
    wide = width >= _WIDE_COLUMNS
    for heading in ("backlog", "size", "oldest", "drains in", "delivered", "last receipt")[
        : 6 if wide else 4
    ]:
        table.add_column(heading, justify="right", no_wrap=True)
    for d in status.destinations:
        style = {"waiting": "yellow", "held": "bold red"}.get(d.state, "")
        last = [format_count(d.delivered), _local_time(d.last_receipt_at_us, status.at_us)] if wide else []
        table.add_row(
            Text.assemble(escape_text(d.name), (f" ({d.kind})", "dim")),
            Text(STATE_TEXTS.get(d.state, d.state), style),
            format_count(d.backlog_readings),
            format_bytes(d.backlog_bytes),
            "-" if d.backlog_oldest_s is None else format_duration(d.backlog_oldest_s),
            drain_text(d),
            *last,
        )
    errors = [(escape_text(d.name), escape_text(d.last_error)) for d in status.destinations if d.last_error]
    return Group(table, *(Text(f"{name}: {error}", "yellow") for name, error in errors))


def _spool_section(status: Status) -> RenderableType:
    spool, wear, processing = status.spool, status.wear, status.processing
    stored = pluralize(spool.readings_kept, "reading", "readings")
    if spool.readings_ever > spool.readings_kept:
        stored += f" of {format_count(spool.readings_ever)} ever"
    full = ""
    if spool.room_days is not None:
        full = f"; full in {format_duration(spool.room_days * _DAY_S)} if nothing is delivered"
    free = format_bytes(spool.room_bytes if status.running else spool.free_bytes)
    lines = [f"{stored} in {format_bytes(spool.size_bytes)}{full} ({free} free)"]
    if spool.damaged_readings:
        damaged = pluralize(spool.damaged_readings, "reading", "readings")
        lines.append(f"{damaged} in damaged segments, set aside")
    if wear is not None and wear.written_bytes_per_day is not None:
        factor = "" if wear.amplification is None else f", {wear.amplification:.3g} times the readings' size"
        lines.append(f"{format_bytes(wear.written_bytes_per_day)} a day written by this gateway{factor}")
        if wear.disk_written_bytes_per_day is not None:
            written = format_bytes(wear.disk_written_bytes_per_day)
            lines.append(f"{written} a day written to {wear.disk} by all programs")
    if wear is not None and wear.years_left is not None and wear.endurance_bytes is not None:
        left = format_duration(wear.years_left * 365 * _DAY_S)
        lines.append(f"the flash lasts {left} of {format_bytes(wear.endurance_bytes)} at this rate")
    if processing is not None:
        behind = f", {format_duration(processing.lag_s)} behind" if processing.lag_s > 1 else ""
        rollups = pluralize(processing.rollups, "rollup", "rollups")
        windows = pluralize(processing.windows_open, "window", "windows")
        revisions = format_count(processing.revisions)
        lines.append(f"{rollups} since start, {revisions} of them revisions; {windows} open{behind}")
    return Group(*map(Text, lines))


def _alerts_section(status: Status) -> RenderableType:
    alerts = status.alerts
    if alerts is None or not alerts.newest:
        return Text("none", "dim")
    rows = []
    for alert in alerts.newest[:_ROWS_MAX]:
        style = _MARKS.get(alert.severity, _MARKS["note"])[1]
        state = Text(alert.severity, style) if alert.firing else Text("resolved", "dim")
        text = f"{escape_text(alert.subject, 60)}  {escape_text(alert.text or alert.rule, 120)}"
        rows.append((state, Text(text), _local_time(alert.since_us, status.at_us)))
    return _list_table(rows, len(alerts.newest))


def _losses_section(status: Status) -> RenderableType:
    losses = status.losses
    if losses is None or not losses.newest:
        return Text("none: every reading is delivered, or still in the spool", "dim")
    rows = []
    for loss in losses.newest[:_ROWS_MAX]:
        destination = f" for {escape_text(loss.destination)}" if loss.destination else ""
        remains = f"kept as {loss.remains}" if loss.remains else "nothing kept"
        text = f"{loss.what}s{destination}: {loss.reason.replace('_', ' ')}; {remains}"
        declared = _local_time(loss.declared_at_us, status.at_us)
        rows.append((Text(format_count(loss.records)), Text(text), declared))
    return _list_table(rows, losses.entries)


def _quarantine_section(status: Status) -> RenderableType:
    quarantine = status.quarantine
    if quarantine is None or not quarantine.reasons:
        return Text("empty", "dim")
    rows = []
    for reason in quarantine.reasons[:_ROWS_MAX]:
        example = escape_text(": ".join(filter(None, (reason.topic, reason.detail))), 120)
        text = Text.assemble(reason.reason.replace("_", " "), (f"  {example}", "dim"))
        rows.append((Text(format_count(reason.items)), text, _local_time(reason.newest_at_us, status.at_us)))
    return _list_table(rows, len(quarantine.reasons))


def _silent_devices_section(status: Status) -> RenderableType:
    devices = status.devices
    if devices is None or not devices.silent:
        return Text("none" if devices and devices.known else "no device has sent a reading yet", "dim")
    rows = []
    for device in devices.silent_devices[:_ROWS_MAX]:
        silent_s = (status.at_us - device.heard_at_us) / 1e6
        series = Text(pluralize(device.series, "series", "series"), "dim")
        rows.append((Text(escape_text(device.sensor_id, 60)), series, f"{format_duration(silent_s)} ago"))
    return _list_table(rows, devices.silent)


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
    """The last values as a line of bars, in proportion to the greatest."""
    most = max(values, default=0)
    top = len(_BARS) - 1
    return "".join(_BARS[round(value / most * top) if most else 0] for value in values[-_SPARK_WIDTH:])


def _local_time(at_us: int | None, now_us: int) -> str:
    """The time of today, the date and time before that, in local time."""
    if at_us is None:
        return "none yet"
    at, now = (datetime.fromtimestamp(us / 1e6, UTC).astimezone() for us in (at_us, now_us))
    return f"{at:%H:%M}" if at.date() == now.date() else f"{at:%Y-%m-%d %H:%M}"


_CHART_LINES = 8
_CHART_MARGIN = 12


def render_chart(chart: Chart, width: int) -> RenderableType:
    """The chart with its least and greatest value and the times of both ends."""
    name = escape_text(f"{chart.sensor_id}/{chart.sensor_type}", 80)
    if not chart.readings:
        return Text(f"{name}: no readings in the last 24 hours", "dim")
    least, greatest = min(chart.least), max(chart.greatest)
    latest, low, high = (_format_value(v, greatest - least) for v in (chart.mean[-1], least, greatest))
    unit = f" {escape_text(chart.unit, 20)}" if chart.unit else ""
    bounds = f"between {low} and {high}{unit}" if least < greatest else "constant"
    part = "" if chart.complete else "; earlier ones could not be read in time"
    title = Text.assemble(
        (name, "bold"),
        f"  latest {latest}{unit}, {bounds}, "
        f"{format_count(chart.readings)} readings, {format_count(sum(chart.flagged))} flagged{part}",
    )
    times = np.repeat(np.array(chart.at_us, np.int64), 2)
    values = np.column_stack((chart.least, chart.greatest)).ravel()
    span_us = chart.since_us, chart.until_us
    drawn = draw_line_chart(times, values, span_us, width=max(20, width), height=_CHART_LINES)
    first, last = (datetime.fromtimestamp(us / 1e6, UTC).astimezone() for us in span_us)
    ends = f"{'':{_CHART_MARGIN}}{first:%H:%M}{f'{last:%H:%M}':>{max(20, width) - _CHART_MARGIN - 5}}"
    return Group(title, *(Text(line, "cyan") for line in drawn), Text(ends, "dim"))


def _format_value(value: float, span: float) -> str:
    if not math.isfinite(span) or abs(value) >= 1e9:  # noqa: PLR2004 - ten digits
        return f"{value:.4g}"
    digits = max(0, min(6, 2 - math.floor(math.log10(span)))) if span > 0 else 2
    return f"{value:.{digits}f}"
