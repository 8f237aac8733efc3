"""Health is the progress of every stage: one that hangs makes the gateway unwell, whatever else is alive."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx

from gateway.build import build_runtime
from gateway.settings.gateway_settings import GatewaySettings
from gateway.spool.database import Database
from gateway.status.active_config import ActiveConfig
from gateway.status.certificates import CertificateMonitor
from gateway.status.collector import StatusCollector
from gateway.web.endpoint import StatusEndpoint
from tests.support.free_ports import free_port

if TYPE_CHECKING:
    from pathlib import Path


ELSEWHERE = {"host": "gateway.example"}


async def test_a_stage_that_does_not_keep_its_word_is_named_to_this_machine_only(tmp_path: Path):
    port = free_port()
    settings = GatewaySettings.model_validate(
        {"gateway_id": "gw-1", "spool": {"path": tmp_path / "spool.db"}, "status": {"port": port}}
    )
    database = await Database.open(settings.spool.path)
    parts = await build_runtime(settings, database)
    collector = StatusCollector(parts, CertificateMonitor(lambda: settings))
    endpoint = StatusEndpoint(parts, collector, ActiveConfig())
    await endpoint.start()
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            assert (await client.get("/healthz")).json() == {"status": "ok"}
            parts.committer.stage.begin_step(within_s=-1)
            unwell = await client.get("/healthz")
            assert (unwell.status_code, unwell.json()["status"]) == (503, "stuck")
            assert "committer" in unwell.json()["stages"][0]
            assert (await client.get("/healthz", headers=ELSEWHERE)).json() == {"status": "stuck"}
            assert "tidegate_stages_late 1.0" in (await client.get("/metrics")).text
            parts.committer.stage.set_idle()
            assert (await client.get("/healthz")).status_code == 200
            parts.committer.counters.holding_reason = "no room"
            ready = await client.get("/readyz")
            assert (ready.status_code, ready.json()["reason"]) == (503, "no room")
            assert (await client.get("/readyz", headers=ELSEWHERE)).json() == {"status": "holding"}
    finally:
        await endpoint.stop()
        for shipper in parts.shippers:
            await shipper.aclose()
        await parts.commit_consumer.aclose()
        await database.close()
