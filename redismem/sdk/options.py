"""The only place that spells out requests as keyword arguments.

They are the fields of `types`, `views` and `conversation`, where stands what each means; a test compares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, TypedDict

from redismem.conversation import ContextParts
from redismem.fields import Scalar
from redismem.filters import Filters, NumberRange, TimeRange
from redismem.types import Consistency, QueryType, SearchMode


class MemoryFields(TypedDict, total=False):
    """Of `MemoryInput`, besides `text`."""

    id: str
    memory_type: str
    topics: Sequence[str]
    entities: Sequence[str]
    session_id: str
    event_date: datetime
    importance: float
    confidence: float
    pinned: bool
    metadata: Mapping[str, Any]


class MemoryChanges(TypedDict, total=False):
    """Of `MemoryPatch`; None clears `session_id` and `event_date`."""

    text: str
    memory_type: str
    topics: Sequence[str]
    entities: Sequence[str]
    session_id: str | None
    event_date: datetime | None
    importance: float
    confidence: float
    pinned: bool
    metadata: Mapping[str, Any]


class ProfileChanges(TypedDict, total=False):
    """Of `ProfilePatch`; None gives a field back to the compiler."""

    display_name: str | None
    communication_style: str | None
    topics_of_interest: Sequence[str] | None
    known_expertise: Sequence[str] | None
    preferred_formats: Mapping[str, str] | None
    current_projects: Sequence[str] | None
    relationship_context: str | None


class ListOptions(TypedDict, total=False):
    """Of `Filters`, as far as a list takes them; a list of names means any of them."""

    memory_type: str | Sequence[str]
    topics: str | Sequence[str]
    entities: str | Sequence[str]
    session_id: str | Sequence[str]
    cluster: str | Sequence[str]
    importance: NumberRange
    confidence: NumberRange
    created_at: TimeRange
    updated_at: TimeRange
    event_date: TimeRange
    metadata: Mapping[str, Scalar]
    pinned: bool
    superseded: Literal["exclude", "include", "only"]


class SearchOptions(TypedDict, total=False):
    """Of `SearchRequest`, besides `text`."""

    vector: Sequence[float]
    limit: int
    search_mode: SearchMode
    query_type: QueryType
    ef: int
    filters: Filters
    max_ms: int
    min_similarity: float
    min_results: int
    session_id: str
    nearest_topics: int
    recency_weight: float
    recency_half_life_days: float
    importance_weight: float
    consistency: Consistency
    min_version: int
    explain: bool


class SessionFields(TypedDict, total=False):
    """Of `SessionInput`, besides `id`."""

    agent: str
    active_topics: Sequence[str]
    pins: Sequence[str]
    ttl_s: int


class SessionChanges(TypedDict, total=False):
    """Of `SessionPatch`."""

    active_topics: Sequence[str]
    pins: Sequence[str]


class MessageFields(TypedDict, total=False):
    """Of `MessageInput`, besides `text` and `role`."""

    id: str
    time: datetime
    agent: str
    topics: Sequence[str]
    entities: Sequence[str]
    metadata: Mapping[str, Any]


class ContextOptions(TypedDict, total=False):
    """Of `ContextRequest`, besides `text` and `session_id`."""

    stages: int
    max_tokens: int
    max_ms: int
    parts: ContextParts
    entities: Sequence[str]
    template: str
    consistency: Consistency
    min_version: int
