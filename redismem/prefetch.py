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
from functools import partial
from typing import Any, Literal

from redismem.codec import widened
from redismem.conversation import MessageInput
from redismem.entities import Entity
from redismem.errors import RedisMemError
from redismem.filters import Filters, NumberRange, TimeRange
from redismem.gathering import (
    LISTED,
    Sources,
    entity_request,
    is_number,
    match_request,
    topic_requests,
)
from redismem.keys import Owner
from redismem.opening import NearTopic, near_topics
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

#: words of a message that is a mere follow-up, and characters of a word at most: some scripts have no blanks
SHORT, _WORD_CHARS = 5, 8

#: days and importance of what a deep conversation reaches down to
OLD_DAYS, UNIMPORTANT = 30, 0.5

#: seconds of quiet after which what was typed is looked at
DEBOUNCE_S = 0.15

#: seconds that a message is left alone: its context, which mostly follows at once, must not wait for it
ANSWER_S = 0.03

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
        embedder_name: str,
        *,
        signals: frozenset[str],
        lanes: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._sources = sources
        self._vectors = sources.vectors
        self._embedder_name = embedder_name
        self._signals = signals
        self._lanes = lanes
        self._clock = clock
        self._talks: OrderedDict[tuple[str, str], _Talk] = OrderedDict()
        #: loads under way -> whose; one that was cancelled is not among them any more
        self._running: dict[asyncio.Task[None], str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.counts: dict[str, Counter[str]] = {}

    # what is heard --------------------------------------------------------------------------------

    def heard(self, owner: Owner, session_id: str, messages: Sequence[MessageInput]) -> None:
        """Load ahead for the last message of the user, if there is one; returns at once."""
        said = [message for message in messages if message.role == "user"]
        if not said or not self._signals:
            return
        talk = self._talk(owner, session_id)
        self._cancel(talk, "message")
        self._cancel(talk, "typing")
        load = partial(self._load, owner, session_id, talk, said[-1])
        talk.task = self._begun(self._later(owner, "message", talk, ANSWER_S, load))

    def typed(self, owner: Owner, session_id: str, text: str) -> None:
        """Load ahead for what is being typed, once it rests; returns at once. Newer text ends older."""
        if "typing" not in self._signals:
            return
        talk = self._talk(owner, session_id)
        self._cancel(talk, "typing")
        load = partial(self._suggest, owner, session_id, talk, text)
        talk.typing = self._begun(self._later(owner, "typing", talk, DEBOUNCE_S, load))

    def used(
        self, owner: Owner, session_id: str, ids: set[str], loaded: Sequence[Loaded] = ()
    ) -> list[Loaded]:
        """Count which of the loaded memories a context shows; return those of `loaded` that it does not."""
        talk = self._talk(owner, session_id)
        talk.shown = ids
        for memory_id in ids & set(talk.loaded):
            self._count(talk.loaded.pop(memory_id)[0], "used")
        return [one for one in loaded if one[0] not in ids]

    async def came_late(self, owner: Owner, session_id: str, hits: Sequence[Hit]) -> None:
        """Keep what was too late for a context for the next one."""
        await self._keep(owner, session_id, self._talk(owner, session_id), {LATE: list(hits)[:MEMORIES]})

    # loading --------------------------------------------------------------------------------------

    def _has_time(self, owner: Owner, signal: str) -> bool:
        """Return whether there is time to spare for one more load."""
        mine = sum(tag == owner.tag for tag in self._running.values())
        is_busy = self._vectors.under_way >= BUSY or len(self._running) >= self._lanes
        if is_busy or mine >= _LANES_PER_USER:
            self._count(signal, "shed")
            return False
        return True

    async def _later(
        self,
        owner: Owner,
        signal: Literal["message", "typing"],
        talk: _Talk,
        delay_s: float,
        load: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        """Begin to load after a while, if there is time then."""
        await asyncio.sleep(delay_s)
        if self._has_time(owner, signal):
            task = self._begun(load(), owner)
            if signal == "message":
                talk.task = task
            else:
                talk.typing = task

    def _begun(self, work: Coroutine[Any, Any, None], owner: Owner | None = None) -> asyncio.Task[None]:
        """Begin to load; with an owner, in one of the lanes."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        if owner is not None:
            self._running[task] = owner.tag
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._running.pop(task, None)
        exc = None if task.cancelled() else task.exception()
        if isinstance(exc, RedisMemError):
            logger.debug("nothing was loaded ahead: %s", exc)
        elif exc is not None:  # a defect here must stay without effect on the conversation
            logger.error("loading ahead failed", exc_info=exc)

    async def _load(self, owner: Owner, session_id: str, talk: _Talk, message: MessageInput) -> None:
        tiers, own = self._sources.tiers, list[Hit]()
        if "message" in self._signals:  # what its context will ask for first
            own = (await tiers.look(owner, match_request(message.text))).memories
        pointed = await self._pointed(owner, session_id, talk, message)
        replies = await asyncio.gather(*(tiers.look(owner, one.request) for one in pointed))
        found: dict[str, list[Hit]] = {}
        for one, reply in zip(pointed, replies, strict=True):
            unsaid = [hit for hit in reply.memories if not _is_said(hit, session_id)]
            found.setdefault(one.signal, []).extend(unsaid[:MEMORIES])
        found["message"] = own[:MEMORIES]  # last: what two signals found is the other's merit
        if "follow_up" in self._signals and is_follow_up(message.text):
            await tiers.warm(owner, sorted(talk.shown)[: MOST_POINTED * MEMORIES])
        await self._keep(owner, session_id, talk, found)

    async def _suggest(self, owner: Owner, session_id: str, talk: _Talk, text: str) -> None:
        await self._vectors.made([text], urgent=False)
        request = SearchRequest(text=text, limit=MEMORIES, query_type="suggestion")
        reply = await self._sources.tiers.look(owner, request)
        await self._keep(owner, session_id, talk, {"typing": reply.memories})

    async def _pointed(
        self, owner: Owner, session_id: str, talk: _Talk, message: MessageInput
    ) -> list[_Pointed]:
        """Return where the signals of a message point, the surest first."""
        text = message.text
        pointed: list[_Pointed] = []
        if "entity" in self._signals:
            named = [Entity(name, is_known=True) for name in message.entities]
            named = named or await self._sources.names.entities(owner, text)
            pointed += [_Pointed("entity", entity_request(one, text)) for one in named if one.is_known]
        if "time" in self._signals and has_time(text):
            now = datetime.fromtimestamp(self._clock(), UTC)
            # the library takes milliseconds, and a first import
            meant = await asyncio.to_thread(window, text, now)
            if meant is not None:
                bounds = TimeRange(gte=meant.start, lt=meant.end)
                pointed.append(_Pointed("time", _of(text, Filters(event_date=bounds))))
        if self._signals.isdisjoint(("topic", "depth")):
            return pointed[:MOST_POINTED]
        near = await self._near(owner, text)
        has_shifted = self._follow(talk, near, is_short=is_follow_up(text))
        if has_shifted:
            active = await self._activated(owner, session_id, talk)
            if "topic" in self._signals:
                pointed += [_Pointed("topic", one) for one in topic_requests(active, text)]
        if "depth" in self._signals and talk.topic and talk.depth >= DEEP_AFTER:
            deep = Filters(
                cluster=[talk.topic],
                importance=NumberRange(lt=UNIMPORTANT),
                created_at=TimeRange(lt=_days_ago(self._clock(), OLD_DAYS)),
            )
            pointed.append(_Pointed("depth", _of(text, deep)))
        return pointed[:MOST_POINTED]

    async def _activated(self, owner: Owner, session_id: str, talk: _Talk) -> list[str]:
        """Put the topic that a conversation has come to before its other active topics; names stay."""
        opened, _ = await self._sources.opening(owner, session_id, 0)
        known = opened.names("active_topics")
        numbers = [*dict.fromkeys([talk.topic, *(one for one in known if is_number(one))])]
        active = [*numbers[:ACTIVE_TOPICS], *(one for one in known if not is_number(one))]
        if active != known:
            await self._sources.sessions.note(owner, session_id, active_topics=active)
        return active

    async def _near(self, owner: Owner, text: str) -> list[NearTopic]:
        vector = self._vectors.known(text) or (await self._vectors.made([text]))[0]
        return await near_topics(
            self._sources.functions, owner, self._embedder_name, widened(vector), NEAR_TOPICS
        )

    def _follow(self, talk: _Talk, near: Sequence[NearTopic], *, is_short: bool) -> bool:
        """Note which topic a message is on; return whether the conversation has come to another one."""
        within = [one for one in near if one.within]
        if not within or is_short or within[0].number == talk.topic:  # it goes on where it was
            talk.depth += 1
            return False
        talk.topic, talk.depth = within[0].number, 1
        return True

    async def _keep(self, owner: Owner, session_id: str, talk: _Talk, found: dict[str, list[Hit]]) -> None:
        """Keep what was found for the next turn; L1 has it with the search that found it."""
        now_s, new = self._clock(), dict[str, tuple[str, float, float]]()
        self._waste(talk, now_s)
        for signal, hits in found.items():
            for hit in hits:
                if not _is_said(hit, session_id) and hit.id not in talk.loaded:
                    new.setdefault(hit.id, (signal, round(hit.score, 4), now_s))
        for signal, _, _ in new.values():
            self._count(signal, "issued")
        talk.loaded = {**new, **talk.loaded}  # the newest first
        # those that the message itself is about come by its own search
        kept = [(one, *told[:2]) for one, told in talk.loaded.items() if told[0] != "message"]
        if new:
            await self._sources.sessions.note(owner, session_id, loaded=kept[:MOST_LOADED])

    def _waste(self, talk: _Talk, now_s: float) -> None:
        old = [one for one, (_, _, at_s) in talk.loaded.items() if at_s < now_s - _WASTED_S]
        old += [one for one in talk.loaded if one not in old][MOST_LOADED:]
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

    def _cancel(self, talk: _Talk, signal: str) -> None:
        """End what was begun for a message, or for what was typed; its lane is free at once."""
        task = talk.task if signal == "message" else talk.typing
        if task is not None and task.cancel():
            self._running.pop(task, None)
            self._count(signal, "cancelled")

    def _end(self, talk: _Talk) -> None:
        self._cancel(talk, "message")
        self._cancel(talk, "typing")
        for signal, _, _ in talk.loaded.values():
            self._count(signal, "wasted")

    def _count(self, signal: str, what: str) -> None:
        self.counts.setdefault(signal, Counter())[what] += 1

    def stats(self) -> dict[str, dict[str, int]]:
        """Return the counts by signal."""
        return {signal: dict(counts) for signal, counts in sorted(self.counts.items())}

    async def settled(self) -> None:
        """Return when nothing is being loaded."""
        while self._tasks:
            await asyncio.wait(list(self._tasks))

    async def close(self) -> None:
        """Stop loading."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def is_follow_up(text: str) -> bool:
    """Return whether a message only makes sense after the one before: it is short, or opens like one."""
    words = max(len(text.split()), len(text) // _WORD_CHARS)
    return words <= SHORT or (_FOLLOW_UP.match(text) is not None and words <= 2 * SHORT)


def _is_said(hit: Hit, session_id: str) -> bool:
    return hit.memory_type == "message" and hit.session_id == session_id


def _of(text: str, filters: Filters) -> SearchRequest:
    # what was just said matches best, and is not loaded
    return SearchRequest(text=text, limit=3 * LISTED, filters=filters, query_type="prefetch")


def _days_ago(now_s: float, days: float) -> datetime:
    # whole days, so that the same search is made all day
    return datetime.fromtimestamp(now_s, UTC).replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(
        days=days
    )
