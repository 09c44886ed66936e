"""Sessions as Redis holds them: misuse of their Functions, other hands, forgetting, older processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from redismem.conversation import SessionInput
from redismem.errors import NotFound, StoreError
from redismem.keys import JOBS_LATER, STORE, Owner
from redismem.service import Service
from redismem.sessions import Sessions
from tests.conftest import lasting_keys
from tests.redis.test_conversations import NAMES, lives_ms, said, sessions, texts

assert sessions  # a fixture

#: arguments that may be anything: an agent; what is only read
ANYTHING = {("rm_session_open_v1", 5), *(("rm_session_ro_v1", i) for i in (0, 1, 3))}

#: of the values tried, those that a field of any JSON may have
POSSIBLE = {("rm_session_set_v1", 5, wrong) for wrong in ('{"a":"b"}', "[1]")}


def calls(owner: Owner) -> list[tuple[str, list[str], list[Any]]]:
    """A valid call of every Function that writes sessions, and of the one that reads them."""
    keys = [owner.session("s"), owner.sessions, JOBS_LATER]
    head = [owner.session_prefix, "s", 1_800_000_000_000]
    return [
        ("rm_session_open_v1", keys, [*head, 0, 60_000, "agent", '["t"]', '["p"]']),
        ("rm_session_said_v1", keys, [*head, 2, 1, '["agent"]']),
        ("rm_session_set_v1", keys[:1], [*head[:2], "pins", '["q"]', "loaded", '[["a","b",1]]']),
        ("rm_session_close_v1", [keys[0], keys[2]], head),
        ("rm_session_ro_v1", [keys[0], owner.turns], [owner.memory_prefix, "s", 10, "text"]),
    ]


async def refused(service: Service, name: str, keys: Sequence[str], args: Sequence[Any]) -> str:
    """The error of a call; empty when it was taken."""
    try:
        await service.functions.call(name, keys, *args)
    except StoreError as exc:
        return exc.message
    return ""


async def test_misuse_is_named_and_writes_nothing(
    service: Service, sessions: Sessions, owner: Owner, dump: Any
) -> None:
    await sessions.open(owner, SessionInput(id="s"))
    await sessions.say(owner, "s", said("hello"))
    for name, keys, args in calls(owner):
        before = await dump()
        for fewer in range(len(keys)):
            assert "RMEM_USAGE" in await refused(service, name, keys[:fewer], args), (name, fewer)
        for i in range(len(args)):
            for wrong in ("", "x", "-1", "1e999", "nan", "null", '{"a":"b"}', "[1]"):
                if (name, i) in ANYTHING or (name, i, wrong) in POSSIBLE:
                    continue
                told = await refused(service, name, keys, [*args[:i], wrong, *args[i + 1 :]])
                assert "RMEM_USAGE" in told, (name, i, wrong, told)
        assert await dump() == before, name
        assert await refused(service, name, keys, args) == ""


async def test_a_key_of_a_foreign_type_is_named_and_nothing_is_written(
    service: Service, sessions: Sessions, owner: Owner, dump: Any
) -> None:
    for name, keys, args in calls(owner):
        for key in keys:
            await sessions.open(owner, SessionInput(id="s"))
            await sessions.say(owner, "s", said("hello"))
            await service.client.execute("SET", key, "foreign", "EX", 60)
            before = await dump()
            told = await refused(service, name, keys, args)
            assert "RMEM_TYPE" in told, (name, key, told)
            assert key in told
            assert await dump() == before
            await service.client.execute("DEL", key)


# forgetting ------------------------------------------------------------------------------------------


async def test_forgetting_a_user_leaves_no_key_of_a_session(
    service: Service, sessions: Sessions, owner: Owner
) -> None:
    bob = service.owner("bob")
    for user in (owner, bob):
        for name in NAMES:
            await sessions.open(user, SessionInput(id=name))
            await sessions.say(user, name, said("secret"), wait=False)
        await sessions.open(user, SessionInput(id="silent"))
    reply = await service.writer.forget(owner)
    keys = [key.decode() for key in await lasting_keys(service.client)]
    assert [key for key in keys if "{alice}" in key] == []
    assert reply.memories == len(NAMES)
    assert reply.keys > reply.memories
    assert sum(key.startswith(bob.session_prefix) for key in keys) == len(NAMES) + 1
    assert await service.client.execute("ZCARD", JOBS_LATER) > 0
    waiting = await service.client.execute("ZRANGE", JOBS_LATER, 0, -1)
    assert {job.split(b" ")[0] for job in waiting} == {b"bob"}
    with pytest.raises(NotFound):
        await sessions.say(owner, "*", said("again"))
    assert not await sessions.note(owner, "*", shown=["m"])


async def test_a_user_with_a_session_and_no_memory_is_forgotten(
    service: Service, sessions: Sessions, owner: Owner
) -> None:
    await sessions.open(owner, SessionInput(id="s"))
    await service.writer.forget(owner)
    assert await lasting_keys(service.client) == [b"redismem:store"]


async def test_an_older_process_forgets_all_but_sessions_which_end_by_themselves(
    service: Service, sessions: Sessions, owner: Owner
) -> None:
    await sessions.open(owner, SessionInput(id="s"))
    await sessions.say(owner, "s", said("secret"), wait=False)
    arguments = [owner.memory_prefix, 500, owner.physical_index("embedding")]
    done = 0
    while not done:
        done = (
            await service.functions.call("rm_forget_v1", [owner.index, *owner.forgotten[:-3]], *arguments)
        )[3]
    left = {key.decode() for key in await lasting_keys(service.client)} - {JOBS_LATER, STORE}
    assert left == {owner.session("s"), owner.sessions}
    assert await lives_ms(service, owner.session("s")) > 0
    assert await texts(sessions, owner, "s") == []
    await service.writer.forget(owner)
    assert await lasting_keys(service.client) == [b"redismem:store"]


async def test_what_another_hand_wrote_into_a_session_does_not_break_it(
    service: Service, sessions: Sessions, owner: Owner
) -> None:
    await sessions.open(owner, SessionInput(id="s", agent="a"))
    await service.client.execute(
        *("HSET", owner.session("s"), "messages", "many", "asked", "1.5", "agents", "[1]", "pins", "{"),
        *("active_topics", b'["\xff"]', "ttl_ms", "x", "loaded", "[[1]]", "opened_at", "then", "more", "x"),
    )
    state = await sessions.state(owner, "s", 1)
    assert (state.session.messages, state.asked, state.loaded) == (0, 0, [])
    assert state.session.agents == state.session.pins == state.session.active_topics == []
    assert (await sessions.say(owner, "s", said("hello", agent="b"))).messages == 1
    assert (await sessions.open(owner, SessionInput(id="s", pins=["p"])))[0].pins == ["p"]
    assert (await sessions.get(owner, "s", 1)).agents == ["b"]
    assert await lives_ms(service, owner.session("s")) > 0
