"""The search path. Changes nothing.

A search is one embedding and one Function call (`rm_search_ro`); how it ranks is told in lua/read.lua
and in the README's ranking section.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from redismem.client import Argument
from redismem.codec import READ_FIELDS, memory_values, unit, vector_bytes
from redismem.embed import Embedder
from redismem.errors import DeadlineExceeded, EmbedderMismatch, IndexMissing, InvalidInput, Unavailable
from redismem.keys import Owner
from redismem.lualib import Functions
from redismem.query import filter_query, words_query
from redismem.types import (
    Filters,
    Hit,
    ScoreParts,
    SearchReply,
    SearchRequest,
    Timing,
)
from redismem.words import query_words

#: candidates of each list before fusion: this many, or this many times the limit
MIN_CANDIDATES = 50
CANDIDATES_PER_HIT = 5

#: share of the words in the fused score; the rest is the cosine's (decision D3)
WORD_WEIGHT = 0.6

#: what a turn adds to the next and the one before, as a share of its own score; its square to those
#: two turns away (decision D4)
NEIGHBOUR_SHARE = 0.5

#: factor for turns of others when the question names a speaker (decision D5)
OTHER_SPEAKER = 0.5

#: milliseconds RediSearch may take when the request sets no `max_ms`
DEFAULT_TIMEOUT_MS = 500


_FIELDS = " ".join(READ_FIELDS)


@dataclass(slots=True)
class _Query:
    """A search on its way: what is known before Redis is asked."""

    request: SearchRequest
    mode: str
    vector: bytes = b""
    timeout_ms: int = DEFAULT_TIMEOUT_MS
    reason: str | None = None


class Reader:
    """Reads one store."""

    def __init__(
        self, functions: Functions, embedder: Embedder, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._functions = functions
        self._embedder = embedder
        self._clock = clock

    async def search(self, owner: Owner, request: SearchRequest) -> SearchReply:
        """Return the best memories for a request.

        Raises:
            InvalidInput: the vector has another dimension than the store.
            EmbedderUnavailable: semantic search without an embedder; other modes go on with words.
            DeadlineExceeded: semantic search whose text could not be embedded within `max_ms`.

        Cost: one embedding, one round trip.
        """
        return (await self.search_each(owner, [request]))[0]

    async def search_each(self, owner: Owner, requests: Sequence[SearchRequest]) -> list[SearchReply]:
        """Return one reply per request, embedded in one batch and searched in one round trip."""
        started = time.perf_counter()
        queries = [_Query(request, request.search_mode) for request in requests]
        await self._embed(queries)
        embedded = time.perf_counter()
        keys = [owner.index, owner.meta, owner.turns]
        calls = [(keys, self._arguments(owner, query, started)) for query in queries]
        raw_replies = await self._functions.call_each("rm_search_ro_v1", calls, read=True)
        searched = time.perf_counter()
        replies = [self._reply(query, raw) for query, raw in zip(queries, raw_replies, strict=True)]
        ended = time.perf_counter()
        for query, reply in zip(queries, replies, strict=True):
            if not reply.partial and _ms(searched - embedded) >= query.timeout_ms:
                reply.partial, reply.reason = True, "the time budget ended during the search"
            reply.timing = Timing(
                embed=_ms(embedded - started), search=_ms(searched - embedded), total=_ms(ended - started)
            )
        return replies

    async def _embed(self, queries: Sequence[_Query]) -> None:
        """Give vectors to the queries that need one; without an embedder they fall back to words."""
        open_texts = []
        for query in queries:
            request = query.request
            if request.vector is not None:
                self._check_dimension(request.vector)
                query.vector = vector_bytes(unit(np.array(request.vector)))
            elif query.mode != "keyword":
                open_texts.append(query)
        if not open_texts:
            return
        texts = [str(query.request.text) for query in open_texts]
        budgets = [query.request.max_ms for query in open_texts if query.request.max_ms]
        try:
            async with asyncio.timeout(min(budgets) / 1000 if budgets else None):
                rows = await self._embedder.embed(texts, urgent=True)
        except TimeoutError as exc:
            if any(query.mode == "semantic" for query in open_texts):
                raise DeadlineExceeded(
                    "the text could not be embedded within max_ms; allow more, or use hybrid mode",
                    field="max_ms",
                ) from exc
            _fall_back(open_texts, "max_ms ended before the text was embedded: words only")
            return
        except Unavailable:
            if any(query.mode == "semantic" for query in open_texts):
                raise
            _fall_back(open_texts, "the embedder is unavailable: words only")
            return
        for query, row in zip(open_texts, rows, strict=True):
            query.vector = vector_bytes(row)

    def _check_dimension(self, vector: Sequence[float]) -> None:
        if len(vector) != self._embedder.dim:
            raise InvalidInput(
                f"`vector` has {len(vector)} numbers; this store's vectors have {self._embedder.dim}",
                field="vector",
            )

    def _arguments(self, owner: Owner, query: _Query, started: float) -> list[Argument]:
        request = query.request
        if request.max_ms is not None:
            query.timeout_ms = max(1, int(request.max_ms - _ms(time.perf_counter() - started)))
        candidates = max(MIN_CANDIDATES, CANDIDATES_PER_HIT * request.limit)
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

    def _reply(self, query: _Query, raw: list[Any]) -> SearchReply:
        if raw[0] == b"NOINDEX":
            raise IndexMissing("this user's index is missing; run `redismem doctor --repair`")
        _, generation, total, note, *flat = raw
        reason = query.reason
        if note == b"EMBEDDER":
            if query.mode == "semantic":
                raise EmbedderMismatch("this user's vectors are of another embedder; run `redismem reembed`")
            reason = "this user's vectors are of another embedder (run `redismem reembed`): words only"
        hits = [_hit(*flat[i : i + 4]) for i in range(0, len(flat), 4)]
        return SearchReply(
            memories=hits,
            total=int(total),
            generation=int(generation),
            served_by="l3",
            timing=Timing(embed=0, search=0, total=0),
            partial=reason is not None,
            reason=reason,
        )


def _fall_back(queries: Sequence[_Query], reason: str) -> None:
    for query in queries:
        query.mode, query.reason = "keyword", reason


def _hit(raw_id: bytes, score: bytes, parts: list[bytes | None] | None, fields: list[bytes | None]) -> Hit:
    hit = Hit(**memory_values(fields), score=float(score))
    hit.id = raw_id.decode("utf-8", "replace")
    if parts is not None:
        numbers = [None if part is None else float(part) for part in parts]
        hit.explain = ScoreParts(**dict(zip(ScoreParts.__struct_fields__, numbers, strict=True)))  # type: ignore[arg-type]  # the order of lua/read.lua
    return hit


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
