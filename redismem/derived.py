"""Reads what the worker derived, and takes what callers say of themselves. Never waits for a job.

What is missing or out of date is queued, and the read answers with what there is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec

from redismem.coherence import Coherence
from redismem.errors import IndexMissing, InvalidInput, NotFound, StoreError, Unavailable
from redismem.fields import checked_name
from redismem.index import is_missing_index
from redismem.jobs import Jobs
from redismem.keys import PROFILE_ID, Owner
from redismem.lualib import Functions
from redismem.material import LABEL_WORDS
from redismem.query import packed_tags, source_query
from redismem.rules import Event
from redismem.views import (
    Conflict,
    ConflictsReply,
    Profile,
    ProfilePatch,
    SimilarMemory,
    SimilarReply,
    Summary,
    SummaryKind,
    TopicsReply,
    TopicView,
)

#: topics listed at most
MOST_TOPICS = 100

_MOMENTS = ("compiled_at", "valid_until")


@dataclass(frozen=True, slots=True)
class FoundProfile:
    """A profile, and the memories it was made from."""

    profile: Profile
    sources: tuple[str, ...]


_KINDS = {one.name: one.type for one in msgspec.structs.fields(Profile)}


class Views:
    """Reads the derived data of one store."""

    def __init__(
        self,
        functions: Functions,
        jobs: Jobs,
        coherence: Coherence,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._functions = functions
        self._client = functions.client
        self._jobs = jobs
        self._coherence = coherence
        self._clock = clock

    async def profile(self, owner: Owner) -> FoundProfile:
        """Return the profile as it is; one that is older than an hour, or missing, is queued.

        Cost: one round trip, one more when it is queued.
        """
        generation, known, *flat = await self._functions.call(
            "rm_profile_ro_v1", [owner.meta, owner.profile], owner.memory_prefix, read=True
        )
        fields = {name.decode(): raw for name, raw in zip(flat[::2], flat[1::2], strict=True)}
        profile = Profile(user_id=owner.user, generation=int(generation), patched=_patched(fields))
        for name in Profile.__struct_fields__:
            if (raw := fields.get(name)) is None or name == "patched":
                continue
            with suppress(ValueError, OverflowError, OSError):  # another hand's is not told
                setattr(profile, name, _moment(raw) if name in _MOMENTS else _told(raw, name))
        if known and (profile.valid_until is None or profile.valid_until.timestamp() < self._clock()):
            await self._queue(owner, "profile")
        sources = tuple[str, ...]()
        with suppress(ValueError):
            sources = msgspec.json.decode(fields.get("sources", b"[]"), type=tuple[str, ...])
        return FoundProfile(profile, sources)

    async def change_profile(self, owner: Owner, patch: ProfilePatch) -> Profile:
        """Set fields of a profile; they hold here at once, in other processes with Redis's push.

        Cost: two round trips.
        """
        given = {name: getattr(patch, name) for name in patch.__struct_fields__}
        changes = {name: value for name, value in given.items() if value is not msgspec.UNSET}
        await self._functions.call(
            "rm_profile_set_v1",
            [owner.meta, *owner.derived],
            *(owner.memory_prefix, int(self._clock() * 1000)),
            *(
                part
                for name, value in changes.items()
                for part in (name, b"" if value is None else msgspec.json.encode(value))
            ),
        )
        await self._coherence.changed(Event.UPDATED, owner, [PROFILE_ID])
        return (await self.profile(owner)).profile

    async def topics(self, owner: Owner) -> TopicsReply:
        """Return the owner's topics, largest first. Cost: one round trip."""
        generation, memories, categorized, *flat = await self._functions.call(
            "rm_topics_ro_v1",
            [owner.meta, owner.ids, owner.topics, owner.index],
            *(owner.memory_prefix, owner.cluster_prefix, owner.summary_prefix, MOST_TOPICS),
            read=True,
        )
        found = []
        for number, size, raw_words, text in zip(*(flat[i::4] for i in range(4)), strict=True):
            words = msgspec.json.decode(raw_words, type=list[str])
            found.append(
                TopicView(
                    id=number.decode(),
                    label=", ".join(words[:LABEL_WORDS]),
                    words=words,
                    size=max(0, int(float(size))),
                    summary=text.decode("utf-8", "replace") or None,
                )
            )
        rest = max(0, int(memories) - int(float(categorized)))
        return TopicsReply(topics=found, uncategorized=rest, generation=int(generation))

    async def summary(self, owner: Owner, kind: SummaryKind, name: str) -> Summary | None:
        """Return a summary; None when there is none yet, and it was queued.

        Raises:
            InvalidInput: no topic, period, entity or session can have such a name.
            NotFound: no memory belongs to it.

        Cost: one round trip; three where there is none.
        """
        try:
            name = checked_name(name, "name")
        except ValueError as exc:
            raise InvalidInput.from_value(exc) from exc
        packed = packed_tags([name]) if kind == "entity" else name
        if kind == "topic" and not (name.isascii() and name.isdigit()):
            raise InvalidInput("a topic has a number, as `topics` tells it", field="name")
        query = source_query(kind, packed)
        flat = await self._functions.call(
            "rm_summary_ro_v1",
            [f"{owner.summary_prefix}{kind}:{packed}"],
            owner.memory_prefix,
            read=True,
        )
        fields = {name.decode(): raw for name, raw in zip(flat[::2], flat[1::2], strict=True)}
        if fields:
            return Summary(
                kind=kind,
                name=name,
                text=fields["text"].decode("utf-8", "replace"),
                sources=msgspec.json.decode(fields["sources"], type=list[str]),
                tokens=int(fields["tokens"]),
                method=fields["method"].decode(),
                generated_at=datetime.fromtimestamp(float(fields["generated_at"]), UTC),
            )
        if not await self._count(owner, query):
            raise NotFound(f"no memory belongs to {kind} {name!r}")
        await self._queue(owner, f"summary:{kind}:{packed}")
        return None

    async def _count(self, owner: Owner, query: str) -> int:
        try:
            reply = await self._client.execute("FT.SEARCH", owner.index, query, "LIMIT", 0, 0, "DIALECT", 2)
        except StoreError as exc:
            if not is_missing_index(exc):
                raise
            if await self._client.execute("HEXISTS", owner.meta, "index"):
                raise IndexMissing("this user's index is being made again; ask again") from exc
            return 0
        return int(reply[0])

    async def similar(self, owner: Owner, memory_id: str, limit: int = 10) -> SimilarReply:
        """Return the memories nearest to one. Cost: one round trip.

        Raises:
            NotFound: there is no such memory.
        """
        word, *flat = await self._functions.call(
            "rm_similar_ro_v1",
            [owner.index, owner.meta, owner.similar, owner.conflicts],
            *(owner.memory_prefix, memory_id, limit),
            read=True,
        )
        if word == b"MISSING":
            raise NotFound(f"there is no memory {memory_id!r}")
        precomputed, *rows = flat
        found = [
            SimilarMemory(
                id=_text(other),
                text=_text(text),
                similarity=float(cosine),
                flag=_text(kind) or None,
                why=_text(why) or None,
            )
            for other, cosine, text, kind, why in zip(*(rows[i::5] for i in range(5)), strict=True)
        ]
        return SimilarReply(id=memory_id, similar=found, precomputed=bool(precomputed))

    async def conflicts(self, owner: Owner, limit: int = 100) -> ConflictsReply:
        """Return pairs that seem to be duplicates or contradictions. Cost: one round trip."""
        total, *flat = await self._functions.call(
            "rm_conflicts_ro_v1", [owner.conflicts], owner.memory_prefix, limit, read=True
        )
        found = [
            Conflict(
                kind="contradiction" if kind == b"contradiction" else "duplicate",
                older=_text(older),
                newer=_text(newer),
                similarity=float(cosine),
                why=_text(why) or None,
                older_text=_text(older_text),
                newer_text=_text(newer_text),
            )
            for kind, older, newer, cosine, why, older_text, newer_text in zip(
                *(flat[i::7] for i in range(7)), strict=True
            )
        ]
        return ConflictsReply(conflicts=found, total=int(total))

    async def _queue(self, owner: Owner, kind: str) -> None:
        with suppress(Unavailable):  # a replica answers reads too
            await self._jobs.queue(owner, kind)


def _patched(fields: dict[str, bytes]) -> list[str]:
    return sorted(msgspec.json.decode(fields.get("patched", b"{}"), type=dict[str, str]))


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def _moment(raw: bytes) -> datetime:
    return datetime.fromtimestamp(float(raw), UTC)


def _told(raw: bytes, name: str) -> Any:
    return msgspec.json.decode(raw, type=_KINDS[name])
