"""The Functions as redis-cli sees them: headers, versions, misuse, foreign hands."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from hashlib import sha1
from typing import Any

import numpy as np
import pytest

from redismem import lualib
from redismem.client import Argument
from redismem.errors import StoreError
from redismem.filters import Filters
from redismem.keys import (
    JOBS,
    JOBS_DEAD,
    JOBS_LATER,
    JOBS_LIVE,
    JOBS_REST,
    JOBS_TRIES,
    STORE,
    WEIGHTS,
    Owner,
    rate_key,
    series_keys,
)
from redismem.lualib import Library, load_libraries, loaded_versions, shipped_libraries
from redismem.material import digest
from redismem.query import index_schema
from redismem.service import Service
from redismem.types import CorrectionRequest, MemoryInput, MemoryPatch, SearchRequest
from redismem.write import record_arguments
from tests.conftest import lasting_keys

RETURNS = "redis.register_function('rm_test_v1', function() return {} end)"

#: RediSearch itself names what is wrong with the arguments of FT.CREATE
MAKES_INDEX = ("rm_open_v1", "rm_begin_v1", "rm_refresh_begin_v1")

Call = tuple[str, list[str], list[Argument]]


@pytest.fixture
async def calls(service: Service, owner: Owner) -> list[Call]:
    """A valid call of every writing Function, on a store with two turns."""
    await service.writer.put(owner, [MemoryInput(id=name, text=name, session_id="s") for name in ("a", "b")])
    embedder, dim = service.embedder.name, service.embedder.dim
    version = (await service.browser.get(owner, "a")).version
    caches = [owner.searches, owner.hot, owner.hits]
    keys, derived = list(owner.written), [owner.meta, *owner.derived]
    now: list[Argument] = [owner.memory_prefix, 1_800_000_000_000]
    one, two = digest(b"a"), digest(b"b")
    centroid = np.ones(dim, np.float32).tobytes()
    queue = [JOBS, JOBS_LATER, JOBS_LIVE, JOBS_REST]
    refreshed = owner.physical_index("embedding", again=True)
    head: list[Argument] = [owner.memory_prefix, 1_800_000_000_000, embedder, dim, 100]
    fields: dict[str, str | bytes] = {
        "text": "new",
        "content_hash": "h",
        "session_id": "s",
        "embedding": np.ones(dim, np.float16).tobytes(),
    }
    record = record_arguments("new", "given", fields, "b")
    turn = await service.functions.call("rm_turns_ro_v1", [owner.turns], owner.memory_prefix, "b", read=True)
    stored = await service.client.execute("HGET", owner.memory("a"), "embedding")
    vector_digest = sha1(stored).hexdigest()[:16]
    embedding = ["b", turn[1], turn[2], turn[4], np.ones(dim, np.float16).tobytes()]
    return [
        ("rm_put_v1", keys, [*head, 1, *record]),
        ("rm_update_v1", keys, [*head, version, *record_arguments("a", "given", fields)]),
        ("rm_delete_v1", keys, [owner.memory_prefix, 1_800_000_000_000, 100, "a", "b"]),
        ("rm_correct_v1", keys, [*head, 2, "a", "b", *record]),
        (
            "rm_embed_v1",
            [owner.meta, owner.ids, owner.turns, *owner.graphs, *owner.derived],
            [*head[:4], *embedding],
        ),
        (
            "rm_stage_v1",
            [owner.meta, owner.turns],
            [owner.memory_prefix, "e", dim, "embedding_next", *embedding],
        ),
        (
            "rm_forget_v1",
            [owner.index, *owner.forgotten],
            [owner.memory_prefix, 1, owner.physical_index("embedding")],
        ),
        ("rm_adopt_v1", [owner.index, owner.ids, owner.meta], [owner.memory_prefix, 0, 10]),
        ("rm_touch_v1", [*caches[1:], owner.meta, owner.used], [*now, 60_000, 10, "a", 1, "b", 2]),
        ("rm_reindex_v1", [owner.ids], [owner.memory_prefix, "a", "b"]),
        (
            "rm_refresh_begin_v1",
            [refreshed, owner.meta],
            [1_800_000_000_000, 0, *index_schema(owner, "embedding", dim, again=True)],
        ),
        (
            "rm_refresh_end_v1",
            [owner.index, refreshed, owner.meta, owner.searches],
            [f"{refreshed} 1800000000000", 0],
        ),
        (
            "rm_begin_v1",
            [owner.physical_index("embedding_next"), owner.meta],
            ["e", 0, *index_schema(owner, "embedding_next", dim)],
        ),
        (
            "rm_settle_v1",
            [owner.meta],
            [owner.memory_prefix, "embedding", "embedding_next", embedder, "a", "b"],
        ),
        (
            "rm_switch_v1",
            [owner.index, owner.physical_index("embedding"), owner.meta],
            [embedder, dim, "embedding"],
        ),
        (
            "rm_open_v1",
            [owner.index, owner.physical_index("embedding"), owner.meta],
            [1_800_000_000_000, embedder, dim, "embedding", *index_schema(owner, "embedding", dim)],
        ),
        ("rm_profile_v1", derived, [*now, "", 1, "a", one, "context_summary", '"x"', "sources", '["a"]']),
        ("rm_profile_set_v1", derived, [*now, "display_name", '"Ada"']),
        (
            "rm_summary_v1",
            derived,
            [*now, 60_000, "topic:1", 2, "a", one, "b", two, "text", "x", "sources", '["a","b"]'],
        ),
        (
            "rm_topics_v1",
            [*derived, owner.centroids],
            [*now, embedder, 8, 1, 0.5, centroid, 2, '[["tea",["a"]]]', f'{{"a":"{one}"}}'],
        ),
        ("rm_topics_end_v1", [*derived, owner.centroids], [*now, 2, 1]),
        ("rm_assign_v1", derived, [*now, "a", one, "1"]),
        (
            "rm_link_v1",
            derived,
            [*now, "a", one, vector_digest, "1", 1, "b", two, vector_digest, "0.9", "duplicate", "", 1],
        ),
        ("rm_decay_v1", [*derived, WEIGHTS], [*now, 0.01, "a", "b"]),
        ("rm_jobs_start_v1", queue, [1_800_000_000_000, 10]),
        ("rm_job_done_v1", [*queue, JOBS_TRIES, JOBS_DEAD], ["g", "1-1", "a profile", 1_800_000_000_000, 0]),
        (
            "rm_job_failed_v1",
            [*queue[:3], JOBS_TRIES, JOBS_DEAD],
            ["g", "1-1", "a profile", 1_800_000_000_000, 1_800_000_000_001, 5, "why"],
        ),
        ("rm_jobs_queue_v1", [JOBS_LATER], [1_800_000_000_000, "a profile"]),
        ("rm_jobs_retry_v1", [JOBS_DEAD, JOBS_LATER, JOBS_TRIES], [1_800_000_000_000, "a profile"]),
        ("rm_schedule_v1", [STORE, JOBS_LATER], ["nightly", 2, 1_800_000_000_000, " nightly"]),
        ("rm_count_v1", list(series_keys(1_800_000_000)), [60, 60, "requests:get:ok", 1]),
        ("rm_take_v1", [rate_key("0123456789ab")], [1_800_000_000_000, 10, 10, 1]),
    ]


@pytest.mark.parametrize("library", shipped_libraries(), ids=lambda library: library.name)
def test_a_header_states_the_version_and_every_function(library: Library) -> None:
    registered = set(re.findall(r"'(rm_\w+_v\d+)'", library.code))
    header = library.code[: library.code.index("\nlocal ")]
    assert library.version > 0
    assert registered == set(re.findall(r"^--   (rm_\w+_v\d+)", header, re.MULTILINE))
    for part in ("-- Version:", "-- Functions (", "Complexity:", "Derived keys:"):
        assert part in header


@pytest.mark.parametrize("library", shipped_libraries(), ids=lambda library: library.name)
def test_a_library_scans_nothing_and_declares_no_name_twice(library: Library) -> None:
    assert not re.search(r"'(KEYS|SCAN)'", library.code)
    names = re.findall(r"^local (?:function )?(\w+)", library.code, re.MULTILINE)
    assert len(names) == len(set(names))


async def test_every_valid_call_is_taken(service: Service, calls: list[Call]) -> None:
    for name, keys, args in sorted(calls, key=lambda call: call[0] == "rm_forget_v1"):
        await service.functions.call(name, keys, *args)


@pytest.mark.parametrize("wrong", ["", "x", "-1", "1e999", "nan", "9" * 30])
async def test_a_wrong_argument_is_misuse_and_writes_nothing(
    service: Service, calls: list[Call], dump: Any, wrong: str
) -> None:
    """Each argument in turn; where the value is possible, the call may succeed, on a scratch copy."""
    before, copy, failures = await dump(), await saved(service), []
    for name, keys, args in calls:
        for at in range(min(len(args), 16)):
            try:
                await service.functions.call(name, keys, *args[:at], wrong, *args[at + 1 :])
            except StoreError as exc:
                if "RMEM_" not in exc.message and name not in MAKES_INDEX:
                    failures.append(f"{name} argument {at}: {exc.message[:90]}")
                if await dump() != before:
                    failures.append(f"{name} argument {at}: failed halfway")
            await restored(service, copy)
    assert failures == [], "\n".join(failures)


async def test_too_few_keys_or_arguments_are_misuse(service: Service, calls: list[Call], dump: Any) -> None:
    before, copy, failures = await dump(), await saved(service), []
    for name, keys, args in calls:
        for fewer_keys, fewer_args in (
            *((keys[:count], args) for count in range(len(keys))),
            *((keys, args[:count]) for count in range(min(len(args), 12))),
        ):
            try:
                await service.functions.call(name, fewer_keys, *fewer_args)
            except StoreError as exc:
                if "RMEM_" not in exc.message and name not in MAKES_INDEX:
                    failures.append(
                        f"{name} {len(fewer_keys)} keys {len(fewer_args)} arguments: {exc.message[:90]}"
                    )
                if await dump() != before:
                    failures.append(
                        f"{name} {len(fewer_keys)} keys {len(fewer_args)} arguments: failed halfway"
                    )
            await restored(service, copy)
    assert failures == [], "\n".join(failures)


async def saved(service: Service) -> dict[bytes, bytes]:
    keys = await lasting_keys(service.client)
    return dict(zip(keys, await service.client.pipeline([("DUMP", key) for key in keys]), strict=True))


async def restored(service: Service, copy: dict[bytes, bytes]) -> None:
    keys = await lasting_keys(service.client)
    await service.client.pipeline([("DEL", key) for key in keys if key not in copy] or [("PING",)])
    await service.client.pipeline([("RESTORE", key, 0, raw, "REPLACE") for key, raw in copy.items()])


@pytest.mark.parametrize("kind", ["meta", "ids", "log", "turns", "searches", "hot", "hits", "memory"])
async def test_a_key_of_a_foreign_type_is_named_and_nothing_is_written(
    service: Service, owner: Owner, calls: list[Call], dump: Any, kind: str
) -> None:
    failures = []
    for name, keys, args in calls:
        if not name.startswith(("rm_put", "rm_update", "rm_delete", "rm_correct", "rm_embed", "rm_touch")):
            continue
        if name == "rm_touch_v1" and kind == "memory":  # it only asks whether it is there
            continue
        copy = await saved(service)
        memory_id = {"rm_put_v1": "new", "rm_update_v1": "a", "rm_correct_v1": "new"}.get(name, "b")
        key = owner.memory(memory_id) if kind == "memory" else getattr(owner, kind)
        if kind != "memory" and key not in keys:
            continue
        await service.client.execute("SET", key, "foreign")
        before = await dump()
        try:
            await service.functions.call(name, keys, *args)
            failures.append(f"{name}: no error")
        except StoreError as exc:
            if "RMEM_TYPE" not in exc.message or key not in exc.message:
                failures.append(f"{name}: {exc.message[:90]}")
        if await dump() != before:
            failures.append(f"{name}: wrote something")
        await restored(service, copy)
    assert failures == [], "\n".join(failures)


async def test_a_vector_of_the_wrong_length_never_reaches_the_index(
    service: Service, owner: Owner, calls: list[Call]
) -> None:
    dim = service.embedder.dim
    for name, keys, args in calls:
        if name not in ("rm_put_v1", "rm_update_v1", "rm_correct_v1", "rm_embed_v1", "rm_stage_v1"):
            continue
        at = next(i for i, value in enumerate(args) if isinstance(value, bytes) and len(value) == 2 * dim)
        with pytest.raises(StoreError, match="RMEM_USAGE"):
            await service.functions.call(name, keys, *args[:at], b"1234", *args[at + 1 :])
        where = args.index(dim)
        lying = [*args[:where], 2, *args[where + 1 :]]  # a dimension that is not the store's
        lying[at] = b"1234"
        if name != "rm_stage_v1":  # the next embedder may have any dimension
            with pytest.raises(StoreError, match="RMEM_USAGE"):
                await service.functions.call(name, keys, *lying)
    assert (
        await service.search(owner, SearchRequest(text="x", filters=Filters(superseded="include")))
    ).total == 2


async def test_after_a_function_flush_every_call_heals_the_server(service: Service, owner: Owner) -> None:
    def put() -> Awaitable[object]:
        return service.writer.put(owner, [MemoryInput(id="a", text="tea")])

    await put()
    acts: tuple[Callable[[], Awaitable[object]], ...] = (
        put,
        lambda: service.search(owner, SearchRequest(text="tea")),
        lambda: service.tiers.find(owner, [SearchRequest(text="tea")] * 3),
        lambda: service.tiers.page(owner, Filters(), 10, None),
        lambda: service.writer.update(owner, "a", MemoryPatch(text="coffee")),
        lambda: service.writer.correct(
            owner, CorrectionRequest(ids=["a"], memory=MemoryInput(id="b", text="x"))
        ),
        lambda: service.writer.delete(owner, "a"),
        lambda: service.writer.forget(owner),
    )
    for act in acts:
        await service.client.execute("FUNCTION", "FLUSH")
        await act()
        assert await loaded_versions(service.client) == {lib.name: lib.version for lib in shipped_libraries()}


@pytest.fixture
async def library(service: Service, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Library]:
    """The only shipped library, so that its versions can be played with."""
    one = Library.parsed(f"#!lua name=redismem_test\n-- Version: 5\n{RETURNS.format(5)}")
    monkeypatch.setattr(lualib, "shipped_libraries", lambda: (one,))
    yield one
    await service.client.execute("FUNCTION", "DELETE", "redismem_test")


@pytest.mark.parametrize(("version", "left"), [("4", 5), ("5", 5), ("6", 6), (None, 5)])
async def test_an_older_library_is_replaced_and_a_newer_one_never(
    service: Service, library: Library, version: str | None, left: int
) -> None:
    line = f"-- Version: {version}\n" if version else ""
    code = RETURNS.format(version or 0)
    await service.client.execute("FUNCTION", "LOAD", f"#!lua name=redismem_test\n{line}{code}")
    loaded = await load_libraries(service.client)
    assert loaded == (["redismem_test"] if version not in ("5", "6") else [])
    assert await service.client.execute("FCALL", "rm_test_v1", 0) == left


async def test_one_of_many_loaders_loads(service: Service, library: Library) -> None:
    loaded = await asyncio.gather(*(load_libraries(service.client) for _ in range(10)))
    assert sorted(loaded) == [[]] * 9 + [["redismem_test"]]
    assert await service.client.execute("EXISTS", "redismem:lock:functions") == 0


async def test_loading_leaves_the_libraries_of_others_alone(service: Service, library: Library) -> None:
    await service.client.execute(
        "FUNCTION", "LOAD", "#!lua name=other\nredis.register_function('o', function() return 1 end)"
    )
    await load_libraries(service.client)
    assert await service.client.execute("FCALL", "o", 0) == 1
    await service.client.execute("FUNCTION", "DELETE", "other")
