"""Caches as an HTTP client sees them: headers, consistency, what the hot path may not change."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator

import httpx
import pytest

from redismem.errors import RedisUnavailable
from redismem.http.app import create_app
from redismem.service import Service, assembled
from tests.conftest import until
from tests.http.conftest import add, error_of, of_user

GENERATION = "redismem-generation"


@pytest.fixture
async def cached(tiered: Service) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a service with its caches on."""
    transport = httpx.ASGITransport(app=create_app(tiered), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def settle(service: Service) -> None:
    """Let every push come that is under way."""
    await service.coherence.barrier({})


async def warm(service: Service, http: httpx.AsyncClient, user: str, text: str) -> dict[str, object]:
    """Search until L1 has the reply; return it."""
    await settle(service)
    await http.post(of_user(user, "search"), json={"text": text})
    reply = await http.post(of_user(user, "search"), json={"text": text})
    assert reply.json()["served_by"] == "l1"
    body: dict[str, object] = reply.json()
    return body


@pytest.mark.parametrize("user", ["ada", "a/b c", "ü%20{x}"])
async def test_l1_says_what_the_index_said(tiered: Service, cached: httpx.AsyncClient, user: str) -> None:
    await add(cached, user, {"text": "likes tea", "id": "a/1"}, {"text": "likes rain"})
    await settle(tiered)
    replies = [await cached.post(of_user(user, "search"), json={"text": "tea"}) for _ in range(2)]
    bodies = [reply.json() for reply in replies]
    assert [body.pop("served_by") for body in bodies] == ["l3", "l1"]
    assert all(set(body.pop("timing")) == {"embed", "search", "total"} for body in bodies)
    assert bodies[0] == bodies[1]
    assert {reply.headers[GENERATION] for reply in replies} == {str(bodies[0]["generation"])}
    assert set(replies[0].headers) == set(replies[1].headers)

    path = of_user(user, "memories", "a/1")
    first, second = [await cached.get(path, headers={"X-Request-ID": f"r{i}"}) for i in range(2)]
    assert first.json() == second.json()
    assert (first.headers["etag"], set(first.headers)) == (second.headers["etag"], set(second.headers))
    assert [first.headers["x-request-id"], second.headers["x-request-id"]] == ["r0", "r1"]
    assert tiered.l1.stats()["memory"]["hits"] == 1
    assert tiered.l1.stats()["memory"]["misses"] == 1


async def test_the_hot_path_leaves_errors_to_the_application(
    tiered: Service, cached: httpx.AsyncClient
) -> None:
    await add(cached, "ada", {"text": "likes tea"})
    await warm(tiered, cached, "ada", "tea")
    json = {"Content-Type": "application/json"}
    path = of_user("ada", "search")
    assert error_of(await cached.post(path, content=b"{", headers=json), 400)["code"] == "malformed"
    assert error_of(await cached.post(path, content=b"[" * 9999, headers=json), 422)
    assert error_of(await cached.post(path, content=b'{"text": "tea"}'), 400)
    assert error_of(await cached.post(path, json={"text": "tea", "limit": 0}), 422)["field"] == "limit"
    assert error_of(await cached.post(path + "?x=1", json={"text": "tea"}), 422)["field"] == "x"
    assert error_of(await cached.post("/v1/users/%FF/search", json={"text": "tea"}), 422)["field"] == "user"
    assert error_of(await cached.post("/v1/users/a/b/search", json={"text": "tea"}), 404)
    assert error_of(await cached.get("/v1/users/ada/memories/%00"), 422)["field"] == "id"
    assert error_of(await cached.get("/v1/users/ada/memories/none"), 404)
    for body in ({"text": "tea", "limit": 10}, {"limit": 10, "text": "tea", "explain": False}):
        assert (await cached.post(path, json=body)).json()["served_by"] == "l1"


async def test_a_body_in_pieces_is_read_whole(tiered: Service, cached: httpx.AsyncClient) -> None:
    await add(cached, "ada", {"text": "likes tea"})
    await warm(tiered, cached, "ada", "tea")

    async def pieces() -> AsyncIterator[bytes]:
        for piece in (b'{"te', b'xt": ', b'"tea"}'):
            yield piece

    headers = {"Content-Type": "application/json"}
    reply = await cached.post(of_user("ada", "search"), content=pieces(), headers=headers)
    assert reply.json()["served_by"] == "l1"


async def test_a_generation_that_is_handed_back_is_seen(tiered: Service, cached: httpx.AsyncClient) -> None:
    await add(cached, "ada", {"text": "likes tea"})
    await warm(tiered, cached, "ada", "tea")
    written = await cached.post(of_user("ada", "memories"), json={"text": "tea at five"})
    assert written.headers[GENERATION] == str(written.json()["generation"])
    eventual = (await cached.post(of_user("ada", "search"), json={"text": "tea"})).json()
    session = {"text": "tea", "consistency": "session", "min_version": int(written.headers[GENERATION])}
    seen = await cached.post(of_user("ada", "search"), json=session)
    assert (eventual["total"], seen.json()["total"]) == (1, 2)
    assert int(seen.headers[GENERATION]) >= int(written.headers[GENERATION])


async def test_writes_tell_the_generation_they_made(tiered: Service, cached: httpx.AsyncClient) -> None:
    (memory_id,) = await add(cached, "ada", {"text": "likes tea"})
    path, told = of_user("ada", "memories", memory_id), []
    changed = await cached.patch(path + "?consistency=strong", json={"importance": 0.7})
    assert changed.headers[GENERATION] == str(changed.json()["version"])
    told.append(changed)
    correction = {"ids": [memory_id], "memory": {"text": "likes coffee"}}
    told.append(await cached.post(of_user("ada", "corrections"), json=correction))
    told.append(await cached.delete(path))
    generations = [int(reply.headers[GENERATION]) for reply in told]
    assert generations == sorted(set(generations))
    assert error_of(await cached.patch(path + "?consistency=session", json={"importance": 1}), 422)


async def test_a_memory_is_read_as_consistently_as_asked(tiered: Service, cached: httpx.AsyncClient) -> None:
    (memory_id,) = await add(cached, "ada", {"text": "likes tea"})
    path = of_user("ada", "memories", memory_id)
    await settle(tiered)
    await cached.get(path)
    version = (await cached.get(path)).json()["version"]
    hits = tiered.l1.stats()["memory"]["hits"]
    for query in ("?consistency=strong", f"?min_version={version + 1}", "?consistency=session"):
        assert (await cached.get(path + query)).status_code == 200
        assert tiered.l1.stats()["memory"]["hits"] == hits
    await cached.get(path + f"?consistency=session&min_version={version}")
    assert tiered.l1.stats()["memory"]["hits"] == hits + 1
    assert error_of(await cached.get(path + "?consistency=weak"), 422)["field"] == "consistency"


async def test_a_batch_is_the_replies_of_its_searches(tiered: Service, cached: httpx.AsyncClient) -> None:
    await add(cached, "ada", {"text": "likes tea"})
    single = await warm(tiered, cached, "ada", "tea")
    batch = await cached.post(of_user("ada", "search") + "/batch", json={"queries": [{"text": "tea"}] * 2})
    for result in batch.json()["results"]:
        assert {**result, "timing": 0} == {**single, "timing": 0}
    assert batch.headers[GENERATION] == str(single["generation"])


async def test_stats_tell_what_the_caches_hold_and_did(tiered: Service, cached: httpx.AsyncClient) -> None:
    await add(cached, "ada", {"text": "likes tea"})
    await warm(tiered, cached, "ada", "tea")
    stats = (await cached.get("/v1/stats")).json()
    assert stats["l1"]["search"]["hits"] == 1
    assert stats["l1"]["total"]["bytes"] > 0
    assert stats["l2"]["search misses"] == 1
    assert stats["coherence"]["live"] is True


async def test_a_service_without_redis_is_live_but_not_ready_and_refuses_at_once(
    tiered: Service, cached: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    await add(cached, "ada", {"text": "likes tea"})

    async def away(*_: object, **__: object) -> None:
        raise RedisUnavailable("away")

    monkeypatch.setattr(tiered.client, "execute", away)
    monkeypatch.setattr(tiered.client, "pipeline", away)
    assert (await cached.get("/health/live")).status_code == 200
    for reply in (
        await cached.get("/health/ready"),
        await cached.post(of_user("ada", "search"), json={"text": "new"}),
        await cached.get(of_user("ada", "memories", "x")),
        await cached.delete(of_user("ada", "memories", "x")),
    ):
        assert reply.status_code == 503
        assert int(reply.headers["retry-after"]) >= 1
    monkeypatch.undo()


async def test_a_stale_answer_says_so(
    tiered: Service, cached: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    (memory_id,) = await add(cached, "ada", {"text": "likes tea"})
    settings = dataclasses.replace(tiered.settings, stale_if_error=True)
    async with assembled(settings, tiered.client, tiered.embedder) as lenient:
        transport = httpx.ASGITransport(app=create_app(lenient), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            await until("the lease is held", lambda: asyncio.sleep(0, lenient.coherence.is_live()))
            await warm(lenient, http, "ada", "tea")
            memory = of_user("ada", "memories", memory_id)
            await http.get(memory)

            async def away(*_: object, **__: object) -> None:
                raise RedisUnavailable("away")

            monkeypatch.setattr(tiered.client, "execute", away)
            monkeypatch.setattr(tiered.client, "pipeline", away)
            await until("the lease has run out", lambda: asyncio.sleep(0, not lenient.coherence.is_live()))
            reply = await http.post(of_user("ada", "search"), json={"text": "tea"})
            assert (reply.json()["stale"], reply.headers["warning"][:3]) == (True, "110")
            assert (await http.get(memory)).headers["warning"][:3] == "110"
            monkeypatch.undo()
