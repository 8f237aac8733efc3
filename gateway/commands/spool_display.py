"""What `tidegate spool info` and `check` print for a person."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from gateway.commands.spool_options import console, table
from gateway.operate.human import bytes_text, count_text, seconds_text
from gateway.operate.moments import moment_text
from gateway.operate.terminal import shown

if TYPE_CHECKING:
    from gateway.operate.spool_check import Checked
    from gateway.operate.spool_info import ClassInfo, SpoolInfo

_STATES = {True: "a gateway is running on it", False: "stopped", None: "whether it is in use is not known"}


def show_info(document: SpoolInfo) -> None:
    """Print the document of `spool info`."""
    out = console()
    gateway = f", gateway {document.gateway_id}" if document.gateway_id else ""
    each = "" if document.bytes_per_reading is None else f", {document.bytes_per_reading:.2f} B per reading"
    free = bytes_text(document.free_pages * document.page_bytes)
    out.print(f"spool    {shown(document.path)}: {_STATES[document.live]}{gateway}")
    out.print(f"format   version {document.format_version}, epoch {shown(document.epoch)}")
    out.print(
        f"on disk  {bytes_text(document.file_bytes)} and {bytes_text(document.wal_bytes)} of log; "
        f"{bytes_text(document.used_bytes)} in use{each}; "
        f"{count_text(document.free_pages)} free pages ({free})"
    )
    out.print(
        f"holds    {count_text(document.series)} series, {count_text(document.quarantined)} quarantined"
    )
    if document.damaged_segments:
        out.print(
            f"damaged  {count_text(document.damaged_segments)} segments with "
            f"{count_text(document.damaged_rows)} readings were set aside"
        )
    if document.classes:
        numbers = ("kept", "ever", "segments", "bytes")
        rows = table("class", "kept", "ever", "commits", "segments", "bytes", "from", "to", right=numbers)
        for name, held in document.classes.items():
            rows.add_row(name, *_class_cells(held))
        out.print(rows)
    if document.destinations:
        out.print(_destinations(document))


def show_checked(result: Checked) -> None:
    """Print the document of `spool check`."""
    out = console()
    for problem in result.problems:
        out.print(f"{shown(problem.where)}: {shown(problem.what)}", soft_wrap=True)
    if result.problem_count > len(result.problems):
        out.print(f"... and {count_text(result.problem_count - len(result.problems))} more problems")
    if result.set_aside_segments:
        out.print(
            f"{count_text(result.set_aside_segments)} damaged segments with "
            f"{count_text(result.set_aside_rows)} readings were set aside by the gateway"
        )
    decoded = (
        "" if result.segments == 0 else f", {count_text(result.decoded_segments)} of their segments decoded"
    )
    verdict = f"{count_text(result.problem_count)} problems" if result.problem_count else "sound"
    out.print(f"{shown(result.path)}: {verdict}; {count_text(result.rows)} readings{decoded}", soft_wrap=True)


def _class_cells(held: ClassInfo) -> list[str]:
    about = "~" if held.estimated else ""
    commits = f"{held.oldest_commit}..{held.newest_commit}"
    return [
        count_text(held.rows),
        count_text(held.rows_ever),
        commits if held.oldest_commit else f"none of {held.newest_commit}",
        about + count_text(held.segments),
        about + bytes_text(held.block_bytes),
        *("-" if at is None else about + moment_text(at) for at in (held.min_time_us, held.max_time_us)),
    ]


def _destinations(document: SpoolInfo) -> object:
    numbers = ("backlog", "oldest", "open batches", "delivered ranges")
    rows = table("destination", *numbers, right=numbers)
    for destination in document.destinations:
        oldest_us = destination.oldest_written_at_us
        lacking = {name: count for name, count in destination.backlog.items() if count} or {"": 0}
        rows.add_row(
            shown(f"{destination.name} ({destination.kind})"),
            ", ".join(f"{count_text(count)} {name}".strip() for name, count in lacking.items()),
            "-" if oldest_us is None else f"{seconds_text(time.time() - oldest_us / 1e6)} ago",
            str(destination.open_batches),
            str(destination.delivered_ranges),
        )
    return rows
