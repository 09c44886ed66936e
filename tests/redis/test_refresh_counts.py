"""What wears an index is counted, by whatever path it comes, and only a worn index is made anew."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from hashlib import sha1

import pytest

from redismem.errors import NotFound
from redismem.keys import WEIGHTS, Owner
from redismem.material import digest
from redismem.service import Service
from redismem.types import CorrectionRequest, MemoryInput, MemoryPatch
from redismem.worker.rounds import decay
from tests.redis.test_refresh import COUNT, NOW_MS, counted, filled, reweighed, text_of, tools_of

Act = Callable[[Service, Owner], Awaitable[object]]

TURNS = [MemoryInput(id=name, text=name, session_id="s") for name in ("one", "two", "three")]


async def nothing(service: Service, owner: Owner) -> None:
    """Only write what is there already, and read."""
    await filled(service, owner)
    assert (await service.browser.get(owner, "m1")).text == text_of(1)


async def new_ones(service: Service, owner: Owner) -> None:
    await service.writer.put(owner, [*TURNS, MemoryInput(text="an id of its own")])


async def updated(service: Service, owner: Owner) -> None:
    """A new text, then its vector; a new weight."""
    await service.writer.update(owner, "m1", MemoryPatch(text="changed"))
    await service.writer.update(owner, "m2", MemoryPatch(importance=0.123))


async def put_over(service: Service, owner: Owner) -> None:
    await service.writer.put(owner, [MemoryInput(id="m1", text="changed"), MemoryInput(id="x", text="new")])


async def corrected(service: Service, owner: Owner) -> None:
    """Two are superseded, and the new one gets its vector."""
    request = CorrectionRequest(ids=["m1", "m2"], memory=MemoryInput(id="new", text="right"))
    await service.writer.correct(owner, request)


async def embedded(service: Service, owner: Owner) -> None:
    assert await service.backfill.embed_now(owner, ["m1", "m2", "m3", "gone"]) == []


async def turn_put_over(service: Service, owner: Owner) -> None:
    """The turn after it loses its vector."""
    await service.writer.put(owner, TURNS)
    await service.writer.put(owner, [MemoryInput(id="one", text="changed", session_id="s")])


async def deleted(service: Service, owner: Owner) -> None:
    """What is gone wears as much; what was not there does not."""
    for name in ("m1", "m2"):
        await service.writer.delete(owner, name)
    with pytest.raises(NotFound):
        await service.writer.delete(owner, "m1")


async def turn_deleted(service: Service, owner: Owner) -> None:
    """The turn after it loses its vector."""
    await service.writer.put(owner, TURNS)
    await service.writer.delete(owner, "one")


async def assigned(service: Service, owner: Owner) -> None:
    told = [one for i in range(3) for one in (f"m{i}", digest(text_of(i).encode()), "4")]
    told += ["m5", "of an older text", "4", "gone", "x", "4"]
    keys = [owner.meta, *owner.derived]
    for changed in (3, 0):
        reply = await service.functions.call("rm_assign_v1", keys, owner.memory_prefix, NOW_MS, *told)
        assert reply == changed


async def linked(service: Service, owner: Owner) -> None:
    vector = await service.client.execute("HGET", owner.memory("m1"), "embedding")
    item = "m1", digest(text_of(1).encode()), sha1(vector).hexdigest()[:16], "uncategorized|near-1", 0
    keys = [owner.meta, *owner.derived]
    for _ in range(2):  # who has a topic keeps it
        reply = await service.functions.call("rm_link_v1", keys, owner.memory_prefix, NOW_MS, *item)
        assert reply == [b"OK"]


async def decayed(service: Service, owner: Owner) -> None:
    await service.client.execute("HSET", WEIGHTS, "*", "[0.5]")
    await service.writer.update(owner, "m1", MemoryPatch(pinned=True))
    for _ in range(2):  # the second finds nothing to change
        await decay(tools_of(service), owner)


@pytest.mark.parametrize(
    ("act", "count"),
    [
        (nothing, 0),
        (new_ones, 0),
        (updated, 3),
        (put_over, 1),
        (corrected, 3),
        (embedded, 3),
        (turn_put_over, 2),
        (deleted, 2),
        (turn_deleted, 2),
        (assigned, 3),
        (linked, 1),
        (decayed, COUNT),
    ],
)
async def test_every_memory_that_is_indexed_anew_is_counted(
    service: Service, owner: Owner, no_backfill: list[str], act: Act, count: int
) -> None:
    await filled(service, owner)
    assert await counted(service, owner) == 0
    await act(service, owner)
    assert await counted(service, owner) == count


async def test_counting_makes_no_key_of_a_forgotten_user(service: Service, owner: Owner) -> None:
    """Jobs that read before the user was forgotten write afterwards; another hand left a memory."""
    await filled(service, owner)
    vector = await service.client.execute("HGET", owner.memory("m1"), "embedding")
    await service.writer.forget(owner)
    fields = "text", text_of(1), "embedding", vector, "importance", "0.9"
    await service.client.execute("HSET", owner.memory("m1"), *fields)
    await service.client.execute("HSET", WEIGHTS, "*", "[0.5]")
    one, hashed = digest(text_of(1).encode()), sha1(vector).hexdigest()[:16]
    derived, head = [owner.meta, *owner.derived], (owner.memory_prefix, NOW_MS)
    call = service.functions.call
    assert await call("rm_assign_v1", derived, *head, "m1", one, "4") == 1
    await service.client.execute("HDEL", owner.memory("m1"), "cluster")
    assert await call("rm_link_v1", derived, *head, "m1", one, hashed, "uncategorized|near-1", 0) == [b"OK"]
    assert await service.client.execute("HGET", owner.memory("m1"), "cluster") == b"uncategorized|near-1"
    await call("rm_decay_v1", [*derived, WEIGHTS], *head, 0.01, "m1")
    embedder, dim = service.embedder.name, service.embedder.dim
    keys = [owner.meta, owner.ids, owner.turns, *owner.graphs, *owner.derived]
    content = await service.client.execute("HGET", owner.memory("m1"), "content_hash") or b""
    await call("rm_embed_v1", keys, *head, embedder, dim, "m1", content, "", "", vector)
    assert await service.client.execute("EXISTS", owner.meta) == 0


@pytest.mark.parametrize(("times", "is_made"), [(12, False), (13, True)])
async def test_an_index_is_made_anew_from_a_tenth_and_eight_on(
    service: Service, owner: Owner, times: int, is_made: bool
) -> None:
    await filled(service, owner)
    for _ in range(times):
        await service.writer.update(owner, "m1", MemoryPatch(importance=0.123))
    assert await counted(service, owner) == times
    assert await service.indexes.refresh(owner) is is_made
    assert await counted(service, owner) == (0 if is_made else times)


async def test_a_user_nobody_knows_has_nothing_to_make_anew(service: Service, owner: Owner) -> None:
    assert not await service.indexes.refresh(owner)
    assert await service.client.execute("KEYS", "*{alice}*") == []


async def test_who_has_no_memory_left_has_an_empty_index(service: Service, owner: Owner) -> None:
    await filled(service, owner)
    await reweighed(service, owner)
    for number in range(COUNT):
        await service.writer.delete(owner, f"m{number}")
    assert await service.indexes.refresh(owner)
    assert await service.client.execute("FT.SEARCH", owner.index, "*", "LIMIT", 0, 0) == [0]
