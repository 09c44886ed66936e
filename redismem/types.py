"""The only place that defines what goes in and out: requests, memories, replies.

The HTTP layer decodes straight into these types and `/openapi.json` is generated from them, so a
constraint written here is checked, documented and tested at once. A wrong value raises
`msgspec.ValidationError` on decoding; `__post_init__` adds what a type cannot say.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType, field

from redismem.fields import (
    MAX_TEXT_BYTES,
    MemoryType,
    Metadata,
    Name,
    Names,
    Share,
    checked_metadata,
    checked_moment,
    checked_name,
    checked_names,
    checked_text,
)
from redismem.filters import Filters

MAX_BATCH_MEMORIES = 500
MAX_BATCH_QUERIES = 50

#: magnitude of the largest number of a vector; inside it no length overflows or vanishes
MIN_NUMBER, MAX_NUMBER = 1e-6, 1e6

SearchMode = Literal["hybrid", "semantic", "keyword"]
QueryType = Literal["suggestion", "prefetch", "primary", "verification"]
Consistency = Literal["eventual", "session", "strong"]
#: higher than any generation
NEVER_CACHED = 2**53

PutOutcome = Literal["CREATED", "UPDATED", "UNCHANGED", "INVALID"]


class MemoryInput(Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A memory as its writer gives it.

    Without an `id`, the same content twice is one memory. `event_date` is when it happened,
    `session_id` the conversation it belongs to: turns of one session support each other in search. Without an
    `importance`, type and wording decide; it fades with time, unless the memory is used or `pinned`.
    """

    text: Annotated[str, Meta(min_length=1, max_length=MAX_TEXT_BYTES)]
    id: Name | None = None
    memory_type: MemoryType = "semantic"
    topics: Names = field(default_factory=list)
    entities: Names = field(default_factory=list)
    session_id: Name | None = None
    event_date: datetime | None = None
    importance: Share | None = None
    confidence: Share = 1.0
    pinned: bool = False
    metadata: Metadata = field(default_factory=dict)

    def __post_init__(self) -> None:
        checked_text(self.text)
        if self.id is not None:
            self.id = checked_name(self.id, "id")
        if self.session_id is not None:
            self.session_id = checked_name(self.session_id, "session_id")
        self.topics = checked_names(self.topics, "topics")
        self.entities = checked_names(self.entities, "entities")
        checked_metadata(self.metadata)
        if self.event_date is not None:
            checked_moment(self.event_date, "event_date")


