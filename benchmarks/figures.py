"""Results of a benchmark: a table, then one line with one flat JSON object."""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

Number = float | int | str | None
LABELS_VARIABLE = "BENCH_LABELS_FILE"
"""Names a file for the meaning of each key, for the report."""

_console = Console(highlight=False, width=118)


def say(text: str) -> None:
    """One line of progress."""
    print(text, flush=True)


class Figures:
    """Collects rows of the table and keys of the object.

    A measured key is the median of its runs; where there are several, the best and the worst run follow
    under the same key with `_best` and `_worst`.
    """

    def __init__(self, title: str) -> None:
        self._table = Table("", "median", "best", "worst", "to reach", title=title, box=box.SIMPLE_HEAD)
        for column in self._table.columns[1:4]:
            column.justify = "right"
        self._keys: dict[str, Number] = {}
        self._labels: dict[str, dict[str, str]] = {}

    def __getitem__(self, key: str) -> Number:
        return self._keys[key]

    def add_runs(
        self, key: str, values: Sequence[float], what: str, goal: str = "", *, low_is_good: bool = False
    ) -> None:
        """A figure that was taken several times."""
        self._labels[key] = {"what": what, "goal": goal}
        best, worst = (min(values), max(values)) if low_is_good else (max(values), min(values))
        self._keys[key] = _rounded(median(values))
        if len(values) > 1:
            self._keys[f"{key}_best"], self._keys[f"{key}_worst"] = _rounded(best), _rounded(worst)
        self._table.add_row(what, _text(median(values)), _text(best), _text(worst), goal)

    def add(self, key: str, value: float | None, what: str, goal: str = "") -> None:
        """A figure that was taken once; None where it could not be."""
        self._labels[key] = {"what": what, "goal": goal}
        self._keys[key] = None if value is None else _rounded(value)
        self._table.add_row(what, "not taken" if value is None else _text(value), "", "", goal)

    def add_hidden(self, key: str, value: Number) -> None:
        """A key that the table does not show."""
        self._keys[key] = value

    def print(self) -> None:
        """Print the table, then the object as the last line."""
        _console.print(self._table)
        if LABELS_VARIABLE in os.environ:
            Path(os.environ[LABELS_VARIABLE]).write_text(json.dumps(self._labels), encoding="utf-8")
        print(json.dumps(self._keys), flush=True)


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _text(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
