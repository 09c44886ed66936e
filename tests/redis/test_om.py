"""redis-om users and the service work on the same memories."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from aredis_om import Migrator, NotFoundError, QueryNotSupportedError, get_redis_connection
from aredis_om.model.model import model_registry
from redis.asyncio import Redis

from redismem.errors import InvalidInput, Misconfigured, NotFound, VersionMismatch
from redismem.filters import Filters
from redismem.keys import STORE, Owner
from redismem.lualib import load_libraries
from redismem.om import memory_model
from redismem.reembed import Reembedder
from redismem.service import Service
from redismem.types import CorrectionRequest, Memory, MemoryInput, MemoryPatch, SearchRequest
from tests.conftest import lasting_keys

#: values a TAG field could mix up
ODD = [*"a|b a b A 50%7C a%7Cb x,y {} tab-le/.*?`~ @f:{*} * שלום".split(), 'it\'s \\ "q"', "🦓 ünï"]

FULL = MemoryInput(
    id="full {x}|y:z*",
    text='Ünïcode 🦓, "quotes" \\ back|slash\nand a second line',
    memory_type="episodic",
    topics=ODD,
    entities=["Anna-Lena O'Neil", "100% sure|really"],
    session_id="s|1,2",
    event_date=datetime(2024, 5, 8, 9, 30, 1, 123456, tzinfo=UTC),
    importance=0.123456789,
    confidence=0.25,
    pinned=True,
    metadata={"k|": "v%", "deep": {"n": [1, None, "é"]}},
)


@pytest.fixture
async def database(redis_url: str) -> AsyncIterator[Redis]:
    database = get_redis_connection(url=redis_url, encoding_errors="surrogateescape")
    yield database
    await database.aclose()


@pytest.fixture
def model(service: Service, database: Redis) -> Any:
    """The model of `owner`; Any, because its fields are expressions on the class."""
    return memory_model("alice", database=database)


async def put(service: Service, owner: Owner, *memories: MemoryInput) -> list[str]:
    reply = await service.writer.put(owner, memories)
    return [str(item.id) for item in reply.memories]


async def found(service: Service, owner: Owner, text: str, mode: Any = "keyword") -> list[str]:
    reply = await service.search(owner, SearchRequest(text=text, search_mode=mode, limit=100))
    return [hit.id for hit in reply.memories]


async def fields_of(service: Service, owner: Owner, memory_id: str) -> dict[bytes, bytes]:
    flat = await service.client.execute("HGETALL", owner.memory(memory_id))
    return dict(zip(flat[::2], flat[1::2], strict=True))


async def keys_of(service: Service) -> set[bytes]:
    return set(await lasting_keys(service.client))


def shared(memory: Any) -> dict[str, object]:
    """Return what redis-om and the service both show of a memory."""
    names = [name for name in Memory.__struct_fields__ if name not in {"id", "embedded"}]
    return {name: getattr(memory, name) for name in names}


@pytest.mark.parametrize("options", [{}, {"decode_responses": False}, {"protocol": 2}, {"protocol": 3}])
async def test_get_and_find_read_all_that_the_service_wrote(
    service: Service, owner: Owner, redis_url: str, options: dict[str, Any]
) -> None:
    ids = await put(service, owner, FULL, MemoryInput(text="only a text"))
    database = get_redis_connection(url=redis_url, encoding_errors="surrogateescape", **options)
    model: Any = memory_model("alice", database=database)
    for memory_id in ids:
        expected = await service.browser.get(owner, memory_id)
        assert expected.embedded
        for read in (await model.get(memory_id), await model.find(model.pk == memory_id).first()):
            assert read.pk == memory_id
            assert shared(read) == shared(expected)
    await database.aclose()


async def test_get_says_that_a_memory_is_not_there(model: Any) -> None:
    with pytest.raises(NotFoundError):
        await model.get("nothing")


async def test_find_answers_by_each_field(service: Service, owner: Owner, model: Any) -> None:
    noon = datetime(2024, 6, 1, 12, tzinfo=UTC)
    work = MemoryInput(
        id="work", text="The zebra report is late", topics=["work", "urgent"], importance=0.9, pinned=True
    )
    home = MemoryInput(
        id="home", text="Bake bread", topics=["home"], entities=["Anna"], session_id="a|b", event_date=noon
    )
    trip = MemoryInput(
        id="trip", text="Lisbon by train", memory_type="episodic", importance=0.1, confidence=0.5
    )
    await put(service, owner, work, home, trip)
    created = (await model.get("home")).created_at
    expectations: list[tuple[Any, set[str]]] = [
        (model.topics == "work", {"work"}),
        (model.topics << ["urgent", "home"], {"work", "home"}),
        (model.topics >> ["urgent", "home"], {"trip"}),
        (model.topics != "work", {"home", "trip"}),
        (model.topics.startswith("ho"), {"home"}),
        (model.topics.endswith("me"), {"home"}),
        (model.topics.contains("rgen"), {"work"}),
        (model.entities == "Anna", {"home"}),
        (model.entities == "anna", set()),
        (model.memory_type == "episodic", {"trip"}),
        (model.session_id == "a|b", {"home"}),
        (model.session_id == "a", set()),
        (model.pinned == True, {"work"}),  # noqa: E712  # an expression of redis-om
        (model.pinned == False, {"home", "trip"}),  # noqa: E712  # an expression of redis-om
        (model.importance >= 0.9, {"work"}),
        ((model.importance > 0.1) & (model.importance < 0.9), {"home"}),
        (model.confidence == 0.5, {"trip"}),
        (model.event_date == noon, {"home"}),
        (model.event_date < noon.replace(tzinfo=None), set()),
        (model.created_at == created, {"home"}),
        (model.created_at > created, {"trip"}),
        (model.updated_at >= created - timedelta(days=1), {"work", "home", "trip"}),
        (model.text % "the ZEBRA, or bread?", {"work", "home"}),
        ((model.topics == "home") | (model.pk == "trip"), {"home", "trip"}),
        (~(model.topics == "home") & (model.text % "zebra"), {"work"}),
    ]
    for expression, ids in expectations:
        query = model.find(expression)
        assert {memory.pk for memory in await query.all()} == ids, query.query
        assert await query.count() == len(ids), query.query
    in_order = [memory.pk for memory in await model.find().sort_by("-created_at").all()]
    assert in_order == ["trip", "home", "work"]
    assert [memory.pk async for memory in model.find().sort_by("created_at")] == in_order[::-1]


async def test_a_time_without_zone_is_utc(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    await model(text="noon", event_date=datetime(2024, 6, 1, 12, tzinfo=UTC)).save()
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        assert await model.find(model.event_date == datetime(2024, 6, 1, 12)).count() == 1  # the point
    time.tzset()


async def test_each_odd_value_finds_only_itself(service: Service, owner: Owner, model: Any) -> None:
    memories = [
        MemoryInput(id=f"id {value}", text=f"number {i}", topics=[value], entities=[value], session_id=value)
        for i, value in enumerate(ODD)
    ]
    await put(service, owner, *memories)
    for value in ODD:
        for field in (model.topics, model.entities, model.session_id):
            assert [memory.pk for memory in await model.find(field == value).all()] == [f"id {value}"]
        assert await model.find(model.pk == f"id {value}").count() == 1


async def test_projections_have_the_types_and_the_precision_of_whole_memories(
    service: Service, owner: Owner, model: Any
) -> None:
    await put(service, owner, FULL)
    whole = await model.get(FULL.id)
    names = ("topics", "created_at", "metadata", "pinned")
    expected = {name: getattr(whole, name) for name in names}
    assert await model.find().values(*names).all() == [expected]
    assert (await model.find().only("created_at").first()).created_at == whole.created_at


async def test_find_reads_past_the_first_page(service: Service, owner: Owner, model: Any) -> None:
    ids = [
        memory_id
        for first in range(0, 1050, 350)
        for memory_id in await put(
            service, owner, *(MemoryInput(text=f"memory {i}") for i in range(first, first + 350))
        )
    ]
    assert {memory.pk for memory in await model.find().all()} == set(ids)
    page = await model.find().sort_by("created_at").page(offset=1040, limit=20)
    assert [memory.pk for memory in page] == ids[1040:]


async def test_a_query_that_cannot_be_right_is_refused(model: Any) -> None:
    for expression in (
        model.text == "whole text",
        model.text % "?!",
        model.topics == "",
        model.topics << [],
        model.session_id == None,  # noqa: E711  # an expression of redis-om
        model.memory_type == 5,
    ):
        with pytest.raises(QueryNotSupportedError):
            await model.find(expression).all()


async def test_a_user_without_memories_has_none(model: Any) -> None:
    assert await model.find().all() == []
    assert await model.find(model.topics == "work").count() == 0
    with pytest.raises(NotFoundError):
        await model.find().first()


async def test_a_lost_index_is_not_an_empty_one(service: Service, owner: Owner, model: Any) -> None:
    await put(service, owner, MemoryInput(text="there"))
    await service.client.execute("FT.DROPINDEX", owner.physical_index("embedding"))
    with pytest.raises(Exception, match=r"(?i)index"):
        await model.find().all()


async def test_a_saved_memory_is_found_by_words_at_once_and_by_meaning_after_reembed(
    service: Service, owner: Owner, model: Any
) -> None:
    saved = await model(text="Der Löwe frisst “Straußeneier” 🦁").save()
    for words in ("Löwe", "lowe", "straußeneier", "STRAUSSENEIER", "🦁"):
        assert await found(service, owner, words) == [saved.pk], words
    assert await found(service, owner, "Löwe", "hybrid") == [saved.pk]
    assert await found(service, owner, "Löwe", "semantic") == []
    reembedder = Reembedder(service.client, service.functions, service.embedder)
    assert await reembedder.move(owner) == 1
    assert await found(service, owner, "Löwe", "semantic") == [saved.pk]
    assert (await service.tiers.page(owner, Filters(), 10, None)).total == 1


async def test_a_save_stores_what_the_service_would_store(service: Service, owner: Owner, model: Any) -> None:
    content = {name: getattr(FULL, name) for name in MemoryInput.__struct_fields__ if name != "id"}
    for values in (content, {"text": "only a text"}):
        [memory_id] = await put(service, owner, MemoryInput(**values))
        twin = await model(**values).save()
        ours, theirs = [await fields_of(service, owner, one) for one in (memory_id, twin.pk)]
        assert theirs.keys() == ours.keys() - {b"embedding", b"embedder"}
        differing = {name for name, value in theirs.items() if ours[name] != value}
        assert differing <= {b"pk", b"version", b"created_at", b"updated_at"}
        assert shared(twin) == shared(await service.browser.get(owner, twin.pk))
        assert await service.client.execute("ZSCORE", owner.ids, twin.pk) is not None
        assert [event.event for event in (await service.browser.history(owner, twin.pk)).events] == [
            "created"
        ]


async def test_http_serves_a_saved_memory(http: httpx.AsyncClient, model: Any) -> None:
    saved = await model(pk="from redis-om", text="Anna likes figs", topics=["food"]).save()
    url = "/v1/users/alice/memories/from%20redis-om"
    reply = await http.get(url)
    assert reply.status_code == 200
    assert (reply.json()["text"], reply.json()["topics"]) == (saved.text, ["food"])
    assert (await http.delete(url)).status_code == 200
    assert await model.find().all() == []


async def test_times_given_to_a_new_memory_are_kept(service: Service, owner: Owner, model: Any) -> None:
    moment = datetime(2020, 2, 29, 1, 2, 3, 456789, tzinfo=UTC)
    saved = await model(text="long ago", created_at=moment, event_date=moment.replace(tzinfo=None)).save()
    stored = await service.browser.get(owner, saved.pk)
    assert (stored.created_at, stored.event_date) == (moment, moment)
    assert saved.updated_at > moment


async def test_a_saved_turn_joins_its_session(service: Service, owner: Owner, model: Any) -> None:
    await put(service, owner, MemoryInput(text="When is it?", session_id="s"))
    saved = await model(text="In June", session_id="s").save()
    [tail, *_] = await service.functions.call(
        "rm_tails_ro_v1", [owner.turns], owner.memory_prefix, "s", read=True
    )
    assert tail.decode() == saved.pk


async def test_spaces_around_an_id_are_no_part_of_it(service: Service, owner: Owner, model: Any) -> None:
    assert (await model(pk=" spaced ", text="x").save()).pk == "spaced"
    assert (await service.browser.get(owner, "spaced")).text == "x"


async def test_a_hash_of_redis_cli_has_its_own_id_and_can_be_saved(
    service: Service, owner: Owner, model: Any
) -> None:
    await put(service, owner, MemoryInput(text="opens the index"))
    await service.client.execute("HSET", owner.memory("by hand"), "text", "a zebra")
    memory = await model.find(model.text % "zebra").first()
    assert memory.pk == "by hand"
    memory.topics = ["animals"]
    await memory.save()
    assert (await service.browser.get(owner, "by hand")).topics == ["animals"]


async def test_a_changed_text_drops_the_vector_and_other_changes_keep_it(
    service: Service, owner: Owner, model: Any
) -> None:
    [memory_id] = await put(service, owner, FULL)
    memory = await model.get(memory_id)
    memory.pinned, memory.event_date, memory.session_id = False, None, "s|1,2"
    await memory.save()
    fields = await fields_of(service, owner, memory_id)
    assert {b"embedding", b"embedder"} <= fields.keys()
    assert fields.keys().isdisjoint({b"event_date", b"day"})
    memory.text = "plain words about a giraffe"
    await memory.save()
    fields = await fields_of(service, owner, memory_id)
    assert fields.keys().isdisjoint({b"embedding", b"embedder", b"words"})
    assert await found(service, owner, "giraffe") == [memory_id]
    assert await found(service, owner, "quotes") == []
    assert await Reembedder(service.client, service.functions, service.embedder).move(owner) == 1
    assert await found(service, owner, "giraffe", "semantic") == [memory_id]


async def test_a_new_object_with_an_old_id_replaces_the_memory(
    service: Service, owner: Owner, model: Any
) -> None:
    [memory_id] = await put(service, owner, FULL)
    created = (await model.get(memory_id)).created_at
    await model(pk=memory_id, text="something else").save()
    stored = await service.browser.get(owner, memory_id)
    assert (stored.text, stored.topics, stored.session_id) == ("something else", [], None)
    assert (stored.created_at, stored.embedded) == (created, False)


async def test_a_save_does_not_undo_what_happened_since_the_read(
    service: Service, owner: Owner, model: Any
) -> None:
    changed, superseded, deleted = await put(
        service, owner, *(MemoryInput(text=f"the {word} one") for word in ("first", "second", "third"))
    )
    old = {memory.pk: memory for memory in await model.find().all()}
    await service.writer.update(owner, changed, MemoryPatch(importance=0.9))
    correction = CorrectionRequest(ids=[superseded], memory=MemoryInput(text="the corrected one"))
    await service.writer.correct(owner, correction)
    await service.writer.delete(owner, deleted)
    for memory_id in (changed, superseded):
        with pytest.raises(VersionMismatch):
            await old[memory_id].save()
    with pytest.raises(NotFoundError):
        await old[deleted].save()
    assert await service.client.execute("EXISTS", owner.memory(deleted)) == 0
    assert superseded not in await found(service, owner, "one")


async def test_superseded_memories_are_hidden_unless_asked_for(
    service: Service, owner: Owner, model: Any
) -> None:
    [old] = await put(service, owner, MemoryInput(text="She lives in Bern", topics=["home"]))
    request = CorrectionRequest(ids=[old], memory=MemoryInput(text="She lives in Rome", topics=["home"]))
    new = (await service.writer.correct(owner, request)).id
    for query in (model.find(), model.find(model.topics == "home"), model.find(model.text % "lives")):
        assert [memory.pk for memory in await query.all()] == [new]
    replaced = await model.find(model.superseded_by == new).all()
    assert [(memory.pk, memory.superseded_by) for memory in replaced] == [(old, new)]
    is_old, is_new = model.superseded_by != None, model.superseded_by == None  # noqa: E711  # expressions of redis-om
    assert await model.find(is_old).count() == 1
    assert await model.find(is_old | is_new).count() == 2
    replaced[0].importance = 0.1
    await replaced[0].save()
    assert await found(service, owner, "lives") == [new]
    assert (await model.get(old)).superseded_by == new


async def test_a_delete_by_redis_om_is_a_delete_of_ours(service: Service, owner: Owner, model: Any) -> None:
    ids = await put(service, owner, *(MemoryInput(text=f"memory {i}", topics=[str(i)]) for i in range(6)))
    assert await model.delete(ids[0]) == 1
    assert await model.delete(ids[0]) == 0
    assert await model.delete_many([await model.get(memory_id) for memory_id in ids[1:3]]) == 2
    assert await model.find(model.topics << ["3", "4"]).delete() == 2
    assert await model.find(model.topics == "none").delete() == 0
    assert await service.client.execute("ZRANGE", owner.ids, 0, -1) == [ids[5].encode()]
    for memory_id in ids[:5]:
        assert (await service.browser.history(owner, memory_id)).events[-1].event == "deleted"
        with pytest.raises(NotFound):
            await service.browser.get(owner, memory_id)


async def test_updates_of_redis_om_go_the_same_way(service: Service, owner: Owner, model: Any) -> None:
    first, second = await put(service, owner, MemoryInput(text="one"), MemoryInput(text="two"))
    await (await model.get(first)).update(topics=["a|b"], pinned=True)
    await model.find(model.pinned == True).update(use_transaction=False, importance=1.0)  # noqa: E712  # an expression of redis-om
    stored = await service.browser.get(owner, first)
    assert (stored.topics, stored.pinned, stored.importance, stored.embedded) == (["a|b"], True, 1.0, True)
    assert (await service.browser.get(owner, second)).importance == 0.5


async def test_what_would_hide_an_outcome_is_refused(service: Service, model: Any, database: Redis) -> None:
    before = await keys_of(service)
    memory = model(text="not stored")
    with pytest.raises(QueryNotSupportedError):
        await memory.save(pipeline=database.pipeline())
    with pytest.raises(QueryNotSupportedError):
        await memory.save(nx=True)
    with pytest.raises(QueryNotSupportedError):
        await memory.save(field_expirations={"text": 1})
    with pytest.raises(QueryNotSupportedError):
        await model.add([memory])
    assert await keys_of(service) == before


@pytest.mark.parametrize(
    "wrong",
    [
        {"text": " "},
        {"text": "x" * 40_000},
        {"text": "a\0b"},
        {"text": "\udc80"},
        {"text": "x", "importance": 1.5},
        {"text": "x", "memory_type": "No Type"},
        {"text": "x", "topics": [""]},
        {"text": "x", "pk": "i" * 300},
        {"text": "x", "metadata": {"k": "v" * 20_000}},
        {"text": "x", "metadata": {"k": object()}},
    ],
)
async def test_a_wrong_value_is_not_saved(service: Service, model: Any, wrong: dict[str, Any]) -> None:
    before = await keys_of(service)
    with pytest.raises(InvalidInput):
        await model(**wrong).save()
    assert await keys_of(service) == before


async def test_a_store_that_no_service_opened_is_not_written(
    service: Service, owner: Owner, model: Any
) -> None:
    await service.client.execute("DEL", STORE)
    with pytest.raises(Misconfigured, match="redismem serve"):
        await model(text="too early").save()
    await service.client.execute("FUNCTION", "FLUSH")
    with pytest.raises(Misconfigured, match="redismem serve"):
        await model(text="too early").save()
    assert await keys_of(service) == set()
    await load_libraries(service.client)


async def test_migrations_of_redis_om_leave_the_index_alone(
    service: Service, owner: Owner, model: Any, database: Redis
) -> None:
    [memory_id] = await put(service, owner, FULL)

    class Derived(model):  # type: ignore[misc]  # model is Any
        """What a user may write."""

    keys, indexes = await keys_of(service), await service.client.execute("FT._LIST")
    assert not {model, Derived} & set(model_registry.values())
    migrator: Any = Migrator
    await migrator().run()
    with pytest.MonkeyPatch.context() as patch:  # even one that registers our classes
        patch.setitem(model_registry, "ours", model)
        patch.setitem(model_registry, "derived", Derived)
        await migrator(conn=database).run()
    assert (await keys_of(service), await service.client.execute("FT._LIST")) == (keys, indexes)
    assert await found(service, owner, "unicode", "semantic") == [memory_id]


HOSTILE = [
    *r"""b u1 u10 U1 u1: u1:x a|b a,b a/b a%2Fb {u1} } * ? [u] ~ \ " ../x 🦓 é""".split(),
    *(" ", "\n", "e\u0301", "u" * 256),
]


