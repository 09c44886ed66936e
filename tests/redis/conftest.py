"""What the tests against a real server share: looking inside the store, counting round trips."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pytest

from redismem.client import Argument, Client
from redismem.codec import vector_bytes
from redismem.keys import Owner
from redismem.service import Service
from redismem.vectors import Turn, turn_vectors
from tests.conftest import lasting_keys

Until = Callable[[str, Callable[[], Awaitable[object]]], Awaitable[None]]
Dump = Callable[[], Awaitable[dict[str, list[Any]]]]
Counter = Callable[[], AbstractContextManager[list[str]]]
Embedded = Callable[[Owner, str, str | None, str], Awaitable[bool]]


@pytest.fixture
def until() -> Until:
    """Wait until a check returns something true."""

    async def wait(what: str, check: Callable[[], Awaitable[object]]) -> None:
        deadline = time.monotonic() + 10
        while not await check():
            assert time.monotonic() < deadline, f"not within 10 s: {what}"
            await asyncio.sleep(0.01)

    return wait


READ = {
    b"hash": ("HGETALL",),
    b"zset": ("ZRANGE", 0, -1, "WITHSCORES"),
    b"stream": ("XRANGE", "-", "+"),
    b"string": ("GET",),
    b"set": ("SMEMBERS",),
}


@pytest.fixture
def dump(service: Service) -> Dump:
    """Return every key of the store with its value, in an order that does not depend on its encoding."""

    async def read() -> dict[str, list[Any]]:
        client, found = service.client, {}
        for key in await lasting_keys(client):
            kind = await client.execute("TYPE", key)
            command, *rest = READ[kind]
            value = await client.execute(command, key, *rest)
            pairs = list(zip(value[::2], value[1::2], strict=True)) if kind == b"hash" else [value]
            found[key.decode()] = sorted(pairs)
        return found

    return read


@pytest.fixture
def round_trips(service: Service, monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Count what is sent to Redis: a command by its name, a pipeline as one."""

    @contextmanager
    def counted() -> Any:
        sent: list[str] = []
        execute, pipeline = Client.execute, Client.pipeline

        async def counting(self: Client, *command: Argument) -> Any:
            if self is service.client and command[0] not in (
                "EVAL",
                "PUBLISH",
            ):  # heartbeats come when they come
                sent.append(str(command[0]))
            return await execute(self, *command)

        async def piped(self: Client, commands: Sequence[Sequence[Argument]]) -> list[Any]:
            if self is service.client:
                sent.append("pipeline")
            return await pipeline(self, commands)

        with monkeypatch.context() as patch:
            patch.setattr(Client, "execute", counting)
            patch.setattr(Client, "pipeline", piped)
            yield sent

    return counted


@pytest.fixture
def embedded_as(service: Service) -> Embedded:
    """Tell whether a memory's stored vector is the one of its text after that turn."""

    async def check(owner: Owner, memory_id: str, previous: str | None, text: str) -> bool:
        stored = await service.client.execute("HGET", owner.memory(memory_id), "embedding")
        fresh = (await turn_vectors(service.embedder, [Turn(text, previous)]))[0]
        return stored is not None and bool(
            np.array_equal(np.frombuffer(stored, np.float16), np.frombuffer(vector_bytes(fresh), np.float16))
        )

    return check


@pytest.fixture
async def no_backfill(service: Service, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[str]]:
    """Queue nothing for later; return the ids that would have been."""
    queued: list[str] = []
    monkeypatch.setattr(service.backfill, "add", lambda _, ids: queued.extend(ids))
    yield queued
    monkeypatch.undo()
