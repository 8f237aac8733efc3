"""The seam to destinations: one folder or module for each kind, one protocol, one conformance suite.

`encode` is pure and may be slow: the shipper runs it in an executor. `send` does the input and output: it
returns a `Receipt` once the batch is durable at the destination, or raises a `DeliveryError`; errors of
libraries never leave it. Sending a batch again is always safe: the destination keeps a ledger of ranges, or
overwrites rows in place, or keeps the first.

A new kind is a folder here with an options dataclass and a class with these methods; a settings table in
`gateway/settings/destinations.py`, whose `build_destination` imports it and whose entry in the union
`AnyDestination` is its registration; and an entry in `KINDS` of `tests/support/destination_kinds.py`, by
which the suite `tests/contract/test_destinations_contract.py` runs over it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from cloud_sync.model.records import Batch, BatchRange, Receipt


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """A batch encoded for one destination: one or more request bodies, sent in order."""

    range: BatchRange
    rows: int
    bodies: tuple[bytes, ...]

    @property
    def wire_bytes(self) -> int:
        """Bytes of the bodies, before headers and TLS."""
        return sum(map(len, self.bodies))


class Destination(Protocol):
    """One upstream: `ingest_client`, `influxdb`, `file`; `timescale.sink` behind the ingest service."""

    name: str

    def encode(self, batch: Batch) -> EncodedBatch:
        """Turn a batch into what `send` sends. Pure; called in an executor thread."""

    async def send(self, encoded_batch: EncodedBatch) -> Receipt:
        """Deliver one batch; the class of a DeliveryError (`cloud_sync.model.errors`) says what is next."""

    async def aclose(self) -> None:
        """Release connections. A batch in flight may be lost; it will be sent again."""
