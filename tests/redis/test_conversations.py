"""Sessions on a real Redis: opening, saying, several agents, changing, closing, ending, odd names."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from redismem.conversation import MessageInput, SessionInput, SessionPatch
from redismem.errors import Conflict, InvalidInput, NotFound
from redismem.filters import Filters
from redismem.keys import Owner
from redismem.service import Service
from redismem.sessions import Sessions
from redismem.types import CorrectionRequest, MemoryInput, MemoryPatch, SearchRequest
from tests.conftest import lasting_keys, until

TTL_S = 3600
#: what Redis, RediSearch, Lua patterns and the encoding of names take for their own
NAMES = ["a|b", "*", "}", "{x}:y", "%7C", "a:b c", '"', "\\", "[", "ismissing", "😀 smile", "😀" * 256]


@pytest.fixture
def sessions(service: Service) -> Sessions:
    return Sessions(service.functions, service.writer, ttl_s=TTL_S)


def at(service: Service, now_s: float, ttl_s: int = TTL_S) -> Sessions:
    """Return sessions whose clock stands still."""
    return Sessions(service.functions, service.writer, ttl_s=ttl_s, clock=lambda: now_s)


def said(*texts: str, **more: Any) -> list[MessageInput]:
    return [MessageInput(text=text, **more) for text in texts]


async def texts(sessions: Sessions, owner: Owner, session_id: str, limit: int = 200) -> list[str]:
    return [message.text for message in (await sessions.get(owner, session_id, limit)).recent]


async def lives_ms(service: Service, key: str) -> int:
    return int(await service.client.execute("PTTL", key))


# opening and joining ---------------------------------------------------------------------------------


async def test_a_session_is_opened_with_what_was_given(service: Service, owner: Owner) -> None:
    now_s = time.time()
    wanted = SessionInput(id="s", agent="coach", active_topics=["tea", "3"], pins=["m1"], ttl_s=90)
    session, outcome = await at(service, now_s).open(owner, wanted)
    assert outcome == "OPENED"
    assert (session.id, session.messages, session.closed_at) == ("s", 0, None)
    assert (session.agents, session.active_topics, session.pins) == (["coach"], ["tea", "3"], ["m1"])
    assert session.opened_at.timestamp() == session.last_at.timestamp() == pytest.approx(now_s, abs=0.002)
    assert session.expires_at.timestamp() == pytest.approx(now_s + 90, abs=0.01)
    assert 89_000 < await lives_ms(service, owner.session("s")) <= 90_000
    assert 89 * 86_400_000 < await lives_ms(service, owner.sessions) <= 90 * 86_400_000
    read = await at(service, now_s).get(owner, "s", 10)
    assert msgspec.structs.asdict(read) == {
        **msgspec.structs.asdict(session),
        "recent": [],
        "expires_at": read.expires_at,
    }


async def test_without_an_id_every_session_is_its_own(sessions: Sessions, owner: Owner) -> None:
    opened = [await sessions.open(owner, SessionInput()) for _ in range(3)]
    assert [outcome for _, outcome in opened] == ["OPENED"] * 3
    assert len({session.id for session, _ in opened}) == 3
    assert opened[0][0].agents == opened[0][0].active_topics == opened[0][0].pins == []


async def test_who_joins_adds_to_what_is_there_and_prolongs_it(service: Service, owner: Owner) -> None:
    now_s = time.time()
    first = SessionInput(id="s", agent="a", active_topics=["t1", "t2"], pins=["p1"], ttl_s=120)
    await at(service, now_s).open(owner, first)
    await service.client.execute("PEXPIRE", owner.session("s"), 5000)
    again = SessionInput(id="s", agent="b", active_topics=["t1", "t3"])
    joined, outcome = await at(service, now_s + 60).open(owner, again)
    assert outcome == "JOINED"
    assert (joined.agents, joined.active_topics, joined.pins) == (["a", "b"], ["t2", "t1", "t3"], ["p1"])
    assert joined.opened_at.timestamp() == pytest.approx(now_s, abs=0.002)
    assert joined.last_at.timestamp() == pytest.approx(now_s + 60, abs=0.002)
    # its own TTL, not the usual one
    assert 119_000 < await lives_ms(service, owner.session("s")) <= 120_000
    await at(service, now_s + 61).open(owner, SessionInput(id="s", ttl_s=240))
    assert 239_000 < await lives_ms(service, owner.session("s")) <= 240_000


async def test_of_many_agents_topics_and_pins_the_newest_are_kept(sessions: Sessions, owner: Owner) -> None:
    names = [f"n{i}" for i in range(100)]
    await sessions.open(owner, SessionInput(id="s", active_topics=names, pins=names))
    for i in range(70):
        session, _ = await sessions.open(
            owner, SessionInput(id="s", agent=f"a{i}", active_topics=[f"x{i}"], pins=["n1", f"y{i}"])
        )
    assert session.agents == [f"a{i}" for i in range(6, 70)]
    assert session.active_topics == [*names[70:], *(f"x{i}" for i in range(70))]
    assert len(session.pins) == 100
    assert session.pins[-2:] == ["n1", "y69"]
    await sessions.say(owner, "s", said("hello", agent="a6"))
    assert (await sessions.get(owner, "s", 1)).agents[-2:] == ["a69", "a6"]


async def test_agents_that_come_at_once_are_in_one_session(sessions: Sessions, owner: Owner) -> None:
    opened = await asyncio.gather(
        *(sessions.open(owner, SessionInput(id="s", agent=f"a{i}")) for i in range(20))
    )
    assert sorted(outcome for _, outcome in opened) == ["JOINED"] * 19 + ["OPENED"]
    assert set((await sessions.get(owner, "s", 1)).agents) == {f"a{i}" for i in range(20)}


async def test_the_oldest_sessions_beyond_a_thousand_end(
    service: Service, sessions: Sessions, owner: Owner
) -> None:
    for name in ("old", "older"):
        await sessions.open(owner, SessionInput(id=name))
    await service.client.execute("ZADD", owner.sessions, 2, "old", 1, "older")
    now_s = time.time()
    many = [part for i in range(999) for part in (now_s - i, f"gone{i}")]
    await service.client.execute("ZADD", owner.sessions, *many)
    await sessions.open(owner, SessionInput(id="new"))
    assert await service.client.execute("ZCARD", owner.sessions) == 1000
    for name in ("old", "older"):
        assert await service.client.execute("EXISTS", owner.session(name)) == 0
        assert await service.client.execute("ZSCORE", owner.sessions, name) is None
    # one that is old by a clock that is behind is not ended by its own message
    await at(service, 1.0).open(owner, SessionInput(id="behind"))
    assert await service.client.execute("EXISTS", owner.session("behind")) == 1


# messages --------------------------------------------------------------------------------------------


async def test_a_message_is_a_memory_that_is_found_at_once(
    service: Service, sessions: Sessions, owner: Owner
) -> None:
    await sessions.open(owner, SessionInput(id="s"))
    moment = datetime(2026, 3, 1, 12, tzinfo=UTC)
    message = MessageInput(
        text="my canoe is green",
        role="assistant",
        agent="coach",
        time=moment,
        topics=["boats"],
        entities=["Ann"],
        metadata={"mood": "glad", "role": "of the caller"},
    )
    reply = await sessions.say(owner, "s", [message])
    (item,) = reply.items
    assert (item.outcome, item.embedded, reply.messages) == ("CREATED", True, 1)
    assert item.version == reply.generation > 0
    filters = Filters(session_id="s", memory_type="message", metadata={"role": "assistant", "agent": "coach"})
    found = await service.search(owner, SearchRequest(text="canoe", filters=filters))
    (hit,) = found.memories
    assert hit.id == item.id
    assert (hit.event_date, hit.topics, hit.entities) == (moment, ["boats"], ["Ann"])
    assert hit.metadata == {"mood": "glad", "role": "assistant", "agent": "coach"}
    (shown,) = (await sessions.get(owner, "s", 5)).recent
    assert (shown.id, shown.text, shown.role) == (item.id, "my canoe is green", "assistant")
    assert (shown.agent, shown.at) == ("coach", moment)


async def test_messages_of_one_request_keep_their_order_in_the_session_and_in_time(
    service: Service, sessions: Sessions, owner: Owner
) -> None:
    await sessions.open(owner, SessionInput(id="s"))
    many = [f"number {i}" for i in range(100)]
    reply = await sessions.say(owner, "s", said(*many), wait=False)
    assert reply.messages == 100
    recent = (await sessions.get(owner, "s", 200)).recent
    assert [message.text for message in recent] == many
    assert [message.id for message in recent] == [item.id for item in reply.items]
    moments = [message.at for message in recent]
    assert moments == sorted(set(moments))
    assert await texts(sessions, owner, "s", 3) == many[-3:]
    assert await texts(sessions, owner, "s", 0) == []


async def test_times_are_given_by_the_caller_where_he_has_them(
    service: Service, sessions: Sessions, owner: Owner
) -> None:
    await sessions.open(owner, SessionInput(id="s"))
    moment = datetime(2020, 5, 8, 9, 30, tzinfo=UTC)
    pair = [
        MessageInput(text="then", time=moment),
        MessageInput(text="later", time=moment + timedelta(hours=1)),
    ]
    await sessions.say(owner, "s", pair)
    session = await sessions.get(owner, "s", 5)
    assert [message.at for message in session.recent] == [moment, moment + timedelta(hours=1)]
    assert session.last_at.timestamp() == pytest.approx(time.time(), abs=30)


async def test_equal_texts_without_an_id_are_messages_of_their_own(sessions: Sessions, owner: Owner) -> None:
    await sessions.open(owner, SessionInput(id="s"))
    reply = await sessions.say(owner, "s", said("ok", "ok"))
    reply = await sessions.say(owner, "s", said("ok"))
    assert reply.messages == 3
    assert await texts(sessions, owner, "s") == ["ok"] * 3


async def test_a_repeated_request_stores_and_counts_its_messages_once(
    service: Service, owner: Owner, dump: Any
) -> None:
    now_s = time.time()
    await at(service, now_s).open(owner, SessionInput(id="s"))
    request = [
        MessageInput(id=f"m{i}", text=f"hello {i}", role=role) for i, role in enumerate(["user", "tool"])
    ]
    first = await at(service, now_s).say(owner, "s", request)
    before = await dump()
    second = await at(service, now_s + 9).say(owner, "s", request)
    assert [item.outcome for item in first.items] == ["CREATED", "CREATED"]
    assert [item.outcome for item in second.items] == ["UNCHANGED", "UNCHANGED"]
    assert [item.version for item in second.items] == [item.version for item in first.items]
    assert (first.messages, second.messages, second.generation) == (2, 2, first.generation)
    after = await dump()
    assert {key for key in after if after[key] != before[key]} <= {owner.session("s"), owner.sessions}
    assert (await at(service, now_s).state(owner, "s", 0)).asked == 1


async def test_a_repeated_request_does_not_bring_back_what_was_corrected(
    service: Service, sessions: Sessions, owner: Owner
) -> None:
    await sessions.open(owner, SessionInput(id="s"))
    request = [MessageInput(id="m", text="I live in Rome"), MessageInput(id="n", text="and I like it")]
    await sessions.say(owner, "s", request)
    correction = MemoryInput(id="c", text="I live in Oslo", memory_type="message", session_id="s")
    await service.writer.correct(owner, CorrectionRequest(ids=["m"], memory=correction))
    reply = await sessions.say(owner, "s", request)
    assert [(item.id, item.outcome) for item in reply.items] == [("m", "UNCHANGED"), ("n", "UNCHANGED")]
    assert reply.items[0].version == (await service.browser.get(owner, "m")).version
    assert (await service.browser.get(owner, "m")).superseded_by == "c"
    assert await texts(sessions, owner, "s") == ["and I like it", "I live in Oslo"]


async def test_a_message_with_the_id_of_what_is_no_message_of_its_session_takes_its_place(
    service: Service, sessions: Sessions, owner: Owner
) -> None:
    await sessions.open(owner, SessionInput(id="s"))
    old = datetime(2020, 1, 1, tzinfo=UTC)
    await service.writer.put(owner, [MemoryInput(id="m", text="old fact", event_date=old)])
    await service.writer.correct(owner, CorrectionRequest(ids=["m"], memory=MemoryInput(text="new fact")))
    reply = await sessions.say(owner, "s", [MessageInput(id="m", text="hello")])
    assert [item.outcome for item in reply.items] == ["UPDATED"]
    (shown,) = (await sessions.get(owner, "s", 5)).recent
    assert (shown.id, shown.text) == ("m", "hello")
    assert shown.at > old


async def test_without_waiting_messages_are_stored_first_and_embedded_later(
    sessions: Sessions, owner: Owner, no_backfill: list[str]
) -> None:
    await sessions.open(owner, SessionInput(id="s"))
    reply = await sessions.say(owner, "s", said("one", "two"), wait=False)
    assert [(item.outcome, item.embedded) for item in reply.items] == [("CREATED", False)] * 2
    assert no_backfill == [item.id for item in reply.items]


async def test_a_changed_message_is_shown_as_it_is_now_and_a_deleted_one_is_not(
    service: Service, sessions: Sessions, owner: Owner
) -> None:
    await sessions.open(owner, SessionInput(id="s"))
    await sessions.say(owner, "s", [MessageInput(id=f"m{i}", text=f"text {i}") for i in range(5)])
    await service.writer.delete(owner, "m1")
    await service.writer.update(owner, "m2", MemoryPatch(text="changed"))
    # by another hand, which knows nothing of turns
    await service.client.execute("DEL", owner.memory("m3"))
    await service.client.execute("HSET", owner.memory("m4"), "superseded_by", "x")
    assert await texts(sessions, owner, "s") == ["text 0", "changed"]
    assert await texts(sessions, owner, "s", 1) == ["changed"]


async def test_memories_of_a_session_that_are_no_messages_are_not_shown_as_such(
    service: Service, sessions: Sessions, owner: Owner
) -> None:
    await sessions.open(owner, SessionInput(id="s"))
    await sessions.say(owner, "s", said("I moved to Oslo"))
    await service.writer.put(owner, [MemoryInput(text="lives in Oslo", session_id="s")])
    assert await texts(sessions, owner, "s") == ["I moved to Oslo"]


async def test_agents_that_speak_at_once_lose_nothing(sessions: Sessions, owner: Owner) -> None:
    await sessions.open(owner, SessionInput(id="s"))

    async def speak(agent: int) -> None:
        for i in range(4):
            pair = [f"question {agent} {i}", f"answer {agent} {i}"]
            await sessions.say(owner, "s", said(*pair, agent=f"a{agent}"), wait=False)

    await asyncio.gather(*(speak(agent) for agent in range(6)))
    session = await sessions.get(owner, "s", 200)
    assert (session.messages, len(session.recent)) == (48, 48)
    assert set(session.agents) == {f"a{agent}" for agent in range(6)}
    for agent in range(6):
        own = [message.text for message in session.recent if message.agent == f"a{agent}"]
        assert own == [f"{kind} {agent} {i}" for i in range(4) for kind in ("question", "answer")]
        # what came in one request stands together
        order = [message.text for message in session.recent]
        assert all(
            order.index(f"answer {agent} {i}") == order.index(f"question {agent} {i}") + 1 for i in range(4)
        )


async def test_a_message_prolongs_the_life_of_its_session(
    service: Service, sessions: Sessions, owner: Owner
) -> None:
    await sessions.open(owner, SessionInput(id="s", ttl_s=120))
    await service.client.execute("PEXPIRE", owner.session("s"), 5000)
    await service.client.execute("PEXPIRE", owner.sessions, 5000)
    await sessions.say(owner, "s", said("hello"))
    assert 119_000 < await lives_ms(service, owner.session("s")) <= 120_000
    assert await lives_ms(service, owner.sessions) > 89 * 86_400_000


async def test_whoever_listens_hears_stored_messages(sessions: Sessions, owner: Owner) -> None:
    heard: list[tuple[Any, ...]] = []
    sessions.heard = lambda *what: heard.append(what)
    await sessions.open(owner, SessionInput(id="s"))
    messages = [MessageInput(text="one"), MessageInput(id="two", text="two")]
    await sessions.say(owner, "s", messages)
    assert heard == [(owner, "s", messages)]
    with pytest.raises(NotFound):
        await sessions.say(owner, "other", messages)
    assert len(heard) == 1


# refusals --------------------------------------------------------------------------------------------


async def test_nothing_is_stored_of_a_request_that_is_refused(
    service: Service, sessions: Sessions, owner: Owner
) -> None:
    await sessions.open(owner, SessionInput(id="s"))
    await sessions.open(owner, SessionInput(id="closed"))
    await sessions.close(owner, "closed")
    before = sorted(await lasting_keys(service.client))
    good = MessageInput(text="fine")
    with pytest.raises(NotFound, match="POST …/sessions"):
        await sessions.say(owner, "none", [good])
    with pytest.raises(Conflict, match="open it again"):
        await sessions.say(owner, "closed", [good])
    with pytest.raises(InvalidInput) as refused:
        await sessions.say(owner, "s", [good, MessageInput(text="x", metadata={"long": "x" * 16_380})])
    assert refused.value.field == "messages[1].metadata"
    with pytest.raises(InvalidInput) as refused:
        await sessions.say(owner, "s", [MessageInput(id="m", text="x"), good, MessageInput(id="m", text="y")])
    assert refused.value.field == "messages[2].id"
    assert sorted(await lasting_keys(service.client)) == before
    assert (await sessions.get(owner, "s", 1)).messages == 0


async def test_what_is_not_there_is_told_by_every_call(sessions: Sessions, owner: Owner) -> None:
    calls = (
        sessions.get(owner, "none", 1),
        sessions.state(owner, "none", 1),
        sessions.change(owner, "none", SessionPatch(pins=["a"])),
        sessions.close(owner, "none"),
    )
    for call in calls:
        with pytest.raises(NotFound, match="'none'"):
            await call
    assert not await sessions.note(owner, "none", shown=["a"])


# changing, closing, ending ---------------------------------------------------------------------------


async def test_changes_and_notes_replace_and_do_not_prolong(
    service: Service, sessions: Sessions, owner: Owner
) -> None:
    await sessions.open(owner, SessionInput(id="s", active_topics=["t"], pins=["p"]))
    await service.client.execute("PEXPIRE", owner.session("s"), 60_000)
    changed = await sessions.change(owner, "s", SessionPatch(active_topics=["u", "v"]))
    assert (changed.active_topics, changed.pins) == (["u", "v"], ["p"])
    changed = await sessions.change(owner, "s", SessionPatch(active_topics=[], pins=["q"]))
    assert (changed.active_topics, changed.pins) == ([], ["q"])
    assert await sessions.note(owner, "s", loaded=[("m1", "entity", 0.5)], shown=["m1", "m2"])
    assert await sessions.note(owner, "s", active_topics=["w"])
    state = await sessions.state(owner, "s", 0)
    assert (state.loaded, state.shown) == ([("m1", "entity", 0.5)], ["m1", "m2"])
    assert (state.session.active_topics, state.session.pins) == (["w"], ["q"])
    assert await sessions.note(owner, "s", loaded=[], shown=[])
    state = await sessions.state(owner, "s", 0)
    assert (state.loaded, state.shown) == ([], [])
    assert 0 < await lives_ms(service, owner.session("s")) <= 60_000


async def test_a_closed_session_stays_to_be_read_and_can_be_opened_again(
    service: Service, owner: Owner
) -> None:
    now_s = time.time()
    await at(service, now_s).open(owner, SessionInput(id="s", pins=["p"]))
    await at(service, now_s).say(owner, "s", said("bye"))
    closed = await at(service, now_s + 5).close(owner, "s")
    assert closed.closed_at is not None
    assert closed.closed_at.timestamp() == pytest.approx(now_s + 5, abs=0.002)
    assert (await at(service, now_s + 8).close(owner, "s")).closed_at == closed.closed_at
    read = await at(service, now_s).get(owner, "s", 5)
    assert (read.closed_at, [message.text for message in read.recent]) == (closed.closed_at, ["bye"])
    assert await lives_ms(service, owner.session("s")) > (TTL_S - 60) * 1000
    again, outcome = await at(service, now_s + 9).open(owner, SessionInput(id="s"))
    assert (outcome, again.closed_at, again.pins, again.messages) == ("JOINED", None, ["p"], 1)
    assert (await at(service, now_s + 9).say(owner, "s", said("back"))).messages == 2


async def test_a_session_ends_with_its_ttl_and_its_messages_stay(
    service: Service, sessions: Sessions, owner: Owner
) -> None:
    await sessions.open(owner, SessionInput(id="s"))
    await sessions.say(owner, "s", said("I stay"))
    await service.client.execute("PEXPIRE", owner.session("s"), 1)

    async def is_gone() -> bool:
        return not await service.client.execute("EXISTS", owner.session("s"))

    await until("the session has ended", is_gone)
    with pytest.raises(NotFound):
        await sessions.say(owner, "s", said("too late"))
    assert not await sessions.note(owner, "s", shown=["a"])
    with pytest.raises(NotFound):
        await sessions.close(owner, "s")
    assert await is_gone()
    found = await service.search(owner, SearchRequest(text="stay", filters=Filters(session_id="s")))
    assert [hit.text for hit in found.memories] == ["I stay"]
    session, outcome = await sessions.open(owner, SessionInput(id="s"))
    assert (outcome, session.messages) == ("OPENED", 0)
    assert await texts(sessions, owner, "s") == ["I stay"]


async def test_a_session_that_ends_while_messages_are_stored_does_not_hide_that_they_are(
    service: Service, sessions: Sessions, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    await sessions.open(owner, SessionInput(id="s"))
    put = service.writer.put

    async def ending(*args: Any, **more: Any) -> Any:
        await service.client.execute("DEL", owner.session("s"))
        return await put(*args, **more)

    monkeypatch.setattr(service.writer, "put", ending)
    reply = await sessions.say(owner, "s", said("one", "two"))
    assert ([item.outcome for item in reply.items], reply.messages) == (["CREATED"] * 2, 2)
    assert await service.client.execute("EXISTS", owner.session("s")) == 0


# names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
async def test_any_name_is_a_session_of_its_own(service: Service, owner: Owner, name: str) -> None:
    sessions, other = Sessions(service.functions, service.writer, ttl_s=TTL_S), service.owner("bob")
    for session_id in (name, name[:-1] + "~"):
        await sessions.open(owner, SessionInput(id=session_id, agent=name, active_topics=[name], pins=[name]))
        reply = await sessions.say(owner, session_id, said(f"in {session_id}", agent=name))
        assert reply.messages == 1
    session = await sessions.get(owner, name, 10)
    assert (session.id, session.agents, session.active_topics, session.pins) == (name, [name], [name], [name])
    assert [(message.text, message.agent) for message in session.recent] == [(f"in {name}", name)]
    found = await service.search(owner, SearchRequest(text="in", filters=Filters(session_id=name)))
    assert [hit.text for hit in found.memories] == [f"in {name}"]
    with pytest.raises(NotFound):
        await sessions.get(other, name, 1)
    assert (await sessions.close(owner, name)).closed_at is not None
