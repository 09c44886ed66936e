"""The only place that reads lua/context.lua: what a conversation can be told without a search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from redismem.codec import READ_FIELDS, memory_from_raw
from redismem.keys import Owner
from redismem.lualib import Functions
from redismem.material import LABEL_WORDS
from redismem.types import Memory

T = TypeVar("T")

_FIELDS = " ".join((*READ_FIELDS, "cluster"))


@dataclass(frozen=True, slots=True)
class Placed:
    """A memory and the number of its topic; empty: none."""

    memory: Memory
    cluster: str = ""


@dataclass(frozen=True, slots=True)
class Derived:
    """A text that the worker made, and the memories it was made from."""

    name: str
    text: str
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LastSession:
    """The session before this one. `summary` may be empty; `shown`: memories of its latest context."""

    id: str
    at_s: float
    summary: str
    sources: tuple[str, ...]
    shown: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What is known of a user and a session. `memories`: those that the other fields name and that exist."""

    generation: int
    #: fields of the session's hash; empty: there is no such session
    session: dict[str, bytes]
    last: LastSession | None = None
    #: active topics: name is the label
    topics: tuple[Derived, ...] = ()
    important: tuple[str, ...] = ()
    newest: tuple[str, ...] = ()
    #: the session's last messages, newest first
    said: tuple[str, ...] = ()
    memories: dict[str, Placed] = field(default_factory=dict)

    def names(self, name: str) -> list[str]:
        """Return a list of strings of the session: active_topics, pins, shown."""
        return _listed(self.session.get(name, b"[]"), str)

    @property
    def loaded(self) -> list[tuple[str, str, float]]:
        """Id, signal and score of what was loaded for this turn."""
        return _listed(self.session.get("loaded", b"[]"), tuple[str, str, float])


@dataclass(frozen=True, slots=True)
class Around:
    """What stands near some memories: turns beside each, and its nearest in meaning."""

    beside: dict[str, tuple[str, ...]]
    related: dict[str, tuple[str, ...]]
    memories: dict[str, Placed]


@dataclass(frozen=True, slots=True)
class NearTopic:
    """A topic near a vector. It is `within` reach: a memory with this vector would belong to it."""

    number: str
    cosine: float
    reach: float

    @property
    def within(self) -> bool:
        return self.cosine >= self.reach


async def opening(
    functions: Functions, owner: Owner, session_id: str | None, *, newest: int, last_after_s: float
) -> Opening:
    """Read a session and what a context of it begins with. Cost: one round trip.

    Args:
        newest: how many of the newest memories.
        last_after_s: a session whose last message is older is no last session.
    """
    keys = owner.meta, owner.profile, owner.ids, owner.sessions, owner.session(session_id or ""), owner.turns
    generation, flat, last, topics, important, newest_ids, said, memories = await functions.call(
        *("rm_open_ro_v1", keys),
        *(owner.memory_prefix, owner.summary_prefix, owner.session_prefix, owner.cluster_prefix),
        *(session_id or "", newest, repr(last_after_s), _FIELDS),
        read=True,
    )
    return Opening(
        generation=int(generation),
        session=dict(zip(map(_text, flat[::2]), flat[1::2], strict=True)),
        last=_last(last),
        topics=tuple(
            Derived(
                ", ".join(_listed(words, str)[:LABEL_WORDS]),
                _text(text),
                tuple(dict.fromkeys((*ids_of(sources), *ids_of(witnesses)[:LABEL_WORDS]))),
            )
            for _, words, witnesses, text, sources in zip(*(topics[i::5] for i in range(5)), strict=True)
        ),
        important=ids_of(important),
        newest=tuple(map(_text, newest_ids)),
        said=tuple(map(_text, said)),
        memories=_placed(memories),
    )


async def around(functions: Functions, owner: Owner, ids: Sequence[str]) -> Around:
    """Read what stands near some memories. Cost: one round trip."""
    if not ids:
        return Around({}, {}, {})
    *flat, memories = await functions.call(
        "rm_around_ro_v1",
        [owner.turns, owner.similar],
        *(owner.memory_prefix, _FIELDS, *ids),
        read=True,
    )
    beside, related = {}, {}
    for memory_id, near, nearest in zip(ids, *(flat[i::2] for i in range(2)), strict=True):
        beside[memory_id] = tuple(map(_text, near))
        related[memory_id] = tuple(map(_text, nearest))
    return Around(beside, related, _placed(memories))


async def near_topics(
    functions: Functions, owner: Owner, embedder: str, vector32: bytes, count: int
) -> list[NearTopic]:
    """Return the topics nearest to a vector; none on a server without vector sets. Cost: one round trip."""
    flat = await functions.call(
        "rm_near_topics_ro_v1",
        [owner.meta, owner.centroids],
        *(embedder, owner.cluster_prefix, count, vector32),
        read=True,
    )
    rows = zip(*(flat[i::3] for i in range(3)), strict=True)
    return [NearTopic(_text(number), float(cosine), float(reach)) for number, cosine, reach in rows]


def _last(raw: list[bytes]) -> LastSession | None:
    if not raw:
        return None
    name, at_s, text, sources, shown = raw
    return LastSession(_text(name), float(at_s), _text(text), ids_of(sources), ids_of(shown))


def _placed(flat: list[Any]) -> dict[str, Placed]:
    found = {}
    for raw_id, (*fields, cluster) in zip(flat[::2], flat[1::2], strict=True):
        memory = memory_from_raw(fields)
        if memory is not None:
            memory.id = _text(raw_id)
            number = _text(cluster or b"")
            found[memory.id] = Placed(memory, number if number.isdigit() else "")
    return found


def ids_of(raw: bytes) -> tuple[str, ...]:
    """Return a JSON list of strings; empty where another hand wrote something else."""
    return tuple(_listed(raw, str))


def _listed(raw: bytes, kind: type[T]) -> list[T]:
    try:
        return msgspec.json.decode(raw, type=list[kind])  # type: ignore[valid-type]  # the type is the argument
    except (msgspec.MsgspecError, UnicodeDecodeError):  # another hand's
        return []


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")
