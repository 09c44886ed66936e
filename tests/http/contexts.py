"""What the tests of contexts share: a service with its caches or without, a user of whom much is known."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from redismem.conversation import STAGE_OF
from redismem.http.app import create_app
from redismem.jobs import Jobs
from redismem.service import Service, assembled
from redismem.settings import Settings
from redismem.worker.worker import Worker
from tests.conftest import until
from tests.http.conftest import Gate, add, of_user
from tests.http.test_derived import BEES, BOATS
from tests.property.test_derived_model import Inline

CONTEXT, BATCH = of_user("ada", "context"), of_user("ada", "context", "batch")
SESSIONS, SESSION = of_user("ada", "sessions"), of_user("ada", "sessions", "s")
GENERATION = "redismem-generation"


@pytest.fixture(params=["with L1", "without L1"])
async def either(request: pytest.FixtureRequest, service: Service, gate: Gate) -> AsyncIterator[Service]:
    """A service with its caches on, then off, behind the gate."""
    settings = service.settings
    if request.param == "with L1":
        settings = Settings(redis_url=settings.redis_url, embedder="deterministic", testing=True, lease_s=0.5)
    async with assembled(settings, service.client, gate) as opened:
        if settings.l1_entries:
            await until("the lease is held", lambda: asyncio.sleep(0, opened.coherence.is_live()))
        yield opened
        gate.away = False
        gate.open.set()
        await opened.contexts.drained()
        await opened.prefetcher.settled()
        assert await opened.backfill.drained(10)
        gc.collect()


@pytest.fixture
async def http(either: Service) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=create_app(either), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def context(http: httpx.AsyncClient, **request: object) -> Any:
    reply = await http.post(CONTEXT, json=request)
    assert reply.status_code == 200, reply.text
    assert reply.headers[GENERATION] == str(reply.json()["generation"])
    return reply.json()


def blocks(reply: Any, part: str | None = None) -> list[Any]:
    found = [block for stage in reply["stages"] for block in stage["blocks"]]
    return [block for block in found if part in (None, block["part"])]


def ids(reply: Any, part: str | None = None) -> list[str]:
    return [memory["id"] for block in blocks(reply, part) for memory in block.get("memories", [])]


def parts(reply: Any) -> set[str]:
    return {block["part"] for block in blocks(reply)}


def only(*wanted: str) -> dict[str, bool]:
    return {part: part in wanted for part in STAGE_OF}


async def opened(http: httpx.AsyncClient, **session: object) -> None:
    assert (await http.post(SESSIONS, json={"id": "s", **session})).status_code == 201


async def said(http: httpx.AsyncClient, text: str, session: str = "s", **message: object) -> None:
    path = of_user("ada", "sessions", session, "messages")
    assert (await http.post(path, json={"text": text, **message})).status_code == 201


QUESTION = "Does Ana eat honey?"


@pytest.fixture
async def rich(http: httpx.AsyncClient, either: Service) -> None:
    """A user with topics, a profile, a session that has ended, and one whose message is to be answered."""
    assert (await http.post(SESSIONS, json={"id": "old"})).status_code == 201
    for i, text in enumerate(("I bought a canoe in Bergen", "Ana paddled the canoe", "It is made of cedar")):
        await said(http, text, "old", id=f"o{i}")
    await http.delete(of_user("ada", "sessions", "old"))
    await add(
        http,
        "ada",
        *BEES,
        *BOATS,
        {"id": "a1", "text": "Ana lives in Lisbon with two cats", "entities": ["Ana"], "importance": 0.9},
        {"id": "a2", "text": "Ana likes honey cake", "entities": ["Ana"]},
        {"id": "p", "text": "allergic to peanuts", "pinned": True},
    )
    # its computing in this process
    tools = replace(either.worker._tools, jobs=Jobs(either.functions, rest=0), pool=Inline())
    await Worker(tools, either.worker._foreign).settle(ahead_s=4000)
    _, boats = (await http.get(of_user("ada", "topics"))).json()["topics"]
    await opened(http, active_topics=[boats["id"]], pins=["b0"])
    await said(http, QUESTION, id="q")
    await either.prefetcher.settled()


async def remove(http: httpx.AsyncClient, either: Service, how: str, memory_id: str) -> None:
    """Make a memory untrue, and return when that was acknowledged."""
    path = of_user("ada", "memories", memory_id)
    match how:
        case "delete":
            assert (await http.delete(path)).status_code == 200
        case "correct":
            new = {"ids": [memory_id], "memory": {"text": "something else"}}
            assert (await http.post(of_user("ada", "corrections"), json=new)).status_code == 201
        case "change":
            reply = await http.patch(path + "?consistency=strong", json={"text": "something else"})
            assert reply.status_code == 200
        case "by hand":
            pushes = either.coherence.counts["pushes"]
            key = either.owner("ada").memory(memory_id)
            assert await either.client.execute("DEL", key) == 1
            await until(
                "the push is here", lambda: asyncio.sleep(0, either.coherence.counts["pushes"] > pushes)
            )
