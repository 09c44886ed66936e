"""The worker on a real Redis: what each kind of job makes, what fails, what other hands write, and decay."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import pytest
from aredis_om import get_redis_connection
from redis.asyncio import Redis

from redismem.client import Argument
from redismem.jobs import MOST_TRIES, Jobs
from redismem.keys import JOBS_LATER, WEIGHTS, Owner
from redismem.om import memory_model
from redismem.service import Service
from redismem.types import MemoryInput, MemoryPatch
from redismem.views import BUDGETS, Profile, ProfilePatch, Summary, SummaryKind
from redismem.weights import default_importance, temporal_weights
from redismem.worker import links
from redismem.worker import worker as module
from redismem.worker.llm import LanguageModel
from redismem.worker.rounds import nightly
from redismem.worker.summaries import summary
from redismem.worker.tools import Overtaken, Tools
from redismem.worker.worker import Worker
from tests.conftest import until
from tests.property.test_derived_model import Handler, Inline, Stored, check, check_cosines, edges_of, stored
from tests.worker.test_llm import WRITTEN, Endpoint, endpoint, says, status

assert endpoint  # a fixture

DAY_S = 86_400
#: seconds ahead that cover every delay of a job
AHEAD_S = 7200.0
PLANTS = "tomato pepper bean carrot onion leek squash".split()
PIECES = "first second third fourth fifth sixth seventh".split()
GARDEN = "I watered the {} seedlings in the greenhouse and added compost to the beds"
MUSIC = "I practised the {} sonata on the violin for the orchestra concert in May"
FACTS = ["My name is Ada. I am a baker", "I am working on a thriller about bread", "I prefer short answers"]


def life() -> list[MemoryInput]:
    texts = [*(GARDEN.format(one) for one in PLANTS), *(MUSIC.format(one) for one in PIECES), *FACTS]
    return [MemoryInput(id=f"m{i}", text=text, entities=["Ben"][i % 3 :]) for i, text in enumerate(texts)]


def another(service: Service, **tools: Any) -> Worker:
    """Return a worker whose jobs do not rest and that computes in this process."""
    given = {"jobs": Jobs(service.functions, rest=0), "pool": Inline(), **tools}
    return Worker(replace(service.worker._tools, **given), service.worker._foreign)


@dataclass(frozen=True)
class Alice:
    """A user, and a worker that does her jobs."""

    service: Service
    owner: Owner
    worker: Worker

    async def put(self, *memories: MemoryInput) -> None:
        await self.service.writer.put(self.owner, memories)

    async def update(self, memory_id: str, **changes: Any) -> None:
        await self.service.writer.update(self.owner, memory_id, MemoryPatch(**changes))

    async def execute(self, *command: Argument) -> Any:
        return await self.service.client.execute(*command)

    async def settle(self) -> int:
        return await self.worker.settle(ahead_s=AHEAD_S)

    async def make(self, kind: str) -> None:
        await self.worker.make(self.owner, kind)

    async def profile(self) -> Profile:
        return (await self.service.views.profile(self.owner)).profile

    async def summary(self, kind: SummaryKind, name: str) -> Summary:
        found = await self.service.views.summary(self.owner, kind, name)
        assert found is not None
        return found

    async def stored(self) -> Stored:
        return await stored(self.service.client, self.owner)


@pytest.fixture
def alice(service: Service, owner: Owner) -> Alice:
    return Alice(service, owner, another(service))


# what each kind makes ----------------------------------------------------------------------------------


async def test_a_write_leads_to_profile_topics_edges_and_summaries(alice: Alice) -> None:
    await alice.put(*life())
    assert await alice.settle() > 5
    await alice.make("profile")  # of the topics as well
    profile = await alice.profile()
    assert profile.display_name == "Ada"
    assert profile.current_projects
    assert profile.compiled_at is not None
    assert set(profile.topic_cluster_ids.values()) == {"1", "2"}
    topics = (await alice.service.views.topics(alice.owner)).topics
    assert sorted(topic.size for topic in topics) == [7, 7]
    assert all(topic.summary for topic in topics)
    near = await alice.service.views.similar(alice.owner, "m0", 6)
    assert near.precomputed
    assert {one.id for one in near.similar} == {f"m{i}" for i in range(1, 7)}
    assert set((await alice.summary("entity", "Ben")).sources) <= {f"m{i}" for i in range(0, 17, 3)}
    assert (await alice.summary("day", time.strftime("%Y-%m-%d", time.gmtime()))).text
    check(await alice.stored())
    counts = await alice.service.jobs.counts()
    assert (counts.waiting, counts.started, counts.failing, counts.dead) == (0, 0, 0, 0)
    assert [alice.worker.counts[f"{kind} done"] for kind in ("link", "topics", "periods")] == [1, 1, 1]


async def test_summaries_and_the_profile_keep_their_budgets(alice: Alice) -> None:
    more = "{}, and number {} was a long day with {}much to tell"
    texts = [more.format(memory.text, i, "quite " * (i % 7)) for i, memory in enumerate(life() * 4)]
    await alice.put(*(MemoryInput(text=text, entities=["Ben"]) for text in texts))
    await alice.settle()
    found = await alice.stored()
    assert {name.split(":")[0] for name in found.each("summary")} == set(BUDGETS) - {"profile", "session"}
    for name, fields in found.each("summary").items():
        (tokens,) = alice.service.embedder.count_tokens([fields["text"].decode()])
        assert int(fields["tokens"]) == tokens
        assert 10 < tokens <= BUDGETS[name.split(":")[0]], name
    told = (await alice.profile()).context_summary
    assert 0 < alice.service.embedder.count_tokens([told])[0] <= BUDGETS["profile"]


async def test_the_services_own_worker_computes_in_another_process(alice: Alice) -> None:
    await alice.put(*life())
    await alice.service.worker.make(alice.owner, "profile")
    assert (await alice.profile()).display_name == "Ada"


async def test_many_new_memories_are_linked_as_few_are(alice: Alice, monkeypatch: pytest.MonkeyPatch) -> None:
    await alice.put(*life())
    await alice.execute("DEL", JOBS_LATER)
    found = []
    for few in (1000, 0):
        monkeypatch.setattr(links, "_FEW", few)
        await alice.execute("DEL", alice.owner.similar, alice.owner.conflicts)
        await alice.execute("SADD", alice.owner.fresh, "gone", *(f"m{i}" for i in range(len(life()))))
        await alice.make("link")
        assert await alice.execute("EXISTS", alice.owner.fresh) == 0
        found.append(edges_of(await alice.stored()))
    for ends in set(found[0]) | set(found[1]):
        pair = [edges.get(ends, 0.0) for edges in found]
        # of equals at the tenth place either may be left out
        assert pair == pytest.approx(pair[::-1], abs=2e-3) or min(pair) == 0.0
    assert len(set(found[0]) ^ set(found[1])) < 0.1 * len(found[0])


async def test_a_job_of_somebody_who_was_forgotten_makes_nothing(alice: Alice) -> None:
    for kind in ("link", "topics", "profile", "periods", "embed", "decay", "summary:entity:Ben"):
        await alice.service.jobs.queue(Owner("nobody"), kind)
    assert await alice.worker.settle() == 7
    assert await alice.execute("KEYS", "redismem:*nobody*") == []
    assert (await alice.service.jobs.counts()).dead == 0


@pytest.mark.parametrize(("hour", "kinds"), [(2, {"hourly"}), (4, {"hourly", "nightly"})])
async def test_rounds_are_queued_once_for_all_workers(service: Service, hour: int, kinds: set[str]) -> None:
    now_s = 20_000 * DAY_S + hour * 3600.0
    workers = [another(service, clock=lambda: now_s) for _ in range(3)]
    for _ in range(2):
        await asyncio.gather(*(one.look_at_clock() for one in workers))
        names = await service.client.execute("ZRANGE", JOBS_LATER, 0, -1)
        assert {name.decode().strip() for name in names} == kinds
    await service.client.execute("DEL", JOBS_LATER)
    await workers[0].look_at_clock()
    assert await service.client.execute("EXISTS", JOBS_LATER) == 0


async def test_the_hourly_round_compiles_profiles_of_active_users_that_are_old(service: Service) -> None:
    now_s = time.time()
    for user in ("active", "compiled", "idle"):
        await service.writer.put(Owner(user), [MemoryInput(text="I sing")])
    await service.client.execute("HSET", Owner("compiled").profile, "compiled_at", now_s)
    await service.client.execute("HSET", Owner("idle").meta, "last_activity", now_s - 7300, "last_read", 0)
    await service.client.execute("DEL", JOBS_LATER)
    await module._OF_STORE["hourly"](another(service)._tools)
    assert await service.client.execute("ZRANGE", JOBS_LATER, 0, -1) == [b"active profile"]


# failing and sharing --------------------------------------------------------------------------------


async def failing(tools: Tools, owner: Owner) -> None:
    raise ValueError(await tools.client.execute("HGET", owner.memory("a"), "text"))


async def test_a_job_that_fails_is_tried_five_times_and_dies_without_memory_text(
    alice: Alice, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(module._OF_OWNER, "profile", failing)
    await alice.put(MemoryInput(id="a", text="secret zebra"))
    with caplog.at_level(logging.INFO):
        await alice.settle()
    counts = alice.worker.counts
    assert (counts["profile retried"], counts["profile dead"]) == (MOST_TRIES - 1, 1)
    (letter,) = await alice.service.jobs.dead()
    assert (letter.job, letter.error) == (alice.owner.job("profile"), "ValueError")
    assert "ValueError" in caplog.text
    assert "zebra" not in caplog.text
    monkeypatch.undo()
    await alice.service.jobs.retry()
    await alice.settle()
    assert (await alice.profile()).compiled_at is not None
    assert (await alice.service.jobs.counts()).dead == 0


async def test_what_keeps_changing_is_tried_later(alice: Alice, monkeypatch: pytest.MonkeyPatch) -> None:
    await alice.put(MemoryInput(id="a", text="I prefer tea", memory_type="preference"))
    await alice.settle()
    recent, number = alice.worker._tools.library.recent, iter(range(99))

    async def changing(who: Owner, most: int) -> Any:
        read = await recent(who, most)
        await alice.service.writer.update(who, "a", MemoryPatch(text=f"I prefer tea {next(number)}"))
        return read

    monkeypatch.setattr(alice.worker._tools.library, "recent", changing)
    with pytest.raises(Overtaken):
        await alice.make("profile")
    assert next(number) == 5
    assert not (await alice.stored()).hash("profile")


async def test_two_workers_share_the_jobs(service: Service) -> None:
    owners = [Owner(f"u{i}") for i in range(12)]
    for one in owners:
        await service.writer.put(one, [MemoryInput(id="a", text="I am a baker", importance=0.9)])
    workers = [another(service) for _ in range(2)]
    await workers[0].step()  # makes the group
    await service.jobs.start(ahead_s=10)
    await asyncio.gather(*(one.settle(ahead_s=10) for one in workers))
    done = [one.counts["profile done"] for one in workers]
    assert sum(done) == len(owners)
    assert min(done) > 0
    for one in owners:
        assert (await service.views.profile(one)).profile.compiled_at is not None


# other hands, and a language model ------------------------------------------------------------------


@asynccontextmanager
async def running(*workers: Worker) -> AsyncIterator[None]:
    """Let workers run, as a process that serves does."""
    tasks = [asyncio.create_task(one.run()) for one in workers]
    yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def is_embedded(alice: Alice, memory_id: str) -> bool:
    raw = await alice.execute("HMGET", alice.owner.memory(memory_id), "embedder", "embedding")
    listed = await alice.execute("ZSCORE", alice.owner.ids, memory_id)
    return raw[0] == alice.service.embedder.name.encode() and bool(raw[1]) and listed is not None


@pytest.mark.parametrize("is_known", [True, False])
async def test_what_another_program_sets_is_embedded_within_seconds(alice: Alice, is_known: bool) -> None:
    if is_known:
        await alice.put(MemoryInput(id="ours", text="Ann sings"))
    await until("pushes come", lambda: asyncio.sleep(0, alice.service.coherence.is_listening))
    async with running(alice.worker), Redis.from_url(alice.service.settings.redis_url) as theirs:
        await theirs.hset(alice.owner.memory("theirs"), mapping={"text": "Ben paints boats"})
        await theirs.hset(alice.owner.memory("bare"), mapping={"note": "no text"})
        await until("it is embedded", lambda: is_embedded(alice, "theirs"))
        await until("it is linked", lambda: alice.execute("HEXISTS", alice.owner.similar, "otheirs"))
    assert not await is_embedded(alice, "bare")
    await alice.execute("DEL", alice.owner.memory("bare"))


async def test_a_memory_that_redis_om_saves_is_embedded_within_seconds(alice: Alice) -> None:
    await alice.put(MemoryInput(id="ours", text="Ann sings"))
    await until("pushes come", lambda: asyncio.sleep(0, alice.service.coherence.is_listening))
    database = get_redis_connection(url=alice.service.settings.redis_url, encoding_errors="surrogateescape")
    async with running(alice.worker), database:
        model: Any = memory_model("alice", database=database)
        saved = await model(text="Ben paints boats").save()
        await until("it is embedded", lambda: is_embedded(alice, saved.pk))


async def test_extracts_stand_in_for_a_language_model_that_fails(alice: Alice, endpoint: Endpoint) -> None:
    await alice.put(*life())
    model = LanguageModel(endpoint.url, "tiny-chat", timeout_s=2.0)
    worker = another(alice.service, language_model=model)
    endpoint.answers = [says(WRITTEN), says("I'm sorry, I cannot help with that."), status(500)]
    methods = []
    for _ in range(4):
        await worker.make(alice.owner, "summary:entity:Ben")
        made = await alice.summary("entity", "Ben")
        assert made.text
        methods.append((made.method, made.text == WRITTEN))
    assert methods == [("tiny-chat", True), *[("extractive", False)] * 3]
    assert len(endpoint.requests) == 3  # the last was not asked: it had failed a moment ago
    asked = msgspec.json.encode(endpoint.requests[0]).decode()
    assert all(GARDEN.format(PLANTS[i]) in asked for i in (0, 3, 6))
    check(await alice.stored())
    await model.close()


async def test_what_a_caller_set_survives_a_drop_and_a_compilation(alice: Alice) -> None:
    await alice.put(*life())
    await alice.make("profile")
    change, given = alice.service.views.change_profile, ProfilePatch(display_name="Zoe", known_expertise=[])
    profile = await change(alice.owner, given)
    assert profile.patched == ["display_name", "known_expertise"]
    await alice.service.writer.delete(alice.owner, "m16")
    raw = (await alice.stored()).hash("profile")
    assert set(raw) == {"display_name", "known_expertise", "patched"}
    await alice.make("profile")
    profile = await alice.profile()
    assert (profile.display_name, profile.known_expertise) == ("Zoe", [])
    assert profile.compiled_at is not None
    profile = await change(alice.owner, ProfilePatch(display_name=None))
    assert (profile.display_name, profile.patched) == (None, ["known_expertise"])
    await alice.make("profile")
    assert (await alice.profile()).display_name == "Ada"


# a handler between two of its round trips ----------------------------------------------------------


async def overtaken(
    alice: Alice, work: Callable[[Tools], Awaitable[None]], steps: int, change: Awaitable[object]
) -> None:
    """Let a handler do some round trips, change something, and let it end."""
    handler = Handler(alice.service, Counter(), work, "work")
    for _ in range(steps):
        assert not await handler.step()
    await change
    while not await handler.step():
        pass


@pytest.mark.parametrize("steps", range(1, 9))
async def test_an_edge_is_not_made_to_what_a_neighbour_became_meanwhile(alice: Alice, steps: int) -> None:
    """The fifth step is the search for the neighbours, the seventh reads them."""
    await alice.put(*life()[:3])
    await alice.execute("DEL", alice.owner.fresh)
    await alice.execute("SADD", alice.owner.fresh, "m0")
    change = alice.put(MemoryInput(id="m1", text="Zebras run fast"))
    await overtaken(alice, lambda tools: links.link(tools, alice.owner), steps, change)
    found = await alice.stored()
    assert ("m0", "m2") in edges_of(found)
    check_cosines(found)


async def test_no_edge_is_made_to_a_turn_whose_vector_went(
    alice: Alice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vector of a turn is of the turn before as well, which is deleted after the neighbours were read."""
    turns = [MemoryInput(id=one, text=f"{one} about boats", session_id="s") for one in ("before", "after")]
    await alice.service.writer.put(alice.owner, [*turns, MemoryInput(id="c", text="c about boats")])
    await alice.execute("DEL", alice.owner.fresh)
    await alice.execute("SADD", alice.owner.fresh, "c")
    monkeypatch.setattr(alice.service.backfill, "add", lambda *_: None)
    change = alice.service.writer.delete(alice.owner, "before")
    await overtaken(alice, lambda tools: links.link(tools, alice.owner), 7, change)
    assert ("c", "after") not in edges_of(await alice.stored())


