"""Writes: idempotent, versioned, atomic; nothing of the old is left."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from redismem.errors import Conflict, NotFound, VersionMismatch
from redismem.keys import Owner
from redismem.service import Service
from redismem.types import CorrectionRequest, ImportRecord, MemoryInput, MemoryPatch, PutItem, SearchRequest


async def put(service: Service, owner: Owner, *memories: MemoryInput, wait: bool = True) -> list[PutItem]:
    return (await service.writer.put(owner, memories, wait=wait)).memories


async def found(service: Service, owner: Owner, text: str) -> set[str]:
    reply = await service.search(owner, SearchRequest(text=text, search_mode="keyword", limit=100))
    return {hit.id for hit in reply.memories}


async def field(service: Service, owner: Owner, memory_id: str, name: str) -> bytes | None:
    raw: bytes | None = await service.client.execute("HGET", owner.memory(memory_id), name)
    return raw


async def test_the_same_id_and_content_is_stored_once(service: Service, owner: Owner) -> None:
    memory = MemoryInput(id="tea", text="likes tea", topics=["drinks"])
    first, second = (await put(service, owner, memory))[0], (await put(service, owner, memory))[0]
    assert (first.outcome, second.outcome) == ("CREATED", "UNCHANGED")
    assert (first.id, first.version) == (second.id, second.version)
    assert second.embedded is True
    changed = (await put(service, owner, MemoryInput(id="tea", text="likes coffee")))[0]
    assert changed.outcome == "UPDATED"
    assert (await service.browser.get(owner, "tea")).topics == []


async def test_the_same_content_without_id_is_one_memory(service: Service, owner: Owner) -> None:
    memory = MemoryInput(text="likes tea")
    items = await put(service, owner, memory, MemoryInput(text="likes tea"), MemoryInput(text="likes Tea"))
    assert [item.outcome for item in items] == ["CREATED", "UNCHANGED", "CREATED"]
    assert items[0].id == items[1].id != items[2].id
    assert (await put(service, owner, memory))[0].outcome == "UNCHANGED"


async def test_content_that_was_deleted_can_be_stored_again(service: Service, owner: Owner) -> None:
    memory = MemoryInput(text="likes tea")
    first = (await put(service, owner, memory))[0]
    await service.writer.delete(owner, str(first.id))
    again = (await put(service, owner, memory))[0]
    assert again.outcome == "CREATED"
    assert (again.version or 0) > (first.version or 0)
    assert await found(service, owner, "tea") == {again.id}


async def test_content_that_was_patched_away_is_stored_beside_it_once(service: Service, owner: Owner) -> None:
    memory = MemoryInput(text="likes tea")
    first = (await put(service, owner, memory))[0]
    await service.writer.update(owner, str(first.id), MemoryPatch(text="likes coffee"))
    again, once_more = (await put(service, owner, memory))[0], (await put(service, owner, memory))[0]
    assert (again.outcome, once_more.outcome) == ("CREATED", "UNCHANGED")
    assert again.id == once_more.id != first.id
    assert (await service.browser.get(owner, str(first.id))).text == "likes coffee"


async def test_content_that_was_corrected_away_is_a_new_memory(service: Service, owner: Owner) -> None:
    memory = MemoryInput(text="likes tea")
    first = (await put(service, owner, memory))[0]
    await service.writer.correct(
        owner, CorrectionRequest(ids=[str(first.id)], memory=MemoryInput(text="likes coffee"))
    )
    again, once_more = (await put(service, owner, memory))[0], (await put(service, owner, memory))[0]
    assert (again.outcome, once_more.outcome) == ("CREATED", "UNCHANGED")
    assert (await service.browser.get(owner, str(first.id))).superseded_by is not None
    assert await found(service, owner, "tea") == {again.id}


async def test_turns_stand_in_the_order_of_the_request_also_when_an_id_is_taken(
    service: Service, owner: Owner, embedded_as: Any
) -> None:
    turns = [MemoryInput(text=text, session_id="s") for text in ("one", "two")]
    first = (await put(service, owner, turns[0]))[0]
    await service.writer.update(owner, str(first.id), MemoryPatch(text="other", session_id=None))
    items = await put(service, owner, *turns)
    assert await service.backfill.drained(10)
    assert await embedded_as(owner, items[0].id, None, "one")
    assert await embedded_as(owner, items[1].id, "one", "two")


async def test_an_invalid_memory_does_not_stop_the_others(service: Service, owner: Owner) -> None:
    big = MemoryInput(text="big", metadata={"a": "b" * 16_384})
    items = await put(service, owner, MemoryInput(text="one"), big, MemoryInput(text="two"))
    assert [item.outcome for item in items] == ["CREATED", "INVALID", "CREATED"]
    assert items[1].error is not None
    assert "metadata" in items[1].error


async def test_versions_grow_through_every_kind_of_write(service: Service, owner: Owner) -> None:
    versions: list[int] = []

    async def note(version: int | None) -> None:
        assert version is not None
        versions.append(version)

    await note((await put(service, owner, MemoryInput(id="a", text="one", session_id="s")))[0].version)
    await note((await put(service, owner, MemoryInput(id="a", text="two")))[0].version)
    await note((await service.writer.update(owner, "a", MemoryPatch(importance=0.9))).version)
    await note((await service.writer.update(owner, "a", MemoryPatch(text="three"))).version)
    await note((await service.writer.delete(owner, "a")).generation)
    await note((await put(service, owner, MemoryInput(id="a", text="one")))[0].version)
    reply = await service.writer.correct(owner, CorrectionRequest(ids=["a"], memory=MemoryInput(text="four")))
    await note(reply.version)
    await note((await service.browser.get(owner, "a")).version)
    await service.writer.forget(owner)
    await note((await put(service, owner, MemoryInput(id="a", text="one")))[0].version)
    assert versions == sorted(set(versions))


async def test_versions_grow_through_a_forget_after_a_burst_of_writes(service: Service, owner: Owner) -> None:
    burst = [MemoryInput(text=f"memory {i}") for i in range(500)]
    newest = 0
    for turn in range(4):
        items = await put(
            service, owner, *(MemoryInput(text=f"{turn} {one.text}") for one in burst), wait=False
        )
        newest = max(newest, *(item.version or 0 for item in items))
    await service.writer.forget(owner)
    again = (await put(service, owner, MemoryInput(text="new")))[0]
    assert (again.version or 0) > newest


async def test_an_update_compares_and_sets(service: Service, owner: Owner) -> None:
    version = (await put(service, owner, MemoryInput(id="a", text="one")))[0].version
    changed = await service.writer.update(owner, "a", MemoryPatch(text="two"), expected_version=version)
    assert changed.version > (version or 0)
    for stale in (version, 0, changed.version + 1):
        with pytest.raises(VersionMismatch):
            await service.writer.update(owner, "a", MemoryPatch(text="three"), expected_version=stale)
    assert (await service.browser.get(owner, "a")).text == "two"
    with pytest.raises(NotFound):
        await service.writer.update(owner, "b", MemoryPatch(text="x"))


async def test_an_update_keeps_what_it_does_not_name(
    service: Service, owner: Owner, embedded_as: Any
) -> None:
    memory = ImportRecord(
        id="a", text="one", topics=["t"], entities=["e"], session_id="s", sources=["x"], metadata={"k": 1}
    )
    await put(service, owner, memory)
    old = await service.browser.get(owner, "a")
    new = await service.writer.update(owner, "a", MemoryPatch(importance=0.9))
    for name in ("text", "topics", "entities", "session_id", "sources", "metadata", "created_at", "embedded"):
        assert getattr(new, name) == getattr(old, name), name
    assert new.embedded
    assert await embedded_as(owner, "a", None, "one")
    assert new.importance == 0.9
    cleared = await service.writer.update(owner, "a", MemoryPatch(session_id=None))
    assert cleared.session_id is None


async def test_concurrent_updates_are_all_applied_or_refused(service: Service, owner: Owner) -> None:
    await put(service, owner, MemoryInput(id="a", text="one"))
    patches = [MemoryPatch(metadata={"n": i}) for i in range(30)]
    replies = await asyncio.gather(
        *(service.writer.update(owner, "a", patch) for patch in patches), return_exceptions=True
    )
    assert all(
        not isinstance(reply, BaseException) or isinstance(reply, VersionMismatch) for reply in replies
    )
    applied = [reply for reply in replies if not isinstance(reply, BaseException)]
    events = (await service.browser.history(owner, "a")).events
    assert len(events) == 1 + len(applied)
    last = await service.browser.get(owner, "a")
    assert last.version == events[-1].version


async def test_only_one_of_many_compare_and_sets_wins(service: Service, owner: Owner) -> None:
    version = (await put(service, owner, MemoryInput(id="a", text="one")))[0].version
    replies = await asyncio.gather(
        *(
            service.writer.update(owner, "a", MemoryPatch(text=f"text {i}"), expected_version=version)
            for i in range(20)
        ),
        return_exceptions=True,
    )
    assert sum(isinstance(reply, VersionMismatch) for reply in replies) == 19


async def test_a_delete_leaves_nothing(service: Service, owner: Owner) -> None:
    await put(service, owner, MemoryInput(id="a", text="likes tea", session_id="s"))
    reply = await service.writer.delete(owner, "a")
    assert reply.outcome == "DELETED"
    assert await service.client.execute("EXISTS", owner.memory("a"), owner.ids) == 0
    assert await service.client.execute("HMGET", owner.turns, "la", "ts") == [None, None]
    assert await found(service, owner, "tea") == set()
    for gone in (service.writer.delete(owner, "a"), service.browser.get(owner, "a")):
        with pytest.raises(NotFound):
            await gone


async def test_a_delete_right_after_a_create_wins_over_its_embedding(service: Service, owner: Owner) -> None:
    for i in range(50):
        await put(service, owner, MemoryInput(id=f"m{i}", text=f"text {i}", session_id="s"), wait=False)
        await service.writer.delete(owner, f"m{i}")
    assert await service.backfill.drained(10)
    assert await service.client.execute("EXISTS", *(owner.memory(f"m{i}") for i in range(50))) == 0
    assert (await service.search(owner, SearchRequest(text="text"))).total == 0


async def test_a_memory_without_wait_is_found_by_words_at_once_and_embedded_soon(
    service: Service, owner: Owner, embedded_as: Any
) -> None:
    items = await put(
        service,
        owner,
        *(MemoryInput(id=f"m{i}", text=f"tea {i}", session_id="s") for i in range(3)),
        wait=False,
    )
    assert [item.embedded for item in items] == [False] * 3
    assert await found(service, owner, "tea") == {"m0", "m1", "m2"}
    assert await service.backfill.drained(10)
    assert await embedded_as(owner, "m0", None, "tea 0")
    assert await embedded_as(owner, "m2", "tea 1", "tea 2")


async def test_a_correction_hides_the_old_at_once(service: Service, owner: Owner) -> None:
    await put(service, owner, MemoryInput(id="a", text="likes tea"), MemoryInput(id="b", text="drinks tea"))
    request = CorrectionRequest(ids=["a", "b"], memory=MemoryInput(id="c", text="hates tea"))
    reply = await service.writer.correct(owner, request)
    assert (reply.outcome, reply.superseded) == ("CREATED", ["a", "b"])
    for mode in ("keyword", "semantic", "hybrid"):
        hits = await service.search(owner, SearchRequest(text="tea", search_mode=mode))
        assert [hit.id for hit in hits.memories] == ["c"]
    assert (await service.browser.get(owner, "a")).superseded_by == "c"
    new = await service.browser.get(owner, "c")
    assert (new.version, new.embedded) == (reply.version, True)
    again = await service.writer.correct(owner, request)
    assert (again.outcome, again.id, again.version) == ("UNCHANGED", "c", reply.version)


async def test_a_correction_with_a_missing_id_changes_nothing(
    service: Service, owner: Owner, dump: Any
) -> None:
    await put(service, owner, MemoryInput(id="a", text="likes tea"))
    before = await dump()
    request = CorrectionRequest(ids=["a", "gone"], memory=MemoryInput(text="hates tea"))
    with pytest.raises(NotFound, match="gone"):
        await service.writer.correct(owner, request)
    assert await dump() == before


async def test_a_correction_never_overwrites_another_memory(
    service: Service, owner: Owner, dump: Any
) -> None:
    await put(service, owner, MemoryInput(id="a", text="likes tea"), MemoryInput(id="b", text="has a dog"))
    before = await dump()
    with pytest.raises(Conflict):
        await service.writer.correct(
            owner, CorrectionRequest(ids=["a"], memory=MemoryInput(id="b", text="hates tea"))
        )
    assert await dump() == before


async def test_a_correction_to_the_same_words_makes_a_new_memory(service: Service, owner: Owner) -> None:
    first = (await put(service, owner, MemoryInput(text="likes tea")))[0]
    request = CorrectionRequest(ids=[str(first.id)], memory=MemoryInput(text="likes tea"))
    reply = await service.writer.correct(owner, request)
    assert reply.id != first.id
    assert await found(service, owner, "tea") == {reply.id}
    assert (await service.writer.correct(owner, request)).outcome == "UNCHANGED"


@pytest.mark.parametrize("new_id", ["new", "[new]", "[", '["a"]', "{}", "ключ"])
async def test_history_survives_a_delete_and_holds_no_text(
    service: Service, owner: Owner, new_id: str
) -> None:
    await put(service, owner, MemoryInput(id="a", text="a secret", session_id="s"))
    await service.writer.update(owner, "a", MemoryPatch(text="another secret"))
    await service.writer.correct(
        owner, CorrectionRequest(ids=["a"], memory=MemoryInput(id=new_id, text="third secret"))
    )
    await service.writer.delete(owner, "a")
    events = (await service.browser.history(owner, "a")).events
    assert [event.event for event in events] == ["created", "updated", "superseded", "deleted"]
    assert [event.version for event in events] == sorted({event.version for event in events})
    assert events[2].other == [new_id]
    corrects = (await service.browser.history(owner, new_id)).events
    assert [(event.event, event.other) for event in corrects] == [("created", []), ("corrects", ["a"])]
    assert b"secret" not in b"".join(
        str(await service.client.execute("XRANGE", owner.log, "-", "+")).encode().split()
    )
    with pytest.raises(NotFound):
        await service.browser.history(owner, "never")
