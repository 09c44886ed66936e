"""Reads: one memory, pages, exports, history; filters agree with a model of them in Python."""

from __future__ import annotations

import random
from base64 import urlsafe_b64encode
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, get_args

import msgspec
import pytest

from redismem.errors import InvalidInput, NotFound
from redismem.filters import Filters, NumberRange, TagMatch, TimeRange
from redismem.keys import Owner
from redismem.service import Service
from redismem.types import (
    CorrectionRequest,
    ImportRecord,
    Memory,
    MemoryInput,
    MemoryPatch,
    SearchMode,
    SearchRequest,
)

MODES: tuple[SearchMode, ...] = get_args(SearchMode)
START = datetime(2026, 1, 1, tzinfo=UTC)

TAGS = ["a b", "@a:[0 1]", *'a A a,b a|b a%7Cb {a} a-b a* "a" a\\b é 😀 or'.split()]
SESSIONS: list[str | None] = [None, None, "s1", "S1", "s1,s2", "s|1", "s 1", "s'1"]
TYPES = ["semantic", "episodic", "a-b", "a_b"]
SHARES = [0.0, 1e-7, 0.1, 0.3, 0.30000000000000004, 0.5, 1.0]
MOMENTS: list[datetime | None] = [
    None,
    datetime(1, 1, 2, tzinfo=UTC),
    datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
    datetime(2023, 5, 8, 12, 0, 0, 1, tzinfo=timezone(timedelta(hours=-7))),
    datetime(2023, 5, 8, 19, 0, 0, 2, tzinfo=UTC),
    datetime(9999, 12, 30, 1, 2, 3, 456_789, tzinfo=UTC),
]
SCALARS: list[Any] = [None, True, False, 0, 1, 1.0, -1.5, 2**53 + 1, 1e300, "", "1", "true", "x" * 400]
KEYS = ["k", "K", "k=v", "", "ключ"]


@dataclass
class Given:
    """A memory as it was written, and when."""

    memory: ImportRecord
    created_at: datetime
    updated_at: datetime


def same_scalar(a: Any, b: Any) -> bool:
    """Return whether JSON calls two scalars equal: a number is no boolean and no string."""
    kinds = [float if type(value) in (int, float) else type(value) for value in (a, b)]
    return kinds[0] is kinds[1] and a == b


def in_range(value: Any, bounds: NumberRange | TimeRange | None) -> bool:
    if bounds is None or value is None:
        return bounds is None
    above = (bounds.gt is None or value > bounds.gt) and (bounds.gte is None or value >= bounds.gte)
    return above and (bounds.lt is None or value < bounds.lt) and (bounds.lte is None or value <= bounds.lte)


def tags_match(values: list[str], wanted: str | list[str] | TagMatch | None) -> bool:
    if wanted is None:
        return True
    if not isinstance(wanted, TagMatch):
        wanted = TagMatch(any=[wanted] if isinstance(wanted, str) else wanted)
    own, any_of = set(values), set(wanted.any)
    return own >= set(wanted.all) and not own & set(wanted.none) and (not any_of or bool(own & any_of))


def matches(given: Given, filters: Filters) -> bool:
    """Return what `types.Filters` promises for one memory."""
    memory, metadata, wanted = given.memory, given.memory.metadata, filters.metadata or {}
    kinds, sessions = filters.memory_type, filters.session_id
    hidden = memory.superseded_by is not None
    return all(
        [
            filters.superseded == "include" or hidden == (filters.superseded == "only"),
            kinds is None or memory.memory_type in ([kinds] if isinstance(kinds, str) else kinds),
            sessions is None or memory.session_id in ([sessions] if isinstance(sessions, str) else sessions),
            tags_match(memory.topics, filters.topics),
            tags_match(memory.entities, filters.entities),
            in_range(memory.importance, filters.importance),
            in_range(memory.confidence, filters.confidence),
            in_range(given.created_at, filters.created_at),
            in_range(given.updated_at, filters.updated_at),
            in_range(memory.event_date, filters.event_date),
            filters.pinned is None or memory.pinned == filters.pinned,
            *(key in metadata and same_scalar(metadata[key], value) for key, value in wanted.items()),
        ]
    )


