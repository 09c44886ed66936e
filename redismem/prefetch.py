"""Loads what a conversation will need next, in the background and only while there is time to spare.

A message tells by signals what the next turn may be about. What they point to is searched as the turn itself
would search it, so that the caches have it, and its ids are kept with the session (`loaded`); content is read
when it is shown, so nothing that was deleted comes back this way. A new message ends what was begun for the
one before. Under load nothing is begun at all.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from redismem.codec import widened
from redismem.conversation import MessageInput
from redismem.entities import Entity
from redismem.errors import RedisMemError
from redismem.filters import Filters, NumberRange, TimeRange
from redismem.gathering import LISTED, Sources, entity_request, match_request
from redismem.keys import Owner
from redismem.opening import NearTopic, near_topics
from redismem.queryvectors import QueryVectors
from redismem.sessions import Loaded
from redismem.timewindow import has_time, window
from redismem.types import Hit, SearchRequest

logger = logging.getLogger(__name__)

#: topics, entities and times of a message that are loaded at most, all together, and memories of each
MOST_POINTED, MEMORIES = 3, LISTED

#: topics that a session is on at most, and that are looked at for a message
ACTIVE_TOPICS, NEAR_TOPICS = 3, 3

#: memories that are kept for the next turn of a session
MOST_LOADED = 30

#: messages of the user on one topic from which a conversation is deep
DEEP_AFTER = 4

#: words of a message that is a mere follow-up
SHORT = 5

#: days and importance of what a deep conversation reaches down to
OLD_DAYS, UNIMPORTANT = 30, 0.5

#: seconds of quiet after which what was typed is looked at
DEBOUNCE_S = 0.15

#: texts being embedded for somebody who waits, from which on nothing is loaded ahead
BUSY = 4

#: loads of one user at once
_LANES_PER_USER = 1

#: conversations that are remembered, and seconds after which a loaded memory was loaded in vain
_MOST_TALKS, _WASTED_S = 10_000, 600.0

_FOLLOW_UP = re.compile(
    r"(?i)^\W*(and|but|so|also|then|what about|how about|why|really|tell me more|go on|more|which one"
    r"|who|when|where)\b"
)

#: of what came too late for a context; no signal, so it cannot be turned off
LATE = "late"


@dataclass(slots=True)
class _Talk:
    """What is known of a conversation in this process."""

    topic: str = ""
    #: messages of the user since the topic changed
    depth: int = 0
    active: list[str] = field(default_factory=list)
    #: id -> signal and score of what was loaded and not used yet, and when
    loaded: dict[str, tuple[str, float, float]] = field(default_factory=dict)
    #: memories of the latest context
    shown: set[str] = field(default_factory=set)
    task: asyncio.Task[None] | None = None
    typing: asyncio.Task[None] | None = None


@dataclass(frozen=True, slots=True)
class _Pointed:
    """Where a signal points."""

    signal: str
    request: SearchRequest


class Prefetcher:
    """Prefetching of one process.

    `counts` by signal: issued (memories loaded), used (shown in a later context), wasted (not shown in time);
    runs that were cancelled (overtaken by the next message) and shed (no time to spare).

    Args:
        signals: those that are on.
        lanes: loads at once.
    """

    def __init__(
        self,
        sources: Sources,
        vectors: QueryVectors,
        embedder_name: str,
        *,
        signals: frozenset[str],
        lanes: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._sources = sources
        self._vectors = vectors
        self._embedder_name = embedder_name
        self._signals = signals
        self._lanes = lanes
        self._clock = clock
        self._talks: OrderedDict[tuple[str, str], _Talk] = OrderedDict()
        self._running: Counter[str] = Counter()
        self.counts: dict[str, Counter[str]] = {}

    # what is heard --------------------------------------------------------------------------------

    def heard(self, owner: Owner, session_id: str, messages: Sequence[MessageInput]) -> None:
        """Load ahead for the last message of the user, if there is one; returns at once."""
        said = [message for message in messages if message.role == "user"]
        if not said or not self._signals:
            return
        talk = self._talk(owner, session_id)
        self._cancel(talk)
        talk.task = self._spawned(owner, "message", self._load(owner, session_id, talk, said[-1]))

    def typed(self, owner: Owner, session_id: str, partial: str) -> None:
        """Load ahead for what is being typed, once it rests; returns at once. Newer text ends older."""
        if "typing" not in self._signals:
            return
        talk = self._talk(owner, session_id)
        if talk.typing is not None and talk.typing.cancel():
            self._count("typing", "cancelled")
        talk.typing = asyncio.create_task(self._load_typed(owner, session_id, talk, partial))

    def used(self, owner: Owner, session_id: str, ids: set[str]) -> None:
        """Count which of the loaded memories a context shows."""
        talk = self._talk(owner, session_id)
        talk.shown = ids
        for memory_id in ids & set(talk.loaded):
            self._count(talk.loaded.pop(memory_id)[0], "used")

    async def came_late(self, owner: Owner, session_id: str, hits: Sequence[Hit]) -> None:
        """Keep what was too late for a context for the next one."""
        await self._keep(owner, session_id, self._talk(owner, session_id), {LATE: list(hits)[:MEMORIES]})

    # loading --------------------------------------------------------------------------------------

    def _spawned(
        self, owner: Owner, signal: str, work: Coroutine[Any, Any, None]
    ) -> asyncio.Task[None] | None:
        """Begin to load, unless there is no time to spare."""
        is_busy = self._vectors.under_way >= BUSY or self._running.total() >= self._lanes
        if is_busy or self._running[owner.tag] >= _LANES_PER_USER:
            self._count(signal, "shed")
            work.close()
            return None
        self._running[owner.tag] += 1
        task = asyncio.create_task(self._guarded(work))

        def ended(_: asyncio.Task[None]) -> None:
            self._running[owner.tag] -= 1
            if not self._running[owner.tag]:
                del self._running[owner.tag]

        task.add_done_callback(ended)
        return task

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except RedisMemError as exc:
            logger.debug("nothing was loaded ahead: %s", exc)
        except Exception:  # a defect here must stay without effect on the conversation
            logger.exception("loading ahead failed")

    async def _load(self, owner: Owner, session_id: str, talk: _Talk, message: MessageInput) -> None:
        found: dict[str, list[Hit]] = {}
        main = match_request(message.text)
        if "message" in self._signals:  # what its context will ask for first
            found["message"] = (await self._sources.tiers.look(owner, main)).memories[:MEMORIES]
        pointed = await self._pointed(owner, talk, message)
        if talk.active:
            await self._sources.sessions.note(owner, session_id, active_topics=talk.active)
        replies = await asyncio.gather(*(self._sources.tiers.look(owner, one.request) for one in pointed))
        for one, reply in zip(pointed, replies, strict=True):
            found.setdefault(one.signal, []).extend(reply.memories)
        if "follow_up" in self._signals and is_follow_up(message.text):
            await self._keep_hot(owner, talk)
        await self._keep(owner, session_id, talk, found)

    async def _load_typed(self, owner: Owner, session_id: str, talk: _Talk, partial: str) -> None:
        await asyncio.sleep(DEBOUNCE_S)
        task = self._spawned(owner, "typing", self._suggest(owner, session_id, talk, partial))
        if task is not None:
            try:
                await task
            except asyncio.CancelledError:
                task.cancel()
                raise

    async def _suggest(self, owner: Owner, session_id: str, talk: _Talk, partial: str) -> None:
        await self._vectors.made([partial], urgent=False)
        request = SearchRequest(text=partial, limit=MEMORIES, query_type="suggestion")
        reply = await self._sources.tiers.look(owner, request)
        await self._keep(owner, session_id, talk, {"typing": reply.memories})

    async def _pointed(self, owner: Owner, talk: _Talk, message: MessageInput) -> list[_Pointed]:
        """Return where the signals of a message point, the surest first."""
        text = message.text
        pointed: list[_Pointed] = []
        if "entity" in self._signals:
            known = [Entity(name, is_known=True) for name in message.entities]
            known = known or await self._sources.names.entities(owner, text)
            pointed += [_Pointed("entity", entity_request(entity, text)) for entity in known]
        if "time" in self._signals and has_time(text):
            now = datetime.fromtimestamp(self._clock(), UTC)
            # the library takes milliseconds, and a first import
            meant = await asyncio.to_thread(window, text, now)
            if meant is not None:
                bounds = TimeRange(gte=meant.start, lt=meant.end)
                pointed.append(_Pointed("time", _of(text, Filters(event_date=bounds))))
        near = await self._near(owner, text)
        shifted = self._follow(talk, near, is_short=is_follow_up(text))
        if "topic" in self._signals:
            pointed += [_Pointed("topic", _of(text, Filters(cluster=[one.number]))) for one in shifted]
        if "depth" in self._signals and talk.topic and talk.depth >= DEEP_AFTER:
            deep = Filters(
                cluster=[talk.topic],
                importance=NumberRange(lt=UNIMPORTANT),
                created_at=TimeRange(lt=_days_ago(self._clock(), OLD_DAYS)),
            )
            pointed.append(_Pointed("depth", _of(text, deep)))
        return pointed[:MOST_POINTED]

    async def _near(self, owner: Owner, text: str) -> list[NearTopic]:
        vector = self._vectors.known(text) or (await self._vectors.made([text]))[0]
        return await near_topics(
            self._sources.functions, owner, self._embedder_name, widened(vector), NEAR_TOPICS
        )

    def _follow(self, talk: _Talk, near: Sequence[NearTopic], *, is_short: bool) -> list[NearTopic]:
        """Note which topic a message is on; return the topics that the conversation has come to."""
        within = [one for one in near if one.within]
        if not within or is_short:  # it goes on where it was
            talk.depth += 1
            return []
        if within[0].number == talk.topic:
            talk.depth += 1
            return []
        talk.topic, talk.depth = within[0].number, 1
        new = [one for one in within if one.number not in talk.active]
        talk.active = [*dict.fromkeys([*(one.number for one in within[:1]), *talk.active])][:ACTIVE_TOPICS]
        return new

    async def _keep_hot(self, owner: Owner, talk: _Talk) -> None:
        """Load what the last context showed into L1 again: a follow-up is about the same."""
        await self._sources.tiers.warm(owner, sorted(talk.shown)[: 3 * MEMORIES])

    async def _keep(self, owner: Owner, session_id: str, talk: _Talk, found: dict[str, list[Hit]]) -> None:
        """Keep what was found for the next turn, in L1 and with the session."""
        now_s, loaded = self._clock(), list[Loaded]()
        self._waste(talk, now_s)
        for signal, hits in found.items():
            for hit in hits:
                if hit.id not in talk.loaded and hit.id not in (one for one, _, _ in loaded):
                    loaded.append((hit.id, signal, round(hit.score, 4)))
        if not loaded:
            return
        for memory_id, signal, score in loaded:
            talk.loaded[memory_id] = signal, score, now_s
            self._count(signal, "issued")
        await self._sources.tiers.warm(owner, [memory_id for memory_id, _, _ in loaded])
        # the newest first; those that the message itself is about come by its own search
        kept = [(one, *told[:2]) for one, told in reversed(talk.loaded.items()) if told[0] != "message"]
        if kept:
            await self._sources.sessions.note(owner, session_id, loaded=kept[:MOST_LOADED])

    def _waste(self, talk: _Talk, now_s: float) -> None:
        old = [one for one, (_, _, at_s) in talk.loaded.items() if at_s < now_s - _WASTED_S]
        surplus = len(talk.loaded) - len(old) - MOST_LOADED
        old += [one for one in talk.loaded if one not in old][: max(0, surplus)]
        for memory_id in old:
            self._count(talk.loaded.pop(memory_id)[0], "wasted")

    # book-keeping ---------------------------------------------------------------------------------

    def _talk(self, owner: Owner, session_id: str) -> _Talk:
        key = owner.tag, session_id
        talk = self._talks.get(key)
        if talk is None:
            talk = self._talks[key] = _Talk()
            if len(self._talks) > _MOST_TALKS:
                _, old = self._talks.popitem(last=False)
                self._end(old)
        self._talks.move_to_end(key)
        return talk

    def _cancel(self, talk: _Talk) -> None:
        for signal, task in (("message", talk.task), ("typing", talk.typing)):
            if task is not None and task.cancel():
                self._count(signal, "cancelled")
        talk.task = talk.typing = None

    def _end(self, talk: _Talk) -> None:
        self._cancel(talk)
        for signal, _, _ in talk.loaded.values():
            self._count(signal, "wasted")

    def _count(self, signal: str, what: str) -> None:
        self.counts.setdefault(signal, Counter())[what] += 1

    def stats(self) -> dict[str, dict[str, int]]:
        """Return the counts by signal."""
        return {signal: dict(counts) for signal, counts in sorted(self.counts.items())}

    async def settled(self) -> None:
        """Return when nothing is being loaded."""
        while tasks := self._tasks():
            await asyncio.wait(tasks)

    async def close(self) -> None:
        """Stop loading."""
        tasks = self._tasks()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _tasks(self) -> list[asyncio.Task[None]]:
        talks = self._talks.values()
        return [task for talk in talks for task in (talk.task, talk.typing) if task and not task.done()]


def is_follow_up(text: str) -> bool:
    """Return whether a message only makes sense after the one before: it is short, or opens like one."""
    return len(text.split()) <= SHORT or (
        _FOLLOW_UP.match(text) is not None and len(text.split()) <= 2 * SHORT
    )


def _of(text: str, filters: Filters) -> SearchRequest:
    return SearchRequest(text=text, limit=LISTED, filters=filters, query_type="prefetch")


def _days_ago(now_s: float, days: float) -> datetime:
    # whole days, so that the same search is made all day
    return datetime.fromtimestamp(now_s, UTC).replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(
        days=days
    )
