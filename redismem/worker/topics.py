"""Topics: clusters of an owner's memories, kept in step with them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from redismem.client import Argument
from redismem.clustering import Centre, Known, assigned, clustered
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


async def centres_of(tools: Tools, owner: Owner) -> list[Centre]:
    """Return the centroids of the owner's topics, of the vectors that serve. Cost: two round trips."""
    raw_numbers, embedder = await tools.client.pipeline(
        [("ZRANGE", owner.topics, 0, -1), ("HGET", owner.meta, "embedder")]
    )
    numbers = [raw.decode() for raw in raw_numbers]
    rows = await tools.client.pipeline(
        [("HMGET", owner.cluster_prefix + one, "centroid", "reach", "embedder") for one in numbers]
    )
    return [
        Centre(int(number), np.frombuffer(centroid, np.float32), float(reach))
        for number, (centroid, reach, of) in zip(numbers, rows, strict=True)
        if centroid and of == embedder
    ]


def clusters_of(centres: Sequence[Centre], vectors: NDArray[np.float32]) -> list[str]:
    """Return the field `cluster` of memories: the topic in whose reach each is, or what is near it."""
    if not centres:
        return [""] * len(vectors)
    near = _near([centre.number for centre in centres], [centre.centroid for centre in centres], vectors)
    numbers = assigned(vectors, centres)
    return [str(number) if number else other for number, other in zip(numbers, near, strict=True)]


def _near(
    numbers: Sequence[int], centroids: Sequence[NDArray[np.float32]], vectors: NDArray[np.float32]
) -> list[str]:
    """Return the field `cluster` of memories in no topic, by which searches of few topics find them."""
    places = (vectors @ np.array(centroids, np.float32).T).argmax(axis=1)
    return [f"{UNCATEGORIZED}|near-{numbers[place]}" for place in places]


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
    """Tell each memory its topic."""
    of = {one: str(topic.number) for topic in made for one in topic.members}
    near = [UNCATEGORIZED] * len(read.items)
    if made:
        near = _near([topic.number for topic in made], [topic.centroid for topic in made], read.vectors)
    arguments: list[Argument] = []
    for item, digest, other in zip(read.items, read.vector_digests, near, strict=True):
        cluster = of.get(item.id) or (other if digest else "")
        if cluster != item.cluster or not cluster:
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
