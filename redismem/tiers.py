"""The read path: L1 of this process, then Redis; as encoded JSON, ready to send.

L1 answers while the lease of `Coherence` holds. What it does not have is computed once for all who
ask at the same time, and kept only if none of its memories changed meanwhile (a ticket of `L1`). A read never
joins a computation that a change has overtaken: it could be older than a delete that was acknowledged
before the read began.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from redismem.browse import Browser
from redismem.codec import search_digest
from redismem.coherence import Coherence
from redismem.derived import FoundProfile, Views
from redismem.embed import Embedder
from redismem.errors import IndexMissing, RedisMemError, RedisUnavailable
from redismem.filters import Filters
from redismem.flight import Abandoned, Flight
from redismem.found import Found
from redismem.index import Indexes
from redismem.keys import PROFILE_ID, Owner
from redismem.l1 import L1, Entry, Kind, Ticket
from redismem.read import Reader
from redismem.settings import Settings
from redismem.touches import Touches
from redismem.trace import CacheStatus
from redismem.types import ListReply, SearchReply, SearchRequest
from redismem.views import Profile

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: bytes of a request that is kept beside its reply, to be computed again
_REQUEST_BYTES = 600

#: searches computed again after a correction dropped them, the most used first
REWARMED = 8

#: seconds a read waits for an index that is being filled (10,000 memories); then it answers in part
PATIENCE_S = 0.15

#: seconds L1 keeps a profile: what makes one stale is pushed, except the clock
PROFILE_TTL_S = 300.0

_encode = msgspec.json.encode
_SERVED = b',"served_by":'


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply as JSON, and the owner's generation that it shows."""

    body: bytes
    generation: int
    #: Redis is away, and this was true before
    stale: bool = False
    #: l1: this process; l2: what was computed before, in Redis; l3: the index or the memory itself
    served_by: CacheStatus = "l3"


@dataclass(slots=True)
class _Fresh:
    """What Redis answered, and how L1 may keep it; ttl_s 0: not at all."""

    answer: Answer
    kept: bytes = b""
    ids: tuple[str, ...] = ()
    ttl_s: float = 0.0


class _Shared(Flight[_Fresh]):
    """A computation and the ticket that tells whether it was overtaken."""

    __slots__ = ("ticket",)

    def __init__(self, ticket: Ticket) -> None:
        super().__init__()
        self.ticket = ticket


