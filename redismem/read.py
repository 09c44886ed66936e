"""The search path below L1: cached searches and query vectors in Redis (L2), the embedder, the index (L3).

A search whose vector is known (or that needs none) is one Function call, which answers from the cached
searches or from the index and fills the cache. A text that is new here is first looked up in Redis, in one
round trip for both: has this search been made, has this text been embedded? That goes on as long as it pays,
where processes share the work. How a search ranks is told in lua/read.lua and in the README's ranking
section.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from redismem.client import Argument
from redismem.codec import (
    READ_FIELDS,
    asks_for_the_past,
    search_digest,
    unit,
    vector_bytes,
    widened,
)
from redismem.effort import EXCELLENT, GOOD, RESERVED_MS, chosen_width, is_fixed, is_staged
from redismem.embed import Embedder
from redismem.errors import (
    DeadlineExceeded,
    IndexMissing,
    InvalidInput,
    Unavailable,
    WritesRefused,
)
from redismem.filters import Filters
from redismem.found import OUT_OF_TIME, Found, found_of, unanswered
from redismem.keys import Owner
from redismem.lualib import Functions, fcall
from redismem.query import escaped_tag, filter_query, words_query
from redismem.queryvectors import QueryVectors
from redismem.settings import Settings
from redismem.types import NEVER_CACHED, SearchRequest, Timing
from redismem.words import query_words

#: candidates of each list before fusion: this many times the limit, within these bounds. The last one has 0
#: after min-max, so more of them would change the order of the best (decision D44)
CANDIDATES_PER_HIT = 5
MIN_CANDIDATES, MAX_CANDIDATES = 50, 100

#: share of the words in the fused score; the rest is the cosine's (decision D3)
WORD_WEIGHT = 0.6

#: what a turn adds to the next and the one before, as a share of its own score; its square to those
#: two turns away (decision D4)
NEIGHBOUR_SHARE = 0.5

#: factor for turns of others when the question names a speaker (decision D5)
OTHER_SPEAKER = 0.5

#: milliseconds RediSearch may take when the request sets no `max_ms`
DEFAULT_TIMEOUT_MS = 500


#: share of look-ups that must find something to be worth it: one costs a thirtieth of an embedding
WORTHWHILE = 0.03

#: how far one look-up moves the estimate of that share; after 110 in vain they end
_LEARNING = 1 / 32

#: one search in so many is looked up all the same
_SAMPLE = 32

#: milliseconds after the end of a budget until a search goes without Redis's answer
_GRACE_MS = 3.0

#: users that are remembered to have a graph; for others Redis converts the vector, in 0.1 ms
_MAX_GRAPHED = 10_000

_FIELDS = " ".join(READ_FIELDS)


@dataclass(slots=True)
class _Query:
    """A search on its way."""

    request: SearchRequest
    mode: str
    digest: str
    vector: bytes = b""
    #: the vector was made for this search, and Redis does not have it yet
    is_new: bool = False
    timeout_ms: int = DEFAULT_TIMEOUT_MS
    reason: str | None = None
    embed_ms: float = 0.0
    found: Found | None = None

    @property
    def text(self) -> str:
        return self.request.text or ""

    @property
    def wants_vector(self) -> bool:
        return self.mode != "keyword" and not self.vector


class Reader:
    """Searches one store; `counts` tells what the tiers below L1 answered."""

    def __init__(
        self,
        functions: Functions,
        embedder: Embedder,
        vectors: QueryVectors,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._functions = functions
        self._embedder = embedder
        self._vectors = vectors
        self._settings = settings
        self._clock = clock
        self.counts: Counter[str] = Counter()
        #: estimated share of look-ups that find something
        self._luck = 1.0
        self._unlooked = 0
        #: users whose graph was used: their searches bring the vector as graphs take it
        self._graphed: set[str] = set()

    async def search_each(self, owner: Owner, requests: Sequence[SearchRequest]) -> list[Found]:
        """Return what was found for each request.

        Raises:
            InvalidInput: the vector has another dimension than the store.
            EmbedderUnavailable: semantic search without an embedder; other modes go on with words.
            DeadlineExceeded: semantic search whose text could not be embedded within `max_ms`.

        Cost: one round trip; for texts that are new to this process one more, and one embedding for all.
        """
        started = time.perf_counter()
        queries = [
            _Query(request, request.search_mode, search_digest(request, self._embedder.name))
            for request in requests
        ]
        for query in queries:
            self._take_known_vector(query)
        await self._look_up(owner, queries)
        await self._embed([query for query in queries if query.found is None and query.wants_vector], started)
        await self._search(owner, [query for query in queries if query.found is None], started)
        found = []
        for query in queries:
            assert query.found is not None
            total = _ms(time.perf_counter() - started)
            query.found.reply.timing = Timing(
                embed=query.embed_ms, search=round(total - query.embed_ms, 3), total=total
            )
            found.append(query.found)
        return found

    def _take_known_vector(self, query: _Query) -> None:
        request = query.request
        if request.vector is not None:
            if len(request.vector) != self._embedder.dim:
                raise InvalidInput(
                    f"`vector` has {len(request.vector)} numbers; this store's vectors have "
                    f"{self._embedder.dim}",
                    field="vector",
                )
            query.vector = vector_bytes(unit(np.array(request.vector)))
        elif query.mode != "keyword":
            query.vector = self._vectors.known(query.text)

    async def _look_up(self, owner: Owner, queries: Sequence[_Query]) -> None:
        """Take from Redis what was searched or embedded before, for queries whose text is new here."""
        asked: list[tuple[_Query, bool]] = []
        for query in queries:
            if query.wants_vector and self._settings.l2_searches:
                asked += [(query, True), (query, False)] if self._may_be_cached(query) else [(query, False)]
        if not asked or not self._is_worthwhile():
            return
        answers = await self._functions.send(
            [
                fcall(
                    "rm_recall_ro_v2",
                    [owner.searches],
                    *(owner.memory_prefix, query.digest, query.request.min_generation, _FIELDS),
                    read=True,
                )
                if is_search
                else self._vectors.look_up(query.text)
                for query, is_search in asked
            ]
        )
        for (query, is_search), raw in zip(asked, answers, strict=True):
            if not is_search:
                query.vector = self._vectors.taken(query.text, raw)
                self.counts["embedding hits" if query.vector else "embedding misses"] += 1
            elif raw[0] != b"MISS":
                self.counts["search hits"] += 1
                _, generation, total, note, ttl_ms, *flat = raw
                query.found = found_of(query.request, generation, total, note, b"l2", ttl_ms, flat)
        for query in {id(query): query for query, _ in asked}.values():
            self._learn(found=bool(query.found or query.vector))

    def _is_worthwhile(self) -> bool:
        if self._luck >= WORTHWHILE:
            return True
        self._unlooked = (self._unlooked + 1) % _SAMPLE
        return self._unlooked == 0

    def _learn(self, *, found: bool) -> None:
        self._luck += _LEARNING * (found - self._luck)

    def _may_be_cached(self, query: _Query) -> bool:
        return (
            self._settings.l2_searches > 0
            and query.request.min_generation < NEVER_CACHED
            and not query.request.explain
        )

    async def _embed(self, queries: Sequence[_Query], began: float) -> None:
        """Give vectors to the queries; without an embedder they fall back to words."""
        if not queries:
            return
        started = time.perf_counter()
        left_ms = _least_left_ms(queries, began)
        patience_s = None if left_ms is None else (left_ms - RESERVED_MS) / 1000
        if patience_s is not None and not self._vectors.has_time(1000 * patience_s):
            patience_s = 0.0
        try:
            async with asyncio.timeout(patience_s):
                vectors = await self._vectors.made([query.text for query in queries])
        except TimeoutError as exc:
            if any(query.mode == "semantic" for query in queries):
                raise DeadlineExceeded(
                    "the text could not be embedded within max_ms; allow more, or use hybrid mode",
                    field="max_ms",
                ) from exc
            _fall_back(queries, "max_ms ended before the text was embedded: words only")
            return
        except Unavailable:
            if any(query.mode == "semantic" for query in queries):
                raise
            _fall_back(queries, "the embedder is unavailable: words only")
            return
        for query, vector in zip(queries, vectors, strict=True):
            query.vector, query.is_new = vector, True
            query.embed_ms = _ms(time.perf_counter() - started)

    async def _search(self, owner: Owner, queries: Sequence[_Query], started: float) -> None:
        if not queries:
            return
        sent = time.perf_counter()
        arguments = [self._arguments(owner, query, started) for query in queries]
        options = [self._options(owner, query) for query in queries]
        read, rest = (
            [owner.index, owner.meta, owner.turns],
            [owner.hot, *owner.graphs, owner.ids, owner.centroids],
        )
        plain = [
            fcall("rm_search_ro_v1", [*read, *rest], *args, *more, read=True)
            for args, more in zip(arguments, options, strict=True)
        ]
        keeping = [
            fcall(
                "rm_search_v1",
                [*read, owner.searches, *rest],
                *(*args, query.digest, self._ttl_ms(query), self._settings.l2_searches),
                *(query.request.min_generation, *more),
            )
            if self._may_be_kept(query)
            else command
            for query, args, more, command in zip(queries, arguments, options, plain, strict=True)
        ]
        vectors = [
            self._vectors.store(query.text, query.vector)
            for query in queries
            if query.is_new and self._settings.l2_searches
        ]
        left_ms = _least_left_ms(queries, started)
        try:
            async with asyncio.timeout(None if left_ms is None else (left_ms + _GRACE_MS) / 1000):
                try:
                    replies = await self._functions.send([*keeping, *vectors])
                except WritesRefused:  # a cache that cannot be filled is no failure
                    keeping = plain
                    replies = await self._functions.send(plain)
        except TimeoutError:
            for query in queries:
                query.found = unanswered()
            return
        took_ms = _ms(time.perf_counter() - sent)
        for query, raw, command in zip(queries, replies, keeping, strict=False):
            query.found = self._read(query, raw, kept=command[0] == "FCALL")
            if query.found.by_graph and len(self._graphed) < _MAX_GRAPHED:
                self._graphed.add(owner.tag)
            reply = query.found.reply
            if reply.served_by == "l2" and query.is_new:
                self._learn(found=True)  # it was embedded in vain
            if not reply.partial and reply.served_by == "l3" and took_ms >= query.timeout_ms:
                reply.partial, reply.reason, query.found.ttl_s = True, OUT_OF_TIME, 0

    def _may_be_kept(self, query: _Query) -> bool:
        return self._settings.l2_searches > 0 and query.reason is None and not query.request.explain

    def _ttl_ms(self, query: _Query) -> int:
        past = asks_for_the_past(query.request.filters, self._clock())
        return int(1000 * (self._settings.past_search_ttl_s if past else self._settings.search_ttl_s))

    def _arguments(self, owner: Owner, query: _Query, started: float) -> list[Argument]:
        request = query.request
        if request.max_ms is not None:
            query.timeout_ms = max(1, int(request.max_ms - _ms(time.perf_counter() - started)))
        candidates = min(MAX_CANDIDATES, max(MIN_CANDIDATES, CANDIDATES_PER_HIT * request.limit))
        words, filter_ = query_words(request.text or ""), filter_query(request.filters)
        unfiltered = words_query(words, "*") if request.filters == Filters() else "-"
        return [
            *(owner.memory_prefix, query.mode, query.vector, self._embedder.name),
            *(" ".join(words), words_query(words, filter_), filter_, unfiltered),
            *(candidates, request.limit, query.timeout_ms, WORD_WEIGHT, NEIGHBOUR_SHARE, OTHER_SPEAKER),
            "" if request.min_similarity is None else request.min_similarity,
            *(request.recency_weight, request.recency_half_life_days * 86_400, request.importance_weight),
            *(repr(self._clock()), int(request.explain), _FIELDS),
        ]

    def _options(self, owner: Owner, query: _Query) -> list[Argument]:
        request = query.request
        is_graphed = owner.tag in self._graphed
        goal = GOOD if request.min_similarity is None else request.min_similarity
        return [
            *(chosen_width(request), int(is_staged(request))),
            *("" if request.min_results is None else request.min_results, goal, EXCELLENT),
            "" if request.session_id is None else escaped_tag(request.session_id),
            *(int(is_fixed(request)), widened(query.vector) if is_graphed else b""),
            "" if request.nearest_topics is None else request.nearest_topics,
        ]

    def _read(self, query: _Query, raw: list[Any], *, kept: bool) -> Found:
        if raw[0] == b"NOINDEX":
            raise IndexMissing("this user's index is missing; run `redismem doctor --repair`")
        _, generation, total, note, *flat = raw
        served_by, ttl_ms = b"l3", self._ttl_ms(query)
        if kept:
            served_by, ttl_ms, *flat = flat  # 0: it may have been cut off, which RediSearch does not tell
            self.counts["search hits" if served_by == b"l2" else "search misses"] += 1
        return found_of(query.request, generation, total, note, served_by, ttl_ms, flat, query.reason)


def _least_left_ms(queries: Sequence[_Query], began: float) -> float | None:
    """Return the milliseconds left of the smallest budget; None when no query has one."""
    budgets = [query.request.max_ms for query in queries if query.request.max_ms]
    return min(budgets) - _ms(time.perf_counter() - began) if budgets else None


def _fall_back(queries: Sequence[_Query], reason: str) -> None:
    for query in queries:
        query.mode, query.reason = "keyword", reason


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
