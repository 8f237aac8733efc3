"""A gateway with its `http` ingress, running in the test's own event loop: no processes, a real spool."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

from cloud_sync.codec import wire
from cloud_sync.delivery.lanes import ClaimRequest
from cloud_sync.destinations.ingest_client import IngestClient
from cloud_sync.http import tokens
from cloud_sync.model.records import Batch, Readings
from gateway.build import build_runtime
from gateway.ingress.http.server import HttpSource
from gateway.settings.gateway_settings import GatewaySettings
from gateway.spool.database import Database

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from gateway.runtime import Runtime

MEDIA = {"Content-Type": wire.MEDIA_TYPE}
JSON = "application/json"


@dataclass
class HttpGateway:
    """A running gateway, its address, and a client without credentials."""

    parts: Runtime
    source: HttpSource
    url: str
    http: httpx.AsyncClient
    tokens_file: Path

    def bearer(self, name: str, scope: Any = "batches") -> dict[str, str]:
        return {"Authorization": f"Bearer {tokens.add_token(self.tokens_file, name, scope)}"}

    def client(self, name: str) -> IngestClient:
        return IngestClient("up", self.url, tokens.add_token(self.tokens_file, name))

    async def batch(self, data: bytes, headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
        answer = await self.http.post("/v1/batches", content=data, headers=MEDIA | headers)
        return answer.status_code, answer.json()

    async def readings(
        self, body: Any, headers: dict[str, str], kind: str = JSON, query: str = ""
    ) -> tuple[int, dict[str, Any]]:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = await self.http.post(
            f"/v1/readings{query}", content=content, headers={"Content-Type": kind} | headers
        )
        return answer.status_code, answer.json()

    async def batches(self) -> list[Batch]:
        """Everything in the spool as a new destination gets it, the most urgent class first."""
        found = []
        deliveries = self.parts.spool.deliveries
        await deliveries.register("all", "ingest", now_us=1)
        while (claimed := await deliveries.claim("all", ClaimRequest(now_us=1))) is not None:
            loaded = await deliveries.read_batch(claimed, "all")
            assert loaded is not None
            found.append(loaded)
            await deliveries.settle("all", claimed)
        await deliveries.drop("all")
        return found

    async def rows(self) -> list[tuple[str, str, int, float, int]]:
        """sensor_id, sensor_type, time_us, value and flags of every reading in the spool, sorted."""
        found = []
        for batch in await self.batches():
            if isinstance(batch.records, Readings):
                r = batch.records
                columns = (c.tolist() for c in (r.series, r.time_us, r.value, r.flags))
                found += [(*batch.series[n][:2], *rest) for n, *rest in zip(*columns, strict=True)]
        return sorted(found)

    async def quarantined(self) -> list[tuple[str, str, str, bytes]]:
        query = "SELECT source, topic, reason, payload FROM quarantine ORDER BY quarantine_no"
        return await self.parts.spool.database.read(lambda c: c.execute(query).fetchall())


def _prepared(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokens").touch()
    return folder / "tokens"


async def until(true: Callable[[], bool], within_s: float = 10) -> None:
    async with asyncio.timeout(within_s):
        while not true():  # noqa: ASYNC110 - what is waited for sets no event
            await asyncio.sleep(0.01)


@asynccontextmanager
async def http_gateway(
    folder: Path, *, gateway_id: str = "gw-1", spool: dict[str, Any] | None = None, **http: Any
) -> AsyncIterator[HttpGateway]:
    """A gateway on a free port until the block ends; with a tokens file unless it is given as None."""
    tokens_file = _prepared(folder)
    given = {"enabled": True, "port": 0, "tokens_file": tokens_file} | http
    settings = GatewaySettings.model_validate(
        {
            "gateway_id": gateway_id,
            "spool": {"path": folder / "spool.db", "min_free_bytes": 0, "commit_interval_ms": 0}
            | (spool or {}),
            "ingress": {"http": given, "host": {"enabled": False}},
            "stop_within_s": 5,
        }
    )
    database = await Database.open(settings.spool.path)
    try:
        parts = await build_runtime(settings, database)
        source = next(each for each in parts.sources if isinstance(each, HttpSource))
        async with asyncio.TaskGroup() as tasks:
            committing = tasks.create_task(parts.committer.run())
            await source.start(tasks)
            scheme = "http" if parts.settings.ingress.http.tls_files is None else "https"
            url = f"{scheme}://127.0.0.1:{source.port}"
            async with httpx.AsyncClient(base_url=url, timeout=20, trust_env=False) as client:
                yield HttpGateway(parts, source, url, client, tokens_file)
            source.stop_reading()
            parts.committer.finish()
            await committing
            await source.close()
    finally:
        await database.close()