class MemoryPatch(Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """The fields to change; a field left out stays. `null` clears `session_id` and `event_date`."""

    text: Annotated[str, Meta(min_length=1, max_length=MAX_TEXT_BYTES)] | UnsetType = UNSET
    memory_type: MemoryType | UnsetType = UNSET
    topics: Names | UnsetType = UNSET
    entities: Names | UnsetType = UNSET
    session_id: Name | UnsetType | None = UNSET
    event_date: datetime | UnsetType | None = UNSET
    importance: Share | UnsetType = UNSET
    confidence: Share | UnsetType = UNSET
    pinned: bool | UnsetType = UNSET
    metadata: Metadata | UnsetType = UNSET

    def __post_init__(self) -> None:
        if all(getattr(self, name) is UNSET for name in self.__struct_fields__):
            raise ValueError("nothing to change: give at least one field")


class PutItem(Struct, kw_only=True, omit_defaults=True):
    """What became of one memory of a request; `error` says why it was not stored."""

    id: str | None = None
    outcome: PutOutcome
    version: int | None = None
    embedded: bool | UnsetType = UNSET
    error: str | None = None
    field: str | None = None


class PutReply(Struct, kw_only=True):
    """One item per memory of the request, in its order."""

    memories: list[PutItem]
    generation: int


class Memory(Struct, kw_only=True, omit_defaults=True):
    """A stored memory. `version` grows with every write to its owner; use it as the ETag."""

    id: str
    text: str
    memory_type: str
    topics: list[str]
    entities: list[str]
    session_id: str | None = None
    event_date: datetime | None = None
    created_at: datetime
    updated_at: datetime
    importance: float
    confidence: float
    pinned: bool
    metadata: Metadata
    version: int
    embedded: bool
    superseded_by: str | None = None
    sources: list[str] = field(default_factory=list)


class ScoreParts(Struct, kw_only=True, omit_defaults=True):
    """How a score came about; the README's ranking section has the formula.

    `similarity` is the cosine, `words` the BM25 score; `semantic` and `keyword` are the same
    after min-max over the candidates; `neighbours` is what adjacent turns added.
    """

    similarity: float | None = None
    words: float | None = None
    semantic: float
    keyword: float
    neighbours: float
    relevance: float
    recency: float | None = None
    importance: float | None = None


class Hit(Memory, kw_only=True, omit_defaults=True):
    """A memory found by a search. `score` is 0..1, higher is better."""

    score: float
    explain: ScoreParts | None = None


class SearchRequest(Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """What to look for. Give `text`, or a `vector` of the store's dimension for semantic search.

    `max_ms` bounds the search (in a batch the smallest one); what it cut off is told by `partial` and
    `skipped`. `min_similarity` is a bound on the cosine: it drops hits whose vector is farther. With
    `min_results`, what was used lately and the turns of `session_id` are looked at first, and the search ends
    there when so many are good (a cosine of `min_similarity`, 0.85 by default) and one is excellent (above
    0.9). With `nearest_topics`, the vector is compared with the memories of so many of the nearest topics,
    and the uncategorized ones near them; users without topics are searched as ever. `query_type` or `ef`
    choose the search width for users with an HNSW graph; exact searches ignore it.
    `consistency`: eventual may miss memories of the last 60 s; `min_version` (session) sees the write that
    returned that generation; strong sees every acknowledged write. Deleted and corrected memories are never
    returned.
    """

    text: Annotated[str, Meta(min_length=1, max_length=MAX_TEXT_BYTES)] | None = None
    vector: Annotated[list[float], Meta(min_length=2, max_length=8192)] | None = None
    limit: Annotated[int, Meta(ge=1, le=100)] = 10
    search_mode: SearchMode = "hybrid"
    query_type: QueryType = "primary"
    ef: Annotated[int, Meta(ge=10, le=4096)] | None = None
    filters: Filters = field(default_factory=Filters)
    max_ms: Annotated[int, Meta(ge=1, le=60_000)] | None = None
    min_similarity: Annotated[float, Meta(ge=-1, le=1)] | None = None
    min_results: Annotated[int, Meta(ge=1, le=100)] | None = None
    session_id: Name | None = None
    nearest_topics: Annotated[int, Meta(ge=1, le=100)] | None = None
    recency_weight: Share = 0.0
    recency_half_life_days: Annotated[float, Meta(gt=0, le=36_500)] = 30.0
    importance_weight: Share = 0.0
    consistency: Consistency = "eventual"
    min_version: Annotated[int, Meta(ge=0, le=2**53)] | None = None
    explain: bool = False

    def __post_init__(self) -> None:
        if self.text is None and self.vector is None:
            raise ValueError("`text` or `vector` is required")
        if self.text is not None:
            checked_text(self.text)
        if self.vector is not None and not MIN_NUMBER <= max(map(abs, self.vector)) <= MAX_NUMBER:
            raise ValueError(f"the largest magnitude in `vector` must be {MIN_NUMBER:g} to {MAX_NUMBER:g}")
        if self.search_mode != "semantic" and self.text is None:
            raise ValueError(f"`text` is required for search_mode {self.search_mode}")
        if self.search_mode == "keyword" and self.min_similarity is not None:
            raise ValueError("`min_similarity` needs vectors: use search_mode hybrid or semantic")
        if self.search_mode == "keyword" and self.min_results is not None:
            raise ValueError("`min_results` needs vectors: use search_mode hybrid or semantic")
        if self.session_id is not None:
            self.session_id = checked_name(self.session_id, "session_id")
        if self.recency_weight + self.importance_weight > 1:
            raise ValueError("`recency_weight` and `importance_weight` add up to more than 1")

    @property
    def min_generation(self) -> int:
        """The least generation of the owner at which a cached reply will do."""
        return min_generation(self.consistency, self.min_version)


def min_generation(consistency: Consistency, min_version: int | None) -> int:
    """Return the least generation at which something cached will do; NEVER_CACHED for none."""
    if consistency == "strong" or (consistency == "session" and min_version is None):
        return NEVER_CACHED
    return min_version or 0


class Timing(Struct, kw_only=True):
    """Milliseconds by stage: turning the text into a vector, the Redis call, all of it."""

    embed: float
    search: float
    total: float


class Plan(Struct, kw_only=True, omit_defaults=True):
    """How a search went about it: exactly (flat), or by the user's graph (hnsw) with width `ef`."""

    index: Literal["flat", "hnsw"]
    ef: int | None = None
    #: the hot set and the session were looked at first
    staged: bool = False
    #: by meaning, only this many of the nearest topics were searched
    topics: int | None = None


class SearchReply(Struct, kw_only=True, omit_defaults=True):
    """Best memories first.

    `total` counts every memory that matches the filters (keyword mode: the words as well), not only
    those returned. `generation` is that of the owner when the search was made. `partial` with `reason`:
    part of the search was left out; `skipped` names the parts of index, words, total, topics that were, also
    where `min_results` ended it or `nearest_topics` bounded it. `archived`: quarters it reaches into whose
    memories are not in Redis (see `redismem archive restore`). `plan` is shown with `explain`. `served_by`:
    this process's cache (l1), the one in Redis (l2), or the index (l3). `stale`: Redis is away, and this is
    what was true before.
    """

    memories: list[Hit]
    total: int
    generation: int
    partial: bool
    reason: str | None = None
    skipped: list[str] = field(default_factory=list)
    archived: list[str] = field(default_factory=list)
    plan: Plan | None = None
    # last: a cached reply is everything before
    served_by: Literal["l1", "l2", "l3"]
    timing: Timing
    stale: bool = False


class BatchRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """Searches of one user that are embedded in one batch and answered in one round trip."""

    queries: Annotated[list[SearchRequest], Meta(min_length=1, max_length=MAX_BATCH_QUERIES)]


class BatchReply(Struct, kw_only=True):
    """One reply per query, in order."""

    results: list[SearchReply]


class CorrectionRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """`ids` are no longer true; `memory` replaces them."""

    ids: Annotated[list[Name], Meta(min_length=1, max_length=100)]
    memory: MemoryInput

    def __post_init__(self) -> None:
        self.ids = checked_names(self.ids, "ids")
        if self.memory.id in self.ids:
            raise ValueError("`memory.id` must not be one of `ids`; use PATCH to change in place")


class CorrectionReply(Struct, kw_only=True):
    """The memory that replaces `superseded`."""

    id: str
    outcome: Literal["CREATED", "UNCHANGED"]
    version: int
    superseded: list[str]
    generation: int


class DeleteReply(Struct, kw_only=True):
    """Receipt of a delete; no later read returns the memory."""

    id: str
    outcome: Literal["DELETED"]
    generation: int


class ListReply(Struct, kw_only=True, omit_defaults=True):
    """Newest first; `cursor` continues, absent at the end."""

    memories: list[Memory]
    total: int
    generation: int
    cursor: str | None = None


class HistoryEvent(Struct, kw_only=True, omit_defaults=True):
    """One change. Holds no memory text: history outlives a delete."""

    at: datetime
    event: str
    version: int
    other: list[str] = field(default_factory=list)


class HistoryReply(Struct, kw_only=True):
    """Oldest first, bounded by the length of the owner's log."""

    id: str
    events: list[HistoryEvent]


class UserItem(Struct, kw_only=True):
    """A user of a listing. `last_active`: the last write, or read as far as reads are told."""

    user: str
    namespace: str
    memories: int
    last_active: datetime | None


class UsersReply(Struct, kw_only=True):
    """Users in no order; `cursor` continues, null at the end.

    A page may be short, even empty, and still have a cursor: the store is looked through in parts.
    """

    users: list[UserItem]
    cursor: str | None


class ForgetReply(Struct, kw_only=True):
    """Receipt of forgetting a user: how many memories, archived ones too, and keys are gone."""

    memories: int
    keys: int


class ImportReply(Struct, kw_only=True):
    """Counts by outcome; `errors` names the first 100 lines that were refused."""

    created: int
    updated: int
    unchanged: int
    invalid: int
    errors: list[PutItem]
    generation: int


class ImportRecord(MemoryInput, kw_only=True, omit_defaults=True):
    """A line of an export: a memory with what only the store may set on a normal write."""

    created_at: datetime | None = None
    updated_at: datetime | None = None
    superseded_by: Name | None = None
    sources: Names = field(default_factory=list)
    version: int | None = None
    embedded: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("created_at", "updated_at"):
            if (moment := getattr(self, name)) is not None:
                checked_moment(moment, name)
        if self.superseded_by is not None:
            self.superseded_by = checked_name(self.superseded_by, "superseded_by")
        self.sources = checked_names(self.sources, "sources")


class StatsReply(Struct, kw_only=True):
    """What one process's caches hold and did since its start; behind several workers, of one of them."""

    process: str
    #: the last round of maintenance: users, graphs, indexes parked and being filled, what was done; null
    #: before the first
    indexes: dict[str, Any] | None = None
    #: by kind and in total: entries, bytes, hits, misses, and what became of entries
    l1: dict[str, Any]
    l2: dict[str, int]
    #: reads that L1 was not asked for (no lease), that joined another's computation, that were stale
    reads: dict[str, int]
    #: contexts, their stages, what was late or left out in time; memories of stage 2, those at hand before
    contexts: dict[str, int]
    #: by signal: memories issued, used, wasted; runs cancelled, shed
    prefetch: dict[str, dict[str, int]]
    #: jobs that wait, are late, are being done, fail, are dead; null while Redis is away
    jobs: dict[str, Any] | None
    #: whether L1 may answer, and what the push connection and barriers did
    coherence: dict[str, Any]
