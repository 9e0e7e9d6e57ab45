"""What stands between clients and a server, to lose connections without the server's doing."""

from __future__ import annotations

import asyncio


class Proxy:
    """Stands between clients and a server, so that connections can be lost without the server's doing."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._port = 0
        self._server: asyncio.Server | None = None
        self._links: set[asyncio.Task[None]] = set()

    @property
    def endpoint(self) -> str:
        return f"nats://127.0.0.1:{self._port}"

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port, limit=2**20)
        self._port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        """End every connection, and take no new one until `open`."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        links, self._links = self._links, set()
        for link in links:
            link.cancel()
        if links:
            await asyncio.wait(links)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = asyncio.get_running_loop().create_task(self._link(reader, writer))
        self._links.add(link)
        link.add_done_callback(self._links.discard)

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_server: asyncio.StreamWriter | None = None
        try:
            from_server, to_server = await asyncio.open_connection(*self._target, limit=2**20)
            await asyncio.gather(_copy(reader, to_server), _copy(from_server, writer))
        except OSError:
            pass  # one side is gone, and so is the other now
        finally:
            for side in (writer, to_server):
                if side is not None:
                    side.transport.abort()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(2**18):
        writer.write(data)
        await writer.drain()
    raise ConnectionResetError
