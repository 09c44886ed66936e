"""lua/cache.lua against a model of its contract, on Redis and on fakeredis (which knows all its commands)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import fakeredis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from redismem.client import Argument
from redismem.keys import Owner
from redismem.lualib import shipped_libraries
from redismem.service import Service

IDS = [f"m{number}" for number in range(12)] + ["m", "m1\x1f2", "m 1", "{m}", "é"]

Call = Callable[..., Awaitable[Any]]


@dataclass
class Model:
    """The hot set, in Python."""

    there: set[str] = field(default_factory=set)
    last_ms: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def touch(self, touches: list[tuple[str, int]], now_ms: int, ttl_ms: int, capacity: int) -> list[Any]:
        touched = {memory_id for memory_id, _ in touches} & self.there
        for memory_id, count in touches:
            if memory_id in touched:
                self.last_ms[memory_id] = now_ms
                self.counts[memory_id] = self.counts.get(memory_id, 0) + count
        evicted = [one for one, last_ms in self.last_ms.items() if now_ms - last_ms > ttl_ms]
        self.remove(evicted)

        def worth(memory_id: str) -> tuple[float, bytes]:
            age_s = max(1.0, (now_ms - self.last_ms[memory_id]) / 1000)
            return self.counts[memory_id] / age_s, memory_id.encode()

        surplus = sorted(self.last_ms, key=worth)[: max(0, len(self.last_ms) - capacity)]
        self.remove(surplus)
        return [b"OK", len(touched), len(evicted) + len(surplus)]

    def remove(self, ids: list[str]) -> None:
        for memory_id in ids:
            self.last_ms.pop(memory_id, None)
            self.counts.pop(memory_id, None)


touches = st.lists(st.tuples(st.sampled_from(IDS), st.integers(1, 9)), max_size=10)
steps = st.lists(
    st.one_of(
        st.tuples(
            st.just("touch"), touches, st.sampled_from([0, 1, 999, 1000, 5000, 60_000]), st.integers(1, 8)
        ),
        st.tuples(st.just("delete"), st.sampled_from(IDS), st.just(0), st.just(0)),
        st.tuples(st.just("create"), st.sampled_from(IDS), st.just(0), st.just(0)),
    ),
    min_size=1,
    max_size=25,
)


async def play(execute: Call, owner: Owner, script: list[tuple[str, Any, int, int]], ttl_ms: int) -> None:
    """Run a script; the hot set must be the model's after every step."""
    model, now_ms = Model(), 1_800_000_000_000
    for memory_id in IDS[::2]:
        await execute("HSET", owner.memory(memory_id), "text", "x")
        model.there.add(memory_id)
    for action, what, wait_ms, capacity in script:
        now_ms += wait_ms
        if action == "touch":
            flat = [item for pair in what for item in pair]
            args = (owner.memory_prefix, now_ms, ttl_ms, capacity, *flat)
            reply = await execute("FCALL", "rm_touch_v1", 2, owner.hot, owner.hits, *args)
            assert reply == model.touch(what, now_ms, ttl_ms, capacity)
        elif action == "create":
            await execute("HSET", owner.memory(what), "text", "x")
            model.there.add(what)
        else:
            await execute("DEL", owner.memory(what))
            await execute("ZREM", owner.hot, what)
            await execute("HDEL", owner.hits, what)
            model.there.discard(what)
            model.remove([what])
        await compare(execute, owner, model)


async def compare(execute: Call, owner: Owner, model: Model) -> None:
    hits = await execute("HGETALL", owner.hits)
    pairs = dict(zip(hits[::2], hits[1::2], strict=True)) if isinstance(hits, list) else hits
    assert {key.decode(): int(value) for key, value in pairs.items()} == model.counts
    stored = {one: await execute("ZSCORE", owner.hot, one) for one in IDS}
    assert {one: int(float(raw)) for one, raw in stored.items() if raw is not None} == model.last_ms
    assert await execute("ZCARD", owner.hot) == len(model.last_ms)
    for key in (owner.hot, owner.hits):
        assert await execute("PTTL", key) > 0 or not model.last_ms


@given(script=steps, ttl_ms=st.sampled_from([1000, 7000, 10**9]))
@settings(max_examples=60, deadline=None)
async def test_a_server_of_another_make_does_what_the_model_says(
    script: list[tuple[str, Any, int, int]], ttl_ms: int
) -> None:
    server = fakeredis.FakeRedis(server_type="redis", version=(7, 4))
    library = next(one for one in shipped_libraries() if one.name == "redismem_cache")
    server.execute_command("FUNCTION", "LOAD", library.code)

    async def execute(*command: Argument) -> Any:
        return server.execute_command(*command)

    await play(execute, Owner("a{b}"), script, ttl_ms)


@given(script=steps, ttl_ms=st.sampled_from([1000, 7000, 10**9]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_redis_does_what_the_model_says(
    service: Service, script: list[tuple[str, Any, int, int]], ttl_ms: int
) -> None:
    owner = service.owner("a{b}")
    try:
        await play(service.client.execute, owner, script, ttl_ms)
    finally:
        await service.client.execute("DEL", owner.hot, owner.hits, *(owner.memory(one) for one in IDS))
