"""Summaries of sessions: when they are made, of what, how they are asked for, when they go."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from redismem.conversation import MessageInput, SessionInput
from redismem.errors import NotFound
from redismem.jobs import Jobs
from redismem.keys import JOBS_LATER, Owner
from redismem.service import Service
from redismem.sessions import Sessions
from redismem.types import CorrectionRequest, MemoryInput, MemoryPatch
from redismem.views import BUDGETS, Summary
from redismem.worker.llm import LanguageModel
from redismem.worker.worker import Worker
from tests.property.test_derived_model import Inline
from tests.redis.test_conversations import NAMES, at, said, sessions
from tests.worker.test_llm import WRITTEN, Endpoint, endpoint

assert endpoint  # fixtures
assert sessions

TALK = [
    "I bought a green canoe in Bergen last week",
    "How long is the canoe?",
    "It is four metres long and made of cedar",
    "My sister Ann wants to paddle it on Saturday",
]


@pytest.fixture
def worker(service: Service) -> Worker:
    """A worker whose jobs do not rest and that computes in this process."""
    tools = replace(service.worker._tools, jobs=Jobs(service.functions, rest=0), pool=Inline())
    return Worker(tools, service.worker._foreign)


@pytest.fixture
async def talk(sessions: Sessions, owner: Owner) -> list[str]:
    """A session with four messages, m0 to m3."""
    await sessions.open(owner, SessionInput(id="s"))
    messages = [MessageInput(id=f"m{i}", text=text) for i, text in enumerate(TALK)]
    await sessions.say(owner, "s", messages)
    return [str(message.id) for message in messages]


async def summary(service: Service, owner: Owner, session_id: str = "s") -> Summary:
    found = await service.views.summary(owner, "session", session_id)
    assert found is not None
    return found


async def due_ms(service: Service, owner: Owner, session_id: str) -> int | None:
    """Moment from which the summary of a session may be made; None when none is queued."""
    job = owner.job(f"summary:session:{session_id}")
    score = await service.client.execute("ZSCORE", JOBS_LATER, job)
    return None if score is None else int(score)


# jobs ------------------------------------------------------------------------------------------------


async def test_a_message_queues_the_summary_for_ten_minutes_later_and_a_close_for_soon(
    service: Service, owner: Owner
) -> None:
    now_s = 1_800_000_000.0
    await at(service, now_s).open(owner, SessionInput(id="s"))
    assert await due_ms(service, owner, "s") is None
    await at(service, now_s).say(owner, "s", said("one"))
    assert await due_ms(service, owner, "s") == (now_s + 600) * 1000
    await at(service, now_s + 60).say(owner, "s", said("two"))
    assert await due_ms(service, owner, "s") == (now_s + 600) * 1000
    await at(service, now_s + 61).close(owner, "s")
    assert await due_ms(service, owner, "s") == (now_s + 62) * 1000


async def test_a_new_session_queues_the_summary_of_the_newest_other_that_was_not_closed(
    service: Service, owner: Owner
) -> None:
    now_s = 1_800_000_000.0
    for i, name in enumerate(("old", "left", "ended", "closed")):
        await at(service, now_s + i).open(owner, SessionInput(id=name))
    await at(service, now_s + 4).close(owner, "closed")
    await service.client.execute("DEL", owner.session("ended"))
    await service.client.execute("DEL", JOBS_LATER)
    await at(service, now_s + 1.5).open(owner, SessionInput(id="left"))  # joining queues nothing
    assert await service.client.execute("EXISTS", JOBS_LATER) == 0
    await at(service, now_s + 10).open(owner, SessionInput(id="new"))
    assert await service.client.execute("ZRANGE", JOBS_LATER, 0, -1, "WITHSCORES") == [
        b"alice summary:session:left",
        str(int((now_s + 10) * 1000)).encode(),
    ]


# what is made ----------------------------------------------------------------------------------------


async def test_a_closed_session_is_summarised_within_its_budget(
    service: Service, sessions: Sessions, owner: Owner, worker: Worker, talk: list[str]
) -> None:
    await sessions.close(owner, "s")
    await worker.settle(ahead_s=2)
    made = await summary(service, owner)
    assert (made.kind, made.name, made.method) == ("session", "s", "extractive")
    assert set(made.sources) <= set(talk)
    assert "four metres" in made.text
    assert 0 < made.tokens == service.embedder.count_tokens([made.text])[0] <= BUDGETS["session"]
    assert await service.client.execute("PTTL", f"{owner.summary_prefix}session:s") > 0


async def test_a_long_session_keeps_to_the_budget_and_to_the_order_of_time(
    service: Service, sessions: Sessions, owner: Owner, worker: Worker
) -> None:
    await sessions.open(owner, SessionInput(id="s"))
    places = ["Bergen", "Oslo", "Porto", "Lima", "Kyoto", "Turin", "Accra", "Perth"]
    facts = [f"In {place} I met cousin {i} and repaired boat {i}" for i, place in enumerate(places * 5)]
    await sessions.say(owner, "s", [MessageInput(id=f"m{i:02}", text=fact) for i, fact in enumerate(facts)])
    await worker.make(owner, "summary:session:s")
    made = await summary(service, owner)
    assert BUDGETS["session"] / 2 < made.tokens <= BUDGETS["session"]
    assert made.sources == sorted(made.sources)
    assert 1 < len(made.sources) < len(facts)


async def test_a_summary_is_of_its_session_only(
    service: Service, sessions: Sessions, owner: Owner, worker: Worker, talk: list[str]
) -> None:
    await sessions.open(owner, SessionInput(id="S"))
    await sessions.say(owner, "S", [MessageInput(id="other", text="The violin concert is in May in Vienna")])
    await service.writer.put(owner, [MemoryInput(id="outside", text="Quinces ripen late in October")])
    await worker.make(owner, "summary:session:S")
    await worker.make(owner, "summary:session:s")
    assert (await summary(service, owner, "S")).sources == ["other"]
    assert set((await summary(service, owner, "s")).sources) <= set(talk)


async def test_a_session_that_goes_on_is_summarised_again(
    service: Service, sessions: Sessions, owner: Owner, worker: Worker, talk: list[str]
) -> None:
    await worker.settle(ahead_s=601)
    before = await summary(service, owner)
    more = MessageInput(id="more", text="We sold the tandem bicycle to a baker from Ghent")
    await sessions.say(owner, "s", [more])
    assert (await summary(service, owner)).sources == before.sources
    await worker.settle(ahead_s=601)
    assert "more" in (await summary(service, owner)).sources


async def test_a_session_left_open_is_summarised_when_the_next_one_opens(
    service: Service, sessions: Sessions, owner: Owner, worker: Worker, talk: list[str]
) -> None:
    await sessions.open(owner, SessionInput(id="next"))
    await worker.settle()
    assert "four metres" in (await summary(service, owner)).text


async def test_a_session_is_summarised_although_it_has_ended(
    service: Service, owner: Owner, worker: Worker, talk: list[str]
) -> None:
    await service.client.execute("DEL", owner.session("s"))
    await worker.settle(ahead_s=601)
    assert set((await summary(service, owner)).sources) <= set(talk)


async def test_a_language_model_is_told_the_messages_in_order(
    service: Service, owner: Owner, worker: Worker, talk: list[str], endpoint: Endpoint
) -> None:
    model = LanguageModel(endpoint.url, "tiny-chat", timeout_s=2.0)
    writing = Worker(replace(worker._tools, language_model=model), service.worker._foreign)
    await writing.make(owner, "summary:session:s")
    made = await summary(service, owner)
    assert (made.text, made.method, made.sources) == (WRITTEN, "tiny-chat", talk)
    (request,) = endpoint.requests
    asked = "\n".join(message["content"] for message in request["messages"])
    assert "conversation" in asked
    assert [asked.index(text) for text in TALK] == sorted(asked.index(text) for text in TALK)
    await model.close()


# when it goes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["delete", "correct", "update", "elsewhere"])
async def test_a_summary_goes_with_a_source_and_is_made_of_what_is_left(
    service: Service, owner: Owner, worker: Worker, talk: list[str], how: str
) -> None:
    await worker.make(owner, "summary:session:s")
    assert "m2" in (await summary(service, owner)).sources
    await service.client.execute("DEL", JOBS_LATER)
    writer = service.writer
    match how:
        case "delete":
            await writer.delete(owner, "m2")
        case "correct":
            new = MemoryInput(id="new", text="It is five metres long", memory_type="message", session_id="s")
            await writer.correct(owner, CorrectionRequest(ids=["m2"], memory=new))
        case "update":
            await writer.update(owner, "m2", MemoryPatch(text="It is five metres long"))
        case "elsewhere":
            await service.client.execute("HSET", owner.memory("m2"), "text", "It is five metres long")
    assert await service.views.summary(owner, "session", "s") is None
    await worker.settle(ahead_s=2)
    made = await summary(service, owner)
    assert "four metres" not in made.text
    assert ("five metres" in made.text) == (how != "delete")


async def test_a_message_that_moved_to_another_session_is_not_in_the_next_summary(
    service: Service, owner: Owner, worker: Worker, talk: list[str]
) -> None:
    await service.writer.update(owner, "m2", MemoryPatch(session_id="t"))
    for name in ("s", "t"):
        await worker.make(owner, f"summary:session:{name}")
    assert "m2" not in (await summary(service, owner, "s")).sources
    assert (await summary(service, owner, "t")).sources == ["m2"]


async def test_a_message_that_moves_away_while_it_is_read_is_not_in_the_summary(
    service: Service, owner: Owner, worker: Worker, talk: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    matching = worker._tools.library.matching

    async def moving(*args: Any) -> list[str]:
        found = await matching(*args)
        await service.writer.update(owner, "m2", MemoryPatch(session_id="t"))
        return found

    monkeypatch.setattr(worker._tools.library, "matching", moving)
    await worker.make(owner, "summary:session:s")
    sources = (await summary(service, owner)).sources
    assert sources
    assert "m2" not in sources


async def test_a_session_without_messages_left_has_no_summary(
    service: Service, sessions: Sessions, owner: Owner, worker: Worker, talk: list[str]
) -> None:
    await worker.make(owner, "summary:session:s")
    for memory_id in talk:
        await service.writer.delete(owner, memory_id)
    await worker.settle(ahead_s=601)
    assert await service.client.execute("EXISTS", f"{owner.summary_prefix}session:s") == 0
    with pytest.raises(NotFound):
        await service.views.summary(owner, "session", "s")


async def test_forgetting_leaves_no_summary_and_no_job_of_a_session(
    service: Service, sessions: Sessions, owner: Owner, worker: Worker, talk: list[str]
) -> None:
    await worker.make(owner, "summary:session:s")
    await sessions.close(owner, "s")
    await service.writer.forget(owner)
    assert await service.client.execute("KEYS", "*{alice}*") == []
    assert await due_ms(service, owner, "s") is None
    assert await worker.settle(ahead_s=601) == 0


async def test_summaries_made_while_agents_speak_hold_nothing_that_is_gone(
    service: Service, sessions: Sessions, owner: Owner, worker: Worker
) -> None:
    await sessions.open(owner, SessionInput(id="s"))

    async def speak(agent: int) -> None:
        for i in range(5):
            memory_id = f"m{agent}{i}"
            text = f"Agent {agent} counted {i} herons at the lake"
            await sessions.say(owner, "s", [MessageInput(id=memory_id, text=text, agent=f"a{agent}")])
            if i % 2:
                await service.writer.delete(owner, memory_id)

    async def summarise() -> None:
        for _ in range(5):
            await service.jobs.queue(owner, "summary:session:s")
            await worker.settle()

    await asyncio.gather(*(speak(agent) for agent in range(3)), summarise())
    await worker.settle(ahead_s=601)
    made = await summary(service, owner)
    assert made.sources
    assert all(int(source[-1]) % 2 == 0 for source in made.sources)


# over HTTP -------------------------------------------------------------------------------------------


def path(session_id: str, user: str = "alice") -> str:
    return f"/v1/users/{user}/summaries/session/{quote(session_id, safe='').replace('.', '%2E')}"


@pytest.mark.parametrize("name", [*NAMES, "..", "a/b", "ana" * 80])
async def test_a_summary_of_any_session_is_read_by_its_id(
    service: Service, sessions: Sessions, owner: Owner, worker: Worker, http: httpx.AsyncClient, name: str
) -> None:
    for session_id in (name, name[:-1] + "~"):
        await sessions.open(owner, SessionInput(id=session_id))
        await sessions.say(owner, session_id, said(f"We sailed to Porto, the {len(session_id)}th time"))
    await service.client.execute("DEL", JOBS_LATER)
    queued = await http.get(path(name))
    assert (queued.status_code, queued.json()) == (202, {"status": "queued"})
    assert await worker.settle() == 1
    reply = await http.get(path(name))
    assert reply.status_code == 200, reply.text
    told: dict[str, Any] = reply.json()
    (message,) = (await sessions.get(owner, name, 10)).recent
    assert (told["kind"], told["name"], told["sources"]) == ("session", name, [message.id])
    assert "Porto" in told["text"]


@pytest.mark.parametrize(("session_id", "user"), [("none", "alice"), ("S", "alice"), ("s", "bob")])
async def test_what_no_message_belongs_to_is_not_found(
    talk: list[str], http: httpx.AsyncClient, session_id: str, user: str
) -> None:
    reply = await http.get(path(session_id, user))
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found")


async def test_a_session_nobody_spoke_in_has_no_summary(
    sessions: Sessions, owner: Owner, http: httpx.AsyncClient, talk: list[str]
) -> None:
    await sessions.open(owner, SessionInput(id="silent"))
    await sessions.close(owner, "silent")
    assert (await http.get(path("silent"))).status_code == 404


async def test_a_session_id_with_control_characters_is_refused(http: httpx.AsyncClient) -> None:
    reply = await http.get(path("a\nb"))
    assert (reply.status_code, reply.json()["error"]["field"]) == (422, "name")
