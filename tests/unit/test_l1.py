"""What the in-process cache returns, forgets, and counts."""

from __future__ import annotations

import gc
import random
import tracemalloc
from bisect import bisect_left

import pytest

from redismem import l1
from redismem.l1 import ENTRY_BYTES, ID_BYTES, L1, Entry, Kind

KIB = 1024


def roomy() -> L1:
    return L1(max_entries=1_000_000, max_bytes=1024**4)


def filled(
    cache: L1,
    owner: str,
    kind: Kind,
    key: str,
    *,
    ids: tuple[str, ...] = (),
    generation: int = 0,
    ttl_s: float = 60.0,
    now_s: float = 0.0,
    size_bytes: int = 100,
) -> bool:
    ticket = cache.open(owner)
    stored = cache.fill(
        ticket,
        kind,
        key,
        key.encode(),
        size_bytes=size_bytes,
        ids=ids,
        generation=generation,
        ttl_s=ttl_s,
        now_s=now_s,
        origin=f"request {key}",
    )
    cache.close(ticket)
    return stored


def keys(entries: list[Entry]) -> set[object]:
    return {entry.key for entry in entries}


def test_a_hit_returns_the_entry_and_counts_the_access() -> None:
    cache = roomy()
    assert filled(cache, "u", "search", "q", ids=("a",), generation=3)
    entry = cache.get("search", "u", "q", 5.0, min_generation=3)
    assert entry is not None
    assert (entry.kind, entry.owner, entry.key, entry.value) == ("search", "u", "q", b"q")
    assert (entry.ids, entry.generation, entry.origin) == (("a",), 3, "request q")
    assert (entry.stored_s, entry.expires_s, entry.last_access_s, entry.count) == (0.0, 60.0, 5.0, 2)
    assert cache.stats()["search"]["hits"] == 1


@pytest.mark.parametrize(
    ("kind", "owner", "key"), [("search", "u", "x"), ("search", "v", "q"), ("context", "u", "q")]
)
def test_an_entry_answers_only_its_own_kind_owner_and_key(kind: Kind, owner: str, key: str) -> None:
    cache = roomy()
    filled(cache, "u", "search", "q")
    assert cache.get(kind, owner, key, 0.0) is None
    assert cache.stats()[kind]["misses"] == 1


def test_an_entry_expires_at_its_ttl_and_is_dropped_when_seen() -> None:
    cache = roomy()
    filled(cache, "u", "search", "q", ttl_s=10.0)
    assert cache.get("search", "u", "q", 9.99) is not None
    assert cache.get("search", "u", "q", 10.0) is None
    assert len(cache) == cache.size_bytes == 0
    counted = cache.stats()["search"]
    assert (counted["hits"], counted["misses"], counted["expirations"]) == (1, 1, 1)


def test_an_entry_of_too_low_a_generation_is_a_miss_and_stays() -> None:
    cache = roomy()
    filled(cache, "u", "search", "q", generation=4)
    assert cache.get("search", "u", "q", 0.0, min_generation=5) is None
    assert cache.get("search", "u", "q", 0.0, min_generation=4) is not None


def test_peeking_ignores_the_generation_but_not_the_ttl_and_counts_nothing() -> None:
    cache = roomy()
    filled(cache, "u", "search", "q", generation=0, ttl_s=10.0)
    entry = cache.peek_stale("search", "u", "q", 9.0)
    assert entry is not None
    assert (entry.count, entry.last_access_s) == (1, 0.0)
    assert cache.peek_stale("search", "u", "q", 10.0) is None
    assert cache.peek_stale("search", "nobody", "q", 0.0) is None
    counted = cache.stats()["total"]
    assert (counted["hits"], counted["misses"], counted["expirations"]) == (0, 0, 0)


def test_an_answer_that_holds_what_was_invalidated_meanwhile_is_refused() -> None:
    cache = roomy()
    ticket, other = cache.open("u"), cache.open("v")
    assert cache.invalidate("u", ["a"]) == []
    assert ticket.void
    assert not cache.fill(ticket, "search", "q", b"", size_bytes=0, ids=("b", "a"), ttl_s=60.0, now_s=0.0)
    assert not cache.fill(ticket, "memory", "a", b"", size_bytes=0, ttl_s=60.0, now_s=0.0)
    assert cache.fill(ticket, "search", "r", b"", size_bytes=0, ids=("b",), ttl_s=60.0, now_s=0.0)
    assert cache.fill(other, "search", "q", b"", size_bytes=0, ids=("a",), ttl_s=60.0, now_s=0.0)
    assert cache.get("search", "u", "q", 0.0) is None
    assert cache.stats()["search"]["refused"] == 1
    assert cache.stats()["memory"]["refused"] == 1


