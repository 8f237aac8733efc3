"""How many rows to put into a batch: what the destination takes, in about the time it should take. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

SMALLEST_ROWS = 500
"""Below this a request costs more than what it carries, so time alone does not make batches smaller."""
_FIRST_ROWS = 10_000
_RETRY_LARGER_AFTER = 200
_LARGER = 1.25
_BYTES_WEIGHT = 0.2


@dataclass(slots=True)
class Sizing:
    """Learns from every answer.

    Attributes:
        max_rows, max_bytes: the configured ceiling of a batch.
        target_s: how long one request should take.
        bytes_per_row: what a row has taken on the wire, a moving mean; 0 before the first.
    """

    max_rows: int
    max_bytes: int = 4 << 20
    target_s: float = 0.5
    bytes_per_row: float = 0.0
    _rows: float = field(init=False)
    _ceiling: float = field(init=False)
    _taken: int = 0

    def __post_init__(self) -> None:
        self._ceiling = float(self.max_rows)
        self._rows = float(min(self.max_rows, _FIRST_ROWS))

    @property
    def rows(self) -> int:
        """Rows to ask for."""
        most = min(self._rows, self._ceiling)
        if self.bytes_per_row > 0:
            most = min(most, self.max_bytes / self.bytes_per_row)
        return max(1, int(most))

    def took(self, rows: int, wire_bytes: int, seconds: float) -> None:
        """A batch was answered with a receipt after so many seconds."""
        if rows <= 0:
            return
        each = wire_bytes / rows
        old = self.bytes_per_row or each
        self.bytes_per_row = old + _BYTES_WEIGHT * (each - old)
        if seconds > self.target_s:
            shrunk = rows * max(0.5, self.target_s / seconds)
            self._rows = max(min(self._rows, shrunk), min(self._rows, SMALLEST_ROWS))
        elif seconds < self.target_s / 2 and rows >= self._rows / 2:
            self._rows = min(float(self.max_rows), self._rows * 2)
        self._taken += 1
        if self._taken >= _RETRY_LARGER_AFTER and self._ceiling < self.max_rows:
            self._taken = 0
            self._ceiling = min(float(self.max_rows), self._ceiling * _LARGER + 1)

    def too_large(self, rows: int) -> None:
        """The destination did not take so many rows at once. Remembered; tried again after many batches."""
        self._taken = 0
        self._ceiling = max(1.0, min(self._ceiling, rows // 2))
