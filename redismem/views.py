"""The only place that says what derived data looks like from outside: profile, topics, summaries, similarity.

As `types` does for memories: the HTTP layer encodes these and `/openapi.json` is generated from them.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType, field

from redismem.fields import Name, Names, checked_name, checked_names

SummaryKind = Literal["topic", "day", "week", "month", "entity", "session"]

#: tokens of a summary at most, by kind; the profile's is `context_summary`
BUDGETS = {"profile": 500, "topic": 200, "day": 300, "week": 300, "month": 300, "entity": 150, "session": 150}

Line = Annotated[str, Meta(min_length=1, max_length=256)]


class Profile(Struct, kw_only=True):
    """What is known of a user, ready for a prompt. `context_summary` has 500 tokens at most.

    Fields that a caller set by PATCH are named in `patched`; the others are derived from the memories.
    `compiled_at` is null before the first compilation, and after a delete or correction of something it was
    made from until it is compiled again, which takes about a second.
    """

    user_id: str
    display_name: str | None = None
    #: concise, detailed, casual, formal or neutral
    communication_style: str | None = None
    topics_of_interest: list[str] = field(default_factory=list)
    known_expertise: list[str] = field(default_factory=list)
    #: such as {"code": "python", "notes": "bullet points"}
    preferred_formats: dict[str, str] = field(default_factory=dict)
    current_projects: list[str] = field(default_factory=list)
    #: of the last seven days of activity
    recent_topics: list[str] = field(default_factory=list)
    #: how long, and in how many sessions, the user is known
    relationship_context: str | None = None
    #: the top 20 by importance and recency; pinned ones first
    important_memory_ids: list[str] = field(default_factory=list)
    #: label of a topic -> its id
    topic_cluster_ids: dict[str, str] = field(default_factory=dict)
    context_summary: str = ""
    compiled_at: datetime | None = None
    valid_until: datetime | None = None
    patched: list[str] = field(default_factory=list)
    generation: int = 0


class ProfilePatch(Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Fields to set; they win over what is derived and survive recompilation. `null` gives a field back."""

    display_name: Name | UnsetType | None = UNSET
    communication_style: Name | UnsetType | None = UNSET
    topics_of_interest: Names | UnsetType | None = UNSET
    known_expertise: Names | UnsetType | None = UNSET
    preferred_formats: Annotated[dict[Line, Line], Meta(max_length=100)] | UnsetType | None = UNSET
    current_projects: Names | UnsetType | None = UNSET
    relationship_context: Name | UnsetType | None = UNSET

    def __post_init__(self) -> None:
        given = [name for name in self.__struct_fields__ if getattr(self, name) is not UNSET]
        if not given:
            raise ValueError("nothing to change: give at least one field")
        for name in given:
            value = getattr(self, name)
            if isinstance(value, str):
                setattr(self, name, checked_name(value, name))
            elif isinstance(value, list):
                setattr(self, name, checked_names(value, name))
            elif isinstance(value, dict):
                pairs = value.items()
                setattr(self, name, {checked_name(key, name): checked_name(one, name) for key, one in pairs})


#: fields of a profile that a caller may set
PATCHABLE = ProfilePatch.__struct_fields__


class TopicView(Struct, kw_only=True, omit_defaults=True):
    """A topic of a user's memories. `id` stays the same from one clustering to the next."""

    id: str
    label: str
    words: list[str]
    #: memories in it, about: filter memories by `cluster` to see them
    size: int
    summary: str | None = None


class TopicsReply(Struct, kw_only=True, omit_defaults=True):
    """Largest first. `uncategorized` memories are in no topic, or not looked at yet."""

    topics: list[TopicView]
    uncategorized: int
    generation: int


class Summary(Struct, kw_only=True, omit_defaults=True):
    """What some memories say, in short. `sources`: the memories it was made from."""

    kind: SummaryKind
    name: str
    text: str
    sources: list[str]
    tokens: int
    #: extractive, or the model that wrote it
    method: str
    generated_at: datetime


class SimilarMemory(Struct, kw_only=True, omit_defaults=True):
    """A memory near another; `similarity` is the cosine."""

    id: str
    text: str
    similarity: float
    #: duplicate, or contradiction with its reason in `why`
    flag: str | None = None
    why: str | None = None


class SimilarReply(Struct, kw_only=True):
    """Nearest first. `precomputed`: false where the worker has not come to it yet; it was searched now."""

    id: str
    similar: list[SimilarMemory]
    precomputed: bool


class Conflict(Struct, kw_only=True, omit_defaults=True):
    """Two memories that seem to say the same (duplicate) or to contradict each other; `newer` came later.

    Nothing is merged by itself: correct, delete, or leave them.
    """

    kind: Literal["duplicate", "contradiction"]
    older: str
    newer: str
    older_text: str
    newer_text: str
    similarity: float
    #: number, negation or value; absent for duplicates
    why: str | None = None


class ConflictsReply(Struct, kw_only=True):
    """Contradictions first, then by similarity."""

    conflicts: list[Conflict]
    total: int
