"""How each way in is doing: connections, what was refused and why, what brokers have shown.

Counters are those since the start of the program; keys of mappings are machine-readable reasons.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from gateway.ingress.http.server import HttpIngress
    from gateway.ingress.listener import Listener
    from gateway.ingress.subscriber import Subscriber
    from gateway.parts import Parts


class ListenStatus(msgspec.Struct):
    """The gateway's own MQTT server."""

    connections: int
    connections_ever: int
    publishes: int
    wills: int
    bytes_in: int
    protocol_faults: dict[str, int]
    refused: dict[str, int]
    closed: dict[str, int]


class SubscribeStatus(msgspec.Struct):
    """One broker. `last_fault` stays after it has passed; `refused_filters` are not served now, and why."""

    name: str
    state: str
    connects: int
    sessions_lost: int
    publishes: int
    again: int
    acknowledged: int
    bytes_in: int
    refused: dict[str, int]
    protocol_faults: dict[str, int]
    faults: dict[str, int]
    last_fault: str
    refused_filters: dict[str, str]
    concerns: list[str]


class HttpStatus(msgspec.Struct):
    """The gateway's own HTTP server; `batches_again` had been taken before."""

    requests: int
    batches: int
    batches_again: int
    rejections: dict[str, int]


class WaysIn(msgspec.Struct):
    """All of them; None for one that is not in use."""

    listen: ListenStatus
    subscribe: list[SubscribeStatus]
    http: HttpStatus | None


def ways_in(parts: Parts) -> WaysIn:
    """How the ways in of a running gateway are doing."""
    http = None if parts.http is None else _http(parts.http)
    return WaysIn(_listen(parts.listener), [_subscribe(one) for one in parts.subscribers], http)


def _listen(listener: Listener) -> ListenStatus:
    counters = listener.counters
    return ListenStatus(
        connections=counters.connections_open,
        connections_ever=counters.connections_total,
        publishes=counters.publishes_total,
        wills=counters.wills_total,
        bytes_in=counters.bytes_in_total,
        protocol_faults=dict(counters.protocol_faults_total),
        refused=dict(counters.refused_total),
        closed=dict(counters.closed_total),
    )


def _subscribe(subscriber: Subscriber) -> SubscribeStatus:
    counters = subscriber.counters
    return SubscribeStatus(
        name=subscriber.settings.name,
        state=counters.state,
        connects=counters.connects_total,
        sessions_lost=counters.sessions_lost_total,
        publishes=counters.publishes_total,
        again=counters.again_total,
        acknowledged=counters.acknowledged_total,
        bytes_in=counters.bytes_in_total,
        refused=dict(counters.refused_total),
        protocol_faults=dict(counters.protocol_faults_total),
        faults=dict(counters.faults_total),
        last_fault=counters.last_fault,
        refused_filters=dict(counters.refused_filters),
        concerns=list(counters.concerns),
    )


def _http(http: HttpIngress) -> HttpStatus:
    counters = http.counters
    return HttpStatus(counters.requests, counters.batches, counters.batches_again, dict(counters.rejections))