async def test_a_summary_is_not_made_from_what_left_its_entity_meanwhile(alice: Alice) -> None:
    await alice.put(*life()[:4])
    change = alice.update("m0", entities=["Anna"])
    await overtaken(alice, lambda tools: summary(tools, alice.owner, "entity", "Ben"), 1, change)
    assert "m0" not in (await alice.summary("entity", "Ben")).sources


# decay -----------------------------------------------------------------------------------------------


async def importance(alice: Alice, memory_id: str = "a") -> tuple[float, bytes | None]:
    raw = await alice.execute("HMGET", alice.owner.memory(memory_id), "importance", "base_importance")
    return float(raw[0]), raw[1]


async def decayed(alice: Alice, days: float, *ids: str) -> int:
    """Let importance decay as of so many days from now; return how many changed."""
    await nightly(alice.service.worker._tools)
    now_ms = int((time.time() + days * DAY_S) * 1000) + 1000
    keys = [alice.owner.meta, *alice.owner.derived, WEIGHTS]
    head = alice.owner.memory_prefix, now_ms, "0.01"
    return int(await alice.service.functions.call("rm_decay_v1", keys, *head, *(ids or "a")))


@pytest.fixture
async def half_life(alice: Alice) -> float:
    """Days in which the importance of the memory `a`, 0.8, halves."""
    await alice.put(MemoryInput(id="a", text="Ann sings", importance=0.8))
    return alice.service.settings.half_life_days


