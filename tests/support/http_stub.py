"""Small HTTP servers for tests: a stub that answers as it is told, and a stub of an InfluxDB 2.

They speak just enough HTTP/1.1: requests with a Content-Length, one after another on a connection.
"""

from __future__ import annotations

import asyncio
import gzip
import json
from collections import deque
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

from line_protocol_parser import LineFormatError, parse_line

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable


@dataclass(frozen=True)
class Request:
    """One request: `query` holds the first value of each key, `headers` have lower-case names."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Answer:
    """What to send back. `hang_s` passes before it; `raw` replaces all of it and ends the connection."""

    status: int = 204
    body: bytes | str = b""
    headers: dict[str, str] = field(default_factory=dict)
    hang_s: float = 0.0
    raw: bytes | None = None

    def as_bytes(self) -> bytes:
        if self.raw is not None:
            return self.raw
        body = self.body.encode() if isinstance(self.body, str) else self.body
        lines = [f"HTTP/1.1 {self.status} Stub", *(f"{k}: {v}" for k, v in self.headers.items())]
        if self.status != 204:
            lines.append(f"content-length: {len(body)}")
        return "\r\n".join((*lines, "", "")).encode() + body


@dataclass
class HttpStub:
    """A listening stub: its address and what it was asked."""

    url: str = ""
    requests: list[Request] = field(default_factory=list)


@asynccontextmanager
async def http_stub(handler: Callable[[Request], Answer]) -> AsyncIterator[HttpStub]:
    """A server on loopback that answers each request with what `handler` returns."""
    stub, closing = HttpStub(), asyncio.Event()
    serving: dict[asyncio.StreamWriter, asyncio.Task[None] | None] = {}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving[writer] = asyncio.current_task()
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                method, target, _ = head[0].split(" ")
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:-2])}
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                parts = urlsplit(target)
                query = {k: v[0] for k, v in parse_qs(parts.query, keep_blank_values=True).items()}
                request = Request(method, parts.path, query, headers, body)
                stub.requests.append(request)
                answer = handler(request)
                if answer.hang_s:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(closing.wait(), answer.hang_s)
                writer.write(answer.as_bytes())
                await writer.drain()
                if answer.raw is not None:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            del serving[writer]
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    stub.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield stub
    finally:
        server.close()
        closing.set()
        await server.wait_closed()
        tasks = [task for task in serving.values() if task is not None]
        for writer in serving:
            writer.transport.abort()
        await asyncio.wait(tasks) if tasks else None


def answering(*answers: Answer) -> Callable[[Request], Answer]:
    """A handler that gives these answers in turn, the last one for ever."""
    left = deque(answers)
    return lambda _: left.popleft() if len(left) > 1 else left[0]


@dataclass
class InfluxV2Stub:
    """What an InfluxDB 2 answers to writes, as its API reference says. A stub: it keeps lines in a set."""

    token: str = "t0ken"
    org: str = "plant"
    bucket: str = "edge"
    max_body_bytes: int = 4_000_000
    lines: set[str] = field(default_factory=set)

    def __call__(self, request: Request) -> Answer:
        if request.headers.get("authorization") != f"Token {self.token}":
            return _fault(401, "unauthorized", "unauthorized access")
        if request.path != "/api/v2/write":
            return _fault(404, "not found", "path not found")
        if request.query.get("org") != self.org:
            return _fault(404, "not found", f'organization name "{request.query.get("org")}" not found')
        if request.query.get("bucket") != self.bucket:
            return _fault(404, "not found", f'bucket "{request.query.get("bucket")}" not found')
        text = (
            gzip.decompress(request.body)
            if "gzip" in request.headers.get("content-encoding", "")
            else request.body
        )
        if len(text) > self.max_body_bytes:
            return _fault(413, "request too large", "unable to read data: points batch is too large")
        bad = []
        for line in text.decode().split("\n")[:-1]:
            try:
                parse_line(line)
            except LineFormatError as fault:
                bad.append(f"unable to parse '{line}': {fault}")
            else:
                self.lines.add(line)
        return _fault(400, "invalid", "; ".join(bad)) if bad else Answer()


def _fault(status: int, code: str, message: str) -> Answer:
    return Answer(
        status, json.dumps({"code": code, "message": message}), {"content-type": "application/json"}
    )
