"""The report of a soak: report.md for people, report.json for programs."""

from __future__ import annotations

import json
import platform
from collections import Counter
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from tests.soak.watch import Watch

_CHECKED = (
    "at_s",
    "store",
    "acknowledged",
    "stored",
    "lost",
    "duplicated",
    "altered",
    "waiting",
    "quarantined",
    "drained_s",
)


@dataclass
class Report:
    """Faults, checks and counters of one soak."""

    seed: int
    rate: float
    requested_s: float
    faults: list[tuple[float, str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    fleet: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path, watch: Watch) -> str:
        """Write both; returns the verdict, "ok" or "FAILED"."""
        verdict = "FAILED" if watch.violations else "ok"
        memory = {
            name: {
                "median_mb": round(median(mb for _, mb in samples), 1),
                "highest_mb": round(max(mb for _, mb in samples), 1),
                "last_mb": round(samples[-1][1], 1),
            }
            for name, samples in watch.memory.items()
        }
        found = {
            "verdict": verdict,
            "seed": self.seed,
            "rate": self.rate,
            "seconds": round(watch.elapsed_s),
            "faults": dict(Counter(name for _, name, _ in self.faults)),
            "missing": self.missing,
            "memory": memory,
            "highest_backlog": max((rows for _, rows in watch.backlog), default=0),
            "status_answers": watch.answers,
            "status_silences": watch.silences,
            "fleet": self.fleet,
            "checks": self.checks,
            "broken": watch.violations,
        }
        (folder / "report.json").write_text(json.dumps(found, indent=1) + "\n")
        (folder / "report.md").write_text(self._format_markdown(found))
        return verdict

    def _format_markdown(self, found: dict[str, Any]) -> str:
        lines = [
            f"# Soak: {found['verdict']}",
            "",
            (
                f"seed {self.seed}, {found['seconds']} s of {self.requested_s:.0f} asked, "
                f"{self.rate:g} readings/s, {platform.machine()}, Python {platform.python_version()}"
            ),
            "",
            *(f"- BROKEN {what}" for what in found["broken"]),
            "",
            "| fault | times |",
            "|---|---|",
            *(f"| {name} | {times} |" for name, times in sorted(found["faults"].items())),
            *(f"| not here: {why} | 0 |" for why in self.missing),
            "",
            "| memory, MB | median | highest | last |",
            "|---|---|---|---|",
            *(
                f"| {name} | {m['median_mb']} | {m['highest_mb']} | {m['last_mb']} |"
                for name, m in found["memory"].items()
            ),
            "",
            f"| {' | '.join(_CHECKED)} |",
            "|---" * len(_CHECKED) + "|",
            *(f"| {' | '.join(str(check[name]) for name in _CHECKED)} |" for check in self.checks),
            "",
            f"fleet: {json.dumps(self.fleet)}",
            "",
            "| at s | fault | |",
            "|---|---|---|",
            *(f"| {at:.0f} | {name} | {what} |" for at, name, what in self.faults),
            "",
        ]
        return "\n".join(lines)
