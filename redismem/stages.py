"""The only place that decides which part of a context comes in which stage, in what order, and how much.

Each function fills the open stage of a turn. What comes first has the room; matches fill what is left, so a
stage without topics, entities or history holds more of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from redismem.conversation import ContextRequest, Part
from redismem.errors import RedisMemError
from redismem.gathering import Gathering
from redismem.immediacy import is_immediate, is_on_demand, order
from redismem.keys import PROFILE_ID, Owner
from redismem.opening import Derived, Opening
from redismem.packing import Packer, Source
from redismem.types import Memory, SearchReply

#: tokens at most, headings included: of profile, last session; of the summaries of a topic and an entity
PROFILE_TOKENS, SESSION_TOKENS, TOPIC_TOKENS, ENTITY_TOKENS = 320, 170, 120, 160
#: the same of memories: on the active topics, prefetched, of an entity, the newest, beside the best, related
ON_TOPIC_TOKENS, PREFETCHED_TOKENS, OF_ENTITY_TOKENS, NEWEST_TOKENS = 250, 200, 150, 100
HISTORY_TOKENS, RELATED_TOKENS = 500, 250

#: memories at most: unasked besides pinned ones, best matches, on the active topics, prefetched, newest
UNASKED, BEST, ON_TOPIC, PREFETCHED, NEWEST = 5, 5, 5, 5, 3

#: active topics whose summaries are shown
TOPICS = 2

#: milliseconds of a budget that are left for packing and sending
_RESERVED_MS = 3.0

T = TypeVar("T")


@dataclass(slots=True)
class Turn:
    """One context on its way. `began_s`: perf_counter at the arrival of the request."""

    owner: Owner
    request: ContextRequest
    began_s: float
    work: Gathering
    packer: Packer
    now_s: float = field(default_factory=time.time)
    #: what is known without a search, and where from
    opening: Opening | None = None
    opening_from: Source = "l2"
    matches: SearchReply | None = None
    entities: list[str] = field(default_factory=list)
    #: of the open stage: parts that are missing, and why
    skipped: list[str] = field(default_factory=list)
    reason: str | None = None
    is_partial: bool = False

    def begin(self, stage: int) -> None:
        """Open a stage."""
        self.skipped, self.reason = [], None
        self.packer.begin(stage)

    def wants(self, part: Part) -> bool:
        return bool(getattr(self.request.parts, part))

    def elapsed_ms(self) -> float:
        return (time.perf_counter() - self.began_s) * 1000

    async def opened(self) -> Opening:
        """Return what is known without a search."""
        if self.opening is None:
            self.opening, self.opening_from = await self.work.opening
        return self.opening

    async def matched(self) -> SearchReply | None:
        """Return what the search for the text found; of words alone, where the budget leaves no more."""
        if self.matches is None:
            self.matches = await self.fetched(["matches", "more"], self.work.matches, needed=True)
            if self.matches is None and (words := self.work.words) and words.done():
                return None if words.exception() else words.result()
            if self.matches and self.matches.partial:
                self.skip(["matches", "more"], self.matches.reason or "a part of the search was left out")
        return self.matches

    async def fetched(
        self, parts: Sequence[Part], task: asyncio.Task[T], *, needed: bool = False
    ) -> T | None:
        """Return what a fetch came to; None, and the parts are skipped, when it is late or failed.

        Args:
            needed: its failure is that of the context.
        """
        left_s = None
        if self.request.max_ms is not None:
            left_s = max(0.0, self.request.max_ms - _RESERVED_MS - self.elapsed_ms()) / 1000
        try:
            async with asyncio.timeout(left_s):
                return await asyncio.shield(task)
        except TimeoutError:
            self.skip(parts, "max_ms ended before it was there")
        except RedisMemError as exc:
            if needed:
                raise
            self.skip(parts, exc.message)
        return None

    def skip(self, parts: Sequence[Part], reason: str) -> None:
        """Note that parts are missing."""
        wanted = [part for part in parts if self.wants(part) and part not in self.skipped]
        if wanted:
            self.skipped += wanted
            self.reason = self.reason or reason
            self.is_partial = True

    def tell(self, part: Part, title: str, told: Derived | None, tokens: int) -> None:
        """Add a derived text, if it is wanted."""
        if told and told.text and self.wants(part):
            most = int(tokens * self.packer.scale)
            self.packer.add_text(part, title, told.text, told.sources, "derived", most=most)

    async def show(
        self,
        part: Part,
        title: str,
        memories: Sequence[Memory],
        source: Source,
        *,
        most: int | None = None,
        tokens: int | None = None,
        why: Mapping[str, str] | None = None,
    ) -> None:
        """Add memories, if they are wanted; what the session has just said its agents have before them."""
        if self.wants(part):
            said = (await self.opened()).said
            unsaid = [one for one in memories if one.id not in said]
            bound = None if tokens is None else int(tokens * self.packer.scale)
            self.packer.add_memories(part, title, unsaid, source, most=most, tokens=bound, why=why)

    async def show_more(self) -> None:
        """Fill what is left with further matches."""
        if matches := await self.matched():
            await self.show("more", "More memories", matches.memories, matches.served_by)


async def first(turn: Turn) -> None:
    """Profile, last session, and what is loaded without being asked for. Never waits for an embedding."""
    opened = await turn.opened()
    if turn.request.text is None and turn.request.session_id is not None:
        await turn.work.text  # tells at once that there is no such session
    if turn.wants("profile"):
        found = await turn.work.profile
        told = Derived("", found.profile.context_summary, (PROFILE_ID, *found.sources))
        turn.tell("profile", "About the user", told, PROFILE_TOKENS)
    if opened.last:
        told = Derived("", opened.last.summary, opened.last.sources)
        turn.tell("session", "Last session", told, SESSION_TOKENS)
    why = _immediate(turn, opened)
    best = order([placed.memory for placed in opened.memories.values()], turn.now_s)
    pinned = [one for one in best if why.get(one.id) == "pinned"]
    rest = [one for one in best if one.id in why and one not in pinned]
    if turn.request.stages == 1:  # a beginning; later ones have something to go by
        important = [one for one in best if one.id in opened.important and one.id not in why]
        rest += [one for one in important if not is_on_demand(one, turn.now_s)]
    for memories, most in ((pinned, None), (rest, UNASKED)):
        await turn.show("pinned", "Keep in mind", memories, turn.opening_from, most=most, why=why)


def _immediate(turn: Turn, opened: Opening) -> dict[str, str]:
    """Return the ids of memories that are loaded without being asked for, with the reason."""
    last_ids = {*opened.last.shown, *opened.last.sources} if opened.last else set[str]()
    active, pins = set(opened.names("active_topics")), set(opened.names("pins"))
    told = {"now_s": turn.now_s, "active_topics": active, "last_ids": last_ids, "pins": pins}
    why = {
        name: is_immediate(placed.memory, placed.cluster, **told)  # type: ignore[arg-type]  # as told
        for name, placed in opened.memories.items()
    }
    return {name: reason for name, reason in why.items() if reason}


async def second(turn: Turn) -> None:
    """The best matches, what is on the active topics, and what was loaded for this turn."""
    matches = await turn.matched()
    if matches:
        await turn.show("matches", "Relevant memories", matches.memories, matches.served_by, most=BEST)
    opened = await turn.opened()
    for topic in opened.topics[:TOPICS]:
        turn.tell("topics", f"Current topic: {topic.name}", topic, TOPIC_TOKENS)
    if on_topic := await turn.fetched(["topics"], turn.work.on_topic):
        title, source = "On the current topic", on_topic.served_by
        await turn.show("topics", title, on_topic.memories, source, most=ON_TOPIC, tokens=ON_TOPIC_TOKENS)
    is_late = matches is None and "matches" in turn.skipped
    loaded = {one: signal for one, signal, _ in opened.loaded if one in opened.memories}
    await turn.show(
        *("prefetched", "May be needed", [opened.memories[one].memory for one in loaded]),
        turn.opening_from,
        most=None if is_late else PREFETCHED,
        tokens=None if is_late else PREFETCHED_TOKENS,
        why=loaded,
    )
    await turn.show_more()


async def third(turn: Turn) -> None:
    """Entities, the newest memories, and more matches."""
    if turn.wants("entities"):
        for one in await turn.fetched(["entities"], turn.work.entities) or ():
            name = one.entity.name
            turn.entities.append(name)
            turn.tell("entities", f"About {name}", one.summary, ENTITY_TOKENS)
            why = {hit.id: name for hit in one.memories}
            title, source = f"Mentions {name}", one.served_by
            await turn.show("entities", title, one.memories, source, tokens=OF_ENTITY_TOKENS, why=why)
    opened, own = await turn.opened(), turn.request.session_id
    newest = [opened.memories[one].memory for one in opened.newest if one in opened.memories]
    newest = [
        one for one in newest if not (own and one.session_id == own) and not is_on_demand(one, turn.now_s)
    ]
    await turn.show("recent", "Recent", newest, turn.opening_from, most=NEWEST, tokens=NEWEST_TOKENS)
    await turn.show_more()


async def fourth(turn: Turn) -> None:
    """What stands around the best matches, and a deep search."""
    matches = await turn.matched()
    near = await turn.fetched(["history", "related"], turn.work.around)
    if near and matches:
        best = [hit.id for hit in matches.memories]
        around_best: tuple[tuple[Part, str, Mapping[str, Iterable[str]], int], ...] = (
            ("history", "Said before and after", near.beside, HISTORY_TOKENS),
            ("related", "Related memories", near.related, RELATED_TOKENS),
        )
        for part, title, around, tokens in around_best:
            why = dict[str, str]()
            for one in best:
                for other in around.get(one, ()):
                    why.setdefault(other, one)
            memories = [near.memories[one].memory for one in why if one in near.memories]
            await turn.show(part, title, memories, "l2", tokens=tokens, why=why)
    await turn.show_more()
    if deep := await turn.fetched(["deep"], turn.work.deep):
        await turn.show("deep", "Further memories", deep.memories, deep.served_by)


STAGES = (first, second, third, fourth)