@pytest.mark.parametrize("everything", ["owner", "clear"])
def test_no_answer_outlives_the_invalidation_of_everything(everything: str) -> None:
    cache = roomy()
    ticket = cache.open("u")
    if everything == "owner":
        cache.invalidate_owner("u")
    else:
        cache.clear()
    assert not cache.fill(ticket, "search", "q", b"", size_bytes=0, ttl_s=60.0, now_s=0.0)


def test_a_ticket_opened_after_the_invalidation_fills() -> None:
    cache = roomy()
    old = cache.open("u")
    cache.invalidate("u", [])
    new = cache.open("u")
    cache.close(old)
    assert cache.fill(new, "search", "q", b"", size_bytes=0, ttl_s=60.0, now_s=0.0)
    cache.invalidate("u", [])
    assert new.void


def test_one_ticket_fills_several_entries_until_it_is_closed() -> None:
    cache = roomy()
    ticket = cache.open("u")
    assert cache.fill(ticket, "search", "q", b"", size_bytes=0, ttl_s=60.0, now_s=0.0)
    assert cache.fill(ticket, "memory", "a", b"", size_bytes=0, ttl_s=60.0, now_s=0.0)
    cache.close(ticket)
    cache.close(ticket)
    assert not cache.fill(ticket, "memory", "b", b"", size_bytes=0, ttl_s=60.0, now_s=0.0)


def test_closed_and_voided_tickets_leave_nothing_behind() -> None:
    cache = roomy()
    tickets = [cache.open(f"u{number % 7}") for number in range(100)]
    cache.invalidate_owner("u0")
    for ticket in tickets:
        cache.close(ticket)
    assert cache._tickets == {}


def test_a_fill_never_replaces_a_newer_generation() -> None:
    cache = roomy()
    filled(cache, "u", "search", "q", generation=5, ttl_s=10.0)
    assert not filled(cache, "u", "search", "q", generation=4)
    assert filled(cache, "u", "search", "q", generation=5, ttl_s=10.0)
    assert filled(cache, "u", "search", "q", generation=6, ttl_s=10.0)
    assert filled(cache, "u", "search", "q", generation=4, now_s=10.0), (
        "expired entries stand in nobody's way"
    )
    assert len(cache) == 1


def test_an_invalidation_drops_the_memory_and_every_entry_that_holds_it() -> None:
    cache = roomy()
    filled(cache, "u", "memory", "a", ids=("a",))
    filled(cache, "u", "memory", "b", ids=("b",))
    filled(cache, "u", "search", "ab", ids=("a", "b"))
    filled(cache, "u", "search", "aa", ids=("a", "a"))
    filled(cache, "u", "context", "b", ids=("b",))
    filled(cache, "v", "memory", "a", ids=("a",))
    dropped = cache.invalidate("u", ["a", "a", "x"])
    assert [entry.key for entry in dropped].count("a") == 1
    assert keys(dropped) == {"a", "ab", "aa"}
    assert {entry.origin for entry in dropped} == {"request a", "request ab", "request aa"}
    assert cache.get("memory", "v", "a", 0.0) is not None
    assert keys(cache.invalidate("u", ["b"])) == {"b"}
    assert cache.stats()["total"]["invalidations"] == 5
    assert len(cache) == 1


def test_a_memory_with_the_content_of_others_is_found_by_them() -> None:
    cache = roomy()
    filled(cache, "u", "memory", "a", ids=("a", "b"))
    assert keys(cache.invalidate("u", ["b"])) == {"a"}


def test_a_memory_is_dropped_by_its_key_even_if_it_names_no_ids() -> None:
    cache = roomy()
    filled(cache, "u", "memory", "a")
    assert keys(cache.invalidate("u", ["a"])) == {"a"}


def test_invalidating_an_owner_drops_all_of_it_and_nothing_else() -> None:
    cache = roomy()
    filled(cache, "u", "search", "q", ids=("a",))
    filled(cache, "u", "profile", "p")
    filled(cache, "v", "profile", "p")
    cache.put("embedding", b"digest", b"vector", size_bytes=6, ttl_s=60.0, now_s=0.0)
    ticket = cache.open("u")
    assert keys(cache.invalidate_owner("u")) == {"q", "p"}
    assert cache.invalidate_owner("") == []
    assert ticket.void
    assert len(cache) == 2


