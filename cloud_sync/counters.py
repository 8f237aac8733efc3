"""What one destination has taken since start, and how it is doing: the figures that people read."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cloud_sync.rates import Rate

if TYPE_CHECKING:
    from cloud_sync.records import Receipt


@dataclass(slots=True)
class LaneCounters:
    """What one lane has delivered. `delivered` is rows per second that receipts came for, a moving rate."""

    batches: int = 0
    rows: int = 0
    wire_bytes: int = 0
    delivered: Rate = field(default_factory=Rate)


@dataclass(slots=True)
class ShipperCounters:
    """What one destination has taken since start, and how it is doing now.

    Attributes:
        state: idle, sending, waiting (a retry is due later) or held (a person is needed).
        last_error: the newest fault in words, "" once a batch went through again.
        refused: rows that the destination refused and that went to quarantine.
        delivered: rows per second that receipts came for, a moving rate.
        lanes: the same by lane, "live", "backfill", or "in order".
    """

    state: str = "idle"
    batches: int = 0
    rows: int = 0
    duplicates: int = 0
    conflicts: int = 0
    refused: int = 0
    wire_bytes: int = 0
    failures: int = 0
    last_error: str = ""
    last_receipt_at_us: int | None = None
    delivered: Rate = field(default_factory=Rate)
    lanes: dict[str, LaneCounters] = field(default_factory=dict)

    def settled(self, receipt: Receipt, wire_bytes: int, *, now_us: int, lane: str = "live") -> None:
        """Count a receipt."""
        at = time.monotonic()
        of_lane = self.lanes.setdefault(lane, LaneCounters())
        for counted in (self, of_lane):
            counted.delivered.add(receipt.rows, at)
            counted.batches += 1
            counted.rows += receipt.rows
            counted.wire_bytes += wire_bytes
        self.duplicates += receipt.duplicates
        self.conflicts += receipt.conflicts
        self.last_receipt_at_us = now_us
