"""Fetches everything that one context is made from, side by side.

Each fetch begins as soon as what it needs is there, so together they take as long as the slowest chain: the
embedding, the search with its vector, and for the fourth stage what stands around the best of it. But what
the first stage does not need waits until that is handed over, the embedding aside: else the loop and Redis,
which share the cores, are busy with the others while it is on its way.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import msgspec

from redismem.coherence import Coherence
from redismem.conversation import ContextRequest
from redismem.derived import FoundProfile
from redismem.entities import Entity
from redismem.errors import NotFound
from redismem.filters import Filters, TagMatch
from redismem.keys import PROFILE_ID, Owner, session_mark
from redismem.l1 import L1
from redismem.lualib import Functions, fcall
from redismem.naming import NameBook
from redismem.opening import Around, Derived, Opening, around, ids_of, opening
from redismem.query import packed_tags
from redismem.queryvectors import QueryVectors
from redismem.sessions import Sessions
from redismem.tiers import Tiers
from redismem.types import Hit, SearchReply, SearchRequest

#: memories of the search for the message, of a deep search, of one on a topic or entity, without a search
MATCHES, DEEP, LISTED, NEWEST = 60, 100, 10, 10

#: best memories whose surroundings are read
CENTRES = 10

#: a context with less time than this asks for words as well
HEDGED_MS = 50

#: a session that ended longer ago is no last session
LAST_SESSION_S = 30 * 86_400

#: seconds L1 keeps an opening, and bytes it is taken for besides its texts
_OPENING_TTL_S, _OPENING_BYTES = 30.0, 600

#: messages that are looked through for the last one of the user
_LAST_SAID = 10

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class EntityContext:
    """What is known of one entity."""

    entity: Entity
    summary: Derived | None
    memories: list[Hit]
    served_by: Literal["l1", "l2", "l3"]


@dataclass(frozen=True, slots=True)
class Sources:
    """Where contexts are read from."""

    functions: Functions
    tiers: Tiers
    sessions: Sessions
    names: NameBook
    vectors: QueryVectors
    l1: L1
    coherence: Coherence

    async def opening(
        self, owner: Owner, session_id: str | None, least: int
    ) -> tuple[Opening, Literal["l1", "l2"]]:
        """Return an opening of at least this generation, and where it came from: l1 or l2."""
        key, now_s = session_id or "", time.monotonic()
        if self.coherence.is_live():
            entry = self.l1.get("context", owner.tag, key, now_s, min_generation=least)
            if entry is not None:
                assert isinstance(entry.value, Opening)
                return entry.value, "l1"
        ticket = self.l1.open(owner.tag)
        try:
            found = await opening(
                self.functions, owner, session_id, newest=NEWEST, last_after_s=time.time() - LAST_SESSION_S
            )
            if self.coherence.is_live():
                texts = [one.memory.text for one in found.memories.values()]
                self.l1.fill(
                    *(ticket, "context", key, found),
                    size_bytes=sum(map(len, texts)) + _OPENING_BYTES * (1 + len(texts)),
                    ids=_named(found, key),
                    generation=found.generation,
                    ttl_s=_OPENING_TTL_S,
                    now_s=now_s,
                )
        finally:
            self.l1.close(ticket)
        return found, "l2"


def _named(found: Opening, session_id: str) -> tuple[str, ...]:
    """Return everything whose change makes an opening untrue."""
    names = [PROFILE_ID, session_mark(session_id), *found.memories]
    for topic in found.topics:
        names += topic.sources
    if found.last:
        names += [session_mark(found.last.id), *found.last.sources]
    return tuple(dict.fromkeys(names))


def match_request(text: str) -> SearchRequest:
    """Return the search that finds what a message needs; prefetching makes the same one."""
    return SearchRequest(text=text, limit=MATCHES)


def topic_requests(active: Sequence[str], text: str) -> list[SearchRequest]:
    """Return the searches for a text on active topics: numbers of topics, or names."""
    numbers = [name for name in active if is_number(name)]
    named = [name for name in active if not is_number(name)]
    filters = [Filters(cluster=numbers)] if numbers else []
    filters += [Filters(topics=TagMatch(any=named))] if named else []
    return [SearchRequest(text=text, limit=LISTED, filters=one) for one in filters]


def is_number(topic: str) -> bool:
    """Return whether an active topic is the number of one; else it is a name."""
    return topic.isascii() and topic.isdigit()


def entity_request(entity: Entity, text: str) -> SearchRequest:
    """Return the search for what a text is about: in an entity's memories, or for its name if none has it."""
    if entity.is_known:
        return SearchRequest(text=text, limit=LISTED, filters=Filters(entities=[entity.name]))
    return SearchRequest(text=entity.name, limit=LISTED, search_mode="keyword")


