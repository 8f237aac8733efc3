"""What a person sees while it runs, on standard error, and the last line on standard output."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, cast

from rich.console import Console
from rich.live import Live
from rich.table import Table

from firmware_sim.verify import EXAMPLES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

    from firmware_sim.verify import Differences

_PLAIN_EVERY_S = 5.0
_REASONS_SHOWN = 10
_ROWS = (
    ("produced", "readings sampled"),
    ("published", "readings sent at least once"),
    ("acknowledged", "readings the server has acknowledged"),
    ("outstanding_publishes", "publishes kept until acknowledged"),
    ("publishes_resent", "publishes sent again after a connection was lost"),
    ("refused", "readings the server refused for good"),
    ("overrun", "readings lost to a full ring buffer"),
    ("forgotten", "readings lost with a device's memory"),
    ("malformed_publishes", "spoilt publishes sent beside them"),
    ("reboots", "restarts of devices"),
    ("attacks", "attacks by hostile devices"),
    ("behind_s", "seconds that sampling is behind"),
    ("reconnects", "connections made again"),
)


class Progress:
    """A live table on a terminal, a plain line every few seconds elsewhere, nothing when quiet."""

    def __init__(self, title: str, *, quiet: bool) -> None:
        self._title = title
        self._quiet = quiet
        self._console = Console(stderr=True)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._shown_s = time.monotonic()

    def __enter__(self) -> Self:
        if not self._quiet and self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, counters: Mapping[str, object]) -> None:
        """Show the counters of `Fleet.progress` or of a replay."""
        if self._quiet:
            return
        if self._console.is_terminal:
            self._live.update(self._table(counters), refresh=True)
        elif time.monotonic() - self._shown_s >= _PLAIN_EVERY_S:
            self._shown_s = time.monotonic()
            self._console.out(f"{self._title}: {one_line(counters)}", highlight=False)

    def _table(self, counters: Mapping[str, object]) -> Table:
        devices = f"{counters['devices_connected']} of {counters['devices']} devices connected"
        table = Table(title=f"{self._title}: {devices}, {counters['elapsed_s']} s", title_justify="left")
        table.add_column("count", justify="right")
        table.add_column("of")
        for name, meaning in _ROWS:
            if counters.get(name) or name in {"produced", "published", "acknowledged"}:
                table.add_row(f"{counters[name]:,}", meaning)
        captions = [f"{name} is down" for name in cast("list[str]", counters.get("services_down", []))]
        captions += [f"last fault: {counters['last_fault']}"] if counters["last_fault"] else []
        table.caption = "; ".join(captions) or None
        return table


def one_line(counters: Mapping[str, object]) -> str:
    """The counters a log needs, as name=value."""
    names = (
        "produced",
        "published",
        "acknowledged",
        "outstanding_publishes",
        "refused",
        "overrun",
        "reconnects",
        "devices_connected",
        "elapsed_s",
    )
    text = " ".join(f"{name}={counters[name]}" for name in names)
    return f"{text} last_fault={json.dumps(counters['last_fault'])}" if counters["last_fault"] else text


def describe(differences: Differences, notes: list[str]) -> str:
    """The outcome of a comparison in words, ending with one line to search for."""
    lines = [f"note: {note}" for note in notes]
    for kind, texts in differences.examples.items():
        total = getattr(differences, kind)
        lines.append(f"{kind}: {total:,}" + (f", the first {EXAMPLES}:" if total > EXAMPLES else ":"))
        lines += [f"  {text}" for text in texts]
    d = differences
    if d.flagged:
        lines.append("flagged: " + ", ".join(f"{name} {count:,}" for name, count in d.flagged.items()))
    lines.append(
        f"verify: {'ok' if d.clean else 'FAILED'} acknowledged={d.acknowledged} stored={d.stored} "
        f"lost={d.lost} duplicated={d.duplicated} altered={d.altered} unknown={d.unknown} "
        f"waiting={d.waiting} suppressed={d.suppressed} quarantined={d.quarantined} declared={d.declared} "
        f"late={d.late} "
        f"early={d.early} produced={d.produced} repeated={d.repeated} "
        f"refused={d.refused} rewritten={d.rewritten} foreign={d.foreign}"
    )
    return "\n".join(lines)


def describe_replay(outcome: Mapping[str, object]) -> str:
    """The summary in words, ending with one line to search for."""
    lines = []
    reasons = outcome["skipped_reasons"]
    assert isinstance(reasons, list)
    lines += [f"skipped {reason}" for reason in reasons[:_REASONS_SHOWN]]
    if len(reasons) > _REASONS_SHOWN:
        lines.append(f"skipped: {outcome['skipped']} in all; --json lists the first {len(reasons)}")
    if outcome["repeated"]:
        examples = outcome["repeated_examples"]
        assert isinstance(examples, list)
        lines.append(
            f"{outcome['repeated']} readings repeat the series and time of an earlier one; "
            f"the first of each is the one that is stored: {', '.join(examples)}"
        )
    if outcome["cut_times"]:
        lines.append(f"{outcome['cut_times']} times had digits below a microsecond, which were cut")
    if outcome["last_fault"]:
        lines.append(f"last fault: {outcome['last_fault']}")
    names = (
        "rows",
        "sent",
        "acknowledged",
        "refused",
        "skipped",
        "empty_cells",
        "repeated",
        "reconnects",
        "elapsed_s",
    )
    lines.append("sim replay: " + " ".join(f"{name}={outcome[name]}" for name in names))
    return "\n".join(lines)
