"""A TCP proxy that spoils exchanges on purpose, for tests of anything that asks and is answered.

An exchange begins with the first bytes a client sends and ends when it sends again after an answer began
(HTTP without pipelining, PostgreSQL). Each exchange takes the next fault of the script, then `default`:

    proxy.script = [PASS, DROP_ANSWER, Fault("delay", seconds=0.2)]
    proxy.default = RESET

    pass          nothing is spoiled
    delay         the answer comes `seconds` late
    stall         the request goes nowhere; silence until the client gives up
    stall_answer  the request arrives; its answer is never passed on; silence
    reset         the client gets a TCP reset; the server saw `after_bytes` bytes of the request
    half_close    the request arrives; the client's side is closed in good order without an answer
    truncate      the first `after_bytes` bytes of the answer, then an orderly close
    drop_answer   the server answers, so it did its work; the client gets a TCP reset instead
    duplicate     after the answer the same request is sent again on a new connection, its answer dropped
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections import deque
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping

Kind = Literal[
    "pass", "delay", "stall", "stall_answer", "reset", "half_close", "truncate", "drop_answer", "duplicate"
]


@dataclass(frozen=True)
class Fault:
    kind: Kind
    seconds: float = 0.0
    after_bytes: int = 0


PASS = Fault("pass")
STALL = Fault("stall")
STALL_ANSWER = Fault("stall_answer")
RESET = Fault("reset")
HALF_CLOSE = Fault("half_close")
TRUNCATE = Fault("truncate", after_bytes=20)
DROP_ANSWER = Fault("drop_answer")
DUPLICATE = Fault("duplicate")


@dataclass
class Exchange:
    """What became of one request."""

    fault: Fault
    request: bytearray = field(default_factory=bytearray)
    answer_bytes: int = 0
    again: asyncio.Task[None] | None = None


@dataclass
class FaultProxy:
    """Listens on 127.0.0.1:`port` and passes on to `upstream`, a (host, port)."""

    upstream: tuple[str, int]
    port: int = 0
    default: Fault = PASS
    exchanges: list[Exchange] = field(default_factory=list)
    _script: deque[Fault] = field(default_factory=deque)
    _random: tuple[random.Random, list[Fault], list[float]] | None = None
    _server: asyncio.Server | None = None
    _connections: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def script(self) -> list[Fault]:
        """The faults still to come."""
        return list(self._script)

    @script.setter
    def script(self, faults: Iterable[Fault]) -> None:
        self._script = deque(faults)

    def at_random(self, seed: int, weights: Mapping[Fault, float]) -> None:
        """After the script, draw each exchange's fault by weight; the same seed draws the same faults."""
        self._random = (random.Random(seed), list(weights), list(weights.values()))

    async def up(self) -> None:
        """Listen; on the same port as before after `down`."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def down(self) -> None:
        """Refuse connections and reset the ones there are."""
        if self._server is not None:
            self._server.close()
            for task in list(self._connections):
                task.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)
            await self._server.wait_closed()
            self._server = None

    async def settled(self) -> None:
        """Wait until every duplicate has been answered."""
        for exchange in self.exchanges:
            if exchange.again is not None:
                await exchange.again

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(_Connection(self, reader, writer).run())
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    def _next(self) -> Exchange:
        if self._script:
            fault = self._script.popleft()
        elif self._random is not None:
            source, faults, weights = self._random
            fault = source.choices(faults, weights)[0]
        else:
            fault = self.default
        self.exchanges.append(Exchange(fault))
        return self.exchanges[-1]


@asynccontextmanager
async def fault_proxy(host: str, port: int) -> AsyncIterator[FaultProxy]:
    """A proxy in front of host:port, down when the block ends."""
    proxy = FaultProxy((host, port))
    await proxy.up()
    try:
        yield proxy
    finally:
        await proxy.down()
        again = [exchange.again for exchange in proxy.exchanges if exchange.again is not None]
        for task in again:
            task.cancel()
        await asyncio.gather(*again, return_exceptions=True)


class _Connection:
    """One client connection with its own connection to the server."""

    def __init__(self, proxy: FaultProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._proxy, self._reader, self._writer = proxy, reader, writer
        self._exchange: Exchange | None = None

    async def run(self) -> None:
        above: asyncio.StreamWriter | None = None
        answers: asyncio.Task[None] | None = None
        try:
            reader, above = await asyncio.open_connection(*self._proxy.upstream)
            answers = asyncio.ensure_future(self._pass_answers(reader))
            await self._pass_requests(above)
            if not self._writer.is_closing():
                above.write_eof()
                await answers
        except (ConnectionError, asyncio.CancelledError):
            _reset(self._writer)
        finally:
            if answers is not None:
                answers.cancel()
            self._writer.close()
            if above is not None:
                above.close()

    async def _pass_requests(self, above: asyncio.StreamWriter) -> None:
        while data := await self._reader.read(65536):
            if self._exchange is None or self._exchange.answer_bytes:
                self._exchange = self._proxy._next()
            exchange = self._exchange
            before = len(exchange.request)
            exchange.request += data
            if exchange.fault.kind == "stall":
                continue
            if exchange.fault.kind == "reset":
                above.write(exchange.request[before : exchange.fault.after_bytes])
                if len(exchange.request) >= exchange.fault.after_bytes:
                    await above.drain()
                    _reset(self._writer)
                    return
                continue
            above.write(data)
            await above.drain()

    async def _pass_answers(self, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(65536):
            exchange = self._exchange
            if exchange is None:
                self._writer.write(data)
                continue
            first = exchange.answer_bytes == 0
            passed = exchange.answer_bytes
            fault = exchange.fault
            if fault.kind == "delay" and first:
                await asyncio.sleep(fault.seconds)
            if fault.kind == "duplicate" and first:
                exchange.again = asyncio.ensure_future(self._send_again(bytes(exchange.request)))
            exchange.answer_bytes += len(data)
            if fault.kind == "stall_answer":
                continue
            if fault.kind == "drop_answer":
                _reset(self._writer)
                return
            if fault.kind in ("half_close", "truncate"):
                limit = fault.after_bytes if fault.kind == "truncate" else 0
                self._writer.write(data[: max(0, limit - passed)])
                if passed + len(data) >= limit:
                    self._writer.write_eof()
                    return
                continue
            self._writer.write(data)
            await self._writer.drain()
        with suppress(OSError):
            self._writer.write_eof()

    async def _send_again(self, request: bytes) -> None:
        reader, writer = await asyncio.open_connection(*self._proxy.upstream)
        try:
            writer.write(request)
            await reader.read(65536)
        finally:
            writer.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST, as a firewall or a crashed host would."""
    connection = writer.get_extra_info("socket")
    if connection is not None and not writer.is_closing():
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
