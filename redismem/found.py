"""The only place that reads what the search Functions of lua/read.lua answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from redismem.codec import memory_values, reached
from redismem.effort import is_staged
from redismem.errors import EmbedderMismatch
from redismem.types import Hit, Plan, ScoreParts, SearchReply, SearchRequest, Timing

OUT_OF_TIME = "the time budget ended during the search"


@dataclass(slots=True)
class Found:
    """A reply, and for how many seconds it may be kept in L1: 0 for not at all."""

    reply: SearchReply
    ttl_s: float = 0.0
    #: the user's index did not hold all memories yet
    is_filling: bool = False
    #: the user's graph was used
    by_graph: bool = False


def found_of(
    request: SearchRequest,
    generation: bytes,
    total: int,
    note: bytes,
    served_by: bytes,
    ttl_ms: int,
    flat: list[Any],
    reason: str | None = None,
) -> Found:
    """Return what a search Function answered.

    Args:
        reason: why something had to be left out before the search.

    Raises:
        EmbedderMismatch: semantic search in a store whose vectors are of another embedder.
    """
    notes = _notes(note)
    skipped = notes.get("CUT", [])
    if "EMBEDDER" in notes:
        if request.search_mode == "semantic":
            raise EmbedderMismatch("this user's vectors are of another embedder; run `redismem reembed`")
        reason = "this user's vectors are of another embedder (run `redismem reembed`): words only"
    elif "FILLING" in notes:
        reason = reason or "this user's index is being rebuilt: not all memories were searched"
    elif skipped:
        reason = reason or OUT_OF_TIME
    near = notes.get("TOPICS")
    reply = SearchReply(
        memories=[_hit(*flat[i : i + 4]) for i in range(0, len(flat), 4)],
        total=int(total),
        generation=int(generation),
        partial=reason is not None,
        reason=reason,
        skipped=["index", "total"] if "EARLY" in notes else [*skipped, *(["topics"] if near else [])],
        archived=reached(request.filters, notes.get("ARCHIVED", [])),
        plan=_plan(request, notes.get("HNSW"), near) if request.explain else None,
        served_by="l2" if served_by == b"l2" else "l3",
        timing=Timing(embed=0, search=0, total=0),
    )
    is_kept = not (reply.partial or reply.skipped or request.explain) and reply.memories
    return Found(
        reply, ttl_ms / 1000 if is_kept else 0.0, is_filling="FILLING" in notes, by_graph="HNSW" in notes
    )


def _notes(raw: bytes) -> dict[str, list[str]]:
    """Return the words of a note of lua/read.lua with what follows each."""
    words = (word.partition(":") for word in raw.decode().split())
    return {name: rest.split(",") if rest else [] for name, _, rest in words}


def _plan(request: SearchRequest, width: list[str] | None, near: list[str] | None) -> Plan:
    ef = int(width[0]) if width else None
    return Plan(
        index="hnsw" if width else "flat",
        ef=ef,
        staged=is_staged(request),
        topics=int(near[0]) if near else None,
    )


def unanswered() -> Found:
    """Return what there is when the budget ended before Redis answered: nothing, and it says so."""
    reply = SearchReply(
        memories=[],
        total=0,
        generation=0,
        partial=True,
        reason="the time budget ended before Redis answered",
        skipped=["index", "words", "total"],
        served_by="l3",
        timing=Timing(embed=0, search=0, total=0),
    )
    return Found(reply)


def _hit(raw_id: bytes, score: bytes, parts: list[bytes | None] | None, fields: list[bytes | None]) -> Hit:
    hit = Hit(**memory_values(fields), score=float(score))
    hit.id = raw_id.decode("utf-8", "replace")
    if parts is not None:
        numbers = [None if part is None else float(part) for part in parts]
        hit.explain = ScoreParts(**dict(zip(ScoreParts.__struct_fields__, numbers, strict=True)))  # type: ignore[arg-type]  # the order of lua/read.lua
    return hit