class Tiers:
    """Reads of one process; `counts` tells what L1 could not answer, and why."""

    def __init__(
        self,
        indexes: Indexes,
        embedder: Embedder,
        reader: Reader,
        browser: Browser,
        views: Views,
        l1: L1,
        coherence: Coherence,
        touches: Touches,
        settings: Settings,
    ) -> None:
        self._indexes = indexes
        self._reader = reader
        self._browser = browser
        self._views = views
        self._l1 = l1
        self._coherence = coherence
        self._touches = touches
        self._settings = settings
        self._embedder = embedder
        self._flights: dict[tuple[Kind, str, str], _Shared] = {}
        self._rewarming: set[asyncio.Task[None]] = set()
        self.counts: Counter[str] = Counter()
        coherence.rewarm = self._rewarm

    # searches ---------------------------------------------------------------------------------

    def known_search(self, owner: Owner, request: SearchRequest) -> Answer | None:
        """Return the answer of L1, or None. Cost: microseconds, no I/O."""
        started = time.perf_counter()
        if request.explain:
            return None
        digest = search_digest(request, self._embedder.name)
        entry = self._known("search", owner, digest, request.min_generation)
        if entry is None:
            return None
        self._touches.add(owner, entry.ids)
        return Answer(_from_l1(entry, started), entry.generation, served_by="l1")

    async def search(self, owner: Owner, request: SearchRequest, *, missed: bool = False) -> Answer:
        """Return the best memories; see `Reader.search_each`.

        Args:
            missed: `known_search` has just returned None.
        """
        if not missed and (known := self.known_search(owner, request)):
            return known
        started = time.perf_counter()
        digest = search_digest(request, self._embedder.name)
        try:
            fresh = await self._computed(owner, request, digest)
        except RedisUnavailable:
            stale = self._stale("search", owner, digest, request.min_generation)
            if stale is None or request.explain:
                raise
            body = _from_l1(stale, started, b',"stale":true')
            return Answer(body, stale.generation, stale=True, served_by="l1")
        self._touches.add(owner, fresh.ids)
        return fresh.answer

    async def look(self, owner: Owner, request: SearchRequest) -> SearchReply:
        """Return a search's reply as an object, from L1 or Redis; what is found does not count as used."""
        started = time.perf_counter()
        digest = search_digest(request, self._embedder.name)
        entry = self._known("search", owner, digest, request.min_generation)
        if entry is not None:
            body = _from_l1(entry, started)
        else:
            body = (await self._computed(owner, request, digest)).answer.body
        return msgspec.json.decode(body, type=SearchReply)

    async def _computed(self, owner: Owner, request: SearchRequest, digest: str) -> _Fresh:
        async def compute() -> _Fresh:
            return self._fresh((await self._found(owner, [request]))[0])

        eventual = request.min_generation == 0 and not request.explain and request.max_ms is None
        return await self._once("search", owner, digest, compute, (owner, request), shared=eventual)

    async def search_batch(self, owner: Owner, requests: Sequence[SearchRequest]) -> list[Answer]:
        """Return one answer a request; those that L1 does not have are computed together."""
        answers = [self.known_search(owner, request) for request in requests]
        missing = [i for i, answer in enumerate(answers) if answer is None]
        if missing:
            ticket = self._l1.open(owner.tag)
            try:
                found = await self._found(owner, [requests[i] for i in missing])
                for i, one in zip(missing, found, strict=True):
                    fresh = self._fresh(one)
                    digest = search_digest(requests[i], self._embedder.name)
                    self._keep(ticket, "search", digest, fresh, (owner, requests[i]))
                    self._touches.add(owner, fresh.ids)
                    answers[i] = fresh.answer
            finally:
                self._l1.close(ticket)
        return [answer for answer in answers if answer is not None]

    async def find(self, owner: Owner, requests: Sequence[SearchRequest]) -> list[SearchReply]:
        """Return one reply a request, from Redis: for callers in this process who want objects."""
        return [found.reply for found in await self._found(owner, requests)]

    async def _found(self, owner: Owner, requests: Sequence[SearchRequest]) -> list[Found]:
        async def search() -> list[Found]:
            return await self._reader.search_each(owner, requests)

        found = await self._repaired(owner, search, requests)
        if not any(one.is_filling for one in found):
            return found
        return await search() if await self._indexes.complete(owner, _patience_s(requests)) else found

    def _fresh(self, found: Found) -> _Fresh:
        body = _encode(found.reply)
        return _Fresh(
            Answer(body, found.reply.generation, served_by=found.reply.served_by),
            kept=body[: body.rindex(_SERVED)] if found.ttl_s else b"",
            ids=tuple(hit.id for hit in found.reply.memories),
            ttl_s=found.ttl_s,
        )

    # memories ---------------------------------------------------------------------------------

    def known_memory(self, owner: Owner, memory_id: str, min_generation: int = 0) -> Answer | None:
        """Return a memory from L1, or None; its generation is its version."""
        entry = self._known("memory", owner, memory_id, min_generation)
        if entry is None:
            return None
        self._touches.add(owner, entry.ids)
        return Answer(_bytes(entry), entry.generation, served_by="l1")

    async def memory(
        self, owner: Owner, memory_id: str, min_generation: int = 0, *, missed: bool = False
    ) -> Answer:
        """Return one memory; see `Browser.get`.

        Args:
            missed: `known_memory` has just returned None.
        """
        if not missed and (known := self.known_memory(owner, memory_id, min_generation)):
            return known

        async def compute() -> _Fresh:
            memory = await self._browser.get(owner, memory_id)
            body = _encode(memory)
            return _Fresh(Answer(body, memory.version), body, (memory_id,), self._settings.memory_ttl_s)

        try:
            fresh = await self._once("memory", owner, memory_id, compute, None, shared=min_generation == 0)
        except RedisUnavailable:
            stale = self._stale("memory", owner, memory_id, min_generation)
            if stale is None:
                raise
            return Answer(_bytes(stale), stale.generation, stale=True, served_by="l1")
        self._touches.add(owner, fresh.ids)
        return fresh.answer

    async def warm(self, owner: Owner, ids: Sequence[str]) -> int:
        """Load memories into L1; return how many it keeps. Cost: one round trip."""
        ticket = self._l1.open(owner.tag)
        try:
            memories = await self._browser.get_each(owner, ids)
            for memory in memories:
                body = _encode(memory)
                answer = Answer(body, memory.version)
                fresh = _Fresh(answer, body, (memory.id,), self._settings.memory_ttl_s)
                self._keep(ticket, "memory", memory.id, fresh, None)
        finally:
            self._l1.close(ticket)
        return len(memories)

    def known_profile(self, owner: Owner) -> Answer | None:
        """Return a profile from L1, or None."""
        entry = self._known("profile", owner, PROFILE_ID, 0)
        return None if entry is None else Answer(_bytes(entry), entry.generation, served_by="l1")

    async def profile(self, owner: Owner, *, missed: bool = False) -> Answer:
        """Return a profile; see `Views.profile`.

        Args:
            missed: `known_profile` has just returned None.
        """
        if not missed and (known := self.known_profile(owner)):
            return known
        try:
            return (await self._profile(owner)).answer
        except RedisUnavailable:
            stale = self._stale("profile", owner, PROFILE_ID, 0)
            if stale is None:
                raise
            return Answer(_bytes(stale), stale.generation, stale=True, served_by="l1")

    async def found_profile(self, owner: Owner) -> FoundProfile:
        """Return a profile with its sources, from L1 or Redis."""
        entry = self._known("profile", owner, PROFILE_ID, 0)
        if entry is not None:
            body, ids = _bytes(entry), entry.ids
        else:
            fresh = await self._profile(owner)
            body, ids = fresh.answer.body, fresh.ids
        return FoundProfile(msgspec.json.decode(body, type=Profile), ids[1:])

    async def _profile(self, owner: Owner) -> _Fresh:
        async def compute() -> _Fresh:
            found = await self._views.profile(owner)
            body, until = _encode(found.profile), found.profile.valid_until
            left_s = until.timestamp() - time.time() if until else 0.0
            ids = (PROFILE_ID, *found.sources)
            answer = Answer(body, found.profile.generation, served_by="l2")
            return _Fresh(answer, body, ids, min(PROFILE_TTL_S, left_s))

        return await self._once("profile", owner, PROFILE_ID, compute, None, shared=True)

    async def page(self, owner: Owner, filters: Filters, limit: int, cursor: str | None) -> ListReply:
        """Return memories newest first, from Redis; see `Browser.page`."""
        return await self._repaired(
            owner, lambda: self._browser.page(owner, filters, limit=limit, cursor=cursor)
        )

    # both -------------------------------------------------------------------------------------

    def _known(self, kind: Kind, owner: Owner, key: str, min_generation: int) -> Entry | None:
        if not self._coherence.is_live():
            self.counts[f"{kind} bypasses"] += 1
            return None
        return self._l1.get(kind, owner.tag, key, time.monotonic(), min_generation=min_generation)

    def _stale(self, kind: Kind, owner: Owner, key: str, min_generation: int) -> Entry | None:
        if not self._settings.stale_if_error:
            return None
        entry = self._l1.peek_stale(kind, owner.tag, key, time.monotonic())
        if entry is None or entry.generation < min_generation:
            return None
        self.counts[f"{kind} stale answers"] += 1
        return entry

    async def _once(
        self,
        kind: Kind,
        owner: Owner,
        key: str,
        compute: Callable[[], Awaitable[_Fresh]],
        origin: object,
        *,
        shared: bool,
    ) -> _Fresh:
        """Compute something, or join whoever computes it now; keep it in L1."""
        place = (kind, owner.tag, key)
        while shared and self._coherence.is_live():
            under_way = self._flights.get(place)
            if under_way is None or under_way.ticket.void:
                break
            self.counts[f"{kind} joins"] += 1
            try:
                return await under_way.join()
            except Abandoned:
                continue
        flight = _Shared(self._l1.open(owner.tag))
        if shared:
            self._flights[place] = flight
        try:
            fresh = await compute()
            self._keep(flight.ticket, kind, key, fresh, origin)
            flight.land(fresh)
        except BaseException as exc:
            flight.fail(exc)
            raise
        else:
            return fresh
        finally:
            self._l1.close(flight.ticket)
            if self._flights.get(place) is flight:
                del self._flights[place]

    def _keep(self, ticket: Ticket, kind: Kind, key: str, fresh: _Fresh, origin: object) -> None:
        if fresh.ttl_s > 0 and self._coherence.is_live():
            self._l1.fill(
                ticket,
                kind,
                key,
                fresh.kept,
                size_bytes=len(fresh.kept) + (_REQUEST_BYTES if origin is not None else 0),
                ids=fresh.ids,
                generation=fresh.answer.generation,
                ttl_s=fresh.ttl_s,
                now_s=time.monotonic(),
                origin=origin,
            )

    async def _repaired(
        self, owner: Owner, read: Callable[[], Awaitable[T]], requests: Sequence[SearchRequest] = ()
    ) -> T:
        """Return what `read` returns; an index that was dropped is made, and filled if that is soon done."""
        try:
            return await read()
        except IndexMissing:
            await self._indexes.complete(owner, _patience_s(requests))
            return await read()

    def _rewarm(self, held: list[Entry]) -> None:
        """Compute the most used of the searches that a correction dropped once more, in the background."""
        searches = [entry for entry in held if entry.kind == "search"]
        if not searches:
            return
        searches.sort(key=lambda entry: -entry.count)
        task = asyncio.create_task(self._search_again([entry.origin for entry in searches[:REWARMED]]))
        self._rewarming.add(task)
        task.add_done_callback(self._rewarming.discard)

    async def _search_again(self, origins: Sequence[object]) -> None:
        # behind the pushes of the change, which would void what is computed before they come
        await self._coherence.barrier({})
        for origin in origins:
            assert isinstance(origin, tuple)
            owner, request = origin
            try:
                await self._computed(owner, request, search_digest(request, self._embedder.name))
                self.counts["search rewarms"] += 1
            except RedisMemError as exc:
                logger.debug("not warmed again: %s", exc)

    async def close(self) -> None:
        """Stop warming."""
        for task in self._rewarming:
            task.cancel()
        await asyncio.gather(*self._rewarming, return_exceptions=True)


def _patience_s(requests: Sequence[SearchRequest]) -> float:
    """Return how long a read waits for an index that is being filled."""
    budgets = [request.max_ms for request in requests if request.max_ms]
    return min([PATIENCE_S, *(budget / 4000 for budget in budgets)])


def _bytes(entry: Entry) -> bytes:
    assert isinstance(entry.value, bytes)
    return entry.value


def _from_l1(entry: Entry, started: float, mark: bytes = b"") -> bytes:
    took_ms = (time.perf_counter() - started) * 1000
    return b'%s,"served_by":"l1","timing":{"embed":0.0,"search":0.0,"total":%.3f}%s}' % (
        entry.value,
        took_ms,
        mark,
    )
