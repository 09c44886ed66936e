"""What the HTTP tests share: URLs of any user, an embedder with a gate, the shape of an error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from urllib.parse import quote

import httpx
import pytest

from redismem.embed.deterministic import DeterministicEmbedder
from redismem.embed.protocol import Vectors
from redismem.errors import EmbedderUnavailable
from redismem.http.app import create_app
from redismem.service import Service, assembled

JSON = {"Content-Type": "application/json"}


def encoded(part: str) -> str:
    """Return one path segment; `.` and `..` too, which a URL library would resolve."""
    return quote(part, safe="").replace(".", "%2E")


def of_user(user: str, *parts: str) -> str:
    """Return the path of a user, or of something of theirs; each part may hold any character."""
    return "/".join(["/v1/users", encoded(user), *map(encoded, parts)])


async def add(
    http: httpx.AsyncClient, user: str, *memories: Mapping[str, object], wait: bool = True
) -> list[str]:
    """Store memories and return their ids; each must be accepted."""
    reply = await http.post(
        of_user(user, "memories"), json={"memories": memories}, params={"wait": str(wait).lower()}
    )
    assert reply.status_code == (201 if wait else 202), reply.text
    return [item["id"] for item in reply.json()["memories"]]


async def found(http: httpx.AsyncClient, user: str, text: str, **request: object) -> list[str]:
    """Return the ids that a search finds, best first."""
    reply = await http.post(of_user(user, "search"), json={"text": text, **request})
    assert reply.status_code == 200, reply.text
    return [hit["id"] for hit in reply.json()["memories"]]


def error_of(reply: httpx.Response, status: int) -> dict[str, str]:
    """Return the error of a reply, which must have this status and exactly the documented shape."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    body = reply.json()
    assert set(body) == {"error"}
    error: dict[str, str] = body["error"]
    assert {"code", "message", "request_id"} <= set(error) <= {"code", "message", "request_id", "field"}
    assert all(isinstance(value, str) and value for value in error.values())
    assert error["request_id"] == reply.headers["x-request-id"]
    assert "Traceback" not in error["message"]
    assert ".py" not in error["message"]
    return error


class Gate:
    """The deterministic embedder behind a gate; `away` makes it fail."""

    def __init__(self) -> None:
        self._inner = DeterministicEmbedder()
        self.name, self.dim = self._inner.name, self._inner.dim
        self.open = asyncio.Event()
        self.open.set()
        self.away = False
        self.waiting = 0

    async def embed(self, texts: list[str], *, urgent: bool = True) -> Vectors:
        self.waiting += 1
        try:
            await self.open.wait()
        finally:
            self.waiting -= 1
        if self.away:
            raise EmbedderUnavailable("the embedder is away")
        return await self._inner.embed(texts, urgent=urgent)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return self._inner.count_tokens(texts)

    async def close(self) -> None:
        self.open.set()


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
async def gated(service: Service, gate: Gate) -> AsyncIterator[Service]:
    """The service of the run with an embedder that a test can hold or take away."""
    async with assembled(service.settings, service.client, gate) as opened:
        yield opened
        gate.away = False
        gate.open.set()
        assert await opened.backfill.drained(10)


@pytest.fixture
async def gated_http(gated: Service) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the gated service."""
    transport = httpx.ASGITransport(app=create_app(gated), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client
