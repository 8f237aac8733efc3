"""The report's pictures, as PNG files. Needs matplotlib (extra `bench`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Number = float | int | str | None
_SIZE = (7.0, 4.0)
_COLOURS = ("#0b6e8a", "#c8553d", "#588157", "#6d597a")


def draw_all(
    folder: Path, sweeps: Mapping[str, Any], figures: Mapping[str, Number]
) -> list[tuple[str, Path]]:
    """Draw what there are figures for; returns (title, file) in the order of the report.

    Args:
        folder: where the files go; made if need be.
        sweeps: lists of points, as `benchmarks.sweeps` prints them.
        figures: medians of all benchmarks by key.
    """
    import matplotlib as mpl  # noqa: PLC0415 - an extra

    mpl.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, (title, draw) in _PICTURES.items():
        path = folder / f"{name}.png"
        if draw(path, title, sweeps, figures):
            drawn.append((title, path))
    return drawn


def _axes(title: str, across: str, up: str) -> tuple[Any, Any]:
    from matplotlib import pyplot as plt  # noqa: PLC0415 - an extra

    figure, axes = plt.subplots(figsize=_SIZE, layout="constrained")
    figure.suptitle(title, fontsize="medium")
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> bool:
    from matplotlib import pyplot as plt  # noqa: PLC0415 - an extra

    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def _throughput(path: Path, title: str, sweeps: Mapping[str, Any], _: Mapping[str, Number]) -> bool:
    points = sweeps.get("throughput_by_batch")
    if not points:
        return False
    figure, axes = _axes(title, "readings per publish", "readings per second")
    axes.plot([p[0] for p in points], [p[1] for p in points], "o-", color=_COLOURS[0])
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    return _save(figure, path)


def _latency(path: Path, title: str, sweeps: Mapping[str, Any], _: Mapping[str, Number]) -> bool:
    points = sweeps.get("latency_by_load")
    if not points:
        return False
    figure, axes = _axes(title, "publishes per second", "milliseconds, from due to PUBACK")
    for place, name in ((2, "p50"), (3, "p99")):
        axes.plot(
            [p[0] for p in points], [p[place] for p in points], "o-", label=name, color=_COLOURS[place - 2]
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.legend()
    return _save(figure, path)


def _bytes(path: Path, title: str, sweeps: Mapping[str, Any], _: Mapping[str, Number]) -> bool:
    curves = sweeps.get("bytes_by_segment")
    if not curves:
        return False
    figure, axes = _axes(title, "readings together", "bytes per reading")
    for colour, (form, points) in zip(_COLOURS, curves.items(), strict=False):
        axes.plot([p[0] for p in points], [p[1] for p in points], "o-", label=form, color=colour)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.legend()
    return _save(figure, path)


def _drain(path: Path, title: str, _: Mapping[str, Any], figures: Mapping[str, Number]) -> bool:
    names = {
        "copy_rows_per_s": "bare binary COPY",
        "drain_readings_per_s": "gateway, ingest service, PostgreSQL",
    }
    found = {
        words: figures[key] for key, words in names.items() if isinstance(figures.get(key), (int, float))
    }
    if not found:
        return False
    figure, axes = _axes(title, "rows per second", "")
    axes.barh(list(found), [float(value or 0) for value in found.values()], color=_COLOURS[: len(found)])
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    return _save(figure, path)


def _memory(path: Path, title: str, sweeps: Mapping[str, Any], _: Mapping[str, Number]) -> bool:
    points = sweeps.get("memory_over_time")
    if not points:
        return False
    figure, axes = _axes(title, "seconds at 100,000 readings/s", "resident MB")
    axes.plot([p[0] for p in points], [p[2] for p in points], color=_COLOURS[0])
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    backlog = axes.twiny()
    backlog.set_xlim(*(edge * 0.1 for edge in axes.get_xlim()))
    backlog.set_xlabel("backlog, about, millions of readings")
    return _save(figure, path)


def _devices(path: Path, title: str, sweeps: Mapping[str, Any], _: Mapping[str, Number]) -> bool:
    points = sweeps.get("cost_by_devices")
    if not points:
        return False
    figure, axes = _axes(title, "devices connected", "resident MB of the agent")
    axes.plot([p[0] for p in points], [p[1] for p in points], "o-", color=_COLOURS[0])
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    return _save(figure, path)


def _rivals(path: Path, title: str, _: Mapping[str, Any], figures: Mapping[str, Number]) -> bool:
    names = {
        "tidegate_per_s": "this gateway, fsync before PUBACK",
        "by_hand_per_s": "aiomqtt + SQLite rows, a commit a second",
        "thingsboard_per_s": "ThingsBoard gateway's SQLite storage alone",
    }
    found = {
        words: figures[key] for key, words in names.items() if isinstance(figures.get(key), (int, float))
    }
    if not found:
        return False
    figure, axes = _axes(title, "readings committed per second", "")
    axes.barh(list(found)[::-1], [float(v or 0) for v in found.values()][::-1], color=_COLOURS[0])
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    return _save(figure, path)


_PICTURES = {
    "throughput": ("Throughput by readings per publish", _throughput),
    "latency": ("Latency by load", _latency),
    "bytes": ("Bytes per reading by how many are together", _bytes),
    "drain": ("Draining a backlog, against a bare COPY of the same rows", _drain),
    "memory": ("Memory over time, while the backlog grows", _memory),
    "devices": ("Cost of connected devices", _devices),
    "rivals": ("Readings made durable, beside what else could be used", _rivals),
}
