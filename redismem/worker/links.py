"""Similarity edges: the ten nearest of each new memory, what they repeat or contradict, and its topic."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from redismem.client import Argument
from redismem.clustering import Centre
from redismem.codec import vector_bytes
from redismem.keys import Owner
from redismem.material import Material
from redismem.similarity import NEAREST, Flag, flagged, nearest
from redismem.worker.materials import NO_VECTOR, Materials
from redismem.worker.tools import Tools
from redismem.worker.topics import centres_of, clusters_of

#: new memories up to which Redis is asked for the nearest of each; more are compared here, in one go
_FEW = 100

#: memories linked by one call; holds Redis for about 1 ms
_SLICE = 3

#: importances read in one round trip
_ASKED = 100

#: memories compared with all others in one go, up to 5 s; a worker that dies then loses no more
_COMPARED = 1_000

#: users with more memories than this get edges for important ones only: ten a memory are 0.4 GB a million
_MOST_MEMORIES = 1_000_000
_IMPORTANT = 0.7

#: rounds over what is new; what keeps changing waits for the next job
_MOST_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class _Edge:
    """From a memory to one near it."""

    other: Material
    vector_digest: str
    cosine: float
    flag: Flag | None
    is_newer: bool


async def link(tools: Tools, owner: Owner) -> None:
    """Link every memory of the owner that is new or has a new vector."""
    for _ in range(_MOST_ROUNDS):
        raw = await tools.client.execute("SMEMBERS", owner.fresh)
        if not raw:
            return
        fresh = [one.decode("utf-8", "replace") for one in raw]
        if await tools.client.execute("ZCARD", owner.ids) > _MOST_MEMORIES:
            fresh = await _important(tools, owner, fresh)
        centres = await centres_of(tools, owner)
        if len(fresh) > _FEW:
            await _link_many(tools, owner, fresh, centres)
        else:
            await _link_few(tools, owner, fresh, centres)


async def _important(tools: Tools, owner: Owner, fresh: list[str]) -> list[str]:
    kept = []
    for first in range(0, len(fresh), _ASKED):
        part = fresh[first : first + _ASKED]
        rows = await tools.client.pipeline([("HGET", owner.memory(one), "importance") for one in part])
        kept += [one for one, raw in zip(part, rows, strict=True) if float(raw or 0) >= _IMPORTANT]
    if left := sorted(set(fresh) - set(kept)):
        await tools.client.execute("SREM", owner.fresh, *left)
    return kept


async def _link_few(tools: Tools, owner: Owner, fresh: Sequence[str], centres: Sequence[Centre]) -> None:
    for first in range(0, len(fresh), _SLICE):
        read = await tools.library.read(owner, fresh[first : first + _SLICE])
        gone = set(fresh[first : first + _SLICE]) - {item.id for item in read.items}
        found = []
        for item, vector, digest in zip(read.items, read.vectors, read.vector_digests, strict=True):
            found.append([] if digest == NO_VECTOR else await _searched(tools, owner, item.id, vector))
        others = await tools.library.read(owner, list({one for ids in found for one in ids}))
        places = {item.id: i for i, item in enumerate(others.items) if others.vector_digests[i] != NO_VECTOR}
        edges = []
        for item, vector, ids in zip(read.items, read.vectors, found, strict=True):
            near = [places[one] for one in ids if one in places]
            # by the vectors that were read: what was found may have changed meanwhile
            edges.append(_edges(item, [(i, float(others.vectors[i] @ vector)) for i in near], others))
            await asyncio.sleep(0)  # comparing words takes up to 0.5 ms a neighbour
        await _store(tools, owner, read, edges, gone, centres)


async def _searched(tools: Tools, owner: Owner, memory_id: str, vector: NDArray[np.float32]) -> list[str]:
    """Return the nearest by the exact index. Cost: one round trip; 8 ms of Redis at 50,000 memories."""
    _, *keys = await tools.client.execute(
        *("FT.SEARCH", owner.index, f"(ismissing(@superseded_by))=>[KNN {NEAREST + 1} @embedding $v AS d]"),
        *("PARAMS", 2, "v", vector_bytes(vector), "NOCONTENT"),
        *("LIMIT", 0, NEAREST + 1, "SORTBY", "d", "DIALECT", 2),
    )
    found = [key.decode("utf-8", "replace").removeprefix(owner.memory_prefix) for key in keys]
    return [other for other in found if other != memory_id][:NEAREST]


async def _link_many(tools: Tools, owner: Owner, fresh: Sequence[str], centres: Sequence[Centre]) -> None:
    everything = await tools.library.all(owner)
    wanted = set(fresh)
    places = [i for i, item in enumerate(everything.items) if item.id in wanted]
    gone = wanted - {everything.items[i].id for i in places}
    await _store(tools, owner, everything.taken([]), [], gone, centres)
    for begin in range(0, len(places), _COMPARED):
        chunk = places[begin : begin + _COMPARED]
        edges = await tools.pool.run(_all_edges, everything, chunk)
        for first in range(0, len(chunk), _SLICE):
            read = everything.taken(chunk[first : first + _SLICE])
            await _store(tools, owner, read, edges[first : first + _SLICE], set(), centres)


def _all_edges(everything: Materials, places: Sequence[int]) -> list[list[_Edge]]:
    usable = [i for i, one in enumerate(everything.vector_digests) if one != NO_VECTOR]
    row_of = {i: row for row, i in enumerate(usable)}
    asked = [i for i in places if i in row_of]
    found = dict(zip(asked, nearest(everything.vectors[usable], [row_of[i] for i in asked]), strict=True))
    return [
        _edges(everything.items[i], [(usable[row], cosine) for row, cosine in found.get(i, ())], everything)
        for i in places
    ]


def _edges(item: Material, near: Sequence[tuple[int, float]], others: Materials) -> list[_Edge]:
    """Return the edges of a memory to its neighbours, given by their places, with cosines."""
    made = []
    for place, cosine in near:
        other = others.items[place]
        is_newer = (item.moment_s, item.created_s) >= (other.moment_s, other.created_s)
        flag = flagged(item, other, cosine)
        made.append(_Edge(other, others.vector_digests[place], min(1.0, cosine), flag, is_newer))
    return made


async def _store(
    tools: Tools,
    owner: Owner,
    read: Materials,
    edges: Sequence[Sequence[_Edge]],
    gone: set[str],
    centres: Sequence[Centre],
) -> None:
    arguments: list[Argument] = []
    clusters = clusters_of(centres, read.vectors)
    for item, digest, cluster, near in zip(read.items, read.vector_digests, clusters, edges, strict=True):
        arguments += [item.id, item.digest, digest, cluster if digest != NO_VECTOR else "", len(near)]
        for edge in near:
            arguments += [edge.other.id, edge.other.digest, edge.vector_digest, f"{edge.cosine:.4f}"]
            arguments += [edge.flag.kind, edge.flag.why] if edge.flag else ["", ""]
            arguments.append(int(edge.is_newer))
    for memory_id in gone:  # the Function sees whether it is
        arguments += [memory_id, "", "", "", 0]
    if arguments:
        head = owner.memory_prefix, tools.now_ms()
        await tools.functions.call("rm_link_v1", [owner.meta, *owner.derived], *head, *arguments)
