"""What an operator sees: every request counted once, documents that agree, headers of every reply."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from starlette.types import ASGIApp, Message

from redismem.errors import RedisUnavailable
from redismem.http.app import create_app
from redismem.http.table import OPERATIONS
from redismem.keys import API_KEYS, API_KEYS_ID
from redismem.service import Service, assembled
from redismem.slo import GROUPS
from tests.conftest import until
from tests.http.conftest import of_user
from tests.http.operating import BY_NAME, IN_ORDER, Reply, Samples, raw, request_of, samples

MINE, OTHER = "https://app.example.com", "https://other.example.com"


@pytest.fixture
async def app(tiered: Service) -> ASGIApp:
    await tiered.keyring.table()  # L1 has it that there are no keys
    return create_app(tiered)


async def ask(app: ASGIApp, name: str, **who: str) -> Reply:
    method, path, headers, body = request_of(BY_NAME[name], **{"user": "ada", **who})
    return await raw(app, method, path, headers=headers, body=body)


async def search(app: ASGIApp, **wanted: object) -> Reply:
    reply = await raw(app, "POST", of_user("ada", "search"), body=json.dumps(wanted).encode())
    assert reply.status == 200, reply.body
    return reply


async def scraped(app: ASGIApp) -> Samples:
    """Return what Prometheus would read."""
    reply = await raw(app, "GET", "/metrics")
    assert reply.status == 200
    assert reply.headers["content-type"].startswith("text/plain; version=")
    return samples(reply.body.decode())


def counted(found: Samples, name: str) -> dict[tuple[str, ...], float]:
    """Return the samples of a name that are not zero: values of the labels -> value."""
    return {key[1:]: value for key, value in found.items() if key[0] == name and value}


async def test_reads_are_counted_by_the_tier_that_answered(tiered: Service, app: ASGIApp) -> None:
    assert (await ask(app, "put")).status == 201
    await tiered.coherence.barrier({})
    for tier in ("l3", "l1", "l1"):
        assert (await search(app, text="bees", search_mode="keyword")).json["served_by"] == tier
    tiered.l1.clear()
    for tier in ("l2", "l1"):
        assert (await search(app, text="bees", search_mode="keyword")).json["served_by"] == tier
    await ask(app, "list")
    assert (await ask(app, "get", memory="none")).status == 404
    found = await scraped(app)
    # labels stand in the order of their names: cache_status, operation
    assert counted(found, "memory_retrieval_seconds_count") == {
        ("l1", "search"): 3,
        ("l2", "search"): 1,
        ("l3", "search"): 1,
        ("none", "list"): 1,
    }
    assert counted(found, "cache_hits_total")["l1_search",] == 3
    assert counted(found, "cache_misses_total")["l1_search",] == 2
    assert counted(found, "cache_hits_total")["l2_search",] == 1
    assert counted(found, "cache_misses_total")["l2_search",] == 1
    assert counted(found, "redismem_update_seconds_count") == {("put",): 1}


async def test_a_hit_of_l1_costs_no_round_trip_and_a_miss_by_words_one(tiered: Service, app: ASGIApp) -> None:
    assert (await ask(app, "put")).status == 201
    await tiered.coherence.barrier({})
    await search(app, text="first", search_mode="keyword")
    before = counted(await scraped(app), "redismem_redis_round_trips_sum")["search",]
    await search(app, text="bees", search_mode="keyword")
    missed = counted(await scraped(app), "redismem_redis_round_trips_sum")["search",]
    for _ in range(7):
        await search(app, text="bees", search_mode="keyword")
    found = await scraped(app)
    assert (missed - before, found["redismem_redis_round_trips_sum", "search"] - missed) == (1, 0)
    embedded = found["redismem_embedding_seconds_count",]
    await search(app, text="never asked", search_mode="semantic")
    assert (await scraped(app))["redismem_embedding_seconds_count",] == embedded + 1


async def test_each_request_is_counted_once_by_how_it_ended(tiered: Service, app: ASGIApp) -> None:
    wanted: Counter[tuple[str, str]] = Counter()
    for name in IN_ORDER:
        reply = await ask(app, name)
        wanted[name, "ok" if reply.status < 400 else "client"] += 1
    for path, status in (("/nowhere", 404), ("/v1/users/ada/memories?wrong=1", 422), ("/docs", 200)):
        assert (await raw(app, "GET", path)).status == status
    wanted += Counter({("other", "client"): 1, ("list", "client"): 1, ("page", "ok"): 1})
    assert (await raw(app, "HEAD", "/v1/users/ada/memories")).status == 200
    wanted["list", "ok"] += 1
    assert (await raw(app, "PUT", "/v1/users/ada/memories")).status == 405
    wanted["other", "client"] += 1
    found = await scraped(app)
    assert counted(found, "redismem_requests_total") == wanted
    for histogram, group in (
        ("memory_retrieval", "retrieval"),
        ("redismem_context", "context"),
        ("redismem_update", "update"),
    ):
        answered = {name for name, outcome in wanted if outcome == "ok" and GROUPS.get(name) == group}
        seconds = counted(found, f"{histogram}_seconds_count")
        assert {key[-1] for key in seconds} == answered
        assert sum(seconds.values()) == sum(wanted[name, "ok"] for name in answered)


async def test_what_breaks_is_counted_as_failed(
    tiered: Service, app: ASGIApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object, **__: object) -> None:
        raise ValueError("a defect")

    monkeypatch.setattr(tiered.tiers, "search", broken)
    monkeypatch.setattr(tiered.tiers, "page", broken)
    body = b'{"text": "bees"}'
    assert (await raw(app, "POST", of_user("ada", "search"), body=body)).error(500)["code"] == "internal"
    with pytest.raises(ValueError, match="a defect"):
        await ask(app, "list")
    found = await scraped(app)
    assert counted(found, "redismem_requests_total")["search", "failed"] == 1
    assert counted(found, "redismem_requests_total")["list", "failed"] == 1
    assert counted(found, "memory_retrieval_seconds_count") == {}


def take_redis_away(service: Service, patch: pytest.MonkeyPatch) -> None:
    async def away(*_: object, **__: object) -> None:
        raise RedisUnavailable("away")

    patch.setattr(service.client, "execute", away)
    patch.setattr(service.client, "pipeline", away)


async def test_a_redis_that_is_away_is_a_failure_and_no_refusal(
    tiered: Service, app: ASGIApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_redis_away(tiered, monkeypatch)
    assert (await ask(app, "list")).error(503)["code"] == "redis_unavailable"
    assert (await ask(app, "search")).status == 503
    monkeypatch.undo()
    requests = counted(await scraped(app), "redismem_requests_total")
    assert requests == {("list", "failed"): 1, ("search", "failed"): 1}


async def test_operators_and_nobody_else_may_look_while_redis_is_away(
    tiered: Service, app: ASGIApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = {}
    for scope in ("read", "write", "admin"):
        _, shown[scope] = await tiered.keyring.create(name=scope, scopes=[scope])
    for _ in range(2):
        assert (await raw(app, "GET", "/v1/dashboard", headers={"X-API-Key": shown["admin"]})).status == 200
    take_redis_away(tiered, monkeypatch)
    tiered.l1.clear()
    for path in ("/metrics", "/v1/dashboard", "/v1/slo", "/v1/stats"):
        for scope, status in (("admin", 200), ("read", 403), ("write", 403)):
            assert (await raw(app, "GET", path, headers={"X-API-Key": shown[scope]})).status == status, path
        assert (await raw(app, "GET", path)).status == 401
    for token in shown.values():
        reply = await raw(app, "GET", of_user("ada", "memories"), headers={"X-API-Key": token})
        assert reply.status == 503


@pytest.mark.parametrize("change", ["revoked", "first"])
async def test_while_redis_is_away_nobody_looks_by_keys_that_are_known_to_have_changed(
    tiered: Service, app: ASGIApp, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """This process has acknowledged the change, so that it returned, before Redis went away."""
    shown = {}
    if change == "revoked":
        key, token = await tiered.keyring.create(name="gone", scopes=["admin"])
        shown = {"X-API-Key": token}
    assert (await raw(app, "GET", "/metrics", headers=shown)).status == 200
    settings = replace(tiered.settings, l1_entries=10)
    async with assembled(settings, tiered.client, tiered.embedder) as other:
        await until("both have a lease", lambda: asyncio.sleep(0, other.coherence.is_live()))
        if change == "revoked":
            await other.keyring.revoke(key.id)
        else:
            await other.keyring.create(name="first", scopes=["admin"])
    take_redis_away(tiered, monkeypatch)
    assert (await raw(app, "GET", "/metrics", headers=shown)).status in (401, 503)


async def test_a_client_that_leaves_is_no_failure_of_ours(tiered: Service, app: ASGIApp) -> None:
    async def gone() -> Message:
        return {"type": "http.disconnect"}

    await raw(app, "POST", of_user("ada", "context"), body=b"x", receive=gone)
    found = counted(await scraped(app), "redismem_requests_total")
    assert found["context", "client"] == 1
    assert {outcome for _, outcome in found} <= {"client", "ok"}


async def test_stages_of_a_context_are_counted(tiered: Service, app: ASGIApp) -> None:
    assert (await ask(app, "put")).status == 201
    for accept in ("application/json", "text/event-stream"):
        method, path, headers, body = request_of(BY_NAME["context"], user="ada")
        assert (await raw(app, method, path, headers={**headers, "Accept": accept}, body=body)).status == 200
    found = await scraped(app)
    assert sum(counted(found, "redismem_context_seconds_count").values()) == 2
    assert counted(found, "redismem_context_stage_seconds_count") == {(str(i),): 2 for i in (1, 2, 3, 4)}
    first, last = (found["redismem_context_stage_seconds_sum", stage] for stage in "14")
    assert 0 < first <= last


async def test_streams_of_contexts_are_an_operation_of_their_own(tiered: Service, app: ASGIApp) -> None:
    """They are as long as their readers are slow, and must not make other contexts look slow."""
    method, path, headers, body = request_of(BY_NAME["context"], user="ada")
    for accept in ("application/json", "text/event-stream"):
        assert (await raw(app, method, path, headers={**headers, "Accept": accept}, body=body)).status == 200
    found = counted(await scraped(app), "redismem_context_seconds_count")
    assert found == {("context",): 1, ("context_stream",): 1}


async def test_no_user_and_no_text_is_a_label(tiered: Service, app: ASGIApp) -> None:
    users = [f"canary{i}" + tail for i, tail in enumerate(["", "/x", "é", " ", "%", '"\n', "{}", "\\"] * 7)][
        :50
    ]
    for user in users:
        for name in ("put", "search", "list", "get", "profile"):
            await ask(app, name, user=user, word="canary text")
        await raw(app, "GET", of_user(user, "nowhere", "canary"))
        await raw(app, "POST", "/canary/" + user.replace("/", "").encode().hex())
    text = (await raw(app, "GET", "/metrics")).body.decode()
    assert "canary" not in text
    labels = {label for key in samples(text) for label in key[1:]}
    known = {operation.name for operation in OPERATIONS} | {"other", "page", "metrics"}
    found = {key[1] for key in samples(text) if key[0] == "redismem_requests_total"}
    assert found <= known
    assert len(labels) < 200
    assert len(text.splitlines()) < 1000


async def test_what_l1_holds_is_told_by_kind(tiered: Service, app: ASGIApp) -> None:
    assert (await ask(app, "put")).status == 201
    await tiered.coherence.barrier({})
    await search(app, text="bees")
    found, held = await scraped(app), tiered.l1.stats()
    kinds = {"search": "l1_search", "memory": "l1_memory", "profile": "l1_profile", "embedding": "l1_vector"}
    for kind, label in kinds.items():
        assert found["redismem_cache_entries", label] == held[kind]["entries"]
        assert found["cache_size_bytes", label] == held[kind]["bytes"]
    assert held["search"]["entries"] == 1
    assert (await raw(app, "DELETE", of_user("ada"))).status == 200
    assert counted(await scraped(app), "redismem_cache_invalidations_total")["l1_search",] >= 1


async def test_dashboard_slo_and_metrics_agree(tiered: Service, app: ASGIApp) -> None:
    assert (await ask(app, "put")).status == 201
    await tiered.coherence.barrier({})
    for text in ("bees", "bees", "tea", "bees"):
        await search(app, text=text)
    for name in ("context", "list", "get"):
        await ask(app, name)
    await raw(app, "POST", of_user("ada", "search"), body=b"{")
    await tiered.telemetry.save()
    await tiered.telemetry.look()
    found = await scraped(app)
    told, slo = [(await raw(app, "GET", f"/v1/{name}")).json for name in ("dashboard", "slo")]
    assert told["slo"] == slo["objectives"]
    reads = sum(counted(found, "memory_retrieval_seconds_count").values())
    by_tier: Counter[str] = Counter()
    for (tier, _), count in counted(found, "memory_retrieval_seconds_count").items():
        by_tier[tier] += int(count)
    hits, cacheable = by_tier["l1"] + by_tier["l2"], by_tier["l1"] + by_tier["l2"] + by_tier["l3"]
    objectives = {one["name"]: one for one in slo["objectives"]}
    assert told["latency"]["hour"]["count"] == told["latency"]["now"]["count"] == reads
    assert told["latency"]["hour"]["hit_rate"] == hits / cacheable
    assert told["cache"]["hit_rate"] == objectives["cache_hit_rate"]["value"] == hits / cacheable
    assert told["cache"]["miss_rate"] == pytest.approx(1 - hits / cacheable)
    assert sum(minute["count"] for minute in told["latency"]["series"]) == reads
    assert len(told["latency"]["series"]) == 60
    requests = counted(found, "redismem_requests_total")
    for row in told["operations"]:
        ends = [count for (name, _), count in requests.items() if name == row["operation"]]
        assert row["count"] == sum(ends), row
    assert {row["operation"] for row in told["operations"]} == {"search", "get", "list", "put", "context"}
    assert objectives["retrieval_p95"]["samples"] == reads
    assert objectives["context_p95"]["samples"] == 1
    assert objectives["update_success"]["samples"] == 1
    tiers = {(tier["tier"], tier["kind"]): tier for tier in told["cache"]["tiers"]}
    assert tiers["l1", "search"]["hits"] == found["cache_hits_total", "l1_search"]
    assert tiers["l2", "search"]["misses"] == found["cache_misses_total", "l2_search"]
    assert told["redis"]["memory_bytes"] == found["redismem_redis_memory_bytes",] > 0
    assert told["redis"]["index_bytes"] == found["index_memory_bytes",]
    assert told["load"] == {"in_flight": 0, "limit": tiered.admission.limit, "refused_hour": 0}
    assert found["redismem_redis_up",] == 1


async def test_the_documents_are_as_they_are_documented(tiered: Service, app: ASGIApp) -> None:
    """Before anything was asked, when nothing is known."""
    told, slo = [(await raw(app, "GET", f"/v1/{name}")).json for name in ("dashboard", "slo")]
    assert {"at", "version", "uptime_s", "processes", "process", "latency", "operations", "cache"} <= set(
        told
    )
    assert {"worker", "redis", "coherence", "load", "slo"} <= set(told)
    assert told["latency"]["hour"]["p95_ms"] is None
    assert [one["met"] for one in slo["objectives"][:-1]] == [None] * 9
    names = [one["name"] for one in slo["objectives"]]
    assert names[0] == "retrieval_p95"
    assert len(set(names)) == 10


def every_reply() -> list[tuple[str, str, bytes]]:
    own = [request_of(operation, user="ada") for operation in OPERATIONS]
    asked = [(method, path, body) for method, path, _, body in own]
    asked += [("GET", path, b"") for path in ("/docs", "/openapi.json", "/dashboard", "/metrics", "/nowhere")]
    asked += [
        ("POST", "/v1/users/ada/search", b"{"),
        ("PUT", "/v1/stats", b""),
        ("GET", "/v1/users/%00", b""),
    ]
    return asked


async def test_every_reply_has_its_request_id_and_may_not_be_sniffed(tiered: Service, app: ASGIApp) -> None:
    await tiered.keyring.create(name="any", scopes=["read"])
    for closed in (True, False):
        for number, (method, path, body) in enumerate(every_reply()):
            headers = {"X-Request-ID": f"r{number}"}
            reply = await raw(app, method, path, headers=headers, body=body)
            assert reply.headers["x-request-id"] == f"r{number}", (method, path)
            assert reply.headers["x-content-type-options"] == "nosniff", (method, path)
        if closed:
            await tiered.client.execute("DEL", API_KEYS)
            await tiered.coherence.barrier({"": [API_KEYS_ID]})
    for unfit in ("a b", "x" * 129, "é", ""):
        reply = await raw(app, "GET", "/nowhere", headers={"X-Request-ID": unfit})
        assert reply.headers["x-request-id"] not in ("", unfit)


def preflight(origin: str, method: str = "POST") -> dict[str, str]:
    return {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "authorization,content-type",
    }


def allowed(reply: Reply) -> str | None:
    return reply.headers.get("access-control-allow-origin")


async def test_no_page_of_another_origin_may_call_unless_it_is_listed(tiered: Service, app: ASGIApp) -> None:
    path, body = of_user("ada", "search"), b'{"text": "bees"}'
    reply = await raw(app, "POST", path, headers={"Origin": MINE}, body=body)
    assert (reply.status, allowed(reply)) == (200, None)
    refused = await raw(app, "OPTIONS", path, headers=preflight(MINE))
    assert (refused.status, allowed(refused)) == (405, None)
    assert not any(name.startswith("access-control") for name in {**reply.headers, **refused.headers})


def listing(service: Service, origins: str) -> ASGIApp:
    return create_app(replace(service, settings=replace(service.settings, cors_origins=origins)))


async def test_pages_of_listed_origins_may_call_and_read_refusals(tiered: Service) -> None:
    app, path = listing(tiered, f"{MINE}, http://localhost:3000"), of_user("ada", "search")
    _, token = await tiered.keyring.create(name="web", scopes=["read"])
    for origin in (MINE, "http://localhost:3000"):
        for method in ("GET", "POST", "PATCH", "DELETE"):
            asked = await raw(app, "OPTIONS", path, headers=preflight(origin, method))  # without a key
            assert (asked.status, allowed(asked)) == (200, origin)
            assert "authorization" in asked.headers["access-control-allow-headers"].lower()
        for key, status in ((token, 200), ("wrong", 401)):
            headers = {"Origin": origin, "X-API-Key": key}
            reply = await raw(app, "POST", path, headers=headers, body=b'{"text": "bees"}')
            assert (reply.status, allowed(reply)) == (status, origin)
            assert "Origin" in reply.headers["vary"]
            exposed = reply.headers["access-control-expose-headers"]
            assert {"X-Request-ID", "Retry-After"} <= set(exposed.split(", "))
            assert "access-control-allow-credentials" not in reply.headers
    for origin in (OTHER, f"{MINE}.evil.example", MINE.replace("https", "http"), f"{MINE}:8443", "null", "*"):
        assert (await raw(app, "OPTIONS", path, headers=preflight(origin))).status == 400
        reply = await raw(app, "POST", path, headers={"Origin": origin}, body=b"{}")
        assert allowed(reply) is None


async def test_health_tells_no_secret_and_answers_without_a_key(
    tiered: Service, app: ASGIApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    await tiered.keyring.create(name="any", scopes=["admin"])
    for path in ("/health/live", "/health/ready", "/health/live?cache=7"):
        reply = await raw(app, "GET", path)
        assert reply.status in (200, 503)
        told: dict[str, Any] = reply.json
        assert set(told) <= {"status", "reason", "warm"}