def random_memory(rng: random.Random, number: int) -> ImportRecord:
    return ImportRecord(
        id=f"m{number}",
        text=rng.choice(["tea", "coffee", "tea and coffee"]) + f" number {number}",
        memory_type=rng.choice(TYPES),
        topics=rng.sample(TAGS, rng.randint(0, 3)),
        entities=rng.sample(TAGS, rng.randint(0, 3)),
        session_id=rng.choice(SESSIONS),
        event_date=rng.choice(MOMENTS),
        importance=rng.choice(SHARES),
        confidence=rng.choice(SHARES),
        pinned=rng.random() < 0.3,
        metadata={rng.choice(KEYS): rng.choice([*SCALARS, [1], {"k": 1}]) for _ in range(rng.randint(0, 2))},
        created_at=START + timedelta(days=rng.randint(-5, 5), microseconds=rng.randint(0, 3)),
        superseded_by=rng.choice([None, None, "other"]),
    )


@pytest.fixture
async def memories(service: Service, owner: Owner, monkeypatch: pytest.MonkeyPatch) -> list[Given]:
    """200 memories that differ in everything a filter may ask; written in the course of ten hours."""
    rng, found = random.Random(5), []
    for hour in range(10):
        now = START + timedelta(hours=hour, milliseconds=1)
        monkeypatch.setattr(service.writer, "_clock", now.timestamp)
        part = [random_memory(rng, 20 * hour + i) for i in range(20)]
        items = (await service.writer.put(owner, part)).memories
        assert [item.outcome for item in items] == ["CREATED"] * 20
        for memory in part:  # an equal moment is moved to the next free one
            created_at = (await service.browser.get(owner, str(memory.id))).created_at
            assert timedelta(0) <= created_at - (memory.created_at or now) < timedelta(milliseconds=1)
            found.append(Given(memory, created_at, now))
    return found


def random_range(rng: random.Random, values: list[Any], kind: type[NumberRange | TimeRange]) -> Any:
    bounds = {}
    if (form := rng.randint(0, 2)) != 1:
        bounds[rng.choice(["gt", "gte"])] = rng.choice(values)
    if form != 0:
        bounds[rng.choice(["lt", "lte"])] = rng.choice(values)
    return kind(**bounds)


def random_tags(rng: random.Random) -> str | list[str] | TagMatch:
    some = [rng.sample([*TAGS, "absent"], rng.randint(0, 3)) for _ in range(3)]
    match rng.randint(0, 3):
        case 0:
            return rng.choice(TAGS)
        case 1:
            return some[0] or ["a"]
        case 2:
            return TagMatch(none=some[0] or ["a"])
        case _:
            return TagMatch(any=some[0], all=some[1][:1], none=[*some[2], "absent"])


def random_filters(rng: random.Random, memories: list[Given]) -> Filters:
    moments = [moment for moment in MOMENTS if moment]
    makers: dict[str, Any] = {
        "memory_type": lambda: rng.choice([rng.choice(TYPES), rng.sample(TYPES, 2), "absent"]),
        "topics": lambda: random_tags(rng),
        "entities": lambda: random_tags(rng),
        "session_id": lambda: rng.choice(["s1", "S1", ["s1,s2", "s|1"], ["s 1", "s'1", "s2"], "s2"]),
        "importance": lambda: random_range(rng, SHARES, NumberRange),
        "confidence": lambda: random_range(rng, [*SHARES, -1e308, 1e308], NumberRange),
        "created_at": lambda: random_range(rng, [one.created_at for one in memories], TimeRange),
        "updated_at": lambda: random_range(rng, [one.updated_at for one in memories], TimeRange),
        "event_date": lambda: random_range(rng, moments, TimeRange),
        "metadata": lambda: {rng.choice(KEYS): rng.choice(SCALARS)},
        "pinned": lambda: rng.random() < 0.5,
    }
    makers = dict(rng.sample(list(makers.items()), rng.choice([0, 1, 1, 1, 2, 2, 3])))
    makers["superseded"] = lambda: rng.choice(["exclude", "include", "only"])
    return Filters(**{name: make() for name, make in makers.items()})


