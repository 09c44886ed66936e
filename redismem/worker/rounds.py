"""What is done by the clock for all owners, and what only the clock makes necessary for one."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec

from redismem.client import Argument
from redismem.index import all_ids
from redismem.keys import WEIGHTS, Owner
from redismem.store import owners
from redismem.weights import temporal_weights
from redismem.worker.tools import Tools

#: change of importance that is worth a write: re-indexing takes 0.1 ms, and L1 drops the memory
_STEP = 0.01

#: memories whose decay is looked at by one call; holds Redis for 0.5 ms, 5 when all change
_DECAYED = 50

#: users whose last use is read in one round trip
_PAGE = 100

HOUR_S = 3600.0
DAY_S = 86_400.0

#: seconds between the jobs of two users in a nightly round, so that it is spread over the night
_APART_S = 0.1


async def hourly(tools: Tools) -> None:
    """Queue the profiles of users who were active in the last hour and whose profile is older than that."""
    async for owner, used_s, compiled_s in _uses(tools):
        if used_s >= tools.clock() - HOUR_S and compiled_s < tools.clock() - HOUR_S:
            await tools.jobs.queue(owner, "profile")


async def nightly(tools: Tools) -> None:
    """Write the weights; queue decay for everyone, profile and periods for who was active lately."""
    table = temporal_weights(tools.settings.half_life_days)
    rounded = {kind: [round(weight, 6) for weight in weights] for kind, weights in table.items()}
    fields: list[Argument] = []
    for kind, weights in rounded.items():
        fields += [kind, msgspec.json.encode(weights)]
    await tools.client.execute("HSET", WEIGHTS, *fields)
    after_s = 0.0
    async for owner, used_s, _ in _uses(tools):
        kinds = ["decay"]
        if used_s >= tools.clock() - 2 * DAY_S:
            kinds += ["profile", "periods"]
        await tools.jobs.queue(owner, *kinds, after_s=after_s)
        after_s += _APART_S


async def _uses(tools: Tools) -> AsyncIterator[tuple[Owner, float, float]]:
    page: list[Owner] = []
    async for owner in owners(tools.client):
        page.append(owner)
        if len(page) == _PAGE:
            for item in await _page_uses(tools, page):
                yield item
            page = []
    for item in await _page_uses(tools, page):
        yield item


async def _page_uses(tools: Tools, page: list[Owner]) -> list[tuple[Owner, float, float]]:
    raw = await tools.client.pipeline(
        [
            command
            for owner in page
            for command in (
                ("HMGET", owner.meta, "last_activity", "last_read"),
                ("HGET", owner.profile, "compiled_at"),
            )
        ]
    )
    return [
        (owner, max(float(one or 0) for one in used), float(compiled or 0))
        for owner, used, compiled in zip(page, raw[::2], raw[1::2], strict=True)
    ]


async def decay(tools: Tools, owner: Owner) -> None:
    """Let the importance of the owner's memories decay, each from its last use on."""
    ids = await all_ids(tools.client, owner)
    head = owner.memory_prefix, tools.now_ms(), _STEP
    for first in range(0, len(ids), _DECAYED):
        part = ids[first : first + _DECAYED]
        await tools.functions.call("rm_decay_v1", [owner.meta, *owner.derived, WEIGHTS], *head, *part)


async def embed(tools: Tools, owner: Owner) -> None:
    """Give a vector to every memory that another service wrote without one."""
    await tools.reembedder.fill(owner)