class Gathering:
    """The fetches of one request. `took_ms`: what each took, from its beginning."""

    def __init__(self, sources: Sources, owner: Owner, request: ContextRequest) -> None:
        self._sources = sources
        self._owner = owner
        self._request = request
        self._least = request.min_generation
        self.took_ms: dict[str, float] = {}
        self._tasks: dict[str, asyncio.Task[Any]] = {}
        #: found without an embedding, where there may be no time for one
        self.words: asyncio.Task[SearchReply | None] | None = None
        self._first_is_out = asyncio.Event()
        self.text = self._begin("text", self._text)
        self.opening = self._begin("opening", self._opening)
        if request.parts.profile:
            self.profile = self._begin("profile", self._profile)
        if request.stages > 1:
            self.matches = self._begin("matches", self._matches)
            if request.max_ms is not None and request.max_ms <= HEDGED_MS:
                self.words = self._begin("words", self._words)

    def go_on(self) -> None:
        """Begin what the later stages need, now that the first is out; again is no change."""
        if self._first_is_out.is_set():
            return
        self._first_is_out.set()
        request = self._request
        if request.stages > 1:
            self.on_topic = self._begin("topics", self._on_topic)
        if request.stages > 2 and request.parts.entities:
            self.entities = self._begin("entities", self._entities)
        if request.stages > 3:
            self.deep = self._begin("deep", self._deep)
            self.around = self._begin("around", self._around)

    def _begin(self, name: str, work: Callable[[], Awaitable[T]]) -> asyncio.Task[T]:
        task = asyncio.create_task(self._timed(name, work))
        # who asks for it hears of its failure; where nobody does it must not be reported
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._tasks[name] = task
        return task

    async def _timed(self, name: str, work: Callable[[], Awaitable[T]]) -> T:
        started_s = time.perf_counter()
        try:
            return await work()
        finally:
            self.took_ms[name] = round((time.perf_counter() - started_s) * 1000, 3)

    def handed_over(self) -> list[asyncio.Task[Any]]:
        """Return the fetches that are still under way, for somebody else to wait for."""
        late = {name: task for name, task in self._tasks.items() if not task.done()}
        for name in late:
            del self._tasks[name]
        return list(late.values())

    def cancel(self) -> None:
        """Stop them."""
        for task in self._tasks.values():
            task.cancel()

    async def _opening(self) -> tuple[Opening, Literal["l1", "l2"]]:
        return await self._sources.opening(self._owner, self._request.session_id, self._least)

    async def _profile(self) -> FoundProfile:
        return await self._sources.tiers.found_profile(self._owner)

    async def _text(self) -> str:
        """Return what the context is for; empty for a session in which nothing was said."""
        request = self._request
        if request.text is not None or request.session_id is None:
            return request.text or ""
        try:
            said = (await self._sources.sessions.state(self._owner, request.session_id, _LAST_SAID)).recent
        except NotFound:
            if request.stages == 1:
                return ""
            raise
        of_user = [memory.text for memory in said if memory.metadata.get("role") == "user"]
        return (of_user or [memory.text for memory in said] or [""])[-1]

    async def _matches(self) -> SearchReply | None:
        parts = self._request.parts
        is_wanted = parts.matches or parts.more or parts.entities or parts.history or parts.related
        text = await self.text if is_wanted else ""
        if not text:
            return None
        if self._sources.vectors.known(text):  # nothing to embed
            await self._first_is_out.wait()
        return await self._look(match_request(text))

    async def _words(self) -> SearchReply | None:
        text = await self.text
        if not text:
            return None
        return await self._look(SearchRequest(text=text, limit=MATCHES, search_mode="keyword"))

    async def _look(self, request: SearchRequest) -> SearchReply:
        if self._least:
            request = msgspec.structs.replace(request, consistency="session", min_version=self._least)
        return await self._sources.tiers.look(self._owner, request)

    async def _on_topic(self) -> SearchReply | None:
        """Search the memories on the session's active topics."""
        found, text = (await self.opening)[0], await self.text
        active = found.names("active_topics")
        if not (active and text and self._request.parts.topics):
            return None
        replies = await asyncio.gather(*(self._look(one) for one in topic_requests(active, text)))
        for reply in replies[1:]:
            replies[0].memories += reply.memories
        replies[0].memories.sort(key=lambda hit: -hit.score)
        return replies[0]

    async def _entities(self) -> list[EntityContext]:
        given, text = self._request.entities, await self.text
        if given:
            entities = [Entity(name, is_known=True) for name in given]
        else:
            entities = await self._sources.names.entities(self._owner, text) if text else []
        found = await asyncio.gather(*(self._entity(entity, text or entity.name) for entity in entities))
        matches = await self.matches
        best = " ".join(hit.text for hit in matches.memories) if matches else ""
        for one in found:
            # a mere word of the text: the search for it has found what there is about both
            if not one.entity.is_known and one.entity.name in best:
                one.memories.clear()
        return [one for one in found if one.summary or one.memories]

    async def _entity(self, entity: Entity, text: str) -> EntityContext:
        reply, (summary,) = await asyncio.gather(
            self._look(entity_request(entity, text)),
            self._sources.functions.send([self._summary_call("entity", packed_tags([entity.name]))]),
        )
        return EntityContext(entity, _summary(entity.name, summary), reply.memories, reply.served_by)

    def _summary_call(self, kind: str, name: str) -> Any:
        key = f"{self._owner.summary_prefix}{kind}:{name}"
        return fcall("rm_summary_ro_v1", [key], self._owner.memory_prefix, read=True)

    async def _deep(self) -> SearchReply | None:
        if not (text := await self.text) or not self._request.parts.deep:
            return None
        await self.matches  # its vector serves this search too, and it is wanted first
        return await self._look(SearchRequest(text=text, limit=DEEP, query_type="verification"))

    async def _around(self) -> Around:
        parts = self._request.parts
        matches = await self.matches if parts.history or parts.related else None
        ids = [hit.id for hit in matches.memories[:CENTRES]] if matches else []
        return await around(self._sources.functions, self._owner, ids)


def _summary(name: str, flat: list[bytes]) -> Derived | None:
    fields = dict(zip(flat[::2], flat[1::2], strict=True))
    if b"text" not in fields:
        return None
    text = fields[b"text"].decode("utf-8", "replace")
    return Derived(name, text, ids_of(fields.get(b"sources", b"[]")))
