"""The only place that says what a conversation looks like from outside: sessions, messages, context.

As `types` does for memories: the HTTP layer decodes straight into these, and `/openapi.json` is generated
from them.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType, field

from redismem.fields import (
    MAX_TEXT_BYTES,
    Metadata,
    Name,
    Names,
    checked_metadata,
    checked_moment,
    checked_name,
    checked_names,
    checked_text,
)
from redismem.types import Consistency, PutOutcome, min_generation

#: messages of one request, texts of one batch
MAX_MESSAGES = 100
MAX_CONTEXTS = 20

#: entities that a request may name: each costs a search
MAX_ENTITIES = 10

#: seconds a session lives without a message at least and at most
MIN_TTL_S, MAX_TTL_S = 60, 30 * 86_400

#: tokens of a context up to and with each stage, at most
STAGE_TOKENS = {1: 500, 2: 1_200, 3: 2_000, 4: 4_000}
MAX_TOKENS = STAGE_TOKENS[4]

MAX_TEMPLATE_CHARS = 8_192

Role = Literal["user", "assistant", "system", "tool"]
Text = Annotated[str, Meta(min_length=1, max_length=MAX_TEXT_BYTES)]

#: what a context consists of; `session` is the last session's summary, `pinned` what is loaded without being
#: asked for, `prefetched` what was loaded for this turn before it came
Part = Literal[
    "profile",
    "session",
    "pinned",
    "matches",
    "topics",
    "prefetched",
    "more",
    "entities",
    "recent",
    "deep",
    "history",
    "related",
]

#: the stage in which each part may appear
STAGE_OF: dict[Part, int] = {
    "profile": 1,
    "session": 1,
    "pinned": 1,
    "matches": 2,
    "topics": 2,
    "prefetched": 2,
    "more": 2,
    "entities": 3,
    "recent": 3,
    "deep": 4,
    "history": 4,
    "related": 4,
}


class SessionInput(Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A session to open, or to join when it is open already. Without an `id` it gets one.

    `active_topics` are ids of topics or names as memories have them in `topics`; `pins` are ids of memories
    that every context of the session begins with. `ttl_s` counts from the last message on.
    """

    id: Name | None = None
    agent: Name | None = None
    active_topics: Names = field(default_factory=list)
    pins: Names = field(default_factory=list)
    ttl_s: Annotated[int, Meta(ge=MIN_TTL_S, le=MAX_TTL_S)] | None = None

    def __post_init__(self) -> None:
        for name in ("id", "agent"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, checked_name(value, name))
        self.active_topics = checked_names(self.active_topics, "active_topics")
        self.pins = checked_names(self.pins, "pins")


