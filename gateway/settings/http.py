"""`[ingress.http]`: readings and batches over HTTP, and who may send them."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - pydantic reads the annotations
from typing import Annotated

from pydantic import Field

from gateway.settings.door import Door
from gateway.settings.tables import Count, Port, Seconds  # noqa: TC001 - pydantic reads the annotations

_Bytes = Annotated[int, Field(ge=1024)]


class Http(Door):
    """The gateway's own HTTP server for readings: devices without MQTT, and other gateways."""

    enabled: bool = False
    """Whether to take readings over HTTP."""
    port: Port = 8422
    """The TCP port."""
    tokens_file: Path | None = Field(default=None, examples=["http-tokens"])
    """Names and hashed tokens. `tidegate device token NAME --config FILE` makes them: one of scope "batches"
    lets the gateway of that name deliver here, one of scope "readings" lets a client send readings under its
    name.
    """
    max_connections: Count = 1000
    """Requests on more are answered with 503."""
    max_requests: Count = 64
    """Requests with a body in progress; more are asked to come back (503)."""
    max_requests_each: Count = 8
    """The same of one client (429)."""
    max_body_bytes: _Bytes = 8 << 20
    """The largest body taken, as it is on the network."""
    max_plain_bytes: _Bytes = 32 << 20
    """The largest body of readings, decompressed."""
    max_plain_rows: Count = 100_000
    """Readings in one such body."""
    max_batch_rows: Count = 200_000
    """Records in one batch of another gateway."""
    process_batches: bool = False
    """Whether readings in batches of other gateways are rolled up and watched for alerts here as well. They
    do that themselves; it is for those that send readings only.
    """
    max_buffered_bytes: _Bytes = 64 << 20
    """What all bodies together may hold in memory; more are asked to come back (503)."""
    body_idle_s: Seconds = 30
    """The longest silence within a request."""
    answer_within_s: Seconds = 30
    """How long a request may wait for its commit; then it is asked to come back (503), and finds what it sent
    stored if it was.
    """
    retry_after_s: Count = 5
    """What a request for which there is no room is asked to wait."""

    @property
    def knows_clients(self) -> bool:
        """Whether there are secrets that tell who a client is."""
        return super().knows_clients or self.tokens_file is not None
