"""`make bench`: run every benchmark several times and write one report with tables and plots.

    python -m benchmarks.report                          all of them, three times each; takes an hour
    python -m benchmarks.report --small --repeats 1      a few minutes, to see that it works
    python -m benchmarks.report --only rivals sweeps

Each benchmark runs in a process of its own and prints one JSON object as its last line; the report shows the
median over the repeats, the lowest and the highest. The README quotes from the report only.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks import plots, processes
from benchmarks.figures import LABELS_VARIABLE, say
from benchmarks.ingress import FOLDER

BENCHES = ("ingress", "spool", "delivery", "formats", "process", "memory", "rivals", "sweeps")
"""In the order of the report; those that are not in this release are left out."""

_SMALL = {
    "ingress": ["--seconds", "1", "--rounds", "1"],
    "spool": ["--small"],
    "delivery": [],
    "memory": ["--small", "--days", "3", "--seconds", "2"],
    "rivals": ["--small"],
    "sweeps": ["--small", "--seconds", "1"],
}
_SMALL_ENVIRONMENT = {"BENCH_READINGS": "300000", "BENCH_LATENCY_S": "2"}
_TITLES = {
    "ingress": "Ingress: from the socket to the fsync",
    "spool": "Spool: bytes, commits, opening",
    "delivery": "Delivery: from the spool to the region",
    "formats": "Payload shapes",
    "process": "Processing",
    "memory": "Memory: idle, busy, large, after a month",
    "rivals": "Rivals, on the same publishes in the same run",
}
_SWEEPS = {
    "throughput_by_batch": ("readings per publish", "readings/s", "CPU us per reading"),
    "latency_by_load": ("publishes/s asked", "publishes/s", "p50 ms", "p99 ms"),
    "cost_by_devices": ("devices", "MB", "kB per device", "CPU % of a core"),
}


@dataclass
class BenchmarkResult:
    """All repeats of one benchmark."""

    name: str
    command: str
    repeats: list[dict[str, Any]] = field(default_factory=list)
    labels: dict[str, dict[str, str]] = field(default_factory=dict)

    def medians(self) -> dict[str, float | int | str | None]:
        """The median of every key that is a number; the last value of every other."""
        found: dict[str, float | int | str | None] = {}
        for key in self.repeats[-1] if self.repeats else ():
            values = [r[key] for r in self.repeats if isinstance(r.get(key), (int, float))]
            found[key] = median(values) if values else self.repeats[-1][key]
        return found


def run_bench(name: str, *, repeats: int, small: bool) -> BenchmarkResult | None:
    """Run one; None when it failed, which is printed."""
    arguments = _SMALL.get(name, []) if small else []
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    measured = BenchmarkResult(name, f"python -m benchmarks.{name} {' '.join(arguments)}".strip())
    environment = {**os.environ, **(_SMALL_ENVIRONMENT if small else {})}
    with tempfile.TemporaryDirectory() as folder:
        labels = Path(folder) / "labels.json"
        for number in range(1, repeats + 1):
            say(f"report: {name}, {number} of {repeats}")
            started_s = time.monotonic()
            done = subprocess.run(
                command,
                cwd=processes.ROOT,
                env={**environment, LABELS_VARIABLE: str(labels)},
                stdout=subprocess.PIPE,
                text=True,
                check=False,
            )
            if done.returncode:
                say(f"report: {name} failed with exit code {done.returncode}:\n{done.stdout[-2000:]}")
                return None
            measured.repeats.append(json.loads(done.stdout.rstrip().splitlines()[-1]))
            say(f"report: {name} took {time.monotonic() - started_s:.0f} s")
        if labels.exists():
            measured.labels = json.loads(labels.read_text())
    return measured


def machine() -> dict[str, str]:
    """The machine and the commit that were measured."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith(("model name", "Model"))
        ),
        platform.machine(),
    )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=processes.ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    FOLDER.mkdir(parents=True, exist_ok=True)
    return {
        "processor": f"{cpu}, {os.cpu_count()} cores",
        "memory": f"{psutil.virtual_memory().total / 1e9:.0f} GB",
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "disk": processes.file_system_type(FOLDER),
        "Python": platform.python_version(),
        "commit": commit or "unknown",
        "taken": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "load before": f"{os.getloadavg()[0]:.1f}",
    }


