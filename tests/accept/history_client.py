"""A small HTTP/1.1 client: a full one would take more of the two cores than the service it loads."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass

#: seconds after which a request counts as lost; longer than any fault lasts for a process that lives
REQUEST_S = 8.0


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of one request. `status` 0: no reply; `sent` False: it cannot have had an effect.

    `chunks` of a reply that came in parts: when each arrived; also of one that broke off.
    """

    began: float
    ended: float
    status: int = 0
    head: bytes = b""
    body: bytes = b""
    sent: bool = True
    why: str = ""
    chunks: tuple[tuple[float, bytes], ...] = ()


class _Connection(asyncio.Protocol):
    """A keep-alive connection with one request at a time."""

    def __init__(self) -> None:
        self.closed = False
        self.chunks: list[tuple[float, bytes]] = []
        self._buffer = bytearray()
        self._head = b""
        self._reply: asyncio.Future[tuple[bytes, bytes]] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self._reply and not self._reply.done():
            self._reply.set_exception(exc or ConnectionResetError("closed by the service"))

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._reply or self._reply.done():
            return
        if not self._head:
            end = self._buffer.find(b"\r\n\r\n") + 4
            if end < 4:
                return
            self._head = bytes(self._buffer[:end])
            del self._buffer[:end]
        _, is_sized, rest = self._head.lower().partition(b"content-length:")
        body = self._sized(int(rest.partition(b"\r\n")[0])) if is_sized else self._chunked()
        if body is not None:
            self._reply.set_result((self._head, body))
            self._head = b""

    def _sized(self, size: int) -> bytes | None:
        if len(self._buffer) < size:
            return None
        body = bytes(self._buffer[:size])
        del self._buffer[:size]
        return body

    def _chunked(self) -> bytes | None:
        """Note each chunk that is there; return what all of them hold after the last, else None."""
        while (end := self._buffer.find(b"\r\n")) >= 0:
            size = int(self._buffer[:end], 16)
            if len(self._buffer) < end + size + 4:
                return None
            chunk = bytes(self._buffer[end + 2 : end + 2 + size])
            del self._buffer[: end + size + 4]
            if not size:
                return b"".join(content for _, content in self.chunks)
            self.chunks.append((time.monotonic(), chunk))
        return None

    async def exchange(self, message: bytes) -> tuple[bytes, bytes]:
        """Return head and body of the reply."""
        assert self._transport is not None
        self.chunks.clear()
        self._reply = asyncio.get_running_loop().create_future()
        self._transport.write(message)
        return await self._reply

    def close(self) -> None:
        self.closed = True
        if self._transport:
            self._transport.abort()


class HttpClient:
    """Connections of one client, one per port; a request that fails ends its connection."""

    def __init__(self) -> None:
        self._connections: dict[int, _Connection] = {}

    async def request(
        self, port: int, method: str, path: str, body: bytes = b"", *, accept: str = "application/json"
    ) -> Reply:
        """Return the reply, or why there is none, within REQUEST_S."""
        loop, sent, why = asyncio.get_running_loop(), False, "refused"
        message = (
            f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Accept: {accept}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode() + body
        began = time.monotonic()
        connection = self._connections.get(port)
        try:
            async with asyncio.timeout(REQUEST_S):
                if connection is None or connection.closed:
                    _, connection = await loop.create_connection(_Connection, "127.0.0.1", port)
                    self._connections[port] = connection
                sent, why = True, "lost"
                head, content = await connection.exchange(message)
                status, ended = int(head[9:12]), time.monotonic()
                return Reply(began, ended, status, head, content, chunks=tuple(connection.chunks))
        except TimeoutError:
            why = "timeout"
        except OSError as exc:
            why += f" ({type(exc).__name__})"
        with suppress(KeyError):
            self._connections.pop(port).close()
        chunks = tuple(connection.chunks) if sent and connection else ()
        return Reply(began, time.monotonic(), sent=sent, why=why, chunks=chunks)

    def close(self) -> None:
        """Close every connection."""
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()
