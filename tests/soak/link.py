"""A network link that can be cut and can go silent: a TCP relay without a buffer of its own."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field


@dataclass
class Link:
    """Listens on 127.0.0.1:`port` and relays to `upstream`, a port of the same machine."""

    upstream: int
    port: int = 0
    _server: asyncio.Server | None = None
    _connections: set[asyncio.Task[None]] = field(default_factory=set)
    _flowing: asyncio.Event = field(default_factory=asyncio.Event)

    async def up(self) -> None:
        """Let connections through, on the same port as before; a silence ends."""
        self._flowing.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
            self.port = self._server.sockets[0].getsockname()[1]

    def silence(self) -> None:
        """Keep connections and forward nothing, like a dead radio link."""
        self._flowing.clear()

    async def cut(self) -> None:
        """Refuse connections and break those there are."""
        self._flowing.set()
        if self._server is None:
            return
        server, self._server = self._server, None
        server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._relay(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        above: asyncio.StreamWriter | None = None
        try:
            below, above = await asyncio.open_connection("127.0.0.1", self.upstream)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass(reader, above))
                group.create_task(self._pass(below, writer))
        except (OSError, ExceptionGroup):
            pass
        finally:
            for end in (writer, above):
                if end is not None:
                    end.transport.abort()

    async def _pass(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(65_536):
            await self._flowing.wait()
            target.write(data)
            await target.drain()
        with suppress(OSError):
            target.write_eof()