async def listed(service: Service, owner: Owner, filters: Filters) -> tuple[list[Memory], set[int]]:
    found, totals, cursor = [], set(), None
    while True:
        reply = await service.tiers.page(owner, filters, 100, cursor)
        found += reply.memories
        totals.add(reply.total)
        cursor = reply.cursor
        if cursor is None:
            return found, totals


async def test_every_filter_agrees_with_its_model(
    service: Service, owner: Owner, memories: list[Given]
) -> None:
    rng = random.Random(11)
    sizes = []
    alone = [Filters(metadata={key: value}, superseded="include") for key in KEYS for value in SCALARS]
    alone += [Filters(topics=tag, superseded="include") for tag in TAGS]
    for filters in [*alone, *(random_filters(rng, memories) for _ in range(150))]:
        expected = {one.memory.id for one in memories if matches(one, filters)}
        sizes.append(len(expected))
        found, totals = await listed(service, owner, filters)
        assert {memory.id for memory in found} == expected, filters
        assert (len(found), totals) == (len(expected), {len(expected)}), filters
        for mode in MODES:
            words = "number" if mode != "keyword" or rng.random() < 0.5 else "coffee"
            wanted = {one.memory.id for one in memories if words in one.memory.text} & expected
            request = SearchRequest(text=words, search_mode=mode, limit=100, filters=filters)
            reply = await service.search(owner, request)
            hits = [hit.id for hit in reply.memories]
            assert reply.total == len(wanted if mode == "keyword" else expected), (mode, filters)
            assert len(set(hits)) == len(hits) == min(100, reply.total), (mode, filters)
            assert set(hits) <= (wanted if mode == "keyword" else expected), (mode, filters)
    assert sum(0 < size < 200 for size in sizes) > 75, "the filters say too little"


async def test_a_memory_is_read_as_it_was_written(
    service: Service, owner: Owner, memories: list[Given]
) -> None:
    for given in memories:
        wanted, memory = given.memory, await service.browser.get(owner, str(given.memory.id))
        for name in MemoryPatch.__struct_fields__:
            if name != "event_date":
                assert getattr(memory, name) == getattr(wanted, name), name
        assert memory.superseded_by == wanted.superseded_by
        assert (memory.created_at, memory.updated_at) == (given.created_at, given.updated_at)
        if wanted.event_date and wanted.event_date.year < 9999:
            assert memory.event_date == wanted.event_date
    for hostile in ("m", "m1 ", "M1", "*", "m1*", "}", "m1}:x", "\\", "😀", "x" * 256):
        with pytest.raises(NotFound):
            await service.browser.get(owner, hostile)


async def test_pages_hold_every_memory_once_while_others_come_and_go(service: Service, owner: Owner) -> None:
    """Those that stay are seen exactly once, also among 150 with the same created_at."""
    rng = random.Random(2)
    moments = [START + timedelta(seconds=rng.randint(-90, 90) if i > 150 else 0) for i in range(500)]
    stays = [ImportRecord(id=f"stay{i}", text="stays", created_at=at) for i, at in enumerate(moments)]
    goes = [ImportRecord(id=f"go{i}", text="goes", created_at=at) for i, at in enumerate(moments[100:200])]
    mixed = [*stays, *goes]
    rng.shuffle(mixed)
    for first in range(0, 600, 500):
        await service.writer.put(owner, mixed[first : first + 500], wait=False)
    for one in stays[:150]:  # another service need not keep moments apart
        await service.client.execute("HSET", owner.memory(str(one.id)), "created_at", START.timestamp())
    seen: list[Memory] = []
    cursor, limit = None, 7
    gone: set[str] = set()
    while True:
        reply = await service.tiers.page(owner, Filters(), limit, cursor)
        assert len(reply.memories) == limit or reply.cursor is None
        assert not {memory.id for memory in reply.memories} & gone
        seen += reply.memories
        cursor = reply.cursor
        if cursor is None:
            break
        limit = rng.randint(1, 60)
        moment = START if rng.random() < 0.5 else None
        new = ImportRecord(id=f"new{len(seen)}", text="new", created_at=moment)
        await service.writer.put(owner, [new], wait=False)
        if goes:
            gone.add(str(goes[-1].id))
            await service.writer.delete(owner, str(goes.pop().id))
    ids = [memory.id for memory in seen]
    assert len(set(ids)) == len(ids)
    assert {one.id for one in stays} <= set(ids)
    assert [memory.created_at for memory in seen] == sorted((m.created_at for m in seen), reverse=True)
    assert gone


