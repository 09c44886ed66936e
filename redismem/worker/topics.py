"""Topics: clusters of an owner's memories, kept in step with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from redismem.client import Argument
from redismem.clustering import Known, clustered
from redismem.keys import Owner
from redismem.material import LabelWord, Material, Topic
from redismem.worker.materials import Materials
from redismem.worker.tools import Overtaken, Tools

#: topics and memories written by one call; hold Redis for about 2 ms
_TOPICS, _ASSIGNED = 4, 16

#: links of the graph of centroids: there are hundreds at most
_LINKS = 8

#: seconds between the summaries of two topics: about what one takes
_APART_S = 1.0

#: share of a topic's memories that must have come or gone for its summary to be made again
_CHANGED = 0.1

UNCATEGORIZED = "uncategorized"


@dataclass(frozen=True, slots=True)
class Centres:
    """What decides about the topic of a new memory: rows belong together."""

    numbers: list[str]
    centroids: NDArray[np.float32]
    reaches: NDArray[np.float32]


async def centres_of(tools: Tools, owner: Owner) -> Centres:
    """Return the centroids of the owner's topics, of the vectors that serve. Cost: two round trips."""
    raw_numbers, embedder, dim = await tools.client.pipeline(
        [
            ("ZRANGE", owner.topics, 0, -1),
            ("HGET", owner.meta, "embedder"),
            ("HGET", owner.meta, "dim"),
        ]
    )
    numbers = [raw.decode() for raw in raw_numbers]
    rows = await tools.client.pipeline(
        [("HMGET", owner.cluster_prefix + one, "centroid", "reach", "embedder") for one in numbers]
    )
    kept = [
        (one, np.frombuffer(row[0], np.float32), float(row[1]))
        for one, row in zip(numbers, rows, strict=True)
        if row[0] and row[2] == embedder
    ]
    return Centres(
        [one for one, _, _ in kept],
        np.array([row for _, row, _ in kept], np.float32).reshape(len(kept), int(dim or 1)),
        np.array([reach for _, _, reach in kept], np.float32),
    )


def nearest_topic(centres: Centres, vector: NDArray[np.float32]) -> str:
    """Return the field `cluster` of a memory: the topic within whose reach it is, or the nearest of none."""
    if not centres.numbers:
        return ""
    cosines = centres.centroids @ vector
    within = np.where(cosines >= centres.reaches, cosines, -2)
    best = int(within.argmax())
    if within[best] > -2:
        return centres.numbers[best]
    return f"{UNCATEGORIZED}|near-{centres.numbers[int(cosines.argmax())]}"


async def topics(tools: Tools, owner: Owner) -> None:
    """Cluster all memories of the owner anew, and queue the summaries of topics that changed."""
    counted = await tools.client.execute("HMGET", owner.meta, "unclustered", "topic_number")
    read = await tools.library.all(owner)
    materials, vectors = read.with_vectors()
    known = _known(materials)
    made: list[Topic] = []
    if materials:
        await tools.indexes.extend(owner)
        numbers = [Known(number, members) for number, members in known.items()]
        first = int(counted[1] or 1)
        made = await tools.pool.run(_clustered, materials, vectors, numbers, first)
    for first in range(0, len(made), _TOPICS):
        await _store(tools, owner, made[first : first + _TOPICS], materials)
    await _assign(tools, owner, made, read)
    names: list[Argument] = [topic.number for topic in made]
    await tools.functions.call(
        "rm_topics_end_v1",
        [owner.meta, *owner.derived, owner.centroids],
        *(owner.memory_prefix, tools.now_ms(), max(0, int(counted[0] or 0)), *names),
    )
    await _queue_dependents(tools, owner, made, known)


def _clustered(
    materials: Sequence[Material], vectors: NDArray[np.float32], known: Sequence[Known], first: int
) -> list[Topic]:
    return clustered(materials, vectors, known, first_number=first)


def _known(materials: Sequence[Material]) -> dict[int, frozenset[str]]:
    members: dict[int, set[str]] = {}
    for item in materials:
        if item.cluster:
            members.setdefault(int(item.cluster), set()).add(item.id)
    return {number: frozenset(ids) for number, ids in members.items()}


