"""What has been applied of gateways, as text for an operator. Pure."""

from __future__ import annotations

from itertools import groupby, pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import datetime

    from cloud_sync.applied import AppliedRange, DeclaredLoss, Progress

_GAPS_SHOWN = 5
_MINUTE, _HOUR, _DAY = 60, 3600, 86_400


def lines(known: Sequence[Progress], *, now: datetime) -> Iterator[str]:
    """One paragraph a gateway: when it delivered last, then a line for each epoch and class."""
    if not known:
        yield "no gateway has delivered yet"
    for each in known:
        readings = sum(applied.rows for applied in each.ranges)
        seen = _ago((now - each.last_seen).total_seconds())
        yield f"{each.gateway_id}  last seen {seen}  {readings:,} readings"
        for (_, epoch, record_class), group in groupby(each.ranges, key=lambda applied: applied.range[:3]):
            yield f"  {record_class.name.lower()} of epoch {epoch.hex[:8]}: {_coverage(list(group))}"
        for reason, losses in groupby(sorted(each.declared, key=_reason), key=_reason):
            yield f"  declared: {_declared(reason, list(losses))}"


def _coverage(islands: list[AppliedRange]) -> str:
    spans = [(i.range.first_commit, i.range.last_commit) for i in islands if i.complete]
    through = spans[0][1] if spans and spans[0][0] == 1 else 0
    parts = [f"complete through {through}"]
    gaps = [(a + 1, b - 1) for (_, a), (b, _) in pairwise([(0, 0), *spans]) if a + 1 < b]
    if gaps:
        shown = ", ".join(
            f"{first}..{last}" if last > first else str(first) for first, last in gaps[:_GAPS_SHOWN]
        )
        more = f" and {len(gaps) - _GAPS_SHOWN} more" if len(gaps) > _GAPS_SHOWN else ""
        parts.append(f"newest {spans[-1][1]}, {len(gaps)} gap{'s' if len(gaps) > 1 else ''}: {shown}{more}")
    arriving = sum(not i.complete for i in islands)
    if arriving:
        parts.append(f"{arriving} range{'s' if arriving > 1 else ''} in part")
    counts = {name: sum(getattr(i, name) for i in islands) for name in ("duplicates", "conflicts", "refused")}
    parts += [f"{count:,} {name}" for name, count in counts.items() if count]
    return "; ".join(parts)


def _reason(loss: DeclaredLoss) -> tuple[str, str, str]:
    """What losses have in common that are told in one line."""
    return loss.range.record_class.name.lower(), loss.reason, loss.survives


def _declared(reason: tuple[str, str, str], losses: list[DeclaredLoss]) -> str:
    record_class, why, survives = reason
    rows = sum(loss.rows for loss in losses)
    first = min(loss.range.first_commit for loss in losses)
    last = max(loss.range.last_commit for loss in losses)
    begins = [loss.from_time for loss in losses if loss.from_time]
    ends = [loss.to_time for loss in losses if loss.to_time]
    times = f", of {min(begins):%Y-%m-%d %H:%M} to {max(ends):%Y-%m-%d %H:%M} UTC" if begins and ends else ""
    left = f", left as {survives}" if survives else ""
    return f"{rows:,} {record_class} rows within {first}..{last} given up: {why}{times}{left}"


def _ago(seconds: float) -> str:
    if seconds < _MINUTE:
        return f"{max(0, int(seconds))} s ago"
    for unit, name in ((_DAY, "d"), (_HOUR, "h"), (_MINUTE, "min")):
        if seconds >= unit:
            return f"{int(seconds // unit)} {name} ago"
    raise AssertionError
