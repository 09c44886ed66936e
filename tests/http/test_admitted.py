"""Too much, too often, too long: what is refused, how, and that nothing of it is held for ever."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import pytest
import uvicorn
from starlette.types import ASGIApp, Message

from redismem.errors import RedisMemError
from redismem.http.app import create_app
from redismem.service import Service, assembled
from tests.conftest import until
from tests.http.conftest import Gate
from tests.http.operating import BY_NAME, IN_ORDER, raw, request_of, samples, scope_of

SEARCH, PUT, CONTEXT = (f"/v1/users/ada/{name}" for name in ("search", "memories", "context"))


@dataclass
class Opened:
    """A service with caches, and limits of its own."""

    service: Service
    app: ASGIApp

    @property
    def in_flight(self) -> int:
        return self.service.admission.in_flight

    async def search(self, text: str, **more: Any) -> Any:
        return await raw(self.app, "POST", SEARCH, body=json.dumps({"text": text}).encode(), **more)

    async def works_on(self, count: int) -> None:
        await until(f"{count} are worked on", lambda: asyncio.sleep(0, self.in_flight == count))

    def told(self, *name: str) -> float:
        return samples(self.service.metrics.exposition().decode()).get(name, 0)


Open = Callable[..., Awaitable[Opened]]


@pytest.fixture
async def opened(service: Service, gate: Gate) -> AsyncIterator[Open]:
    """Open the service with its caches on and an embedder that a test can hold."""
    async with AsyncExitStack() as stack:

        async def one(**limits: Any) -> Opened:
            told = replace(service.settings, l1_entries=1000, l2_searches=10, **limits)
            made = await stack.enter_async_context(assembled(told, service.client, gate))
            await until("the lease is held", lambda: asyncio.sleep(0, made.coherence.is_live()))
            return Opened(made, create_app(made))

        yield one
        gate.away = False
        gate.open.set()


async def remembered(opened: Opened) -> None:
    """Store a memory, and let L1 have it and a search that finds it."""
    body = b'{"text": "likes tea", "id": "m1"}'
    assert (await raw(opened.app, "POST", PUT, body=body)).status == 201
    await opened.service.coherence.barrier({})
    for _ in range(2):
        assert (await opened.search("tea")).status == 200
        assert (await raw(opened.app, "GET", PUT + "/m1")).status == 200


async def test_what_is_beyond_the_limit_is_refused_at_once_and_l1_still_answers(
    opened: Open, gate: Gate
) -> None:
    store = await opened(max_in_flight=2)
    await remembered(store)
    gate.open.clear()
    slow = [asyncio.create_task(store.search(text)) for text in ("one", "two")]
    await store.works_on(2)
    for name in IN_ORDER:
        operation = BY_NAME[name]
        method, path, headers, body = request_of(operation, user="ada", word="never asked")
        began_s = time.monotonic()
        reply = await raw(store.app, method, path, headers=headers, body=body)
        assert time.monotonic() - began_s < 1, name
        if name in ("get", "live", "ready", "stats", "slo", "dashboard", "users"):
            assert reply.status in (200, 503), name
            assert b"overloaded" not in reply.body, name
            continue
        assert reply.error(503)["code"] == "overloaded", name
        assert int(reply.headers["retry-after"]) >= 1
    hit = await store.search("tea")
    assert (hit.status, hit.json["served_by"]) == (200, "l1")
    for path in ("/metrics", "/docs", "/dashboard", "/nowhere"):
        assert b"overloaded" not in (await raw(store.app, "GET", path)).body
    assert store.in_flight == 2
    gate.open.set()
    assert [reply.status for reply in await asyncio.gather(*slow)] == [200, 200]
    assert store.in_flight == 0
    assert (await store.search("three")).status == 200


async def test_a_refusal_by_overload_is_counted_as_refused_and_no_failure(opened: Open, gate: Gate) -> None:
    store = await opened(max_in_flight=1)
    gate.open.clear()
    slow = asyncio.create_task(store.search("one"))
    await store.works_on(1)
    for _ in range(3):
        assert (await store.search("two")).status == 503
        assert (await raw(store.app, "GET", "/v1/users/ada/memories")).status == 503
    gate.open.set()
    await slow
    assert store.told("redismem_refused_total", "overload") == 6
    assert store.told("redismem_requests_total", "search", "refused") == 3
    assert store.told("redismem_requests_total", "list", "refused") == 3
    assert store.told("redismem_requests_total", "search", "ok") == 1
    assert store.told("redismem_requests_total", "search", "failed") == 0


# what may become of a request; each returns when the application is done with it


async def _answered(store: Opened, rng: random.Random) -> None:
    name = rng.choice([name for name in IN_ORDER if name not in ("forget", "delete")])
    method, path, headers, body = request_of(BY_NAME[name], user=f"u{rng.randrange(3)}")
    await raw(store.app, method, path, headers=headers, body=body)


async def _wrong(store: Opened, rng: random.Random) -> None:
    path = rng.choice([SEARCH, PUT, CONTEXT, "/v1/users/ada/search/batch", "/v1/users/%FF/search"])
    body = rng.choice([b"{", b"[]", b'{"text": ""}', b"[" * 9000, b"x" * 2_000_000])
    assert (await raw(store.app, "POST", path, body=body)).status >= 400


async def _broken(store: Opened, rng: random.Random) -> None:
    text = rng.choice(["broken", "unavailable"])
    with suppress(ValueError):
        await store.search(text, receive=rng.choice([None, _in_pieces(json.dumps({"text": text}).encode())]))


async def _leaves_in_its_body(store: Opened, rng: random.Random) -> None:
    messages = [{"type": "http.request", "body": b'{"te', "more_body": True}][: rng.randrange(2)]

    async def receive() -> Message:
        return messages.pop() if messages else {"type": "http.disconnect"}

    await raw(store.app, "POST", rng.choice([SEARCH, PUT, CONTEXT]), body=b"x", receive=receive)


async def _leaves_its_context(store: Opened, rng: random.Random) -> None:
    messages = [{"type": "http.request", "body": b'{"text": "tea", "stages": 4}', "more_body": False}]

    async def receive() -> Message:
        if not messages:
            await asyncio.sleep(rng.random() / 100)
        return messages.pop() if messages else {"type": "http.disconnect"}

    accept = {"Accept": rng.choice(["application/json", "text/event-stream"])}
    await raw(store.app, "POST", CONTEXT, headers=accept, body=b"x", receive=receive)


async def _cancelled(store: Opened, rng: random.Random) -> None:
    name = rng.choice(["search", "context", "put", "list", "export", "session_open"])
    method, path, headers, body = request_of(BY_NAME[name], user="ada", word=f"w{rng.random()}")
    task = asyncio.create_task(raw(store.app, method, path, headers=headers, body=body))
    await asyncio.sleep(rng.random() / 100)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _nobody_reads(store: Opened, rng: random.Random) -> None:
    """Its client is gone when the reply is sent, and the server says so by an error."""
    left = rng.randrange(2)

    async def send(_: Message) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError("gone")

    name = rng.choice(["search", "list", "put", "export", "context"])
    method, path, headers, body = request_of(BY_NAME[name], user="ada")
    with suppress(OSError):
        await store.app(scope_of(method, path, headers), _in_pieces(body), send)


def _in_pieces(body: bytes) -> Callable[[], Awaitable[Message]]:
    pieces: list[Message] = [
        {"type": "http.request", "body": body[5:], "more_body": False},
        {"type": "http.request", "body": body[:5], "more_body": True},
    ]

    async def receive() -> Message:
        if not pieces:
            await asyncio.Event().wait()
        return pieces.pop()

    return receive


ENDS = (
    _answered,
    _wrong,
    _broken,
    _leaves_in_its_body,
    _leaves_its_context,
    _cancelled,
    _nobody_reads,
)


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_becomes_of_requests_their_places_are_given_back(
    opened: Open, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng, store = random.Random(seed), await opened(max_in_flight=4)
    await remembered(store)
    search, entered, most = store.service.tiers.search, store.service.admission.enter, 0

    async def failing(owner: Any, request: Any, **more: Any) -> Any:
        if request.text == "broken":
            raise ValueError("a defect")
        if request.text == "unavailable":
            raise RedisMemError("an error")
        return await search(owner, request, **more)

    def watched() -> bool:
        nonlocal most
        is_in = entered()
        most = max(most, store.in_flight)
        return is_in

    monkeypatch.setattr(store.service.tiers, "search", failing)
    monkeypatch.setattr(store.service.admission, "enter", watched)
    for _ in range(15):
        ends = rng.choices(ENDS, k=rng.randrange(1, 8))
        await asyncio.wait_for(asyncio.gather(*(end(store, rng) for end in ends)), 30)
        assert store.in_flight == 0, [end.__name__ for end in ends]
    assert 0 < most <= 4
    assert store.service.admission.limit == 4


async def test_a_stream_gives_its_place_back_when_it_begins(opened: Open, gate: Gate) -> None:
    """It is as long as its reader is slow."""
    store = await opened(max_in_flight=1)
    began, go_on = asyncio.Event(), asyncio.Event()
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)
        if message["type"] == "http.response.body":
            began.set()
            await go_on.wait()

    scope = scope_of("POST", CONTEXT, {"Content-Type": "application/json", "Accept": "text/event-stream"})
    stream = asyncio.ensure_future(store.app(scope, _in_pieces(b'{"text": "tea", "stages": 3}'), send))
    await asyncio.wait_for(began.wait(), 10)
    assert store.in_flight == 0
    assert (await store.search("another")).status == 200
    go_on.set()
    await stream
    assert (sent[0]["status"], store.in_flight) == (200, 0)


async def test_slow_reads_lower_the_limit_and_slow_writes_do_not(opened: Open, gate: Gate) -> None:
    store = await opened(max_in_flight=64, overload_ms=20)
    for i in range(40):
        body = json.dumps({"text": f"memory {i}"}).encode()
        gate.open.clear()
        task = asyncio.create_task(raw(store.app, "POST", PUT, body=body))
        await until("it is embedded", lambda: asyncio.sleep(0, gate.waiting))
        await asyncio.sleep(0.03)  # longer than is fast
        gate.open.set()
        assert (await task).status == 201
    assert store.service.admission.limit == 64
    for start in range(0, 60, 20):
        gate.open.clear()
        tasks = [asyncio.create_task(store.search(f"text {i}")) for i in range(start, start + 20)]
        await store.works_on(min(20, store.service.admission.limit))
        await asyncio.sleep(0.03)
        gate.open.set()
        assert {reply.status for reply in await asyncio.gather(*tasks)} <= {200, 503}
    assert store.service.admission.limit < 20


async def test_a_key_that_asks_too_often_is_told_when_to_come_back_and_others_are_not(opened: Open) -> None:
    store = await opened()
    await remembered(store)
    ring = store.service.keyring
    _, often = await ring.create(name="often", scopes=["read"], rate_per_s=0.5, burst=3)
    _, other = await ring.create(name="other", scopes=["read"], rate_per_s=0.5, burst=3)
    _, free = await ring.create(name="free", scopes=["admin"])
    bodies = [b'{"text": "tea"}'] * 3
    paths = [SEARCH, "/v1/users/ben/search", SEARCH]
    for path, body in zip(paths, bodies, strict=True):
        assert (await raw(store.app, "POST", path, headers={"X-API-Key": often}, body=body)).status == 200
    for path in ("/v1/users/carl/search", SEARCH, "/nowhere"):
        reply = await raw(store.app, "POST", path, headers={"X-API-Key": often}, body=bodies[0])
        assert reply.error(429)["code"] == "rate_limited"
        assert 1 <= int(reply.headers["retry-after"]) <= 2
    assert (await raw(store.app, "GET", "/health/live", headers={"X-API-Key": often})).status == 200
    for headers in [{"X-API-Key": other}] * 3 + [{"X-API-Key": free}] * 20:
        assert (await raw(store.app, "POST", SEARCH, headers=headers, body=bodies[0])).status == 200
    assert store.told("redismem_refused_total", "rate") == 3
    # it is not the service that fails them
    assert store.told("redismem_requests_total", "search", "client") == 2
    assert store.told("redismem_requests_total", "search", "refused") == 0


async def test_a_request_that_was_refused_costs_its_key_nothing(opened: Open) -> None:
    store = await opened()
    _, token = await store.service.keyring.create(name="few", scopes=["read"], rate_per_s=0.01, burst=2)
    for _ in range(5):
        assert (await raw(store.app, "POST", PUT, headers={"X-API-Key": token}, body=b"{}")).status == 403
    for status in (200, 200, 429):
        assert (await raw(store.app, "GET", PUT, headers={"X-API-Key": token})).status == status


@asynccontextmanager
async def listening(app: ASGIApp) -> AsyncIterator[tuple[str, int]]:
    """Serve an application by uvicorn, as `serve` does; yield its place."""
    config = uvicorn.Config(app, port=0, lifespan="off", http="httptools", log_config=None)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    await until("it listens", lambda: asyncio.sleep(0, server.started))
    yield server.servers[0].sockets[0].getsockname()[:2]
    server.should_exit = True
    await serving


async def test_a_body_that_comes_byte_by_byte_is_answered_504_in_time(opened: Open) -> None:
    store = await opened(request_timeout_s=0.5)
    body = json.dumps({"text": "tea " * 1000}).encode()
    head = (
        f"POST {SEARCH} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    async with listening(store.app) as place:
        reader, writer = await asyncio.open_connection(*place)

        async def drip() -> None:
            writer.write(head.encode())
            for byte in body:
                writer.write(bytes([byte]))
                await asyncio.sleep(0.02)

        dripping, began_s = asyncio.create_task(drip()), time.monotonic()
        status, *_ = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)).decode().split("\r\n")
        took_s = time.monotonic() - began_s
        dripping.cancel()
        writer.transport.abort()
    assert status.split()[1] == "504"
    assert 0.5 <= took_s < 3
    assert store.in_flight == 0


@pytest.mark.parametrize("name", ["search", "put", "context", "list", "message"])
async def test_a_request_that_hangs_is_answered_504(
    opened: Open, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Redis holds its answers back for longer than a request may take."""
    store = await opened(request_timeout_s=0.3, redis_timeout_s=5)
    method, path, headers, body = request_of(BY_NAME["session_open"], user="ada")
    assert (await raw(store.app, method, path, headers=headers, body=body)).status == 201
    await store.service.client.execute("CLIENT", "PAUSE", 1500, "ALL")
    method, path, headers, body = request_of(BY_NAME[name], user="ada")
    began_s = time.monotonic()
    reply = await raw(store.app, method, path, headers={**headers, "X-Request-ID": "r1"}, body=body)
    took_s = time.monotonic() - began_s
    error = reply.error(504)
    assert (error["code"], error["request_id"]) == ("deadline_exceeded", "r1")
    assert 0.3 <= took_s < 1.5
    assert store.in_flight == 0
    assert store.told("redismem_requests_total", name, "failed") == 1
    assert await store.service.client.execute("PING") == b"PONG"
    assert (await store.search("tea")).status == 200


async def test_what_began_in_time_is_not_cut(opened: Open) -> None:
    """A stream is as long as its reader is slow, an import as long as what it is given."""
    store = await opened(request_timeout_s=0.1)
    done = asyncio.Event()
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)
        if message["type"] == "http.response.body" and not done.is_set():
            await asyncio.sleep(1.2)  # past the limit and the next look at it
            done.set()

    scope = scope_of("POST", CONTEXT, {"Content-Type": "application/json", "Accept": "text/event-stream"})
    await store.app(scope, _in_pieces(b'{"text": "tea", "stages": 3}'), send)
    assert sent[0]["status"] == 200
    assert b"event: done" in b"".join(message.get("body", b"") for message in sent)

    lines = [b'{"text": "one"}\n', b'{"text": "two"}\n', b'{"text": "three"}\n']

    async def receive() -> Message:
        await asyncio.sleep(0.4)
        return {"type": "http.request", "body": lines.pop(), "more_body": bool(lines)}

    reply = await raw(
        store.app,
        "POST",
        "/v1/users/ada/import",
        headers={"Content-Type": "application/x-ndjson"},
        receive=receive,
    )
    assert (reply.status, reply.json["created"]) == (200, 3)