def test_clearing_keeps_embeddings_and_voids_every_ticket() -> None:
    cache = roomy()
    filled(cache, "u", "search", "q", ids=("a",))
    cache.put("embedding", b"digest", b"vector", size_bytes=6, ttl_s=60.0, now_s=0.0)
    tickets = [cache.open("u"), cache.open("v")]
    cache.clear()
    assert all(ticket.void for ticket in tickets)
    assert len(cache) == 1
    assert cache.size_bytes == cache.stats()["embedding"]["bytes"] == 6 + ENTRY_BYTES
    assert cache.get("embedding", "", b"digest", 0.0) is not None
    assert filled(cache, "u", "search", "q", ids=("a",))
    assert keys(cache.invalidate("u", ["a"])) == {"q"}


def test_a_dropped_or_refused_entry_is_freed_at_once() -> None:
    class Payload:
        alive = 0

        def __init__(self) -> None:
            Payload.alive += 1

        def __del__(self) -> None:
            Payload.alive -= 1

    def fill(owner: str, key: str, size_bytes: int) -> None:
        ticket = cache.open(owner)
        cache.fill(ticket, "search", key, Payload(), size_bytes=size_bytes, ids=("a",), ttl_s=60.0, now_s=0.0)
        cache.close(ticket)

    cache = L1(max_entries=150, max_bytes=KIB**2)
    gc.disable()
    try:
        for number in range(200):
            fill(f"u{number % 2}", str(number), 1)
        assert Payload.alive == len(cache) == 150
        fill("u1", "too large", KIB**2)
        assert Payload.alive == 150
        cache.invalidate("u0", ["a"])
        assert Payload.alive == len(cache)
        cache.clear()
        assert Payload.alive == 0
    finally:
        gc.enable()


def test_the_heap_stays_within_thrice_the_entries() -> None:
    cache = roomy()
    filled(cache, "u", "profile", "p")
    for _ in range(1000):
        filled(cache, "u", "search", "q")
        assert len(cache._heap) <= 3 * len(cache)


def test_entries_and_bytes_stay_within_their_bounds() -> None:
    cache = L1(max_entries=10, max_bytes=20 * KIB)
    for number in range(100):
        assert filled(cache, "u", "search", str(number), size_bytes=100 if number < 50 else 6 * KIB)
        assert len(cache) <= 10
        assert cache.size_bytes <= 20 * KIB
        assert cache.peek_stale("search", "u", str(number), 0.0) is not None
    assert len(cache) == 3
    assert cache.stats()["search"]["evictions"] == 97


def test_an_entry_larger_than_the_cache_is_refused_and_evicts_nothing() -> None:
    cache = L1(max_entries=10, max_bytes=10 * KIB)
    filled(cache, "u", "search", "q")
    assert not filled(cache, "u", "search", "big", size_bytes=10 * KIB)
    assert not cache.put("embedding", b"big", b"", size_bytes=10 * KIB, ttl_s=60.0, now_s=0.0)
    assert len(cache) == 1


def test_a_cache_of_no_entries_stores_nothing() -> None:
    cache = L1(max_entries=0, max_bytes=10 * KIB)
    assert not filled(cache, "u", "search", "q")
    assert not cache.put("embedding", b"digest", b"", size_bytes=1, ttl_s=60.0, now_s=0.0)
    assert cache.get("search", "u", "q", 0.0) is None


def test_expired_entries_leave_before_unexpired_ones_of_any_score() -> None:
    cache = L1(max_entries=100, max_bytes=1024**3)
    for number in range(100):
        filled(cache, "u", "search", str(number), ttl_s=10.0 if number % 10 == 0 else 1000.0)
        for _ in range(0 if number % 10 else 50):
            cache.get("search", "u", str(number), 5.0)
    for number in range(100, 110):
        filled(cache, "u", "search", str(number), now_s=10.0, ttl_s=1000.0)
    counted = cache.stats()["search"]
    assert (counted["expirations"], counted["evictions"]) == (10, 0)
    filled(cache, "u", "search", "110", now_s=10.0)
    assert cache.stats()["search"]["evictions"] == 1


def test_entries_used_often_or_lately_outlive_the_others() -> None:
    cache = L1(max_entries=200, max_bytes=1024**3)
    for number in range(200):
        filled(cache, "u", "search", f"old {number}", ttl_s=10_000.0)
    for number in range(0, 200, 10):
        for _ in range(20):
            cache.get("search", "u", f"old {number}", 10.0)
    for number in range(1, 200, 10):
        cache.get("search", "u", f"old {number}", 999.0)
    for number in range(100):
        filled(cache, "u", "search", f"new {number}", now_s=1000.0)
    kept = {entry.key for entry in cache._everything}
    assert {f"old {number}" for number in range(200) if number % 10 < 2} <= kept


