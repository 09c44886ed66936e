"""Turns of a session: a vector always fits the turn before it; forgetting leaves nothing."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest

from redismem.backfill import Backfill
from redismem.embed import Vectors
from redismem.embed.deterministic import DeterministicEmbedder
from redismem.errors import EmbedderUnavailable
from redismem.keys import Owner
from redismem.service import Service
from redismem.types import CorrectionRequest, ImportRecord, MemoryInput, MemoryPatch, SearchRequest


@pytest.fixture
async def turns(service: Service, owner: Owner) -> list[MemoryInput]:
    memories = [MemoryInput(id=f"t{i}", text=f"turn number {i}", session_id="s") for i in range(4)]
    await service.writer.put(owner, memories)
    return memories


async def chain(service: Service, owner: Owner, session: str) -> list[str]:
    """Ids of a session's turns, walked from its last one; both directions must agree."""
    tail = await service.client.execute("HGET", owner.turns, f"t{session}")
    ids: list[str] = []
    at, after = (tail.decode().split("\x1f")[0] if tail else ""), ""
    while at:
        raw = (await service.client.execute("HGET", owner.turns, f"l{at}")).decode().split("\x1f")
        assert raw[1] == after
        ids.append(at)
        at, after = raw[0], at
    return ids[::-1]


async def has_vector(service: Service, owner: Owner, memory_id: str) -> bool:
    raw = await service.client.execute("HMGET", owner.memory(memory_id), "embedding", "embedder")
    assert (raw[0] is None) == (raw[1] is None)
    return raw[0] is not None


async def test_each_turn_is_embedded_with_the_one_before(
    service: Service, owner: Owner, turns: list[MemoryInput], embedded_as: Any
) -> None:
    assert await chain(service, owner, "s") == ["t0", "t1", "t2", "t3"]
    assert await embedded_as(owner, "t0", None, turns[0].text)
    for i in (1, 2, 3):
        assert await embedded_as(owner, f"t{i}", turns[i - 1].text, turns[i].text)


@pytest.mark.parametrize(
    "how", ["delete", "correct", "text", "session", "no session", "put", "put elsewhere"]
)
async def test_the_next_turn_loses_its_vector_in_the_same_call_and_gets_a_fitting_one(
    service: Service,
    owner: Owner,
    turns: list[MemoryInput],
    embedded_as: Any,
    no_backfill: list[str],
    how: str,
) -> None:
    writer = service.writer
    before: str | None = turns[0].text
    left = ["t0", "t2", "t3"]
    match how:
        case "delete":
            await writer.delete(owner, "t1")
        case "correct":
            await writer.correct(owner, CorrectionRequest(ids=["t1"], memory=MemoryInput(text="new")))
        case "text":
            await writer.update(owner, "t1", MemoryPatch(text="changed"))
            before, left = "changed", ["t0", "t1", "t2", "t3"]
        case "session":
            await writer.update(owner, "t1", MemoryPatch(session_id="other"))
        case "no session":
            await writer.update(owner, "t1", MemoryPatch(session_id=None))
        case "put":
            await writer.put(owner, [MemoryInput(id="t1", text="changed", session_id="s")])
            before, left = "changed", ["t0", "t1", "t2", "t3"]
        case "put elsewhere":
            await writer.put(owner, [MemoryInput(id="t1", text="changed", session_id="other")])
    assert not await has_vector(service, owner, "t2")
    assert await has_vector(service, owner, "t3")
    assert "t2" in no_backfill
    assert await chain(service, owner, "s") == left
    assert await service.backfill.embed_now(owner, no_backfill) == []
    assert await embedded_as(owner, "t2", before, turns[2].text)
    if how == "session":
        assert await embedded_as(owner, "t1", None, turns[1].text)
    if how in ("text", "put"):
        assert await embedded_as(owner, "t1", turns[0].text, "changed")


async def test_the_next_turn_is_embedded_again_without_being_asked(
    service: Service, owner: Owner, turns: list[MemoryInput], embedded_as: Any
) -> None:
    await service.writer.delete(owner, "t0")
    await service.writer.delete(owner, "t1")
    assert await service.backfill.drained(10)
    assert await embedded_as(owner, "t2", None, turns[2].text)
    await service.writer.put(owner, [MemoryInput(id="t4", text="the last", session_id="s")])
    await service.writer.delete(owner, "t3")
    assert await service.backfill.drained(10)
    assert await embedded_as(owner, "t4", turns[2].text, "the last")
    for i in (2, 4):
        await service.writer.delete(owner, f"t{i}")
    assert await chain(service, owner, "s") == []
    assert await service.client.execute("HEXISTS", owner.turns, "ts") == 0


