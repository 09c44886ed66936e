"""Assembles the context of a conversation in stages, each as soon as it is there.

A stage is compared with what changed since the request began in the moment in which it is handed over: no
stage shows what was deleted or corrected before, although it may have been read earlier. While the lease of
`Coherence` holds, the owner's ticket in L1 tells what changed; else everything is read once more.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

from redismem.browse import Browser
from redismem.conversation import ContextReply, ContextRequest, Stage
from redismem.embed import Embedder
from redismem.errors import RedisMemError
from redismem.gathering import Gathering, Sources
from redismem.keys import PROFILE_ID, Owner
from redismem.l1 import Ticket
from redismem.packing import Packer
from redismem.prefetch import Prefetcher
from redismem.rendering import check_template, templated
from redismem.stages import STAGES, Turn
from redismem.tokens import TokenCounts
from redismem.touches import Touches
from redismem.types import Memory, SearchReply

#: how often what changed during the comparison is read again, before it is left out
_MOST_READS = 3

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
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._sources = sources
        self._browser = browser
        self._touches = touches
        self._prefetcher = prefetcher
        self._count = TokenCounts(embedder)
        self._clock = clock
        self._background: set[asyncio.Task[None]] = set()
        self._late = 0
        self.counts: Counter[str] = Counter()

    async def whole(self, owner: Owner, request: ContextRequest) -> ContextReply:
        """Return a context in one piece; see `stages`."""
        *stages, reply = [part async for part in self.stages(owner, request)]
        assert isinstance(reply, ContextReply)
        reply.stages = [stage for stage in stages if isinstance(stage, Stage)]
        return reply

    async def batch(self, owner: Owner, requests: Sequence[ContextRequest]) -> list[ContextReply]:
        """Return one context a request, in order; their texts are embedded together.

        Raises:
            as `stages`: the first that fails fails all.
        """
        async with asyncio.TaskGroup() as tasks:
            made = [tasks.create_task(self.whole(owner, request)) for request in requests]
        return [task.result() for task in made]

    async def stages(
        self, owner: Owner, request: ContextRequest
    ) -> AsyncGenerator[Stage | ContextReply, None]:
        """Yield the stages one by one, then the reply without them.

        Whoever stops early ends the work. What is late at the end of `max_ms` goes on, and is there for the
        next turn of the session.

        Raises:
            InvalidInput: the template is none.
            NotFound: no text was given, and there is no such session (any more).
            RedisUnavailable: Redis cannot answer now.

        Cost: stage 1 one round trip, or none where L1 has it; stage 2 and 3 an embedding and one round trip
        beside it, none for what was just asked; stage 4 one more.
        """
        if request.template is not None:
            check_template(request.template)
        began_s = time.perf_counter()
        packer = Packer(
            self._count, max_tokens=request.max_tokens, stages=request.stages, template=request.template
        )
        ticket = self._sources.l1.open(owner.tag)
        work = Gathering(self._sources, owner, request)
        turn = Turn(owner, request, began_s, work, packer)
        stages: list[Stage] = []
        try:
            for number, fill in enumerate(STAGES[: request.stages], 1):
                turn.begin(number)
                stages.append(await self._stage(turn, ticket, fill))
                yield stages[-1]
            self._finish(turn)
            text = "\n\n".join(stage.text for stage in stages if stage.text)
            assert turn.opening is not None
            yield ContextReply(
                text=text if request.template is None else templated(request.template, stages),
                tokens=packer.tokens_used,
                generation=turn.opening.generation,
                partial=turn.is_partial,
                entities=turn.entities,
                total_ms=round(turn.elapsed_ms(), 3),
                timing=work.took_ms,
            )
        finally:
            self._sources.l1.close(ticket)
            work.cancel()

    async def _stage(self, turn: Turn, ticket: Ticket, fill: Callable[[Turn], Awaitable[None]]) -> Stage:
        at_ms = turn.elapsed_ms()
        is_watched = self._sources.coherence.is_live()
        if not is_watched and turn.opening is not None:
            turn.work.renew()
            turn.opening = None
        await fill(turn)
        at_ms = await self._made_true(turn, ticket, at_ms, is_watched=is_watched)
        self.counts["stages"] += 1
        self.counts["partial stages"] += turn.reason is not None
        return turn.packer.end(round(at_ms, 3), skipped=turn.skipped, reason=turn.reason)

    async def _made_true(self, turn: Turn, ticket: Ticket, began_ms: float, *, is_watched: bool) -> float:
        """Compare the open stage with what changed; return the milliseconds at which that began.

        Args:
            began_ms: when the stage was begun; what its texts come from was read later, unless the stage
                `is_watched` by the lease.
        """
        packer, watches, opened = turn.packer, dict[str, Ticket](), list[Ticket]()
        try:
            for _ in range(_MOST_READS):
                at_ms = turn.elapsed_ms()
                if not self._sources.coherence.is_live():
                    if is_watched:
                        packer.drop_texts()
                    await self._read_again(turn, packer.memory_ids(), keep_texts=True)
                    return began_ms
                changed = _changed(packer.stage_ids(), ticket, watches)
                if not changed:
                    return at_ms
                opened.append(self._sources.l1.open(turn.owner.tag))
                watches.update(dict.fromkeys(changed, opened[-1]))
                await self._read_again(turn, changed)
            packer.drop(_changed(packer.stage_ids(), ticket, watches))
            return turn.elapsed_ms()
        finally:
            for watch in opened:
                self._sources.l1.close(watch)

    async def _read_again(self, turn: Turn, ids: set[str], *, keep_texts: bool = False) -> None:
        memories = await self._browser.get_each(turn.owner, [one for one in ids if one != PROFILE_ID])
        current: dict[str, Memory] = {one.id: one for one in memories if one.superseded_by is None}
        if gone := ids - set(current):
            turn.packer.drop(gone)
            self.counts["left out in time"] += len(gone)
        turn.packer.replace(current, keep_texts=keep_texts)

    # afterwards -----------------------------------------------------------------------------------

    def _finish(self, turn: Turn) -> None:
        """Tell what was used; what is late is loaded for the next turn of the session."""
        shown, session_id = turn.packer.ids(), turn.request.session_id
        self.counts["contexts"] += 1
        self._touches.add(turn.owner, sorted(shown))
        if session_id is None or turn.opening is None or not turn.opening.session:
            return
        self._prefetcher.used(turn.owner, session_id, shown)
        late = turn.work.handed_over()
        if late and self._late >= _MOST_LATE:
            for task in late:
                task.cancel()
            late = []
        task = asyncio.create_task(self._follow_up(turn.owner, session_id, sorted(shown), late))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _follow_up(
        self, owner: Owner, session_id: str, shown: list[str], late: Sequence[asyncio.Task[Any]]
    ) -> None:
        self._late += bool(late)
        try:
            with suppress(RedisMemError):
                await self._sources.sessions.note(owner, session_id, shown=shown)
                if late:
                    done, undone = await asyncio.wait(late, timeout=_LATE_S)
                    for task in undone:
                        task.cancel()
                    found = [task.result() for task in done if not task.cancelled() and not task.exception()]
                    hits = [
                        hit for reply in found if isinstance(reply, SearchReply) for hit in reply.memories
                    ]
                    self.counts["late parts"] += len(late)
                    await self._prefetcher.came_late(owner, session_id, hits)
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


def _changed(ids: set[str], ticket: Ticket, watches: dict[str, Ticket]) -> set[str]:
    """Return the ids that changed since they were read: since the ticket, or the later watch, was opened."""
    found = set()
    for one in ids:
        gone = watches.get(one, ticket).gone
        if gone is None or one in gone:
            found.add(one)
    return found
