"""Similarity edges: the ten nearest of each new memory, what they repeat or contradict, and its topic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from redismem.client import Argument
from redismem.codec import vector_bytes
from redismem.keys import Owner
from redismem.material import Material
from redismem.similarity import NEAREST, flagged, nearest
from redismem.worker.materials import NO_VECTOR, Materials
from redismem.worker.tools import Tools
from redismem.worker.topics import centres_of, nearest_topic

#: new memories up to which Redis is asked for the nearest of each; more are compared here, in one go
_FEW = 100

#: memories linked by one call; holds Redis for about 5 ms
_SLICE = 32

#: users with more memories than this get edges for important ones only: ten a memory are 0.4 GB a million
_MOST_MEMORIES = 1_000_000
_IMPORTANT = 0.7

#: rounds over what is new; what keeps changing waits for the next job
_MOST_ROUNDS = 3


class _Neighbour(NamedTuple):
    memory: Material
    vector_digest: str
    vector: NDArray[np.float32]


#: neighbours with their cosines, best first
_Near = list[tuple[_Neighbour, float]]


async def link(tools: Tools, owner: Owner) -> None:
    """Link every memory of the owner that is new or has a new vector."""
    for _ in range(_MOST_ROUNDS):
        raw = await tools.client.execute("SMEMBERS", owner.fresh)
        if not raw:
            return
        fresh = [one.decode("utf-8", "replace") for one in raw]
        if await tools.client.execute("ZCARD", owner.ids) > _MOST_MEMORIES:
            fresh = await _important(tools, owner, fresh)
        if len(fresh) > _FEW:
            await _link_many(tools, owner, fresh)
        else:
            await _link_few(tools, owner, fresh)


async def _important(tools: Tools, owner: Owner, fresh: list[str]) -> list[str]:
    kept = []
    for first in range(0, len(fresh), _SLICE):
        part = fresh[first : first + _SLICE]
        rows = await tools.client.pipeline([("HGET", owner.memory(one), "importance") for one in part])
        kept += [one for one, raw in zip(part, rows, strict=True) if float(raw or 0) >= _IMPORTANT]
    if left := sorted(set(fresh) - set(kept)):
        await tools.client.execute("SREM", owner.fresh, *left)
    return kept


async def _link_few(tools: Tools, owner: Owner, fresh: Sequence[str]) -> None:
    for first in range(0, len(fresh), _SLICE):
        read = await tools.library.read(owner, fresh[first : first + _SLICE])
        gone = set(fresh[first : first + _SLICE]) - {item.id for item in read.items}
        near = []
        for item, vector, digest in zip(read.items, read.vectors, read.vector_digests, strict=True):
            near.append([] if digest == NO_VECTOR else await _searched(tools, owner, item.id, vector))
        others = await tools.library.read(owner, list({one for found in near for one in found}))
        known = {
            item.id: _Neighbour(item, digest, vector)
            for item, digest, vector in zip(others.items, others.vector_digests, others.vectors, strict=True)
            if digest != NO_VECTOR
        }
        # by the vectors that were read: what was found may have changed meanwhile
        edges = [
            [(known[one], float(known[one].vector @ vector)) for one in found if one in known]
            for found, vector in zip(near, read.vectors, strict=True)
        ]
        await _store(tools, owner, read, edges, gone)


async def _searched(tools: Tools, owner: Owner, memory_id: str, vector: NDArray[np.float32]) -> list[str]:
    """Return the nearest by the exact index. Cost: one round trip; 8 ms of Redis at 50,000 memories."""
    _, *keys = await tools.client.execute(
        *("FT.SEARCH", owner.index, f"(ismissing(@superseded_by))=>[KNN {NEAREST + 1} @embedding $v AS d]"),
        *("PARAMS", 2, "v", vector_bytes(vector), "NOCONTENT"),
        *("LIMIT", 0, NEAREST + 1, "SORTBY", "d", "DIALECT", 2),
    )
    found = [key.decode("utf-8", "replace").removeprefix(owner.memory_prefix) for key in keys]
    return [other for other in found if other != memory_id][:NEAREST]


async def _link_many(tools: Tools, owner: Owner, fresh: Sequence[str]) -> None:
    everything = await tools.library.all(owner)
    wanted = set(fresh)
    gone = wanted - {item.id for item in everything.items}
    usable = [i for i, one in enumerate(everything.vector_digests) if one != NO_VECTOR]
    rows = [place for place, i in enumerate(usable) if everything.items[i].id in wanted]
    found = await tools.pool.run(nearest, everything.vectors[usable], rows)

    def everything_at(place: int) -> _Neighbour:
        digest, vector = everything.vector_digests[place], everything.vectors[place]
        return _Neighbour(everything.items[place], digest, vector)

    near: dict[int, _Near] = {
        usable[row]: [(everything_at(usable[other]), cosine) for other, cosine in one]
        for row, one in zip(rows, found, strict=True)
    }
    places = [i for i, item in enumerate(everything.items) if item.id in wanted]
    for first in range(0, len(places), _SLICE):
        part = places[first : first + _SLICE]
        read = Materials(
            [everything.items[i] for i in part],
            everything.vectors[part],
            [everything.vector_digests[i] for i in part],
        )
        await _store(tools, owner, read, [near.get(i, []) for i in part], gone)
        gone = set()


async def _store(tools: Tools, owner: Owner, read: Materials, edges: Sequence[_Near], gone: set[str]) -> None:
    centres = await centres_of(tools, owner)
    arguments: list[Argument] = []
    for item, vector, digest, near in zip(read.items, read.vectors, read.vector_digests, edges, strict=True):
        topic = nearest_topic(centres, vector) if digest != NO_VECTOR else ""
        arguments += [item.id, item.digest, digest, topic, len(near)]
        for (other, other_digest, _), cosine in near:
            flag = flagged(item, other, cosine)
            is_newer = (item.moment_s, item.created_s) >= (other.moment_s, other.created_s)
            arguments += [other.id, other.digest, other_digest, f"{min(1.0, cosine):.4f}"]
            arguments += [flag.kind if flag else "", flag.why if flag else "", int(is_newer)]
    for memory_id in gone:  # the Function sees whether it is
        arguments += [memory_id, "", "", "", 0]
    if arguments:
        head = owner.memory_prefix, tools.now_ms()
        await tools.functions.call("rm_link_v1", [owner.meta, *owner.derived], *head, *arguments)
