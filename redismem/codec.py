"""The only place that turns memories into hash fields and back. Pure: no I/O, no clock."""

from __future__ import annotations

import math
from base64 import b32encode
from collections.abc import Sequence
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from redismem.fields import MAX_METADATA_BYTES
from redismem.filters import Filters
from redismem.query import epoch, filtered_quarters, metadata_tags, packed_tags, unpacked_tags
from redismem.types import Memory, MemoryInput, SearchRequest
from redismem.weights import default_importance
from redismem.words import day_words, extra_words

#: what a reader fetches, in the order `memory_from_raw` expects
READ_FIELDS = (
    *("pk", "text", "memory_type", "topics", "entities", "session_id", "event_date", "created_at"),
    *("updated_at", "importance", "confidence", "pinned", "metadata", "version", "embedder"),
    *("superseded_by", "sources"),
)

#: part of every cached search's digest: bumped when the same request may rank differently
RANKING = 4

# stands in content hashes for an importance that nobody gave
_UNSAID = 0.5

# values a hash written by another service may lack
_UNSET_MOMENT = datetime.fromtimestamp(0, UTC)


def memory_fields(memory: MemoryInput, now_s: float) -> dict[str, str | bytes]:
    """Return the hash fields of a memory, without vector, version and timestamps.

    Raises:
        ValueError: the metadata is larger than 16 KiB.
    """
    metadata = msgspec.json.encode(memory.metadata)
    if len(metadata) > MAX_METADATA_BYTES:
        raise ValueError(f"`metadata` is longer than {MAX_METADATA_BYTES} bytes")
    fields: dict[str, str | bytes] = {
        "text": memory.text,
        "memory_type": memory.memory_type,
        "importance": repr(_importance(memory)),
        "confidence": repr(memory.confidence),
        "pinned": "1" if memory.pinned else "0",
        "content_hash": content_hash(memory),
        "partition": quarter(epoch(memory.event_date) if memory.event_date else now_s),
    }
    if words := extra_words(memory.text):
        fields["words"] = words
    if memory.topics:
        fields["topics"] = packed_tags(memory.topics)
    if memory.entities:
        fields["entities"] = packed_tags(memory.entities)
    if memory.session_id is not None:
        fields["session_id"] = memory.session_id
    if memory.event_date is not None:
        fields["event_date"] = format(epoch(memory.event_date), ".6f")
        fields["day"] = day_words(memory.event_date)
    if memory.metadata:
        fields["metadata"] = metadata
        if tags := metadata_tags(memory.metadata):
            fields["metadata_tags"] = packed_tags(tags)
    return fields


def _importance(memory: MemoryInput) -> float:
    if memory.importance is None:
        return default_importance(memory.memory_type, memory.text, memory.pinned)
    return memory.importance


def content_hash(memory: MemoryInput) -> str:
    """Return 26 characters that two memories share exactly when a writer gave the same content."""
    moment = format(epoch(memory.event_date), ".6f") if memory.event_date else None
    # what was exported with the importance that nobody gave is what was written without one
    usual = default_importance(memory.memory_type, memory.text, memory.pinned)
    importance = _UNSAID if memory.importance in (None, usual) else memory.importance
    content = [
        *(memory.text, memory.memory_type, sorted(memory.topics), sorted(memory.entities)),
        *(memory.session_id, moment, importance, memory.confidence, memory.pinned),
        msgspec.json.encode(memory.metadata, order="deterministic"),
    ]
    return _digest(msgspec.msgpack.encode(content))


def derived_id(digest: str, attempt: int = 0) -> str:
    """Return the id of a memory whose writer gave none; another one for each `attempt`.

    The first attempt is the content hash, so that a repeated write meets its first copy.
    """
    return digest if attempt == 0 else _digest(f"{digest}:{attempt}".encode())


# JSON: msgpack has no way to write the year 9999 west of Greenwich
_canonical = msgspec.json.Encoder(order="deterministic")


def search_digest(request: SearchRequest, embedder: str) -> str:
    """Return 32 characters that two requests share exactly when they ask for the same memories.

    What bounds or describes the answer (`max_ms`, `min_results`, `session_id`, `consistency`, `min_version`,
    `explain`) is not in it: an answer that is kept is a whole one.
    """
    asked = (
        *(RANKING, embedder, request.text, request.vector, request.limit, request.search_mode),
        *(request.query_type, request.ef, request.filters, request.min_similarity, request.nearest_topics),
        *(request.recency_weight, request.recency_half_life_days, request.importance_weight),
    )
    return blake2b(_canonical.encode(asked), digest_size=16).hexdigest()


