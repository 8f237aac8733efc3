"""A series over a span of time, drawn with dots of braille: two by four in each character."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from gateway.operate.human import count_text
from gateway.operate.terminal import shown

if TYPE_CHECKING:
    from rich.console import RenderableType

    from gateway.operate.series_chart import Chart

_BRAILLE = 0x2800
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""The bit of each dot, by column and by row from the top. Source: Unicode, Braille Patterns."""
_LINES = 8
_MARGIN = 10


def chart_display(chart: Chart, width: int) -> RenderableType:
    """The chart with its least and greatest value and the times of both ends."""
    name = shown(f"{chart.sensor_id}/{chart.sensor_type}", 80)
    if not chart.readings:
        return Text(f"{name}: no readings in the last 24 hours", "dim")
    least, greatest = min(chart.least), max(chart.greatest)
    unit = f" {shown(chart.unit, 20)}" if chart.unit else ""
    part = "" if chart.complete else "; earlier ones could not be read in time"
    title = Text.assemble(
        (name, "bold"),
        f"  latest {value_text(chart.mean[-1], greatest - least)}{unit}, between "
        f"{value_text(least, greatest - least)} and {value_text(greatest, greatest - least)}{unit}, "
        f"{count_text(chart.readings)} readings, {count_text(sum(chart.flagged))} flagged{part}",
    )
    columns = max(20, width - _MARGIN)
    lines = dots(chart, columns, _LINES)
    labels = {0: value_text(greatest, greatest - least), len(lines) - 1: value_text(least, greatest - least)}
    drawn = [
        Text.assemble((f"{labels.get(row, ''):>{_MARGIN - 2}}  ", "dim"), (line, "cyan"))
        for row, line in enumerate(lines)
    ]
    first, last = (
        datetime.fromtimestamp(us / 1e6, UTC).astimezone() for us in (chart.since_us, chart.until_us)
    )
    ends = Text(f"{'':{_MARGIN}}{first:%H:%M}{f'{last:%H:%M}':>{columns - 5}}", "dim")
    return Group(title, *drawn, ends)


def dots(chart: Chart, columns: int, lines: int) -> list[str]:
    """The span from least to greatest of each step as a column of dots; lines from the top."""
    low, high = min(chart.least), max(chart.greatest)
    height, wide = lines * 4, columns * 2
    cells = [[0] * columns for _ in range(lines)]

    def row_of(value: float) -> int:
        return round((high - value) / (high - low) * (height - 1)) if high > low else height // 2

    for at_us, least, greatest in zip(chart.at_us, chart.least, chart.greatest, strict=True):
        x = min(wide - 1, int((at_us - chart.since_us) / (chart.until_us - chart.since_us) * wide))
        for y in range(row_of(greatest), row_of(least) + 1):
            cells[y // 4][x // 2] |= _DOTS[x % 2][y % 4]
    return ["".join(chr(_BRAILLE + cell) for cell in row) for row in cells]


def value_text(value: float, span: float) -> str:
    """A measured value with as many digits as its span makes sensible."""
    if not math.isfinite(span) or abs(value) >= 1e9:  # noqa: PLR2004 - ten digits
        return f"{value:.4g}"
    digits = max(0, min(6, 2 - math.floor(math.log10(span)))) if span > 0 else 2
    return f"{value:.{digits}f}"