def write(out: Path, runs: list[BenchmarkResult], facts: dict[str, str], repeats: int) -> None:
    """The report and its plots, beside each other."""
    sweeps = next((run.repeats[-1] for run in runs if run.name == "sweeps"), {})
    figures = {key: value for run in runs if run.name != "sweeps" for key, value in run.medians().items()}
    pictures = plots.draw_all(out.parent / "plots", sweeps, figures)
    lines = [
        "# Benchmarks: one run",
        "",
        (
            "Written by `make bench`; what each figure means is in docs/benchmarks.md. Medians of "
            f"{repeats} repeat{'s' if repeats > 1 else ''}, each a process of its own. Ratios hold within "
            "this run; another machine has other figures."
        ),
        "",
        *_table(["", ""], [[name, fact] for name, fact in facts.items()]),
    ]
    for run in runs:
        if run.name != "sweeps":
            lines += ["", f"## {_TITLES.get(run.name, run.name)}", "", f"`{run.command}`", "", *_figures(run)]
    if sweeps:
        lines += ["", "## Curves", "", f"`{next(r.command for r in runs if r.name == 'sweeps')}`", ""]
        lines += [f"![{title}]({path.relative_to(out.parent)})\n" for title, path in pictures]
        for key, head in _SWEEPS.items():
            if sweeps.get(key):
                rows = [[_number(cell) for cell in point] for point in sweeps[key]]
                lines += ["", *_table(list(head), rows)]
        lines += _bytes_table(sweeps.get("bytes_by_segment", {}))
    elif pictures:
        lines += ["", *(f"![{title}]({path.relative_to(out.parent)})\n" for title, path in pictures)]
    out.write_text("\n".join(lines).rstrip() + "\n")


def _figures(run: BenchmarkResult) -> list[str]:
    rows = []
    for key, value in run.medians().items():
        if key.endswith(("_best", "_worst")):
            continue
        label = run.labels.get(key, {})
        values = [r[key] for r in run.repeats if isinstance(r.get(key), (int, float))]
        inner = [r[f"{key}{end}"] for r in run.repeats for end in ("_best", "_worst") if f"{key}{end}" in r]
        spread = [*values, *(v for v in inner if isinstance(v, (int, float)))]
        rows.append(
            [
                f"`{key}`",
                label.get("what", ""),
                _number(value),
                _number(min(spread)) if spread else "",
                _number(max(spread)) if spread else "",
                label.get("goal", ""),
            ]
        )
    return _table(["key", "", "median", "lowest", "highest", "to reach"], rows)


def _bytes_table(curves: dict[str, list[list[float]]]) -> list[str]:
    if not curves:
        return []
    sizes = [point[0] for point in next(iter(curves.values()))]
    rows = [[form, *(f"{point[1]:.2f}" for point in points)] for form, points in curves.items()]
    return ["", *_table(["bytes per reading, together:", *(f"{size:,.0f}" for size in sizes)], rows)]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        f"|{'|'.join('---' for _ in head)}|",
        *(f"| {' | '.join(cells)} |" for cells in rows),
    ]


def _number(value: float | str | None) -> str:
    if value is None:
        return "not taken"
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="short runs, to see that it works")
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=list(BENCHES))
    parser.add_argument("--out", type=Path, default=processes.ROOT / "benchmarks" / "report.md")
    options = parser.parse_args()
    facts = machine()
    present = [n for n in options.only if importlib.util.find_spec(f"benchmarks.{n}") is not None]
    done = [run_bench(name, repeats=options.repeats, small=options.small) for name in present]
    runs = [run for run in done if run is not None]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write(options.out, runs, facts, options.repeats)
    say(f"report: {options.out}")
    if len(runs) < len(present):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
