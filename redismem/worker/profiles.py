"""Compiles profiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from redismem.client import Argument
from redismem.embed.protocol import estimated_tokens
from redismem.keys import Owner
from redismem.material import Material, Topic
from redismem.profile import Compiled, compiled
from redismem.views import BUDGETS, PATCHABLE
from redismem.worker.tools import MOST_READS, Overtaken, Tools, sourced
from redismem.worker.topics import labelled

#: memories a profile is made from: the newest, and as many pinned and important ones
MOST_MEMORIES = 5_000

#: seconds until a profile that is read is compiled again although nothing changed
VALID_S = 3600.0


async def profile(tools: Tools, owner: Owner) -> None:
    """Compile the owner's profile."""
    for _ in range(MOST_READS):
        raw_patched = await tools.client.execute("HGET", owner.profile, "patched") or b""
        read = await tools.library.recent(owner, MOST_MEMORIES)
        topics = await labelled(tools, owner, read.items)
        now_s = tools.clock()
        patched = patched_values(raw_patched)
        made = await tools.pool.run(_compiled, owner.user, read.items, topics, patched, now_s)
        _fit(made.values, tools.embedder.count_tokens)
        fields: dict[str, Argument] = {
            name: msgspec.json.encode(value) for name, value in made.values.items()
        }
        fields |= {"compiled_at": repr(now_s), "valid_until": repr(now_s + VALID_S)}
        outcome = await tools.functions.call(
            "rm_profile_v1",
            [owner.meta, *owner.derived],
            *(owner.memory_prefix, tools.now_ms(), raw_patched),
            *sourced(made.sources, read.items, fields),
        )
        if outcome != b"STALE":
            return
    raise Overtaken("the memories of this user keep changing")


def _compiled(
    user: str,
    materials: Sequence[Material],
    topics: Sequence[Topic],
    patched: Mapping[str, Any],
    now_s: float,
) -> Compiled:
    def count(texts: Sequence[str]) -> list[int]:
        return [estimated_tokens(text) for text in texts]

    return compiled(user, materials, topics, patched, now_s, count)


def _fit(values: dict[str, Any], count_tokens: Callable[[Sequence[str]], list[int]]) -> None:
    """Cut the summary, which was made by an estimate, where the real count is above its budget."""
    lines = values["context_summary"].split("\n")
    while len(lines) > 1 and count_tokens(["\n".join(lines)])[0] > BUDGETS["profile"]:
        lines.pop()
    values["context_summary"] = "\n".join(lines)


def patched_values(raw: bytes) -> dict[str, Any]:
    """Return what a caller set, from the field `patched`: JSON of JSON."""
    told = msgspec.json.decode(raw, type=dict[str, str]) if raw else {}
    return {name: msgspec.json.decode(value) for name, value in told.items() if name in PATCHABLE}