WRONG = "= x %%% 😀 ~ ~a 1~ 1~~a 1_0 nan inf -inf +inf 1e999 (1 1. .5 0x1 --1 1]@pinned:{1}".split()
FOREIGN = urlsafe_b64encode(b'["1767225600",["a"]]').decode()


@pytest.mark.parametrize(
    "cursor", ["", "A" * 5000, "9" * 400, "\0", " 1", "1\n", "1 2", "\u0661", FOREIGN, *WRONG]
)
async def test_a_cursor_that_is_not_ours_is_refused(service: Service, owner: Owner, cursor: str) -> None:
    await service.writer.put(owner, [MemoryInput(id="a", text="tea")])
    with pytest.raises(InvalidInput) as caught:
        await service.tiers.page(owner, Filters(), 10, cursor)
    assert caught.value.field == "cursor"


async def test_a_cursor_fits_a_url_also_among_many_of_one_moment(service: Service, owner: Owner) -> None:
    """8 KB is what proxies allow by default; a backup of another service may know days only."""
    records = [ImportRecord(text=f"memory {i}", created_at=START) for i in range(1000)]
    for first in (0, 500):
        await service.writer.put(owner, records[first : first + 500], wait=False)
    cursor, longest, count = None, 0, 0
    while True:
        reply = await service.tiers.page(owner, Filters(), 100, cursor)
        count += len(reply.memories)
        if (cursor := reply.cursor) is None:
            break
        longest = max(longest, len(cursor))
    assert count == 1000
    assert longest < 8000


async def test_an_export_holds_every_memory_once_oldest_first(service: Service, owner: Owner) -> None:
    records = [
        ImportRecord(id=f"m{i}", text=f"memory {i}", created_at=START + timedelta(seconds=i * 7919 % 450))
        for i in range(450)
    ]
    await service.writer.put(owner, records, wait=False)
    request = CorrectionRequest(ids=["m7"], memory=MemoryInput(id="new", text="new"))
    await service.writer.correct(owner, request)
    exported: list[Memory] = []
    async for page in service.browser.export(owner):
        if not exported:
            await service.writer.delete(owner, str(records[1].id))  # 319 s after the oldest: a page to come
        exported += page
    assert [memory.created_at for memory in exported] == sorted(memory.created_at for memory in exported)
    assert len({memory.id for memory in exported}) == len(exported)
    assert {memory.id for memory in exported} == {"new", *(one.id for one in records)} - {"m1"}
    assert {memory.id: memory.superseded_by for memory in exported}["m7"] == "new"
    assert [page async for page in service.browser.export(service.owner("nobody"))] == []


@pytest.mark.parametrize("memory_id", ['q"uote\\', "[]", "ключ 😀" + "x" * 249])
async def test_history_is_found_among_thousands_of_events(
    service: Service, owner: Owner, memory_id: str
) -> None:
    async def others(name: str) -> None:
        for part in range(3):
            many = [MemoryInput(id=f"{name}{part}.{i}", text="x") for i in range(400)]
            await service.writer.put(owner, many, wait=False)

    await service.writer.put(owner, [MemoryInput(id=memory_id, text="secret one")])
    await others("early")
    await service.writer.update(owner, memory_id, MemoryPatch(text="secret two", topics=["secret"]))
    new = CorrectionRequest(ids=[memory_id, "early0.0"], memory=MemoryInput(id="new", text="secret three"))
    await service.writer.correct(owner, new)
    await others("late")
    await service.writer.delete(owner, memory_id)
    history = await service.browser.history(owner, memory_id)
    assert [event.event for event in history.events] == ["created", "updated", "superseded", "deleted"]
    assert [event.at for event in history.events] == sorted(event.at for event in history.events)
    assert [event.other for event in history.events] == [[], [], ["new"], []]
    assert (await service.browser.history(owner, "new")).events[-1].other == [memory_id, "early0.0"]
    assert b"secret" not in msgspec.json.encode(history)
    assert "secret" not in str(await service.client.execute("XRANGE", owner.log, "-", "+"))
