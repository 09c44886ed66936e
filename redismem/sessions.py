"""The only place that opens, changes and closes sessions, and that makes memories of their messages.

A session is a hash with a TTL (lua/session.lua) beside its messages, which are memories as any others: found
at once, corrected and deleted as such, and there when the session has ended. Several agents may be in one.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, TypeVar

import msgspec

from redismem.client import Argument
from redismem.codec import READ_FIELDS, memory_fields, memory_from_raw
from redismem.conversation import (
    Message,
    MessageInput,
    MessageItem,
    MessageReply,
    Session,
    SessionInput,
    SessionPatch,
    SessionReply,
)
from redismem.errors import Conflict, InvalidInput, NotFound
from redismem.keys import JOBS_LATER, Owner
from redismem.lualib import Functions, fcall
from redismem.types import Memory, MemoryInput, PutItem
from redismem.write import Writer

#: id, signal and score of a memory that was loaded ahead for a session
Loaded = tuple[str, str, float]

_MESSAGE = "message"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SessionState:
    """A session, and what only this service asks of it."""

    session: Session
    #: messages of the user
    asked: int
    #: what was loaded ahead, or came too late for the last context
    loaded: list[Loaded]
    #: ids of the memories in the latest context
    shown: list[str]
    #: the newest messages, oldest first
    recent: list[Memory]


class Sessions:
    """The sessions of one store.

    `heard` is called with owner, session id and messages when these have been stored. It must not block.

    Args:
        ttl_s: seconds a session lives after its last message, unless it was opened with its own.
    """

    def __init__(
        self, functions: Functions, writer: Writer, *, ttl_s: int, clock: Callable[[], float] = time.time
    ) -> None:
        self._functions = functions
        self._writer = writer
        self._ttl_s = ttl_s
        self._clock = clock
        self.heard: Callable[[Owner, str, list[MessageInput]], None] = lambda *_: None

    async def open(self, owner: Owner, wanted: SessionInput) -> tuple[Session, Literal["OPENED", "JOINED"]]:
        """Open a session, or join it where it is there; a closed one is open again. Cost: one round trip."""
        session_id = wanted.id or secrets.token_hex(8)
        word, lives_ms, flat = await self._functions.call(
            "rm_session_open_v1",
            [owner.session(session_id), owner.sessions, JOBS_LATER],
            *(owner.session_prefix, session_id, self._now_ms()),
            *((wanted.ttl_s or 0) * 1000, self._ttl_s * 1000),
            *(wanted.agent or "", _listed(wanted.active_topics), _listed(wanted.pins)),
        )
        session = self._session(session_id, _fields(flat), lives_ms)
        return session, "OPENED" if word == b"OPENED" else "JOINED"

    async def say(
        self, owner: Owner, session_id: str, messages: list[MessageInput], *, wait: bool = True
    ) -> MessageReply:
        """Store messages of a session in their order; by id, a repeated request stores them once.

        A message that was corrected since stays corrected.

        Args:
            wait: embed before the reply.

        Returns:
            `messages` counts those that were stored for the first time.

        Raises:
            NotFound: there is no such session (any more); nothing was stored.
            Conflict: it is closed; nothing was stored.
            InvalidInput: one of the messages cannot be stored; none was.

        Cost: four round trips, one more a slice of 64.
        """
        known = await self._known(owner, session_id, messages)
        ids = [message.id or secrets.token_hex(16) for message in messages]
        now = datetime.fromtimestamp(self._clock(), UTC)
        memories = []
        for i, (memory_id, message) in enumerate(zip(ids, messages, strict=True)):
            before = known.get(memory_id)
            # a repetition is at the moment of the first, or it would be another content
            moment = (before and before.event_date) or now + timedelta(microseconds=i)
            memory = _memory(message, i, memory_id, session_id, moment)
            if before is None or before.superseded_by is None:
                memories.append(memory)
        reply = await self._writer.put(owner, memories, wait=wait)
        stored = {str(item.id): item for item in reply.memories}
        items = [_item(memory_id, stored.get(memory_id), known) for memory_id in ids]
        count = await self._count(owner, session_id, messages, items)
        self.heard(owner, session_id, messages)
        return MessageReply(items=items, messages=count, generation=reply.generation)

    async def _known(
        self, owner: Owner, session_id: str, messages: Sequence[MessageInput]
    ) -> dict[str, Memory]:
        """Check that the session is open; return its messages with the ids of these, by id."""
        ids: list[str] = []
        for i, message in enumerate(messages):
            if message.id in ids:
                raise InvalidInput("another message has this id", field=f"messages[{i}].id")
            ids += [message.id] if message.id is not None else []
        session, *rows = await self._functions.send(
            [
                fcall(
                    "rm_session_ro_v1",
                    [owner.session(session_id), owner.turns],
                    *(owner.memory_prefix, session_id, 0),
                    read=True,
                ),
                *[("HMGET", owner.memory(memory_id), *READ_FIELDS) for memory_id in ids],
            ]
        )
        fields = _fields(_found(session_id, session)[2])
        if "closed_at" in fields:
            raise Conflict(f"session {session_id!r} is closed; open it again")
        known = {}
        for memory_id, raw in zip(ids, rows, strict=True):
            memory = memory_from_raw(raw)
            if memory and (memory.memory_type, memory.session_id) == (_MESSAGE, session_id):
                known[memory_id] = memory
        return known

    async def _count(
        self, owner: Owner, session_id: str, messages: Sequence[MessageInput], items: Sequence[MessageItem]
    ) -> int:
        new = [message for message, item in zip(messages, items, strict=True) if item.outcome == "CREATED"]
        agents = dict.fromkeys(message.agent for message in messages if message.agent is not None)
        word, *messages_so_far = await self._functions.call(
            "rm_session_said_v1",
            [owner.session(session_id), owner.sessions, JOBS_LATER],
            *(owner.session_prefix, session_id, self._now_ms()),
            *(len(new), sum(message.role == "user" for message in new), _listed(list(agents))),
        )
        # one that ended in this very moment; what was said is stored
        return len(new) if word == b"MISSING" else int(messages_so_far[0])

    async def get(self, owner: Owner, session_id: str, limit: int) -> SessionReply:
        """Return a session with its newest messages, at most `limit` (0-200). Cost: one round trip.

        Raises:
            NotFound: there is no such session (any more).
        """
        state = await self.state(owner, session_id, limit)
        recent = [_message(memory) for memory in state.recent]
        return SessionReply(**msgspec.structs.asdict(state.session), recent=recent)

    async def state(self, owner: Owner, session_id: str, limit: int) -> SessionState:
        """Return the same with what a context needs of it. Cost: one round trip.

        Raises:
            NotFound: there is no such session (any more).
        """
        reply = await self._functions.call(
            "rm_session_ro_v1",
            [owner.session(session_id), owner.turns],
            *(owner.memory_prefix, session_id, limit, *READ_FIELDS),
            read=True,
        )
        _, lives_ms, flat, *rows = _found(session_id, reply)
        fields, recent = _fields(flat), []
        for raw_id, raw in zip(rows[::2], rows[1::2], strict=True):
            if (memory := memory_from_raw(raw)) is not None:
                memory.id = raw_id.decode("utf-8", "replace")
                recent.append(memory)
        return SessionState(
            session=self._session(session_id, fields, lives_ms),
            asked=_whole(fields, "asked"),
            loaded=_list(fields, "loaded", list[Loaded]),
            shown=_list(fields, "shown", list[str]),
            recent=recent,
        )

    async def change(self, owner: Owner, session_id: str, patch: SessionPatch) -> Session:
        """Set the active topics or the pins of a session; it does not live longer by that.

        Raises:
            NotFound: there is no such session (any more).

        Cost: one round trip.
        """
        given = {name: getattr(patch, name) for name in patch.__struct_fields__}
        changes = {name: value for name, value in given.items() if value is not msgspec.UNSET}
        _, lives_ms, flat = _found(session_id, await self._set(owner, session_id, changes))
        return self._session(session_id, _fields(flat), lives_ms)

    async def note(
        self,
        owner: Owner,
        session_id: str,
        *,
        active_topics: Sequence[str] | None = None,
        loaded: Sequence[Loaded] | None = None,
        shown: Sequence[str] | None = None,
    ) -> bool:
        """Keep what a context or a prefetch found; return False when the session is gone.

        Each replaces what was kept before. Cost: one round trip.
        """
        given = {"active_topics": active_topics, "loaded": loaded, "shown": shown}
        changes = {name: value for name, value in given.items() if value is not None}
        word, *_ = await self._set(owner, session_id, changes)
        return bool(word == b"OK")

    async def _set(self, owner: Owner, session_id: str, changes: dict[str, Any]) -> Any:
        pairs: list[Argument] = [part for name, value in changes.items() for part in (name, _listed(value))]
        return await self._functions.call(
            "rm_session_set_v1", [owner.session(session_id)], owner.session_prefix, session_id, *pairs
        )

    async def close(self, owner: Owner, session_id: str) -> Session:
        """Close a session: its summary is made, and it takes no more messages. Cost: one round trip.

        Raises:
            NotFound: there is no such session (any more).
        """
        reply = await self._functions.call(
            "rm_session_close_v1",
            [owner.session(session_id), JOBS_LATER],
            *(owner.session_prefix, session_id, self._now_ms()),
        )
        _, lives_ms, flat = _found(session_id, reply)
        return self._session(session_id, _fields(flat), lives_ms)

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)

    def _session(self, session_id: str, fields: dict[str, bytes], lives_ms: int) -> Session:
        return Session(
            id=session_id,
            opened_at=_moment(fields, "opened_at"),
            last_at=_moment(fields, "last_at"),
            expires_at=datetime.fromtimestamp(self._clock() + max(0, lives_ms) / 1000, UTC),
            messages=_whole(fields, "messages"),
            agents=_list(fields, "agents", list[str]),
            active_topics=_list(fields, "active_topics", list[str]),
            pins=_list(fields, "pins", list[str]),
            closed_at=_moment(fields, "closed_at") if "closed_at" in fields else None,
        )


def _found(session_id: str, reply: Sequence[Any]) -> Sequence[Any]:
    if reply[0] == b"MISSING":
        raise NotFound(f"there is no session {session_id!r}: open it with POST …/sessions")
    return reply


def _memory(
    message: MessageInput, place: int, memory_id: str, session_id: str, moment: datetime
) -> MemoryInput:
    metadata = {**message.metadata, "role": message.role}
    if message.agent is not None:
        metadata["agent"] = message.agent
    try:
        memory = MemoryInput(
            id=memory_id,
            text=message.text,
            memory_type=_MESSAGE,
            topics=message.topics,
            entities=message.entities,
            session_id=session_id,
            event_date=message.time or moment,
            metadata=metadata,
        )
        memory_fields(memory, moment.timestamp())
    except ValueError as exc:
        raise InvalidInput.from_value(exc, f"messages[{place}]") from exc
    return memory


def _item(memory_id: str, item: PutItem | None, known: Mapping[str, Memory]) -> MessageItem:
    if item is None:  # it was corrected since, and not stored again
        old = known[memory_id]
        return MessageItem(id=memory_id, outcome="UNCHANGED", version=old.version, embedded=old.embedded)
    embedded, version = item.embedded is True, item.version or 0
    return MessageItem(id=memory_id, outcome=item.outcome, version=version, embedded=embedded)


def _message(memory: Memory) -> Message:
    role, agent = memory.metadata.get("role"), memory.metadata.get("agent")
    return Message(
        id=memory.id,
        text=memory.text,
        role=role if isinstance(role, str) else "user",
        at=memory.event_date or memory.created_at,
        agent=agent if isinstance(agent, str) else None,
    )


def _listed(values: Sequence[Any]) -> bytes:
    return msgspec.json.encode(values)


# tolerant of what another hand wrote, as `codec` is ---------------------------------------------------


def _fields(flat: Sequence[bytes]) -> dict[str, bytes]:
    return {name.decode("utf-8", "replace"): raw for name, raw in zip(flat[::2], flat[1::2], strict=True)}


def _list(fields: dict[str, bytes], name: str, kind: type[list[T]]) -> list[T]:
    try:
        return msgspec.json.decode(fields.get(name, b"[]"), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return []


def _whole(fields: dict[str, bytes], name: str) -> int:
    raw = fields.get(name, b"")
    return int(raw) if raw.isdigit() else 0


def _moment(fields: dict[str, bytes], name: str) -> datetime:
    try:
        return datetime.fromtimestamp(float(fields.get(name, b"0")), UTC)
    except (ValueError, OverflowError, OSError):
        return datetime.fromtimestamp(0, UTC)