async def _store(tools: Tools, owner: Owner, made: Sequence[Topic], materials: Sequence[Material]) -> None:
    digests = {item.id: item.digest for item in materials}
    arguments: list[Argument] = []
    for topic in made:
        words = [[entry.word, list(entry.witnesses)] for entry in topic.words]
        seen = {one: digests[one] for entry in topic.words for one in entry.witnesses}
        arguments += [topic.number, f"{topic.reach:.4f}", topic.centroid.astype(np.float32).tobytes()]
        arguments += [len(topic.members), msgspec.json.encode(words), msgspec.json.encode(seen)]
    reply = await tools.functions.call(
        "rm_topics_v1",
        [owner.meta, *owner.derived, owner.centroids],
        *(owner.memory_prefix, tools.now_ms(), tools.embedder.name, _LINKS, *arguments),
    )
    if reply == b"STALE":
        raise Overtaken("this user's vectors are of another embedder")


async def _assign(tools: Tools, owner: Owner, made: Sequence[Topic], read: Materials) -> None:
    """Tell each memory its topic; those in none the nearest, so that a search of few topics finds them."""
    of = {one: str(topic.number) for topic in made for one in topic.members}
    numbers = [str(topic.number) for topic in made]
    centroids = np.array([topic.centroid for topic in made], np.float32)
    arguments: list[Argument] = []
    for item, vector, digest in zip(read.items, read.vectors, read.vector_digests, strict=True):
        cluster = of.get(item.id, "")
        if not cluster and numbers and digest:
            cluster = f"{UNCATEGORIZED}|near-{numbers[int((centroids @ vector).argmax())]}"
        elif not cluster:
            cluster = UNCATEGORIZED if digest else ""
        if cluster != item.cluster or not cluster.isdigit():
            arguments += [item.id, item.digest, cluster]
    head = owner.memory_prefix, tools.now_ms()
    for first in range(0, len(arguments), 3 * _ASSIGNED):
        part = arguments[first : first + 3 * _ASSIGNED]
        await tools.functions.call("rm_assign_v1", [owner.meta, *owner.derived], *head, *part)


async def _queue_dependents(
    tools: Tools, owner: Owner, made: Sequence[Topic], known: dict[int, frozenset[str]]
) -> None:
    summaries = await tools.client.execute("ZRANGE", owner.summarized, 0, -1)
    there = {raw.decode("utf-8", "replace") for raw in summaries}
    changed = []
    for topic in made:
        members, before = set(topic.members), known.get(topic.number, frozenset())
        share = len(members ^ before) / max(1, len(members | before))
        if share > _CHANGED or f"topic:{topic.number}" not in there:
            changed.append(f"summary:topic:{topic.number}")
    await tools.jobs.queue(owner, "profile")  # which tells the topics
    for i, kind in enumerate(changed):
        # one after the other: hundreds at once would stand in the way of everybody else's jobs
        await tools.jobs.queue(owner, kind, after_s=i * _APART_S)


async def labelled(tools: Tools, owner: Owner, materials: Sequence[Material]) -> list[Topic]:
    """Return the owner's topics, largest first, as profiles show them: without centroids.

    Args:
        materials: where their members are looked for.
    """
    members = _known(materials)
    raw_numbers = await tools.client.execute("ZREVRANGE", owner.topics, 0, -1)
    numbers = [raw.decode() for raw in raw_numbers]
    rows = await tools.client.pipeline([("HGET", owner.cluster_prefix + one, "words") for one in numbers])
    found = []
    for number, raw in zip(numbers, rows, strict=True):
        words = msgspec.json.decode(raw, type=list[tuple[str, list[str]]]) if raw else []
        if words:
            found.append(
                Topic(
                    number=int(number),
                    words=tuple(LabelWord(word, tuple(witnesses)) for word, witnesses in words),
                    centroid=np.zeros(0, np.float32),
                    reach=1.0,
                    members=tuple(sorted(members.get(int(number), ()))),
                )
            )
    return found