async def test_a_vector_made_from_an_older_turn_is_refused(
    service: Service, owner: Owner, turns: list[MemoryInput], no_backfill: list[str]
) -> None:
    """What a slow process writes after the turn before changed."""
    raw = await service.functions.call("rm_turns_ro_v1", [owner.turns], owner.memory_prefix, "t2", read=True)
    _, content_hash, prev_id, _, prev_hash = raw
    await service.writer.update(owner, "t1", MemoryPatch(text="changed"))
    vector = np.zeros(service.embedder.dim, np.float16).tobytes()
    keys = [owner.meta, owner.ids, owner.turns]
    head = (owner.memory_prefix, 1, service.embedder.name, service.embedder.dim)
    words = await service.functions.call(
        "rm_embed_v1", keys, *head, "t2", content_hash, prev_id, prev_hash, vector, "gone", "", "", "", vector
    )
    assert words == [b"STALE", b"MISSING"]
    assert not await has_vector(service, owner, "t2")
    assert await service.client.execute("EXISTS", owner.memory("gone")) == 0
    refused = await service.functions.call(
        "rm_embed_v1", keys, owner.memory_prefix, 1, "other", service.embedder.dim, "t0", "", "", "", vector
    )
    assert refused == [b"REFUSED"]


async def test_an_import_of_a_superseded_turn_takes_it_out_of_its_session(
    service: Service, owner: Owner, turns: list[MemoryInput]
) -> None:
    await service.writer.put(
        owner, [ImportRecord(id="t1", text="turn number 1", session_id="s", superseded_by="t3")]
    )
    assert await chain(service, owner, "s") == ["t0", "t2", "t3"]


async def test_a_session_changed_by_another_service_breaks_no_later_write(
    service: Service, owner: Owner
) -> None:
    """redis-om saves every field of a record, session_id too."""
    await service.writer.put(owner, [MemoryInput(id="a", text="first", session_id="s")])
    await service.client.execute("HSET", owner.memory("a"), "session_id", "t")
    await service.writer.delete(owner, "a")
    for memory_id in "bcd":
        await service.writer.put(owner, [MemoryInput(id=memory_id, text=f"turn {memory_id}", session_id="s")])
    assert await chain(service, owner, "s") == ["b", "c", "d"]
    await service.writer.delete(owner, "b")
    assert await chain(service, owner, "s") == ["c", "d"]


async def test_a_record_deleted_by_another_service_breaks_no_later_write(
    service: Service, owner: Owner, turns: list[MemoryInput]
) -> None:
    await service.client.execute("DEL", owner.memory("t3"))
    await service.writer.put(owner, [MemoryInput(id="t4", text="after it", session_id="s")])
    await service.writer.delete(owner, "t4")
    await service.writer.put(owner, [MemoryInput(id="t5", text="and again", session_id="s")])
    assert await service.backfill.drained(10)
    assert (await service.search(owner, SearchRequest(text="again"))).memories[0].id == "t5"


class FailingOnce(DeterministicEmbedder):
    """Raises at its first call."""

    def __init__(self, fault: Exception) -> None:
        super().__init__()
        self.fault: Exception | None = fault

    async def embed(self, texts: list[str], *, urgent: bool = True) -> Vectors:
        if fault := self.fault:
            self.fault = None
            raise fault
        return await super().embed(texts, urgent=urgent)


@pytest.mark.parametrize("fault", [EmbedderUnavailable("away"), RuntimeError("a defect")])
async def test_the_backfill_outlives_a_failing_embedder(
    service: Service,
    owner: Owner,
    monkeypatch: pytest.MonkeyPatch,
    no_backfill: list[str],
    fault: Exception,
    embedded_as: Any,
) -> None:
    monkeypatch.setattr("redismem.backfill._BACK_OFF_S", 0.01)
    await service.writer.put(owner, [MemoryInput(id=name, text=name) for name in "ab"], wait=False)
    assert no_backfill == ["a", "b"]
    backfill = Backfill(service.functions, FailingOnce(fault))
    backfill.add(owner, ["a"])
    drained = await backfill.drained(1)
    backfill.add(owner, ["b"])
    drained = await backfill.drained(1) and drained
    with contextlib.suppress(RuntimeError):
        await backfill.close(0)
    assert drained
    assert await embedded_as(owner, "b", None, "b")


async def test_forgetting_leaves_no_key_and_no_index(
    service: Service, owner: Owner, turns: list[MemoryInput]
) -> None:
    await service.writer.put(owner, [MemoryInput(text=f"memory {i}") for i in range(1100)], wait=False)
    assert await service.backfill.drained(20)
    await service.client.execute("HSET", owner.memory("by hand"), "text", "written by redis-cli")
    other = service.owner("alice2")
    await service.writer.put(other, [MemoryInput(id="x", text="stays")])
    receipt = await service.writer.forget(owner)
    assert receipt.memories == 1105
    assert receipt.keys > 1105
    keys = await service.client.execute("KEYS", "*{alice}*")
    assert keys == []
    assert not [name for name in await service.client.execute("FT._LIST") if b"{alice}" in name]
    assert (await service.search(owner, SearchRequest(text="memory"))).total == 0
    assert (await service.browser.get(other, "x")).text == "stays"
    empty = await service.writer.forget(owner)
    assert (empty.memories, empty.keys) == (0, 0)


async def test_a_forgotten_user_can_come_back(
    service: Service, owner: Owner, turns: list[MemoryInput]
) -> None:
    await service.writer.forget(owner)
    await service.writer.put(owner, turns)
    assert (await service.search(owner, SearchRequest(text="turn"))).total == 4
