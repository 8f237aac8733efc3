"""Where batches go: one module per kind of destination, one contract, one contract suite.

A destination has two halves. `encode` is pure and may be slow: the shipper runs it off the event loop.
`send` is input and output: it returns a `Receipt` once the batch is durable at the destination, or raises
a `DeliveryError`; faults of a third party's library never leave it. Sending a batch again is always safe.
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
        """Bytes this parcel puts on the link, bodies only."""
        return sum(map(len, self.bodies))


class Destination(Protocol):
    """One upstream. Implementations: ingest_client, influxdb, files, timescaledb."""

    name: str

    def encode(self, batch: Batch) -> EncodedBatch:
        """Turn a batch into what `send` sends. Pure; called in an executor thread."""

    async def send(self, encoded_batch: EncodedBatch) -> Receipt:
        """Deliver one parcel.

        Raises:
            DeliveryError: the class says what to do next (`cloud_sync.model.errors`).
        """

    async def aclose(self) -> None:
        """Release connections. A parcel being sent may be lost; it will be sent again."""
