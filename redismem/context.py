"""Assembles the context of a conversation in stages, each as soon as it is there.

A stage is compared with what changed since the request began in the moment in which it is handed over: no
stage shows what was deleted or corrected before, although it may have been read earlier (watch.py).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from itertools import chain, zip_longest
from typing import Any

from msgspec.structs import replace

from redismem.browse import Browser
from redismem.conversation import Block, ContextReply, ContextRequest, Stage
from redismem.embed import Embedder
from redismem.errors import RedisMemError, Unavailable
from redismem.gathering import EntityContext, Gathering, Sources
from redismem.keys import PROFILE_ID, Owner
from redismem.opening import Opening
from redismem.packing import Packer
from redismem.prefetch import Prefetcher
from redismem.rendering import rendered, templated
from redismem.sessions import Loaded
from redismem.stages import STAGES, Turn
from redismem.tokens import TokenCounts
from redismem.touches import Touches
from redismem.trace import current
from redismem.types import Hit, SearchReply
from redismem.watch import Watch

#: how often what changed during the comparison is read again, before it is left out
_MOST_READS = 3

#: the stage whose memories are counted: what prefetching is for
_COUNTED_STAGE = 2

#: requests whose late parts are waited for at once, and for how many seconds
_MOST_LATE, _LATE_S = 64, 5.0


class Contexts:
    """Contexts of one process; `counts` tells what became of them."""

    def __init__(
        self,
        sources: Sources,
        embedder: Embedder,
        browser: Browser,
        touches: Touches,
        prefetcher: Prefetcher,
    ) -> None:
        self._sources = sources
        self._browser = browser
        self._touches = touches
        self._prefetcher = prefetcher
        self._count = TokenCounts(embedder)
        self._background: set[asyncio.Task[None]] = set()
        self._late = 0
        self.counts: Counter[str] = Counter()

    async def whole(self, owner: Owner, request: ContextRequest) -> ContextReply:
        """Return a context in one piece; see `stages`."""
        *_, reply = [part async for part in self.stages(owner, request)]
        assert isinstance(reply, ContextReply)
        return reply

    async def batch(self, owner: Owner, requests: Sequence[ContextRequest]) -> list[ContextReply]:
        """Return one context a request, in order; their texts are embedded together.

        Raises:
            as `stages`; the first that fails fails all.
        """
        texts = [request.text for request in requests if request.text is not None and request.stages > 1]
        tasks = [asyncio.create_task(self.whole(owner, request)) for request in requests]
        try:
            with suppress(Unavailable):  # each falls back to words by itself
                await self._sources.vectors.made(list(dict.fromkeys(texts)))
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def stages(
        self, owner: Owner, request: ContextRequest
    ) -> AsyncGenerator[Stage | ContextReply, None]:
        """Yield the stages one by one, then the reply: all of them as they are by then.

        Whoever stops early ends the work. What is late at the end of `max_ms` goes on, and is there for the
        next turn of the session.

        Raises:
            InvalidInput: the template is none.
            NotFound: no text was given, and there is no such session (any more).
            RedisUnavailable: Redis cannot answer now.

        Cost: stage 1 one round trip, or none where L1 has it; stage 2 and 3 an embedding and one round trip
        beside it, none for what was just asked; stage 4 one more. Without a lease one more a stage.
        """
        began_s = time.perf_counter()
        packer = Packer(
            self._count, max_tokens=request.max_tokens, stages=request.stages, template=request.template
        )
        watch = Watch(self._sources.l1, self._sources.coherence, self._browser, owner)
        work = Gathering(self._sources, owner, request)
        turn = Turn(owner, request, began_s, work, packer)
        stages: list[Stage] = []
        trace = current.get()
        try:
            for number, fill in enumerate(STAGES[: request.stages], 1):
                turn.begin(number)
                await fill(turn)
                at_ms = await self._made_true(turn, watch)
                self.counts["stages"] += 1
                self.counts["partial stages"] += turn.reason is not None
                stages.append(packer.end(round(at_ms, 3), skipped=turn.skipped, reason=turn.reason))
                if number == _COUNTED_STAGE:
                    self._count_at_hand(turn, stages[-1])
                if trace is not None:
                    trace.stages_s.append((number, time.perf_counter() - trace.began_s))
                yield _shown(stages[-1])
                work.go_on()
            opened = await turn.opened()
            self._finish(turn, opened)
            stages = await self._as_of_now(turn, watch, stages)
            template, blocks = request.template, [block for stage in stages for block in stage.blocks]
            yield ContextReply(
                text=rendered(blocks) if template is None else templated(template, stages),
                stages=[_shown(stage) for stage in stages],
                tokens=packer.tokens_used,
                generation=opened.generation,
                partial=turn.is_partial,
                entities=turn.entities,
                total_ms=round(turn.elapsed_ms(), 3),
                timing=work.took_ms,
            )
        finally:
            watch.close()
            work.cancel()

    def _count_at_hand(self, turn: Turn, stage: Stage) -> None:
        """Count the memories of a stage, and those that a cache, or the session, had before the request."""
        opened, matches = turn.opening, turn.matches
        loaded = {one for one, _, _ in opened.loaded} if opened else set[str]()
        cached = matches.memories if matches and matches.served_by != "l3" else ()
        loaded.update(hit.id for hit in cached)
        for memory in (memory for block in stage.blocks for memory in block.memories):
            held = self._sources.l1.holding(turn.owner.tag, [memory.id])
            is_held = memory.id in loaded or any(entry.stored_s < turn.began_s for entry in held)
            self.counts["stage 2 memories"] += 1
            self.counts["stage 2 memories at hand"] += is_held

    # coherence ------------------------------------------------------------------------------------

    async def _made_true(self, turn: Turn, watch: Watch) -> float:
        """Bring the open stage up to date; return the milliseconds at which that began."""
        packer = turn.packer
        for _ in range(_MOST_READS):
            at_ms = turn.elapsed_ms()
            if not watch.is_sure():
                now = await watch.read(packer.stage_ids() - {PROFILE_ID})
                packer.drop(now.gone)
                packer.replace({one: now.memories[one] for one in packer.memory_ids()}, keep_texts=True)
                since = (await turn.opened()).generation
                packer.drop_texts(now.changed_since(since))
                self.counts["left out in time"] += len(now.gone)
                return at_ms
            # what memories say is read again, what was made from them is not
            packer.drop_texts(watch.changed_at_all(packer.text_ids()))
            changed = watch.changed(packer.memory_ids())
            if not changed:
                return at_ms
            now = await watch.read(changed)
            packer.drop(now.gone)
            packer.replace(now.memories)
            self.counts["left out in time"] += len(now.gone)
        packer.drop_texts(watch.changed_at_all(packer.text_ids()))
        packer.drop(watch.changed(packer.memory_ids()))
        return turn.elapsed_ms()

    async def _as_of_now(self, turn: Turn, watch: Watch, stages: list[Stage]) -> list[Stage]:
        """Return the stages without what changed since they were handed over."""
        blocks = [block for stage in stages for block in stage.blocks]
        sources = {one for block in blocks for one in block.memory_ids}
        memories = {memory.id for block in blocks for memory in block.memories}
        if watch.is_sure():
            stale = watch.changed_at_all(sources), watch.changed(memories)
        else:
            now = await watch.read((sources | memories) - {PROFILE_ID})
            gone = now.gone | now.changed_since((await turn.opened()).generation)
            stale = gone & sources, gone & memories
        if not any(stale):
            return stages
        self.counts["left out in time"] += len(stale[1])
        kept = [[left for block in stage.blocks if (left := _without(block, *stale))] for stage in stages]
        return [
            replace(stage, blocks=blocks, text=rendered(blocks))
            for stage, blocks in zip(stages, kept, strict=True)
        ]

    # afterwards -----------------------------------------------------------------------------------

    def _finish(self, turn: Turn, opened: Opening) -> None:
        """Tell what was used; what is late is loaded for the next turn of the session."""
        shown, session_id = turn.packer.ids(), turn.request.session_id
        self.counts["contexts"] += 1
        self._touches.add(turn.owner, sorted(shown))
        if session_id is None or not opened.session:
            return
        unused = self._prefetcher.used(turn.owner, session_id, shown, opened.loaded)
        late = turn.work.handed_over()
        if late and self._late >= _MOST_LATE:
            for task in late:
                task.cancel()
            late = []
        task = asyncio.create_task(self._follow_up(turn.owner, session_id, sorted(shown), unused, late))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _follow_up(
        self,
        owner: Owner,
        session_id: str,
        shown: list[str],
        unused: list[Loaded],
        late: Sequence[asyncio.Task[Any]],
    ) -> None:
        self._late += bool(late)
        try:
            with suppress(RedisMemError):
                await self._sources.sessions.note(owner, session_id, shown=shown, loaded=unused)
                if late:
                    done, undone = await asyncio.wait(late, timeout=_LATE_S)
                    for task in undone:
                        task.cancel()
                    found = [
                        task.result()
                        for task in late
                        if task in done and not task.cancelled() and not task.exception()
                    ]
                    self.counts["late parts"] += len(late)
                    await self._prefetcher.came_late(owner, session_id, _hits(found))
        finally:
            self._late -= bool(late)

    async def drained(self) -> None:
        """Return when nothing goes on in the background."""
        while self._background:
            await asyncio.wait(list(self._background))

    async def close(self) -> None:
        """Stop what goes on in the background."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)


def _hits(found: Sequence[object]) -> list[Hit]:
    """Return the memories of fetches, the best first."""
    many = [part for one in found for part in (one if isinstance(one, list) else [one])]
    lists = [part.memories for part in many if isinstance(part, SearchReply | EntityContext)]
    hits = dict[str, Hit]()
    for hit in chain.from_iterable(zip_longest(*lists)):
        if hit is not None:
            hits.setdefault(hit.id, hit)
    return list(hits.values())


def _without(block: Block, sources: set[str], stale: set[str]) -> Block | None:
    """Return a block without some memories; None when nothing is left, or its text has a stale source."""
    if not sources.isdisjoint(block.memory_ids):
        return None
    memories = [memory for memory in block.memories if memory.id not in stale]
    return replace(block, memories=memories) if memories or block.text else None


def _shown(stage: Stage) -> Stage:
    """Return a stage as callers see it: the mark that stands for the profile is ours."""
    blocks = [
        replace(block, memory_ids=[one for one in block.memory_ids if one != PROFILE_ID])
        if PROFILE_ID in block.memory_ids
        else block
        for block in stage.blocks
    ]
    return replace(stage, blocks=blocks)
