"""Reads memories as derived data is made from them, in slices that hold Redis for a few ms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha1

import numpy as np
from numpy.typing import NDArray

from redismem.client import Client
from redismem.codec import unit
from redismem.index import all_ids
from redismem.keys import Owner
from redismem.material import Material, digest
from redismem.query import unpacked_tags

#: memories read in one round trip; holds Redis for under 1 ms
_SLICE = 50

_FIELDS = (
    *("text", "topics", "entities", "memory_type", "session_id", "importance", "pinned"),
    *("event_date", "created_at", "superseded_by", "cluster"),
)

#: the digest of the vector of a memory that has none, or another embedder's
NO_VECTOR = ""


@dataclass(frozen=True, slots=True)
class Materials:
    """Memories with what belongs to each; superseded ones are left out."""

    items: list[Material]
    #: unit rows; zero where a memory has no vector. Shape (len(items), dim)
    vectors: NDArray[np.float32]
    #: as rm_link compares them
    vector_digests: list[str]

    def taken(self, places: Sequence[int]) -> Materials:
        """Return some of them."""
        digests = [self.vector_digests[i] for i in places]
        return Materials([self.items[i] for i in places], self.vectors[list(places)], digests)

    def with_vectors(self) -> tuple[list[Material], NDArray[np.float32]]:
        """Return the memories that have a vector, and their vectors."""
        places = [i for i, one in enumerate(self.vector_digests) if one != NO_VECTOR]
        return [self.items[i] for i in places], self.vectors[places]


class Library:
    """Reads the memories of one store."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def all(self, owner: Owner) -> Materials:
        """Return all memories of an owner, oldest first. Cost: 20 us a memory, a round trip per 50."""
        return await self.read(owner, await all_ids(self._client, owner))

    async def recent(self, owner: Owner, most: int) -> Materials:
        """Return the newest memories, and those that are pinned or important, `most` of each."""
        newest = await self._client.execute("ZREVRANGE", owner.ids, 0, most - 1)
        ids = [raw.decode("utf-8", "replace") for raw in newest][::-1]
        if len(ids) == most:
            query = "(@pinned:{1})|(@importance:[0.7 inf])"
            ids = [*dict.fromkeys([*await self.matching(owner, query, most), *ids])]
        return await self.read(owner, ids)

    async def matching(self, owner: Owner, query: str, most: int) -> list[str]:
        """Return ids of memories that satisfy a query, the newest `most`.

        Raises:
            StoreError: the index is missing; what has memories must not pass for empty.
        """
        _, *keys = await self._client.execute(
            *("FT.SEARCH", owner.index, query, "NOCONTENT", "SORTBY", "created_at", "DESC"),
            *("LIMIT", 0, most, "DIALECT", 2),
        )
        return [key.decode("utf-8", "replace").removeprefix(owner.memory_prefix) for key in keys]

    async def read(self, owner: Owner, ids: Sequence[str]) -> Materials:
        """Return those of the memories that exist and were not superseded, in order."""
        embedder, dim, field = await self._client.execute(
            "HMGET", owner.meta, "embedder", "dim", "vector_field"
        )
        width = int(dim or 1)
        items: list[Material] = []
        vectors, digests = [np.zeros((0, width), np.float32)], list[str]()
        for first in range(0, len(ids), _SLICE):
            part = ids[first : first + _SLICE]
            replies = await self._client.pipeline(
                [
                    ("HMGET", owner.memory(memory_id), *_FIELDS, "embedder", field or b"embedding")
                    for memory_id in part
                ]
            )
            rows = []
            for memory_id, raw in zip(part, replies, strict=True):
                *told, superseded_by, cluster, by, vector = raw
                if told[0] is not None and superseded_by is None:
                    items.append(_material(memory_id, told, cluster))
                    rows.append(vector if by == embedder and len(vector or b"") == 2 * width else b"")
            # slice by slice: of a large owner all at once would hold the event loop
            vectors.append(_unit_rows(rows, width))
            digests += [_vector_digest(row) for row in rows]
        return Materials(items, np.concatenate(vectors), digests)


def _vector_digest(row: bytes) -> str:
    return sha1(row, usedforsecurity=False).hexdigest()[:16] if row else NO_VECTOR


def _unit_rows(rows: Sequence[bytes], width: int) -> NDArray[np.float32]:
    made = np.zeros((len(rows), width), np.float32)
    for i, row in enumerate(rows):
        if row:
            made[i] = np.frombuffer(row, np.float16)
    return unit(made)


def _material(memory_id: str, raw: Sequence[bytes | None], cluster: bytes | None) -> Material:
    text, topics, entities, memory_type, session_id, importance, pinned, event_date, created_at = raw
    created_s, number = _number(created_at, 0.0), _decoded(cluster)
    return Material(
        id=memory_id,
        text=_decoded(text),
        digest=digest(text or b"", topics or b"", entities or b"", event_date or b""),
        memory_type=_decoded(memory_type) or "semantic",
        topics=tuple(unpacked_tags(_decoded(topics))),
        entities=tuple(unpacked_tags(_decoded(entities))),
        session_id=_decoded(session_id) or None,
        importance=_number(importance, 0.5),
        pinned=pinned in (b"1", b"True", b"true"),
        moment_s=_number(event_date, created_s),
        created_s=created_s,
        cluster=number if number.isdigit() else "",
    )


def _decoded(raw: bytes | None) -> str:
    return raw.decode("utf-8", "replace") if raw else ""


def _number(raw: bytes | None, default: float) -> float:
    try:
        number = float(raw) if raw else default
    except ValueError:
        return default
    return number if abs(number) < 1e12 else default
