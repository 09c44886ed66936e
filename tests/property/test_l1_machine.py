"""The in-process cache against a plain dict, over random histories."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from redismem.l1 import ENTRY_BYTES, ID_BYTES, KINDS, L1, Entry, Kind, Ticket

Name = tuple[Kind, str, str]

IDS = ("a", "b", "c", "d", "e")
OWNED: tuple[Kind, ...] = ("search", "memory", "profile", "context")

owners = st.sampled_from(["u", "v"])
owned_kinds = st.sampled_from(OWNED)
some_keys = st.sampled_from(IDS[:3])
some_ids = st.lists(st.sampled_from(IDS), max_size=4).map(tuple)
generations = st.integers(0, 3)
sizes = st.integers(0, 2000)
ttls = st.sampled_from([1.0, 5.0, 30.0, 1000.0])

#: entries and bytes: room for everything, a few entries, a few bytes, both, nothing
BOUNDS = [(10_000, 10**9), (5, 10**9), (10_000, 6000), (6, 8000), (1, 10**9), (0, 10**9)]


@dataclass
class Known:
    """What the model knows of a stored entry."""

    value: int
    ids: tuple[str, ...]
    generation: int
    expires_s: float
    last_access_s: float
    count: int
    size_bytes: int


class L1Machine(RuleBasedStateMachine):
    """Every call is made on both; what eviction removed must follow its rule, and leaves the model too."""

    tickets = Bundle("tickets")

    @initialize(bounds=st.sampled_from(BOUNDS), seed=st.integers(0, 3))
    def start(self, bounds: tuple[int, int], seed: int) -> None:
        self.max_entries, self.max_bytes = bounds
        self.cache = L1(max_entries=self.max_entries, max_bytes=self.max_bytes, seed=seed)
        self.model: dict[Name, Known] = {}
        self.open_tickets: dict[Ticket, str] = {}
        #: ids invalidated since a ticket was opened
        self.gone: dict[Ticket, set[str]] = {}
        self.now_s = 100.0
        self.values = 0
        self.counts = dict.fromkeys(
            ["hits", "misses", "evictions", "expirations", "invalidations", "refused"], 0
        )

    # --- what the cache holds, and what eviction may remove

    def held(self) -> dict[Name, Entry]:
        return {
            (kind, owner, str(key)): entry
            for kind, shelf in self.cache._shelves.items()
            for owner, owned in shelf.owners.items()
            for key, entry in owned.items()
        }

    def forget(self, belongs: Callable[[Name, Known], bool]) -> set[Name]:
        gone = {name for name, known in self.model.items() if belongs(name, known)}
        for name in gone:
            del self.model[name]
        return gone

    def stored(self, name: Name, known: Known, stored: bool) -> None:
        """Check a fill or put that was let in."""
        old = self.model.get(name)
        newer = old is not None and old.generation > known.generation and old.expires_s > self.now_s
        fits = self.max_entries > 0 and known.size_bytes <= self.max_bytes
        assert stored == (fits and not newer)
        if not stored:
            return
        before = {other: was for other, was in self.model.items() if other != name}
        self.model = {**before, name: known}
        held = self.held()
        assert name in held, "an entry was the victim of its own storing"
        removed = {other: was for other, was in before.items() if other not in held}
        if removed:
            entries, size_bytes = len(held), sum(entry.size_bytes for entry in held.values())
            assert entries + 1 > self.max_entries or (
                size_bytes + max(was.size_bytes for was in removed.values()) > self.max_bytes
            ), "more was removed than needed"
        evicted = [was for was in removed.values() if was.expires_s > self.now_s]
        if evicted:
            expired = [
                entry for other, entry in held.items() if entry.expires_s <= self.now_s and other != name
            ]
            assert not expired, "an entry was evicted while an expired one stayed"
        if len(before) <= 1:
            assert len(evicted) <= len(before)
        self.counts["evictions"] += len(evicted)
        self.counts["expirations"] += len(removed) - len(evicted)
        self.forget(lambda other, _: other in removed)

    # --- operations

    @rule(seconds=st.sampled_from([0.5, 1.0, 5.0, 20.0, 500.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(kind=st.sampled_from(KINDS), owner=owners, key=some_keys, generation=generations)
    def get(self, kind: Kind, owner: str, key: str, generation: int) -> None:
        owner = "" if kind == "embedding" else owner
        known = self.model.get((kind, owner, key))
        entry = self.cache.get(kind, owner, key, self.now_s, min_generation=generation)
        if known is not None and known.expires_s <= self.now_s:
            del self.model[kind, owner, key]
            self.counts["expirations"] += 1
            known = None
        if known is None or known.generation < generation:
            assert entry is None
            self.counts["misses"] += 1
            return
        known.count += 1
        known.last_access_s = self.now_s
        self.counts["hits"] += 1
        assert entry is not None
        assert (entry.kind, entry.owner, entry.key, entry.value) == (kind, owner, key, known.value)

    @rule(kind=st.sampled_from(KINDS), owner=owners, key=some_keys)
    def peek_stale(self, kind: Kind, owner: str, key: str) -> None:
        owner = "" if kind == "embedding" else owner
        known = self.model.get((kind, owner, key))
        entry = self.cache.peek_stale(kind, owner, key, self.now_s)
        fresh = known is not None and known.expires_s > self.now_s
        assert (entry is not None) == fresh

    @rule(target=tickets, owner=owners)
    def open(self, owner: str) -> Ticket:
        ticket = self.cache.open(owner)
        assert not ticket.void
        self.open_tickets[ticket] = owner
        return ticket

    @rule(ticket=consumes(tickets), times=st.integers(1, 2))
    def close(self, ticket: Ticket, times: int) -> None:
        for _ in range(times):
            self.cache.close(ticket)
        self.open_tickets.pop(ticket, None)

    @rule(
        ticket=tickets,
        kind=owned_kinds,
        key=some_keys,
        ids=some_ids,
        generation=generations,
        size_bytes=sizes,
        ttl_s=ttls,
    )
    def fill(
        self,
        ticket: Ticket,
        kind: Kind,
        key: str,
        ids: tuple[str, ...],
        generation: int,
        size_bytes: int,
        ttl_s: float,
    ) -> None:
        self.values += 1
        stored = self.cache.fill(
            ticket,
            kind,
            key,
            self.values,
            size_bytes=size_bytes,
            ids=ids,
            generation=generation,
            ttl_s=ttl_s,
            now_s=self.now_s,
        )
        held = {*ids, key} if kind == "memory" else set(ids)
        if ticket not in self.open_tickets or held & self.gone.get(ticket, set()):
            assert not stored, "an answer of before an invalidation was stored"
            self.counts["refused"] += 1
            return
        indexed = [i for i in ids if kind != "memory" or i != key]
        size_bytes += ENTRY_BYTES + sum(ID_BYTES + len(i) for i in indexed)
        known = Known(self.values, ids, generation, self.now_s + ttl_s, self.now_s, 1, size_bytes)
        self.stored((kind, ticket.owner, key), known, stored)

    @rule(owner=owners, kind=owned_kinds, key=some_keys, ids=some_ids, generation=generations, ttl_s=ttls)
    def read(
        self, owner: str, kind: Kind, key: str, ids: tuple[str, ...], generation: int, ttl_s: float
    ) -> None:
        ticket = self.open(owner)
        self.fill(ticket, kind, key, ids, generation, 300, ttl_s)
        self.close(ticket, 1)

    @rule(key=some_keys, size_bytes=sizes, ttl_s=ttls)
    def put(self, key: str, size_bytes: int, ttl_s: float) -> None:
        self.values += 1
        stored = self.cache.put(
            "embedding", key, self.values, size_bytes=size_bytes, ttl_s=ttl_s, now_s=self.now_s
        )
        known = Known(self.values, (), 0, self.now_s + ttl_s, self.now_s, 1, size_bytes + ENTRY_BYTES)
        self.stored(("embedding", "", key), known, stored)

    def dropped(self, entries: list[Entry], gone: set[Name]) -> None:
        assert len(entries) == len(gone)
        assert {(entry.kind, entry.owner, entry.key) for entry in entries} == gone
        self.counts["invalidations"] += len(gone)

    def void(self, voided: set[str]) -> None:
        for ticket, owner in list(self.open_tickets.items()):
            if owner in voided:
                assert ticket.void
                del self.open_tickets[ticket]

    @rule(owner=owners, ids=some_ids)
    def invalidate(self, owner: str, ids: tuple[str, ...]) -> None:
        entries = self.cache.invalidate(owner, ids)
        gone = self.forget(
            lambda name, known: (
                name[1] == owner
                and (bool(set(ids) & set(known.ids)) or (name[0] == "memory" and name[2] in ids))
            )
        )
        self.dropped(entries, gone)
        for ticket, of in self.open_tickets.items():
            if of == owner:
                assert ticket.void
                self.gone.setdefault(ticket, set()).update(ids)

    @rule(owner=owners)
    def invalidate_owner(self, owner: str) -> None:
        entries = self.cache.invalidate_owner(owner)
        self.dropped(entries, self.forget(lambda name, _: name[1] == owner))
        self.void({owner})

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.counts["invalidations"] += len(self.forget(lambda name, _: name[0] != "embedding"))
        self.void({"u", "v"})

    # --- what holds after every step

    @invariant()
    def it_holds_what_the_model_holds(self) -> None:
        held = {
            name: Known(
                int(str(entry.value)),
                entry.ids,
                entry.generation,
                entry.expires_s,
                entry.last_access_s,
                entry.count,
                entry.size_bytes,
            )
            for name, entry in self.held().items()
        }
        assert held == self.model

    @invariant()
    def bounds_and_sums_are_right(self) -> None:
        size_bytes = sum(known.size_bytes for known in self.model.values())
        assert len(self.cache) == len(self.model) <= max(self.max_entries, 0)
        assert self.cache.size_bytes == size_bytes <= self.max_bytes
        stats = self.cache.stats()
        every = {name: sum(stats[kind][name] for kind in KINDS) for name in stats["total"]}
        assert every == {"entries": len(self.model), "bytes": size_bytes, **self.counts}
        # one look at the keys a request would hide what the caches are worth
        of_users = {name: every[name] - stats["key"][name] for name in every}
        assert stats["total"] == of_users
        for kind in KINDS:
            of_kind = [known.size_bytes for name, known in self.model.items() if name[0] == kind]
            assert (stats[kind]["entries"], stats[kind]["bytes"]) == (len(of_kind), sum(of_kind))

    @invariant()
    def indexes_agree(self) -> None:
        cache, held = self.cache, self.held()
        assert all(owned for shelf in cache._shelves.values() for owned in shelf.owners.values())
        assert set(cache._everything) == set(held.values())
        assert [entry.position for entry in cache._everything] == list(range(len(held)))
        assert set(cache._pool) <= set(held.values())
        live = [place for place in cache._heap if place.entry is not None]
        assert {place.entry for place in live} == set(held.values())
        assert len(live) == len(held)
        assert all(place.entry is not None and place.entry.place is place for place in live)
        assert len(cache._heap) <= 3 * len(held)
        expected: dict[str, dict[str, set[Entry]]] = {}
        for (kind, owner, key), entry in held.items():
            for memory_id in entry.ids:
                if kind != "memory" or memory_id != key:
                    expected.setdefault(owner, {}).setdefault(memory_id, set()).add(entry)
        found = {
            owner: {i: {who} if isinstance(who, Entry) else set(who) for i, who in by_id.items()}
            for owner, by_id in cache._holders.items()
        }
        assert found == expected
        for by_id in cache._holders.values():
            assert all(isinstance(who, Entry) or len(who) > 1 for who in by_id.values())

    @invariant()
    def only_open_tickets_are_kept(self) -> None:
        kept = {ticket for tickets in self.cache._tickets.values() for ticket in tickets}
        assert kept == set(self.open_tickets)
        assert all(self.cache._tickets.values())
        assert all(ticket.gone == self.gone.get(ticket, set()) for ticket in kept)


TestL1 = L1Machine.TestCase
TestL1.settings = settings(
    derandomize=True, database=None, deadline=None, max_examples=200, stateful_step_count=60
)
