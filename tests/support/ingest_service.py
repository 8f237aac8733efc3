"""An ingest service running in the test's own event loop."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx

from cloud_sync.codec import wire
from cloud_sync.destinations.ingest_client import IngestClient
from cloud_sync.http import tokens
from cloud_sync.http.uvicorn_server import bind_http_sockets
from cloud_sync.ingest import program
from cloud_sync.ingest.settings import IngestSettings
from cloud_sync.timescale.sink import TimescaleSink

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

MEDIA = {"Content-Type": wire.MEDIA_TYPE}


class Service:
    """A running service: its address, a token of gw-1, and a plain HTTP client with that token."""

    def __init__(self, url: str, token: str, tokens_file: Path) -> None:
        self.url = url
        self.token = token
        self.tokens_file = tokens_file
        self.http = httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=30)

    async def post(self, data: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
        response = await self.http.post("/v1/batches", content=data, headers=MEDIA | headers)
        return response.status_code, response.json()

    def client(self, token: str | None = None) -> IngestClient:
        return IngestClient("region", self.url, token or self.token)


@asynccontextmanager
async def running(
    dsn: str, folder: Path, *, tls: dict[str, Any] | None = None, **limits: float
) -> AsyncIterator[Service]:
    """A service on a free port until the block ends."""
    tokens_file = folder / "tokens"
    token = tokens.add_token(tokens_file, "gw-1")
    settings = IngestSettings.model_validate(
        {
            "tokens_file": tokens_file,
            "database": {"dsn": dsn},
            "limits": limits,
            "tls": tls,
            "stop_within_s": 5,
        }
    )
    sink = TimescaleSink(dsn)
    bound = bind_http_sockets("127.0.0.1", 0)
    stop = asyncio.Event()
    task = asyncio.create_task(program.serve(settings, sink, tokens.TokenFile(tokens_file), bound, stop))
    scheme = "http" if tls is None else "https"
    service = Service(f"{scheme}://127.0.0.1:{bound[0].getsockname()[1]}", token, tokens_file)
    try:
        yield service
    finally:
        await service.http.aclose()
        stop.set()
        await task
        await sink.aclose()
