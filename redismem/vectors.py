"""The only place that makes a memory's vector.

A turn of a conversation often makes sense only after the turn before it ("Yes, in June"). So a turn's
vector is the unit mean of two: of its own text, and of the previous turn and it together. Cosine
against it is the mean of both cosines, at no cost to a search (decision D4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from redismem.codec import unit
from redismem.embed import Embedder, Vectors
from redismem.keys import Owner
from redismem.lualib import Functions
from redismem.trace import waiting


@dataclass(frozen=True, slots=True)
class Turn:
    """A text and, when it continues a session, the text before it."""

    text: str
    previous: str | None = None


async def turn_vectors(
    embedder: Embedder,
    turns: Sequence[Turn],
    *,
    urgent: bool = False,
    keep: Callable[[str, Vectors], None] | None = None,
) -> Vectors:
    """Return one unit row per turn; shape (len(turns), dim).

    Args:
        keep: told each text with the vector of it alone; shape (dim,).

    Raises:
        EmbedderUnavailable: the embedder cannot answer now.
    """
    texts = [turn.text for turn in turns]
    places = [i for i, turn in enumerate(turns) if turn.previous is not None]
    texts += [f"{turns[i].previous}\n{turns[i].text}" for i in places]
    with waiting("embed"):
        rows = await embedder.embed(texts, urgent=urgent)
    own = np.array(rows[: len(turns)])
    if keep is not None:
        for turn, row in zip(turns, own, strict=True):
            keep(turn.text, row)
    own[places] += rows[len(turns) :]
    return unit(own)


@dataclass(frozen=True, slots=True)
class StoredTurn:
    """A stored memory to embed; `key` lets rm_embed see whether it changed meanwhile."""

    id: str
    turn: Turn
    #: id, content hash, id and content hash of the turn before
    key: tuple[str, bytes, bytes, bytes]


async def read_turns(functions: Functions, owner: Owner, ids: Sequence[str]) -> list[StoredTurn]:
    """Return the stored ones of `ids` with the turns before them. Cost: one round trip."""
    raw = await functions.call("rm_turns_ro_v1", [owner.turns], owner.memory_prefix, *ids, read=True)
    found = []
    for i, memory_id in enumerate(ids):
        text, content_hash, prev_id, prev_text, prev_hash = raw[5 * i : 5 * i + 5]
        if text:
            turn = Turn(_decoded(text), _decoded(prev_text) if prev_id else None)
            found.append(StoredTurn(memory_id, turn, (memory_id, content_hash, prev_id, prev_hash)))
    return found


def _decoded(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")
