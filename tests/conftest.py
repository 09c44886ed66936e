"""One Redis and one service for the whole run; an empty store and a key audit for every test."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import httpx
import hypothesis
import pytest

from redismem.client import Client
from redismem.embedded import EmbeddedRedis
from redismem.http.app import create_app
from redismem.keys import LEASES, Owner
from redismem.service import Service, assembled, open_service
from redismem.settings import Settings

# the same examples in every run: a change is judged by what it changed, not by how busy the machine is
hypothesis.settings.register_profile("redismem", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("redismem")


def pytest_collection_finish() -> None:
    """Let the collector leave alone what lasts for the whole run: else each collection looks at all of it."""
    gc.collect()
    gc.freeze()


#: every key the store may hold: pattern -> whether it may live without a TTL
SCHEMA = {
    r"redismem:memory:\{[^{}]+\}:.+": True,
    r"redismem:(ids|meta|log|turns|archived):\{[^{}]+\}": True,
    r"redismem:(made|profile|similar|conflicts|fresh|used|topics|summaries|centroids):\{[^{}]+\}": True,
    r"redismem:cluster:\{[^{}]+\}:[0-9]+": True,
    r"redismem:summary:\{[^{}]+\}:(topic|day|week|month|entity|session):.+": False,
    r"redismem:session:\{[^{}]+\}:.+": False,
    r"redismem:sessions:\{[^{}]+\}": False,
    r"redismem:jobs(:later|:live|:rest|:tries|:dead)?": True,
    r"redismem:weights": True,
    r"redismem:graph:\{[^{}]+\}:[01]": True,
    r"redismem:store": True,
    r"redismem:lock:(functions|maintain)": False,
    r"redismem:(hot|hits):\{[^{}]+\}": False,
    r"redismem:embed:[^:]+:[0-9a-f]+": False,
    r"redismem:series:\{ops\}:[md]:[0-9]+": False,
    r"redismem:keys": True,
    r"redismem:rate:[0-9a-f]{12}": False,
}

#: hashes whose fields expire one by one
FIELD_TTL = (r"redismem:(search|idempotency):\{[^{}]+\}", r"redismem:leases")


@pytest.fixture(scope="session")
async def redis_url(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """URL of a server of our own; of REDISMEM_TEST_REDIS_URL if given and empty."""
    if given := os.environ.get("REDISMEM_TEST_REDIS_URL"):
        client = Client(Settings(), given)
        assert await client.execute("DBSIZE") == 0, (
            "REDISMEM_TEST_REDIS_URL holds data; tests would remove it"
        )
        await client.close()
        yield given
        return
    async with EmbeddedRedis(tmp_path_factory.mktemp("redis"), persist=False) as redis:
        yield redis.url


@pytest.fixture(scope="session")
def settings(redis_url: str) -> Settings:
    """Settings of a service on the test server; its embedder knows no meaning but costs nothing.

    Its caches are off: what a search finds is not what it found a moment ago. `tiered` has them on.
    """
    return Settings(
        redis_url=redis_url, embedder="deterministic", testing=True, l1_entries=0, l2_searches=0, lease_s=0.5
    )


@pytest.fixture(scope="session")
async def open_store(settings: Settings) -> AsyncIterator[Service]:
    async with open_service(settings) as opened:
        yield opened


@pytest.fixture
async def service(open_store: Service) -> AsyncIterator[Service]:
    """A service on an empty store; afterwards every key must belong to the schema."""
    yield open_store
    try:
        assert await open_store.backfill.drained(10)
        await audit(open_store.client)
    finally:
        embedder = open_store.embedder
        await open_store.client.execute("FLUSHALL")
        await open_store.client.execute(
            "HSET", "redismem:store", "schema", 1, "embedder", embedder.name, "dim", embedder.dim
        )


@pytest.fixture
async def tiered(service: Service) -> AsyncIterator[Service]:
    """A service with its caches, on the same store; its L1 may answer."""
    settings = Settings(
        redis_url=service.settings.redis_url, embedder="deterministic", testing=True, lease_s=0.5
    )
    async with assembled(settings, service.client, service.embedder) as opened:
        await until("the lease is held", lambda: asyncio.sleep(0, opened.coherence.is_live()))
        yield opened
        assert await opened.backfill.drained(10)


@pytest.fixture
def owner(service: Service) -> Owner:
    return service.owner("alice")


@pytest.fixture
async def http(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the ASGI application, in process."""
    transport = httpx.ASGITransport(app=create_app(service), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def lasting_keys(client: Client) -> list[bytes]:
    """Return every key but the one of the running processes, which is there or not by the beat."""
    return [key for key in await client.execute("KEYS", "*") if key != LEASES.encode()]


async def audit(client: Client) -> None:
    """Check that every key matches the schema, and has a TTL unless it is permanent."""
    for key in await client.execute("KEYS", "*"):
        name = key.decode(errors="replace")
        if any(re.fullmatch(rule, name) for rule in FIELD_TTL):
            fields = await client.execute("HKEYS", key)
            ttls = await client.execute("HPTTL", key, "FIELDS", len(fields), *fields) if fields else []
            assert all(ttl != -1 for ttl in ttls), f"a field of {name} never expires"
            continue
        rule = next((rule for rule in SCHEMA if re.fullmatch(rule, name, re.DOTALL)), None)
        assert rule is not None, f"{name} is not in the schema"
        assert SCHEMA[rule] or await client.execute("PTTL", key) >= 0, f"{name} never expires"


async def until(what: str, check: Callable[[], Awaitable[object]], timeout_s: float = 10) -> None:
    """Wait until `check` returns something true; fail with `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not await check():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        await asyncio.sleep(0.01)


@pytest.fixture(scope="session")
def sample_life() -> Path:
    return Path(__file__).parent.parent / "redismem" / "data" / "sample_life.jsonl"
