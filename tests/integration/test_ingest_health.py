"""The region's health is the progress of what waits for the database, not that the process answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx

from cloud_sync.codec.wire import WireLimits
from cloud_sync.http.auth import RequestAuthenticator
from cloud_sync.http.requests import RequestAdmission, RequestLimits
from cloud_sync.http.tokens import TokenFile
from cloud_sync.ingest import apply_queue as queue_module
from cloud_sync.ingest.app import IngestApp
from cloud_sync.ingest.apply_queue import ApplyQueue
from cloud_sync.timescale.sink import TimescaleSink

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


async def test_a_batch_whose_turn_never_ends_makes_the_region_unwell_until_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokens").touch()
    queue = ApplyQueue(1)
    app = IngestApp(
        TimescaleSink("postgresql://127.0.0.1:1/nowhere"),
        RequestAuthenticator(TokenFile(tmp_path / "tokens")),
        RequestAdmission(RequestLimits()),
        queue,
        WireLimits(),
    ).build()
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://region") as client:
        async with queue.turn("gw-1", 10):
            assert (await client.get("/healthz")).json() == {"status": "ok"}
        monkeypatch.setattr(queue_module, "_TURN_WITHIN_S", -1.0)
        async with queue.turn("gw-1", 10):
            unwell = await client.get("/healthz")
            assert (unwell.status_code, unwell.json()["status"]) == (503, "stuck")
            assert "applying batches has been silent" in unwell.json()["stages"][0]
        assert (await client.get("/healthz")).status_code == 200
