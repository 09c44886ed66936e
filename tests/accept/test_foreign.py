from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
from redis.asyncio import Redis

from redismem.reembed import Reembedder
from redismem.service import Service

pytestmark = pytest.mark.accept

USER = "/v1/users/alice"
KEY = "redismem:memory:{alice}:"


@pytest.fixture
async def cli(redis_url: str) -> AsyncIterator[Redis]:
    """A client of another program: plain redis-py, nothing of ours."""
    client = Redis.from_url(redis_url)
    yield client
    await client.aclose()


@pytest.fixture
async def alice(http: httpx.AsyncClient) -> httpx.AsyncClient:
    """A user who has an index."""
    reply = await http.post(f"{USER}/memories", json={"id": "ours", "text": "Ana drinks tea"})
    assert reply.status_code == 201
    return http


async def hits(http: httpx.AsyncClient, text: str, mode: str = "hybrid", **request: object) -> list[str]:
    reply = await http.post(f"{USER}/search", json={"text": text, "search_mode": mode, **request})
    assert reply.status_code == 200, reply.text
    return [hit["id"] for hit in reply.json()["memories"]]


async def listed(http: httpx.AsyncClient) -> list[str]:
    reply = await http.get(f"{USER}/memories")
    assert reply.status_code == 200, reply.text
    return sorted(memory["id"] for memory in reply.json()["memories"])


async def test_a_foreign_hash_is_found_by_words_at_once(alice: httpx.AsyncClient, cli: Redis) -> None:
    await cli.hset(KEY + "theirs", mapping={"text": "Ben paints boats", "topics": "art|sea"})
    assert await hits(alice, "boats", "keyword") == ["theirs"]
    assert await hits(alice, "boats") == ["theirs", "ours"]
    assert await hits(alice, "Ben", filters={"topics": "sea"}) == ["theirs"]
    assert await listed(alice) == ["ours", "theirs"]
    memory = (await alice.get(f"{USER}/memories/theirs")).json()
    assert (memory["text"], memory["topics"], memory["embedded"]) == (
        "Ben paints boats",
        ["art", "sea"],
        False,
    )


async def test_a_foreign_change_is_found_by_its_new_words(alice: httpx.AsyncClient, cli: Redis) -> None:
    await cli.hset(KEY + "ours", "text", "Ana drinks coffee")
    assert await hits(alice, "coffee", "keyword") == ["ours"]
    assert await hits(alice, "tea", "keyword") == []
    assert (await alice.get(f"{USER}/memories/ours")).json()["text"] == "Ana drinks coffee"


async def test_a_foreign_delete_is_gone_everywhere(alice: httpx.AsyncClient, cli: Redis) -> None:
    assert await cli.delete(KEY + "ours") == 1
    for mode in ("hybrid", "semantic", "keyword"):
        assert await hits(alice, "tea", mode) == []
    assert await listed(alice) == []
    assert (await alice.get(f"{USER}/export")).text == ""
    for method in ("GET", "DELETE"):
        assert (await alice.request(method, f"{USER}/memories/ours")).status_code == 404
    assert (await alice.patch(f"{USER}/memories/ours", json={"pinned": True})).status_code == 404


async def test_our_delete_of_a_foreign_hash_wins(alice: httpx.AsyncClient, cli: Redis) -> None:
    await cli.hset(KEY + "theirs", "text", "Ben paints boats")
    assert (await alice.delete(f"{USER}/memories/theirs")).status_code == 200
    assert not await cli.exists(KEY + "theirs")
    assert await hits(alice, "boats", "keyword") == []


async def test_a_foreign_hash_can_be_patched_corrected_and_embedded(
    alice: httpx.AsyncClient, cli: Redis, service: Service
) -> None:
    for name in ("a", "b", "c"):
        await cli.hset(KEY + name, "text", f"Ben paints boat{name}")
    assert (await alice.patch(f"{USER}/memories/a", json={"topics": ["art"]})).status_code == 200
    correction = {"ids": ["b"], "memory": {"text": "Ben sold the boat"}}
    assert (await alice.post(f"{USER}/corrections", json=correction)).status_code == 201
    made = await Reembedder(service.client, service.functions, service.embedder).run()
    assert made >= 1
    assert (await hits(alice, "Ben paints boatc", "semantic"))[0] == "c"
    exported = [line for line in (await alice.get(f"{USER}/export")).text.splitlines() if line]
    assert len(exported) == 5


@pytest.mark.parametrize(
    "fields",
    [
        {"text": ""},
        {"memory_type": "semantic"},
        {"text": "boats", "created_at": "yesterday", "importance": "much", "version": "x"},
        {"text": "boats", "event_date": "1e400", "confidence": "nan"},
        {"text": "boats", "importance": "inf"},
        {"text": "boats", "metadata": "[" * 5000},
        {"text": "boats", "metadata": "{"},
        {"text": "boats", "metadata": "[1]"},
        {"text": "boats", "embedding": "short"},
        {"text": "boats", "pk": "another"},
        {"text": "boats", "topics": "|||", "pinned": "maybe"},
        {"text": b"\xff\xfe boats", "topics": b"\xff"},
        {"text": "boats\0", "session_id": "s"},
        {"text": "boats", "superseded_by": "nobody"},
    ],
)
async def test_a_hash_against_the_schema_breaks_no_reader(
    alice: httpx.AsyncClient, cli: Redis, fields: dict[str, str | bytes]
) -> None:
    await cli.hset(KEY + "theirs", mapping=dict(fields))
    for mode in ("hybrid", "semantic", "keyword"):
        await hits(alice, "boats", mode, limit=50, explain=True, recency_weight=0.5, importance_weight=0.5)
    assert "ours" in await listed(alice)
    memory = await alice.get(f"{USER}/memories/theirs")
    assert memory.status_code in (200, 404)
    assert memory.status_code == 404 or None not in memory.json().values()
    assert (await alice.get(f"{USER}/export")).status_code == 200
    assert (await alice.patch(f"{USER}/memories/theirs", json={"pinned": True})).status_code in (
        200,
        404,
        422,
    )
    assert (await alice.delete(f"{USER}/memories/theirs")).status_code == 200
    assert await hits(alice, "tea") == ["ours"]


async def test_a_key_of_a_foreign_type_is_an_error_that_changes_nothing(
    alice: httpx.AsyncClient, cli: Redis
) -> None:
    await cli.set(KEY + "theirs", "not a hash")
    for method, body in (("GET", None), ("PATCH", {"pinned": True}), ("DELETE", None)):
        reply = await alice.request(method, f"{USER}/memories/theirs", json=body)
        assert "error" in reply.json() or reply.status_code == 200
    assert await hits(alice, "tea") == ["ours"]
    await cli.delete(KEY + "theirs")


async def test_an_index_dropped_by_hand_is_rebuilt_by_the_next_read(
    alice: httpx.AsyncClient, cli: Redis
) -> None:
    (index,) = [name for name in await cli.execute_command("FT._LIST") if b"{alice}" in name]
    await cli.execute_command("FT.DROPINDEX", index)
    assert await hits(alice, "tea") == ["ours"]
    await cli.execute_command("FT.DROPINDEX", index)
    assert await listed(alice) == ["ours"]