async def test_importance_halves_in_a_half_life_of_its_type(alice: Alice, half_life: float) -> None:
    kinds = {"e": "semantic", "f": "preference", "g": "episodic", "h": "whatever"}
    for one, kind in kinds.items():
        await alice.put(MemoryInput(id=one, text=f"it is {one}", memory_type=kind, importance=0.8))
    assert await decayed(alice, half_life, *kinds) == 4
    got = [await importance(alice, one) for one in kinds]
    assert [value for value, _ in got] == pytest.approx([0.4, 0.8 * 0.5**0.5, 0.2, 0.4], abs=0.005)
    assert {base for _, base in got} == {b"0.8"}
    assert await decayed(alice, 2 * half_life, "e") == 1  # of the base, not of the last value
    assert (await importance(alice, "e"))[0] == pytest.approx(0.2, abs=0.005)


async def test_an_access_counts_as_new(alice: Alice, half_life: float) -> None:
    assert await decayed(alice, half_life) == 1
    await alice.execute("ZADD", alice.owner.used, time.time() + half_life * DAY_S, "a")
    assert await decayed(alice, half_life) == 1
    assert (await importance(alice))[0] == 0.8
    assert await decayed(alice, 2 * half_life) == 1
    assert (await importance(alice))[0] == pytest.approx(0.4, abs=0.005)


