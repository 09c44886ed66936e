"""The only place of the client that speaks in a session."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Unpack

from msgspec.structs import replace

from redismem.conversation import (
    ClosedReply,
    ContextReply,
    ContextRequest,
    MessageBatch,
    MessageInput,
    MessageReply,
    OpenedReply,
    Role,
    Session,
    SessionPatch,
    SessionReply,
    TypingInput,
    TypingReply,
)
from redismem.sdk.calls import UserCalls
from redismem.sdk.options import ContextOptions, MessageFields, SessionChanges
from redismem.sdk.streams import ContextStream
from redismem.sdk.values import built


class SessionHandle:
    """An open session. `opened` is the reply of its opening, with the first stage of its context.

    Raises, in every method:
        NotFound: the session has ended.
        Conflict: it was closed.
    """

    def __init__(self, calls: UserCalls, opened: OpenedReply) -> None:
        self._calls = calls
        self.opened = opened

    @property
    def id(self) -> str:
        return self.opened.session.id

    async def say(
        self, text: str, role: Role = "user", *, wait: bool = True, **fields: Unpack[MessageFields]
    ) -> MessageReply:
        """Store a message; see `say_many`."""
        message = built(MessageInput, {"text": text, "role": role, **fields})
        return await self.say_many([message], wait=wait)

    async def say_many(self, messages: Sequence[MessageInput], *, wait: bool = True) -> MessageReply:
        """Store messages in their order: all, or none.

        Repeated when it fails in passing: one without an id gets one here, so it is stored once.

        Args:
            wait: embed before the reply.
        """
        named = [replace(one, id=one.id or secrets.token_hex(16)) for one in messages]
        batch = built(MessageBatch, {"messages": named})
        query = {} if wait else {"wait": "false"}
        return await self._calls.write(
            MessageReply, "POST", "sessions", self.id, "messages", body=batch, query=query
        )

    async def typing(self, partial: str) -> None:
        """Tell what stands in the input field, so that what it needs is loaded. Not repeated: the next is."""
        body = built(TypingInput, {"partial": partial})
        await self._calls.write(
            TypingReply, "POST", "sessions", self.id, "typing", body=body, repeatable=False
        )

    async def context(self, text: str | None = None, **options: Unpack[ContextOptions]) -> ContextReply:
        """Return the context for a text, or for the last message; see `UserMemory.context`."""
        return await self._calls.read(ContextReply, "POST", "context", body=self._request(text, options))

    def stream(self, text: str | None = None, **options: Unpack[ContextOptions]) -> ContextStream:
        """Return the same as a stream of its stages."""
        return ContextStream(self._calls, self._request(text, options))

    def _request(self, text: str | None, options: ContextOptions) -> ContextRequest:
        given = self._calls.current({"text": text, "session_id": self.id, **options})
        return built(ContextRequest, given)

    async def change(self, **changes: Unpack[SessionChanges]) -> Session:
        """Set active topics or pins. Sent once: others may have set them since."""
        body = built(SessionPatch, changes)
        return await self._calls.write(Session, "PATCH", "sessions", self.id, body=body, repeatable=False)

    async def get(self, *, messages: int = 20) -> SessionReply:
        """Return the session as it stands, with its newest messages (0-200). Repeated."""
        return await self._calls.read(
            SessionReply, "GET", "sessions", self.id, query={"limit": str(messages)}
        )

    async def close(self) -> Session:
        """Close the session; its summary follows. Sent once: it may be open again by then."""
        reply = await self._calls.write(ClosedReply, "DELETE", "sessions", self.id, repeatable=False)
        return reply.session
