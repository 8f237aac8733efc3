"""Sets of commits as sorted, disjoint, inclusive ranges. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class Range(NamedTuple):
    """Commits first..last, both inclusive."""

    first: int
    last: int


def merged(ranges: Iterable[tuple[int, int]]) -> list[Range]:
    """The same commits in as few ranges as can be, sorted."""
    result: list[Range] = []
    for first, last in sorted(ranges):
        if result and first <= result[-1].last + 1:
            result[-1] = Range(result[-1].first, max(result[-1].last, last))
        else:
            result.append(Range(first, last))
    return result


def gaps(ranges: Iterable[tuple[int, int]], first: int, last: int) -> Iterator[Range]:
    """The ranges of first..last that `ranges` (merged) leave out, oldest first."""
    at = first
    for covered_first, covered_last in ranges:
        if at > last:
            return
        if covered_first > at:
            yield Range(at, min(covered_first - 1, last))
        at = max(at, covered_last + 1)
    if at <= last:
        yield Range(at, last)