@pytest.mark.parametrize("spelled", ["1", "True", "true"])
async def test_the_pinned_does_not_decay(alice: Alice, half_life: float, spelled: str) -> None:
    assert await decayed(alice, half_life) == 1
    await alice.execute("HSET", alice.owner.memory("a"), "pinned", spelled)
    assert await decayed(alice, 3 * half_life) == 1
    assert (await importance(alice))[0] == 0.8
    assert await decayed(alice, 9 * half_life) == 0


async def test_decay_begins_again_where_a_caller_sets_it(alice: Alice, half_life: float) -> None:
    await decayed(alice, half_life)
    await alice.update("a", importance=0.6)
    assert await importance(alice) == (0.6, None)
    await decayed(alice, half_life)
    assert await importance(alice) == (0.3, b"0.6")


@pytest.mark.parametrize("given", [0.6422, 0.8])
async def test_another_change_keeps_the_base_of_decay(alice: Alice, half_life: float, given: float) -> None:
    await alice.update("a", importance=given, confidence=0.99)
    for confidence in (0.5, 0.6):
        await decayed(alice, half_life)
        assert (await importance(alice))[1] == repr(given).encode()
        await alice.update("a", confidence=confidence)


async def test_new_content_decays_from_its_own_importance(alice: Alice, half_life: float) -> None:
    await decayed(alice, half_life)
    await alice.put(MemoryInput(id="a", text="It rains", importance=0.2))
    await decayed(alice, 0.0)
    assert (await importance(alice))[0] == 0.2