async def test_users_see_only_their_own_whatever_their_names(service: Service, database: Redis) -> None:
    models: dict[str, Any] = {user: memory_model(user, database=database) for user in HOSTILE}
    models["b in namespace a"] = memory_model("b", namespace="a", database=database)
    for user, model in models.items():
        await model(pk="same", text=f"secret of number {list(models).index(user)}").save()
    for number, model in enumerate(models.values()):
        assert [memory.text for memory in await model.find().all()] == [f"secret of number {number}"]
        assert (await model.get("same")).text == f"secret of number {number}"
    for user in HOSTILE:
        assert await found(service, service.owner(user), "secret") == ["same"]
        assert await models[user].delete("same") == 1
    assert await models["b in namespace a"].find().count() == 1


@pytest.mark.parametrize("user", ["", "x" * 257, "a\0b"])
def test_no_model_for_an_id_that_is_no_user_id(user: str) -> None:
    with pytest.raises(InvalidInput):
        memory_model(user)


def test_a_connection_that_cannot_read_vectors_is_refused(redis_url: str) -> None:
    with pytest.raises(Misconfigured, match="surrogateescape"):
        memory_model("alice", database=get_redis_connection(url=redis_url))


async def test_the_default_connection_is_that_of_the_environment(
    service: Service, owner: Owner, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDISMEM_REDIS_URL", redis_url)
    model: Any = memory_model("alice")
    saved = await model(text="a zebra").save()
    assert await found(service, owner, "zebra") == [saved.pk]
    await model.db().aclose()
