"""The Python client against the application in process: every method, errors, read-your-writes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import httpx
import msgspec
import pytest

from redismem import conversation, errors, types, views
from redismem.conversation import ContextParts, ContextRequest, MessageInput
from redismem.errors import Conflict, InvalidInput, NotFound, RedisMemError, VersionMismatch
from redismem.filters import Filters, NumberRange, TimeRange
from redismem.http.app import create_app
from redismem.http.table import OPERATIONS
from redismem.http.wire import error_response
from redismem.sdk import Client, UserMemory, options
from redismem.sdk.failures import told_error
from redismem.service import Service
from redismem.types import MemoryInput, SearchRequest
from tests.conftest import until

ODD = "a/b %2F?#é.."


class Recorded(httpx.ASGITransport):
    """The application in process; keeps what it was asked."""

    def __init__(self, service: Service) -> None:
        super().__init__(app=create_app(service), raise_app_exceptions=False)
        self.requests: list[httpx.Request] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return await super().handle_async_request(request)

    def last(self) -> dict[str, Any]:
        """Return the last body."""
        body: dict[str, Any] = msgspec.json.decode(self.requests[-1].content)
        return body


@pytest.fixture
def transport(service: Service) -> Recorded:
    return Recorded(service)


@pytest.fixture
async def client(transport: Recorded) -> AsyncIterator[Client]:
    async with Client("http://test", transport=transport) as client:
        yield client


@pytest.fixture
def ada(client: Client) -> UserMemory:
    return client.user("ada")


async def ids(ada: UserMemory, **filters: Any) -> list[str]:
    return [memory.id async for memory in ada.list(page=2, **filters)]


# memories -----------------------------------------------------------------------------------------


async def test_a_memory_is_added_read_changed_and_deleted(ada: UserMemory) -> None:
    item = await ada.add("Ada keeps bees", topics=["bees"], importance=0.7, event_date=datetime.now(UTC))
    assert (item.outcome, item.embedded) == ("CREATED", True)
    memory = await ada.get(item.id or "")
    assert (memory.text, memory.topics, memory.importance) == ("Ada keeps bees", ["bees"], 0.7)
    changed = await ada.update(memory.id, if_match=memory.version, text="Ada keeps wasps", event_date=None)
    assert (changed.text, changed.event_date) == ("Ada keeps wasps", None)
    with pytest.raises(VersionMismatch):
        await ada.update(memory.id, if_match=memory.version, pinned=True)
    assert (await ada.delete(memory.id)).outcome == "DELETED"
    with pytest.raises(NotFound):
        await ada.get(memory.id)
    events = [event.event for event in (await ada.history(memory.id)).events]
    assert len(events) == 3


async def test_memories_are_refused_one_by_one(ada: UserMemory) -> None:
    wrong = MemoryInput(text="bee", importance=7)
    reply = await ada.add_many([MemoryInput(text="ant"), wrong])
    assert [item.outcome for item in reply.memories] == ["CREATED", "INVALID"]
    with pytest.raises(InvalidInput) as caught:
        await ada.add_many([wrong])
    assert caught.value.field == "memories[0].importance"


async def test_a_memory_need_not_wait_for_its_vector(service: Service, ada: UserMemory) -> None:
    assert (await ada.add("bee", wait=False)).embedded is False
    assert await service.backfill.drained(10)


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        ({}, ["d", "c", "b", "a"]),
        ({"topics": "odd"}, ["c", "a"]),
        ({"topics": ["odd", "even"], "pinned": True}, ["d"]),
        ({"importance": NumberRange(gte=0.25, lt=0.4)}, ["c"]),
        ({"event_date": TimeRange(gt=datetime(2026, 1, 2, tzinfo=UTC))}, ["d", "c"]),
        ({"metadata": {"n": "2"}}, ["b"]),
        ({"metadata": {"n": 2}}, []),
        ({"superseded": "only"}, []),
        ({"session_id": "nobody's"}, []),
    ],
)
async def test_a_list_goes_over_all_pages_of_what_passes_the_filters(
    ada: UserMemory, filters: Mapping[str, Any], found: list[str]
) -> None:
    for number, name in enumerate("abcd", 1):
        await ada.add(
            f"bee {name}",
            id=name,
            topics=["odd" if number % 2 else "even"],
            importance=number / 10,
            event_date=datetime(2026, 1, number, tzinfo=UTC),
            metadata={"n": str(number)},
            pinned=number == 4,
        )
    assert await ids(ada, **filters) == found


async def test_searches_find_one_by_one_and_together(ada: UserMemory) -> None:
    await ada.add_many([MemoryInput(text="Ada keeps bees", id="a"), MemoryInput(text="Eve sails", id="b")])
    reply = await ada.search("bees", filters=Filters(pinned=False), limit=1, explain=True)
    assert [hit.id for hit in reply.memories] == ["a"]
    assert reply.memories[0].explain is not None
    queries = [SearchRequest(text=text, search_mode="keyword") for text in ("sails", "bees")]
    both = await ada.search_batch(queries)
    assert [[hit.id for hit in one.memories] for one in both.results] == [["b"], ["a"]]


async def test_a_correction_replaces(ada: UserMemory) -> None:
    await ada.add("The wedding is in May", id="old")
    reply = await ada.correct(["old"], "The wedding is in June", topics=["wedding"])
    assert reply.superseded == ["old"]
    assert await ids(ada) == [reply.id]
    assert (await ada.correct(["old"], "The wedding is in June", topics=["wedding"])).outcome == "UNCHANGED"


async def test_what_is_derived_is_read(service: Service, ada: UserMemory) -> None:
    await ada.add("Ada keeps bees", id="a", event_date=datetime(2026, 3, 1, tzinfo=UTC))
    await ada.add("Ada keeps bees!", id="b", event_date=datetime(2026, 3, 1, tzinfo=UTC))
    assert await ada.summary("day", "2026-03-01") is None, "it is being made"
    await service.worker.settle(ahead_s=4000)
    summary = await ada.summary("day", "2026-03-01")
    assert summary is not None
    assert "bees" in summary.text
    assert (await ada.profile()).context_summary
    assert (await ada.change_profile(display_name="Ada L.")).patched == ["display_name"]
    assert (await ada.profile()).display_name == "Ada L."
    assert (await ada.topics()).topics == []
    assert [one.id for one in (await ada.similar("a", limit=1)).similar] == ["b"]
    assert {(one.older, one.newer) for one in (await ada.conflicts(limit=5)).conflicts} == {("a", "b")}
    with pytest.raises(NotFound):
        await ada.summary("topic", "99")


async def test_an_export_is_an_import(client: Client, ada: UserMemory) -> None:
    text = "a line \u2028 that \x85 ends nowhere"
    await ada.add(text, id=ODD, metadata={"a": [1, {"b": None}]})
    await ada.add("bee", id="b")
    exported = [memory async for memory in ada.export()]
    assert [memory.id for memory in exported] == [ODD, "b"]
    eve = client.user("eve")
    assert (await eve.import_memories(exported)).created == 2
    again = await eve.get(ODD)
    assert (again.text, again.metadata, again.created_at) == (
        text,
        {"a": [1, {"b": None}]},
        exported[0].created_at,
    )
    assert (await ada.forget()).memories == 2
    assert await ids(ada) == []
    assert await ids(eve) == ["b", ODD]


@pytest.mark.parametrize("user", [ODD, ".", "..", "user/memories"])
async def test_a_user_and_an_id_may_hold_anything(client: Client, user: str) -> None:
    other = client.user(user)
    await other.add("bee", id=user)
    assert (await other.get(user)).text == "bee"
    session = await other.open_session(user)
    await session.say("ant")
    assert (await session.get()).messages == 1
    await other.delete(user)


# conversations ------------------------------------------------------------------------------------


async def test_a_session_from_its_opening_to_its_end(service: Service, ada: UserMemory) -> None:
    await ada.add("Ada keeps bees in Kent", id="a", pinned=True)
    session = await ada.open_session(agent="one", pins=["a"], ttl_s=3600)
    assert session.opened.outcome == "OPENED"
    assert "Kent" in session.opened.context.text
    said = await session.say("Where are my bees?", id="m1", entities=["bees"])
    assert [item.outcome for item in said.items] == ["CREATED"]
    messages = [MessageInput(text="In Kent.", role="assistant", agent="two"), MessageInput(text="Thanks!")]
    assert (await session.say_many(messages, wait=False)).messages == 3
    assert [one.text for one in (await session.get(messages=2)).recent] == ["In Kent.", "Thanks!"]
    await session.typing("And how ma")
    assert (await session.change(active_topics=["bees"])).active_topics == ["bees"]
    context = await session.context("Where are the bees?", stages=2, parts=ContextParts(profile=False))
    assert "Kent" in context.text
    assert isinstance(context.stages, list)
    assert [stage.stage for stage in context.stages] == [1, 2]
    joined = await ada.open_session(session.id, agent="two")
    assert (joined.opened.outcome, joined.opened.session.agents) == ("JOINED", ["one", "two"])
    assert (await session.close()).closed_at is not None
    with pytest.raises(Conflict, match="closed"):
        await session.say("Hello?")
    await service.prefetcher.settled()
    await service.contexts.drained()


async def test_a_context_comes_in_stages_and_is_whole_at_the_end(ada: UserMemory) -> None:
    await ada.add_many([MemoryInput(text=f"Bee {number} is in Kent") for number in range(8)])
    asked = {"entities": ["Kent"], "max_tokens": 2000}
    async with ada.stream_context(
        "Where are the bees?", stages=4, entities=["Kent"], max_tokens=2000
    ) as stream:
        stages = [stage async for stage in stream]
        reply = await stream.whole()
    assert [stage.stage for stage in stages] == [1, 2, 3, 4]
    assert reply.stages == stages
    assert reply.text == (await ada.context("Where are the bees?", stages=4, **asked)).text  # type: ignore[arg-type]
    assert reply.tokens == stages[-1].tokens


async def test_a_stream_of_which_nothing_was_asked_sends_nothing(
    transport: Recorded, ada: UserMemory
) -> None:
    stream = ada.stream_context("bees")
    await stream.aclose()
    with pytest.raises(errors.Unavailable, match="left"):
        await stream.whole()
    assert transport.requests == []


async def test_contexts_come_together(ada: UserMemory) -> None:
    await ada.add("Ada keeps bees in Kent")
    requests = [ContextRequest(text="bees", template="<{memories}>"), ContextRequest(stages=1)]
    reply = await ada.contexts(requests)
    assert reply.contexts[0].text.startswith("<")
    assert "Kent" in reply.contexts[0].text
    assert len(reply.contexts) == 2


async def test_a_session_that_is_not_there_is_told_by_the_status_of_a_stream(ada: UserMemory) -> None:
    with pytest.raises(NotFound, match="session"):
        await ada.stream_context(session_id="nobody's").whole()


async def test_the_service_tells_of_itself(client: Client) -> None:
    await until("it is ready", client.ready)
    assert (await client.stats()).process
    async with Client("http://127.0.0.1:1") as nobody:
        assert not await nobody.ready()


# errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda ada: ada.add(" "), "text"),
        (lambda ada: ada.add("bee", importance=2), "importance"),
        (lambda ada: ada.add("bee", topics=["ok", ""]), "topics[1]"),
        (lambda ada: ada.add("bee", metadata={"a": object()}), None),
        (lambda ada: ada.add("bee", colour="red"), "colour"),
        (lambda ada: ada.update("a"), None),
        (lambda ada: ada.update("", text="bee"), "id"),
        (lambda ada: ada.correct([], "bee"), "ids"),
        (lambda ada: ada.correct(["a"], ""), "memory.text"),
        (lambda ada: ada.search(), "text"),
        (lambda ada: ada.search("bee", limit=0), "limit"),
        (lambda ada: ada.search("bee", filters={"topics": {"any": 1}}), "filters.topics.any"),
        (lambda ada: ada.context("bee", stages=5), "stages"),
        (lambda ada: ada.context(), "text"),
        (lambda ada: ada.contexts([]), "contexts"),
        (lambda ada: ada.open_session(ttl_s=1), "ttl_s"),
        (lambda ada: ada.change_profile(display_name=" "), "display_name"),
        (lambda ada: ada.get("a\nb"), "id"),
        (lambda ada: ids(ada, pinned="perhaps"), "pinned"),
    ],
)
async def test_a_wrong_value_is_an_error_before_anything_is_sent(
    transport: Recorded, ada: UserMemory, call: Callable[[UserMemory], Any], field: str | None
) -> None:
    with pytest.raises(InvalidInput) as caught:
        await call(ada)
    assert caught.value.field == field
    assert transport.requests == []


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Client("localhost:8000"), "url"),
        (lambda: Client("http://test").user(""), "user"),
        (lambda: Client("http://test").user("ada", request_id="two words"), "request_id"),
    ],
)
async def test_what_cannot_be_asked_is_refused(make: Callable[[], object], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        make()
    assert caught.value.field == field


PUBLIC = [
    kind for kind in vars(errors).values() if isinstance(kind, type) and kind.__module__ == errors.__name__
]


@pytest.mark.parametrize("kind", PUBLIC)
def test_every_error_of_the_service_comes_back_as_its_class(kind: type[RedisMemError]) -> None:
    error = told_error(bytes(error_response(kind("what it is", field="where"), "r1").body))
    shared: dict[type, type] = {errors.WritesRefused: errors.RedisUnavailable}  # the code of its parent
    assert type(error) is shared.get(kind, kind)
    assert (error.message, error.field, vars(error)["request_id"]) == ("what it is", "where", "r1")


async def test_an_error_keeps_what_the_service_told(transport: Recorded, ada: UserMemory) -> None:
    with pytest.raises(NotFound) as caught:
        await ada.tagged("night-17").get("nobody")
    assert vars(caught.value)["request_id"] == "night-17"
    assert caught.value.status == 404
    assert transport.requests[-1].headers["X-Request-ID"] == "night-17"
    with pytest.raises(InvalidInput) as refused:
        await ada.similar("a", limit=0)
    assert (refused.value.field, refused.value.status) == ("limit", 422)


# read-your-writes ---------------------------------------------------------------------------------


async def test_what_was_written_is_asked_for(transport: Recorded, client: Client, ada: UserMemory) -> None:
    await ada.search("bees")
    assert "min_version" not in transport.last(), "nothing was written"
    first = (await ada.add_many([MemoryInput(text="Ada keeps bees", id="a")])).generation
    session = await client.user("ada").open_session()
    latest = (await session.say("Where are they?")).generation
    assert latest > first
    wish = {"consistency": "session", "min_version": latest}
    for call in (ada.search("bees"), ada.context("bees"), session.context(), session.stream().whole()):
        await call
        assert wish.items() <= transport.last().items()
    await ada.search_batch([SearchRequest(text="a"), SearchRequest(text="b", consistency="strong")])
    mine, strong = transport.last()["queries"]
    assert wish.items() <= mine.items()
    assert (strong["consistency"], "min_version" in strong) == ("strong", False)
    await ada.contexts([ContextRequest(text="a")])
    assert wish.items() <= transport.last()["contexts"][0].items()
    await ada.get("a")
    assert dict(transport.requests[-1].url.params) == {name: str(value) for name, value in wish.items()}
    await ada.search("bees", consistency="eventual")
    assert "min_version" not in transport.last()
    await client.user("eve").search("bees")
    assert "min_version" not in transport.last(), "they are another user's writes"


@pytest.mark.parametrize(
    "write",
    [
        lambda ada: ada.add("ant"),
        lambda ada: ada.update("a", pinned=True),
        lambda ada: ada.correct(["a"], "wasp"),
        lambda ada: ada.delete("a"),
        lambda ada: ada.import_memories([types.ImportRecord(text="fly")]),
    ],
)
async def test_every_write_is_remembered(
    transport: Recorded, ada: UserMemory, write: Callable[[UserMemory], Any]
) -> None:
    await ada.add("bee", id="a")
    await ada.search("bee")
    before = transport.last()["min_version"]
    await write(ada)
    await ada.search("bee")
    assert transport.last()["min_version"] > before


def test_the_latest_write_counts_whatever_order_replies_come_in(client: Client) -> None:
    calls = client._calls
    for generation in ("7", "9", "8", "none"):
        calls.note_write("ada", httpx.Response(200, headers={"Redismem-Generation": generation}))
    assert calls.written("ada") == 9
    for number in range(10_000):
        calls.note_write(f"user {number}", httpx.Response(200, headers={"Redismem-Generation": "1"}))
    assert calls.written("ada") is None, "it wrote longest ago"


async def test_it_can_be_turned_off(transport: Recorded) -> None:
    async with Client("http://test", transport=transport, read_your_writes=False) as client:
        ada = client.user("ada")
        await ada.add("bee")
        await ada.search("bee")
        assert "min_version" not in transport.last()


async def test_a_cached_answer_does_not_hide_what_was_written(tiered: Service) -> None:
    async with Client("http://test", transport=Recorded(tiered)) as client:
        ada = client.user("ada")
        await ada.add("Ada keeps bees", id="a")
        for _ in range(2):
            reply = await ada.search("bees", search_mode="keyword")
        assert reply.served_by == "l1", "there is nothing to hide"
        await ada.add("Bees sting", id="b")
        assert {hit.id for hit in (await ada.search("bees", search_mode="keyword")).memories} == {"a", "b"}


# its own shape ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "struct", "besides"),
    [
        (options.MemoryFields, types.MemoryInput, {"text"}),
        (options.MemoryChanges, types.MemoryPatch, set()),
        (options.ProfileChanges, views.ProfilePatch, set()),
        (options.ListOptions, Filters, {"partition"}),
        (options.SearchOptions, types.SearchRequest, {"text"}),
        (options.SessionFields, conversation.SessionInput, {"id"}),
        (options.SessionChanges, conversation.SessionPatch, set()),
        (options.MessageFields, conversation.MessageInput, {"text", "role"}),
        (options.ContextOptions, conversation.ContextRequest, {"text", "session_id"}),
    ],
)
def test_keyword_arguments_are_the_fields_of_the_requests(
    given: Any, struct: type[msgspec.Struct], besides: set[str]
) -> None:
    assert set(given.__annotations__) | besides == set(struct.__struct_fields__)


def test_a_list_takes_every_parameter_of_its_route() -> None:
    (listed,) = [one for one in OPERATIONS if one.handler.__name__ == "list_memories"]
    heads = {name.partition(".")[0] for name in (*listed.query, *listed.open_query)}
    assert heads - {"limit", "cursor"} == set(options.ListOptions.__annotations__)


def test_importing_the_client_starts_nothing_heavy() -> None:
    heavy = ("numpy", "sklearn", "onnxruntime", "starlette", "uvicorn", "redis", "tokenizers", "dateparser")
    code = f"import redismem.sdk, sys; print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