async def test_decay_writes_only_steps_and_keeps_what_was_made(alice: Alice, half_life: float) -> None:
    await alice.settle()
    before, meta = await alice.stored(), ("HGET", alice.owner.meta, "generation")
    generation = await alice.execute(*meta)
    assert await decayed(alice, 0.0, "a", "gone") == 0
    assert (await alice.stored(), await alice.execute(*meta)) == (before, generation)
    assert await decayed(alice, half_life, "a", "gone") == 1
    after = await alice.stored()
    assert after.derived == before.derived
    assert after.memories["a"]["version"] == await alice.execute(*meta) > generation


async def test_the_nightly_round_writes_weights_and_queues_decay(alice: Alice, half_life: float) -> None:
    await alice.execute("DEL", JOBS_LATER)
    await nightly(alice.worker._tools)
    flat = await alice.execute("HGETALL", WEIGHTS)
    table = {name.decode(): msgspec.json.decode(raw) for name, raw in zip(flat[::2], flat[1::2], strict=True)}
    wanted = temporal_weights(half_life)
    assert set(table) == set(wanted)
    assert all(table[kind] == pytest.approx(wanted[kind], abs=1e-6) for kind in wanted)
    names = await alice.execute("ZRANGE", JOBS_LATER, 0, -1)
    assert set(names) == {b"alice decay", b"alice profile", b"alice periods"}
    later = replace(alice.worker._tools, clock=lambda: time.time() + half_life * DAY_S)
    await module._OF_OWNER["decay"](later, alice.owner)
    assert (await importance(alice))[0] == pytest.approx(0.4, abs=0.005)


async def test_importance_that_nobody_gave_is_decided_by_type_and_wording(alice: Alice) -> None:
    memories = [
        MemoryInput(id="e", text="Eve is allergic to nuts", memory_type="fact"),
        MemoryInput(id="f", text="Thanks!", memory_type="message"),
    ]
    await alice.put(*memories)
    wanted = [default_importance(one.memory_type, one.text, one.pinned) for one in memories]
    assert [(await importance(alice, one))[0] for one in "ef"] == wanted
    assert wanted[0] > wanted[1] + 0.4
