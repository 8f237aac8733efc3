"""Shippers for tests: options by keyword, and single steps of one that has one sender."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cloud_sync.delivery.batch_sender import DeliveryOptions, DeliveryState
from cloud_sync.delivery.shipper import Shipper

if TYPE_CHECKING:
    from cloud_sync.delivery.batch_sender import Spool
    from cloud_sync.destinations import Destination

_SOURCES = ("clock_us", "clock", "chance")


def build_state(spool: Spool, destination: Destination, **options: Any) -> DeliveryState:
    sources = {name: options.pop(name) for name in _SOURCES if name in options}
    return DeliveryState(spool, destination, DeliveryOptions(**options), **sources)


def build_shipper(spool: Spool, destination: Destination, **options: Any) -> Shipper:
    return Shipper(build_state(spool, destination, **options))


def one_sender(spool: Spool, destination: Destination, **options: Any) -> Shipper:
    """A shipper whose only sender serves its lanes in turn."""
    return build_shipper(spool, destination, **{"concurrency": 1, **options})


async def send_one(shipper: Shipper) -> bool:
    """One step of the only sender; returns whether there was something to send, and raises its error."""
    (sender,) = shipper.senders
    result = await sender.send_once()
    if result.error is not None:
        raise result.error
    return result.claimed is not None


async def ship_one(shipper: Shipper) -> float | None:
    """One step as the loop does it."""
    (sender,) = shipper.senders
    return await shipper.ship_once(sender)