def text_digest(text: str) -> str:
    """Return 32 characters that stand for a text in a key."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def asks_for_the_past(filters: Filters, now_s: float) -> bool:
    """Return whether only memories of before now can satisfy the filters."""
    for bounds in (filters.created_at, filters.event_date):
        ends = [end for end in (bounds.lt, bounds.lte) if end is not None] if bounds else []
        if any(epoch(end) < now_s for end in ends):
            return True
    return False


def reached(filters: Filters, quarters: Sequence[str]) -> list[str]:
    """Return those of `quarters` whose memories may satisfy the filters, in order."""
    found = sorted(quarters)
    if filters.partition is not None:
        asked = filtered_quarters(filters.partition)
        found = [name for name in found if name in asked]
    if (bounds := filters.event_date) is not None:
        starts = [quarter(epoch(start)) for start in (bounds.gt, bounds.gte) if start is not None]
        ends = [quarter(epoch(end)) for end in (bounds.lt, bounds.lte) if end is not None]
        found = [name for name in found if max(starts, default="") <= name <= min(ends, default="~")]
    return found


def _digest(content: bytes) -> str:
    return b32encode(blake2b(content, digest_size=16).digest()).decode().rstrip("=").lower()


def quarter(epoch_s: float) -> str:
    """Return the partition of a moment, such as `2026-Q1`."""
    moment = datetime.fromtimestamp(epoch_s, UTC)
    return f"{moment.year:04d}-Q{(moment.month + 2) // 3}"


def memory_from_raw(raw: Sequence[bytes | None]) -> Memory | None:
    """Return the memory of `READ_FIELDS` values; None when the hash has no text (it is gone)."""
    if raw[1] is None:
        return None
    return Memory(**memory_values(raw))


def memory_values(raw: Sequence[bytes | None]) -> dict[str, Any]:
    """Return the fields of `types.Memory`; tolerant of what other services leave out."""
    (pk, text, memory_type, topics, entities, session_id, event_date, created_at) = raw[:8]
    (updated_at, importance, confidence, pinned, metadata, version, embedder) = raw[8:15]
    (superseded_by, sources) = raw[15:17]
    created = _moment(created_at) or _UNSET_MOMENT
    return {
        "id": _decoded(pk),
        "text": _decoded(text),
        "memory_type": _decoded(memory_type) or "semantic",
        "topics": unpacked_tags(_decoded(topics)),
        "entities": unpacked_tags(_decoded(entities)),
        "session_id": _decoded(session_id) or None,
        "event_date": _moment(event_date),
        "created_at": created,
        "updated_at": created if updated_at == created_at else _moment(updated_at) or created,
        "importance": _number(importance, 0.5),
        "confidence": _number(confidence, 1.0),
        "pinned": pinned in (b"1", b"True", b"true"),
        "metadata": _json_object(metadata),
        "version": int(version) if version and version.isdigit() else 0,
        "embedded": bool(embedder),
        "superseded_by": _decoded(superseded_by) or None,
        "sources": unpacked_tags(_decoded(sources)),
    }


def _decoded(raw: bytes | None) -> str:
    return raw.decode("utf-8", "replace") if raw else ""


def _number(raw: bytes | None, default: float) -> float:
    try:
        number = float(raw) if raw else default
    except ValueError:
        return default
    return number if math.isfinite(number) else default


def _moment(raw: bytes | None) -> datetime | None:
    try:
        return datetime.fromtimestamp(float(raw), UTC) if raw else None
    except (ValueError, OverflowError, OSError):
        return None


def _json_object(raw: bytes | None) -> dict[str, object]:
    try:
        value = msgspec.json.decode(raw) if raw else {}
    except (msgspec.DecodeError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def vector_bytes(vector: NDArray[np.floating]) -> bytes:
    """Return a vector as the FLOAT16 bytes of the index; shape (dim,)."""
    return np.asarray(vector, dtype=np.float16).tobytes()


def widened(raw: bytes) -> bytes:
    """Return FLOAT16 bytes as FLOAT32 bytes."""
    return np.frombuffer(raw, np.float16).astype(np.float32).tobytes()


def unit(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return rows scaled to L2 norm 1; shape (…, dim). A zero row stays zero."""
    rows = np.asarray(vectors, dtype=np.float64)
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    return (rows / np.where(norms == 0, 1, norms)).astype(np.float32)