class SessionPatch(Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """What to change; a field left out stays, a list replaces the old one."""

    active_topics: Names | UnsetType = UNSET
    pins: Names | UnsetType = UNSET

    def __post_init__(self) -> None:
        if self.active_topics is UNSET and self.pins is UNSET:
            raise ValueError("nothing to change: give `active_topics` or `pins`")
        if self.active_topics is not UNSET:
            self.active_topics = checked_names(self.active_topics, "active_topics")
        if self.pins is not UNSET:
            self.pins = checked_names(self.pins, "pins")


class MessageInput(Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A message of a session; it becomes a memory of type `message`.

    `time` is when it was said, now without it. With an `id`, a repeated request stores it once.
    """

    text: Text
    role: Role = "user"
    id: Name | None = None
    time: datetime | None = None
    agent: Name | None = None
    topics: Names = field(default_factory=list)
    entities: Names = field(default_factory=list)
    metadata: Metadata = field(default_factory=dict)

    def __post_init__(self) -> None:
        checked_text(self.text)
        for name in ("id", "agent"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, checked_name(value, name))
        if self.time is not None:
            checked_moment(self.time, "time")
        self.topics = checked_names(self.topics, "topics")
        self.entities = checked_names(self.entities, "entities")
        checked_metadata(self.metadata)


class MessageBatch(Struct, forbid_unknown_fields=True, kw_only=True):
    """Several messages in their order, such as a question and its answer. All are stored, or none."""

    messages: Annotated[list[MessageInput], Meta(min_length=1, max_length=MAX_MESSAGES)]


class TypingInput(Struct, forbid_unknown_fields=True, kw_only=True):
    """What stands in the input field so far."""

    partial: Text

    def __post_init__(self) -> None:
        checked_text(self.partial, "partial")


class ContextParts(Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Parts that are wanted; all are, unless turned off."""

    profile: bool = True
    session: bool = True
    pinned: bool = True
    matches: bool = True
    topics: bool = True
    prefetched: bool = True
    more: bool = True
    entities: bool = True
    recent: bool = True
    deep: bool = True
    history: bool = True
    related: bool = True


class ContextRequest(Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """What to assemble a context for: a `text`, or the last message of a `session_id`, or both.

    `stages`: up to which stage: 1 profile and last session, 2 the best memories and active topics, 3 more of
    them and entities, 4 a deep search, history and cross-references. `max_tokens` bounds all of it, beside
    the bounds of the stages. After `max_ms` the answer is what there is; what was late is loaded for the next
    turn of the session. `entities` are names that the text is about, in place of those found in it.
    `template` is the text to return, with `{profile}`, `{session}`, `{memories}`, `{topics}`, `{entities}`,
    `{context}` where they shall stand. `min_version`, `consistency`: as for a search, for memories; the
    profile may be older.
    """

    text: Text | None = None
    session_id: Name | None = None
    stages: Annotated[int, Meta(ge=1, le=4)] = 3
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)] = MAX_TOKENS
    max_ms: Annotated[int, Meta(ge=1, le=60_000)] | None = None
    parts: ContextParts = field(default_factory=ContextParts)
    entities: Annotated[list[Name], Meta(max_length=MAX_ENTITIES)] = field(default_factory=list)
    template: Annotated[str, Meta(min_length=1, max_length=MAX_TEMPLATE_CHARS)] | None = None
    consistency: Consistency = "eventual"
    min_version: Annotated[int, Meta(ge=0, le=2**53)] | None = None

    def __post_init__(self) -> None:
        if self.text is not None:
            checked_text(self.text)
        if self.session_id is not None:
            self.session_id = checked_name(self.session_id, "session_id")
        self.entities = checked_names(self.entities, "entities")
        if self.stages > 1 and self.text is None and self.session_id is None:
            raise ValueError("`text` or `session_id` is required for more than the first of `stages`")

    @property
    def min_generation(self) -> int:
        """The least generation of the owner at which a cached reply will do."""
        return min_generation(self.consistency, self.min_version)


class ContextBatch(Struct, forbid_unknown_fields=True, kw_only=True):
    """Contexts of one user that are embedded together and assembled side by side."""

    contexts: Annotated[list[ContextRequest], Meta(min_length=1, max_length=MAX_CONTEXTS)]


class ContextMemory(Struct, kw_only=True, omit_defaults=True):
    """A memory in a context. `score`: of the search that found it; `at`: when it happened, or was written."""

    id: str
    text: str
    at: datetime
    score: float | None = None
    memory_type: str = "semantic"
    session_id: str | None = None
    #: why it is there, beyond its part: pinned, important, active_topic, last_session, a signal, an entity,
    #: the id that it relates to
    why: str | None = None


class Block(Struct, kw_only=True, omit_defaults=True):
    """One part of a context: a text made from `memory_ids`, or `memories`; `tokens` are its rendering's.

    `source`: l1, l2 or l3 as for a search; `derived` for what the worker made.
    """

    part: Part
    title: str
    text: str | None = None
    memory_ids: list[str] = field(default_factory=list)
    memories: list[ContextMemory] = field(default_factory=list)
    tokens: int = 0
    source: Literal["l1", "l2", "l3", "derived"] = "l3"


class Stage(Struct, kw_only=True, omit_defaults=True):
    """What one stage adds. No memory stands in two blocks of a context.

    `text` is its rendering; `tokens` count up to and with this stage. `at_ms`: from the arrival of the
    request until what it shows was last compared with deletes and corrections. `partial`: parts in `skipped`
    came too late, or could not be had, for `reason`.
    """

    stage: int
    blocks: list[Block]
    text: str
    tokens: int
    at_ms: float
    partial: bool = False
    skipped: list[str] = field(default_factory=list)
    reason: str | None = None


class ContextReply(Struct, kw_only=True, omit_defaults=True):
    """A context: `text` is ready to be put into a prompt, `stages` are the same in structured form.

    As server-sent events: an event `stage` for each of `stages`, then an event `done` with all but these.
    """

    text: str
    tokens: int
    generation: int
    partial: bool
    stages: list[Stage] | UnsetType = UNSET
    #: names that were taken for entities
    entities: list[str] = field(default_factory=list)
    total_ms: float
    #: milliseconds that each part took to fetch, side by side
    timing: dict[str, float] = field(default_factory=dict)


class ContextBatchReply(Struct, kw_only=True):
    """One context a request, in order."""

    contexts: list[ContextReply]


class Session(Struct, kw_only=True, omit_defaults=True):
    """A session as it stands."""

    id: str
    opened_at: datetime
    last_at: datetime
    expires_at: datetime
    messages: int
    agents: list[str] = field(default_factory=list)
    active_topics: list[str] = field(default_factory=list)
    pins: list[str] = field(default_factory=list)
    closed_at: datetime | None = None


class Message(Struct, kw_only=True, omit_defaults=True):
    """A message of a session, as it stands now."""

    id: str
    text: str
    role: str
    at: datetime
    agent: str | None = None


class SessionReply(Session, kw_only=True, omit_defaults=True):
    """A session with its newest messages, oldest first."""

    recent: list[Message]


class OpenedReply(Struct, kw_only=True):
    """A session, whether this request opened or joined it, and the first stage of its context."""

    session: Session
    outcome: Literal["OPENED", "JOINED"]
    context: ContextReply


class MessageItem(Struct, kw_only=True):
    """What became of a message."""

    id: str
    outcome: PutOutcome
    version: int
    embedded: bool


class MessageReply(Struct, kw_only=True):
    """One item a message, in order; `messages` of the session so far."""

    items: list[MessageItem]
    messages: int
    generation: int


class ClosedReply(Struct, kw_only=True):
    """The session as it was closed. Its summary follows; its messages stay memories."""

    session: Session


class TypingReply(Struct, kw_only=True):
    """It is being loaded, unless there is more to load than there is time for."""

    status: Literal["accepted"] = "accepted"
