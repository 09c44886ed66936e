"""Notices memories that another service wrote by plain HSET, and queues what they need.

Redis pushes the key of every record that is written, by whomever. What has a text and no vector a second
later was not written by us, or waits for its vector anyway.
"""

from __future__ import annotations

from redismem.coherence import Coherence
from redismem.index import Indexes
from redismem.jobs import Jobs
from redismem.keys import Owner
from redismem.lualib import Functions

#: keys noted between two looks; of more, `redismem reembed` finds what was left
_MOST = 10_000

#: keys looked at in one round trip
_SLICE = 200


class ForeignWrites:
    """Looks at what was pushed to one process."""

    def __init__(self, functions: Functions, indexes: Indexes, jobs: Jobs, coherence: Coherence) -> None:
        self._functions = functions
        self._indexes = indexes
        self._jobs = jobs
        self._coherence = coherence
        self._pushed: dict[tuple[str, str], None] = {}

    def listen(self) -> None:
        """Note what is pushed from now on."""
        self._coherence.on_push = self._note

    def _note(self, tag: str, memory_id: str) -> None:
        if len(self._pushed) < _MOST:
            self._pushed[tag, memory_id] = None

    async def look(self) -> None:
        """Queue an embedding for owners whose memories came without vectors. Cost: a round trip per 200."""
        pushed, self._pushed = list(self._pushed), {}
        bare: dict[str, list[str]] = {}
        for first in range(0, len(pushed), _SLICE):
            part = pushed[first : first + _SLICE]
            rows = await self._functions.client.pipeline(
                [("HMGET", Owner.from_tag(tag).memory(one), "text", "embedder") for tag, one in part]
            )
            for (tag, one), (text, embedder) in zip(part, rows, strict=True):
                if text is not None and embedder is None:
                    bare.setdefault(tag, []).append(one)
        for tag, ids in bare.items():
            owner = Owner.from_tag(tag)
            if await self._functions.client.execute("HGET", owner.meta, "index") is None:
                await self._indexes.open(owner)
                # Redis does not index what was there before its index
                await self._functions.call("rm_reindex_v1", [owner.ids], owner.memory_prefix, *ids)
            await self._jobs.queue(owner, "embed")