def test_a_just_stored_entry_scores_no_more_than_its_count() -> None:
    cache = L1(max_entries=2, max_bytes=1024**3)
    filled(cache, "u", "search", "used")
    for _ in range(4):
        cache.get("search", "u", "used", 0.0)
    filled(cache, "u", "search", "stored", now_s=0.9)
    filled(cache, "u", "search", "next", now_s=1.0)
    assert {entry.key for entry in cache._everything} == {"used", "next"}


def test_victims_rank_among_the_lowest_tenth_of_the_scores() -> None:
    entries, victims, draw = 20_000, 2_000, random.Random(5)
    cache = L1(max_entries=entries, max_bytes=1024**4)
    for number in range(entries):
        cache.put("embedding", str(number), b"", size_bytes=0, ttl_s=1e9, now_s=0.0)
    for entry in cache._everything:
        entry.count = int(draw.paretovariate(1.0))
        entry.last_access_s = 10_000.0 - draw.expovariate(1 / 600)
    # while nothing is accessed and no time passes, the order of the first entries is fixed
    scores = {
        entry.key: entry.count / max(1.0, 10_000.0 - entry.last_access_s) for entry in cache._everything
    }
    ordered = sorted(scores.values())
    for number in range(victims):
        cache.put("embedding", f"new {number}", b"", size_bytes=0, ttl_s=1e9, now_s=10_000.0)
    kept = keys(cache._everything)
    ranks = [bisect_left(ordered, score) / entries for key, score in scores.items() if key not in kept]
    assert len(ranks) == victims
    assert sum(ranks) / victims < 0.10
    assert sorted(ranks)[int(0.95 * victims)] < 0.20


def test_an_index_holds_a_set_only_for_shared_ids() -> None:
    cache = roomy()
    filled(cache, "u", "search", "q", ids=("a", "b"))
    filled(cache, "u", "search", "r", ids=("b",))
    filled(cache, "u", "memory", "a", ids=("a",))

    def shape() -> dict[str, type]:
        return {memory_id: type(found) for memory_id, found in cache._holders["u"].items()}

    assert shape() == {"a": Entry, "b": dict}
    filled(cache, "u", "search", "r")
    assert shape() == {"a": Entry, "b": Entry}
    filled(cache, "u", "search", "q")
    assert cache._holders == {}


def test_the_size_of_an_entry_is_payload_and_overhead() -> None:
    cache = roomy()
    filled(cache, "u", "search", "q", ids=("a", "bcd"), size_bytes=1000)
    filled(cache, "u", "memory", "a", ids=("a",), size_bytes=500)
    counted = cache.stats()
    assert counted["search"]["bytes"] == 1000 + ENTRY_BYTES + 2 * ID_BYTES + 4
    assert counted["memory"]["bytes"] == 500 + ENTRY_BYTES
    assert counted["total"]["bytes"] == cache.size_bytes


def _fresh(text: str) -> str:
    """Return a string of its own, as decoding a reply makes."""
    return "".join(list(text))


def _fill_as_in_use(cache: L1, kind: Kind, owners: int, per_owner: int) -> None:
    draw = random.Random(7)
    for owner in range(owners):
        ids = [f"{draw.getrandbits(128):032x}"[:26] for _ in range(50)]
        for number in range(per_owner):
            now_s = draw.random()
            if kind == "embedding":
                cache.put(kind, draw.randbytes(32), bytes(1536), size_bytes=1536, ttl_s=3600.0, now_s=now_s)
                continue
            key = draw.randbytes(32) if kind == "search" else f"{draw.getrandbits(128):032x}"[:26]
            held = tuple(map(_fresh, draw.sample(ids, 10))) if isinstance(key, bytes) else (key,)
            size_bytes = 4096 if kind == "search" else 500
            ticket = cache.open(_fresh(f"user-{owner:06d}"))
            cache.fill(
                ticket,
                kind,
                key,
                bytes(size_bytes),
                size_bytes=size_bytes,
                ids=held,
                generation=1000 + number,
                ttl_s=60.0,
                now_s=now_s,
            )
            cache.close(ticket)


@pytest.mark.parametrize("per_owner", [5, 40, 1000])
@pytest.mark.parametrize("kind", ["search", "memory", "embedding"])
def test_the_reported_size_is_what_tracemalloc_says(kind: Kind, per_owner: int) -> None:
    entries = 10_000
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        cache = roomy()
        _fill_as_in_use(cache, kind, entries // per_owner, per_owner)
        gc.collect()
        used = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert len(cache) == entries
    assert cache.size_bytes == pytest.approx(used, rel=0.15)


def test_the_constants_are_those_the_measurements_stand_for() -> None:
    assert (l1.SAMPLES, l1.POOL) == (16, 16), "measure anew and correct the docstring"
