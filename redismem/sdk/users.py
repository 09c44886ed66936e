"""The only place of the client that asks for memories, what was derived from them, and contexts."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Literal, TypeVar, Unpack

import msgspec
from msgspec.structs import replace

from redismem.conversation import (
    ContextBatch,
    ContextBatchReply,
    ContextReply,
    ContextRequest,
    OpenedReply,
    SessionInput,
)
from redismem.filters import Filters
from redismem.sdk.calls import UserCalls
from redismem.sdk.failures import translated
from redismem.sdk.options import (
    ContextOptions,
    ListOptions,
    MemoryChanges,
    MemoryFields,
    ProfileChanges,
    SearchOptions,
    SessionFields,
)
from redismem.sdk.sessions import SessionHandle
from redismem.sdk.streams import ContextStream
from redismem.sdk.values import built, checked_id, decoded
from redismem.types import (
    BatchReply,
    BatchRequest,
    Consistency,
    CorrectionReply,
    CorrectionRequest,
    DeleteReply,
    ForgetReply,
    HistoryReply,
    ImportRecord,
    ImportReply,
    ListReply,
    Memory,
    MemoryInput,
    MemoryPatch,
    PutItem,
    PutReply,
    SearchReply,
    SearchRequest,
)
from redismem.views import (
    ConflictsReply,
    Profile,
    ProfilePatch,
    SimilarReply,
    Summary,
    SummaryKind,
    TopicsReply,
)

WriteConsistency = Literal["eventual", "strong"]

R = TypeVar("R", SearchRequest, ContextRequest)


class _Memories(msgspec.Struct, kw_only=True):
    memories: list[MemoryInput]


class UserMemory:
    """The memory of one user.

    Keyword arguments are the fields of the requests in `redismem.types`, `views` and `conversation`; a wrong
    one is `InvalidInput`, naming the field, before anything is sent. Searches, `get` and contexts see what
    was written through this client (consistency `session`) unless they name a `consistency` or `min_version`.
    """

    def __init__(self, calls: UserCalls) -> None:
        self._calls = calls

    def tagged(self, request_id: str) -> UserMemory:
        """Return the same memory; what is asked of it carries this X-Request-ID (1-128 printable ASCII)."""
        return UserMemory(dataclasses.replace(self._calls, request_id=request_id))

    # writing -------------------------------------------------------------------------------------

    async def add(
        self,
        text: str,
        *,
        wait: bool = True,
        consistency: WriteConsistency = "eventual",
        **fields: Unpack[MemoryFields],
    ) -> PutItem:
        """Store a memory. Repeated: by its id, and by its content without one, it is one memory.

        Args:
            wait: embed before the reply; False embeds within 0.5 s.
            consistency: strong: answered when no process returns the old content.
        """
        memory = built(MemoryInput, {"text": text, **fields})
        reply = await self.add_many([memory], wait=wait, consistency=consistency)
        return reply.memories[0]

    async def add_many(
        self,
        memories: Sequence[MemoryInput],
        *,
        wait: bool = True,
        consistency: WriteConsistency = "eventual",
    ) -> PutReply:
        """Store up to 500 memories; each is stored or refused by itself. Repeated, as `add`.

        Raises:
            InvalidInput: all of them were refused, or there are none, or too many.
        """
        query: dict[str, str] = {} if wait else {"wait": "false"}
        if consistency != "eventual":
            query["consistency"] = consistency
        body = _Memories(memories=list(memories))
        return await self._calls.write(PutReply, "POST", "memories", body=body, query=query)

    async def update(
        self,
        memory_id: str,
        *,
        if_match: int | None = None,
        consistency: WriteConsistency = "eventual",
        **changes: Unpack[MemoryChanges],
    ) -> Memory:
        """Change fields of a memory. Sent once: a repetition could undo what others changed since.

        Args:
            if_match: the version to change, and no other.

        Raises:
            NotFound: there is no such memory.
            VersionMismatch: it has another version by now.
        """
        return await self._calls.write(
            Memory,
            "PATCH",
            "memories",
            checked_id(memory_id),
            body=built(MemoryPatch, changes),
            query={"consistency": consistency} if consistency != "eventual" else {},
            headers={} if if_match is None else {"If-Match": f'"{if_match}"'},
            repeatable=False,
        )

    async def correct(self, ids: Sequence[str], text: str, **fields: Unpack[MemoryFields]) -> CorrectionReply:
        """Store a memory that replaces those of `ids`. Repeated: the same correction twice is one.

        Raises:
            NotFound: one of `ids` does not exist; nothing was changed.
            Conflict: the new memory's id belongs to another memory.
        """
        body = built(CorrectionRequest, {"ids": ids, "memory": {"text": text, **fields}})
        return await self._calls.write(CorrectionReply, "POST", "corrections", body=body)

    async def delete(self, memory_id: str) -> DeleteReply:
        """Delete a memory and everything made from it. Repeated.

        Raises:
            NotFound: there is no such memory; an earlier try may have deleted it, whose reply was lost.
        """
        return await self._calls.write(DeleteReply, "DELETE", "memories", checked_id(memory_id))

    async def forget(self) -> ForgetReply:
        """Remove everything of the user. Repeated; the counts are then those of the last try.

        Raises:
            Conflict: memories are archived where the service cannot reach them.
        """
        return await self._calls.write(ForgetReply, "DELETE")

    async def import_memories(self, records: Iterable[Memory | ImportRecord]) -> ImportReply:
        """Store memories such as `export` yields, with their ids and times. Repeated.

        They are sent as one request, which must be through within the client's `timeout_s`.
        """
        body = b"".join(msgspec.json.encode(record) + b"\n" for record in records)
        headers = {"Content-Type": "application/x-ndjson"}
        return await self._calls.write(ImportReply, "POST", "import", body=body, headers=headers)

    async def change_profile(self, **changes: Unpack[ProfileChanges]) -> Profile:
        """Set fields of the profile, or give them back with None. Sent once, as `update`."""
        body = built(ProfilePatch, changes)
        return await self._calls.write(Profile, "PATCH", "profile", body=body, repeatable=False)

    # reading: repeated when it fails in passing --------------------------------------------------

    async def get(
        self, memory_id: str, *, consistency: Consistency | None = None, min_version: int | None = None
    ) -> Memory:
        """Return a memory.

        Raises:
            NotFound: there is none with this id.
        """
        wanted = {"consistency": consistency, "min_version": min_version}
        given = self._calls.current({name: value for name, value in wanted.items() if value is not None})
        query = {name: str(value) for name, value in given.items()}
        return await self._calls.read(Memory, "GET", "memories", checked_id(memory_id), query=query)

    async def list(self, *, page: int = 100, **filters: Unpack[ListOptions]) -> AsyncGenerator[Memory, None]:
        """Yield all memories that pass the filters, newest first, read by pages of 1 to 500."""
        query: dict[str, str | Sequence[str]] = {
            "limit": str(page),
            **_list_query(built(Filters, filters)),
        }
        while True:
            reply = await self._calls.read(ListReply, "GET", "memories", query=query)
            for memory in reply.memories:
                yield memory
            if reply.cursor is None:
                return
            query["cursor"] = reply.cursor

    async def history(self, memory_id: str) -> HistoryReply:
        """Return what happened to a memory, oldest first; also after its delete.

        Raises:
            NotFound: nothing is known of it.
        """
        return await self._calls.read(HistoryReply, "GET", "memories", checked_id(memory_id), "history")

    async def search(self, text: str | None = None, **options: Unpack[SearchOptions]) -> SearchReply:
        """Return the best memories for a text, or a `vector`."""
        body = built(SearchRequest, self._calls.current({"text": text, **options}))
        return await self._calls.read(SearchReply, "POST", "search", body=body)

    async def search_batch(self, queries: Sequence[SearchRequest]) -> BatchReply:
        """Answer up to 50 searches at once, in order.

        One that has its `consistency` and `min_version` as they are by default sees what was written.
        """
        body = built(BatchRequest, {"queries": [self._current(query) for query in queries]})
        return await self._calls.read(BatchReply, "POST", "search", "batch", body=body)

    async def profile(self) -> Profile:
        """Return the profile."""
        return await self._calls.read(Profile, "GET", "profile")

    async def topics(self) -> TopicsReply:
        """Return the topics, largest first."""
        return await self._calls.read(TopicsReply, "GET", "topics")

    async def summary(self, kind: SummaryKind, name: str) -> Summary | None:
        """Return the summary of a topic, day, week, month, entity or session; None while it is being made.

        Raises:
            NotFound: there is nothing to sum up.
        """
        response = await self._calls.send("GET", "summaries", kind, checked_id(name, "name"))
        return None if response.status_code == 202 else decoded(response.content, Summary)

    async def similar(self, memory_id: str, *, limit: int = 10) -> SimilarReply:
        """Return the memories nearest to one (1-100).

        Raises:
            NotFound: there is none with this id.
        """
        query = {"limit": str(limit)}
        return await self._calls.read(
            SimilarReply, "GET", "memories", checked_id(memory_id), "similar", query=query
        )

    async def conflicts(self, *, limit: int = 100) -> ConflictsReply:
        """Return what seems to be said twice, or to contradict itself (1-500)."""
        return await self._calls.read(ConflictsReply, "GET", "conflicts", query={"limit": str(limit)})

    async def export(self) -> AsyncGenerator[Memory, None]:
        """Yield all memories, oldest first, from one stream. Repeated only until its first line."""
        response = await self._calls.send("GET", "export", stream=True)
        rest = b""
        async with aclosing(response):
            with translated():
                # not by httpx's lines: they end at characters that a text may hold
                async for chunk in response.aiter_bytes():
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        yield decoded(line, Memory)

    # conversations -------------------------------------------------------------------------------

    async def open_session(
        self, session_id: str | None = None, **fields: Unpack[SessionFields]
    ) -> SessionHandle:
        """Open a session, or join the one that has this id; the first stage of its context comes along.

        Repeated: one without an id gets one here, so the second try joins what the first opened.
        """
        wanted = built(SessionInput, {"id": session_id or secrets.token_hex(8), **fields})
        reply = await self._calls.read(OpenedReply, "POST", "sessions", body=wanted)
        return SessionHandle(self._calls, reply)

    async def context(
        self, text: str | None = None, *, session_id: str | None = None, **options: Unpack[ContextOptions]
    ) -> ContextReply:
        """Return a context for a text, or for the last message of a session. Repeated.

        Raises:
            NotFound: there is neither a text nor such a session.
        """
        request = self._context(text, session_id, options)
        return await self._calls.read(ContextReply, "POST", "context", body=request)

    def stream_context(
        self, text: str | None = None, *, session_id: str | None = None, **options: Unpack[ContextOptions]
    ) -> ContextStream:
        """Return the same as a stream of its stages; repeated only until the first is there."""
        return ContextStream(self._calls, self._context(text, session_id, options))

    async def contexts(self, requests: Sequence[ContextRequest]) -> ContextBatchReply:
        """Return up to 20 contexts, in order. Repeated. Consistency: as for `search_batch`."""
        body = built(ContextBatch, {"contexts": [self._current(request) for request in requests]})
        return await self._calls.read(ContextBatchReply, "POST", "context", "batch", body=body)

    def _context(self, text: str | None, session_id: str | None, options: ContextOptions) -> ContextRequest:
        given = self._calls.current({"text": text, "session_id": session_id, **options})
        return built(ContextRequest, given)

    def _current(self, request: R) -> R:
        if request.consistency != "eventual" or request.min_version is not None:
            return request
        return replace(request, **self._calls.current({}))


def _list_query(filters: Filters) -> Mapping[str, str | Sequence[str]]:
    """Return filters as the query parameters of a list."""
    query: dict[str, str | Sequence[str]] = {}
    given: dict[str, Any] = msgspec.to_builtins(filters)
    for name, value in given.items():
        if name == "metadata":  # as JSON, so that "5" stays a text
            query |= {f"{name}.{key}": msgspec.json.encode(part).decode() for key, part in value.items()}
        elif isinstance(value, dict):
            query |= {f"{name}.{end}": str(bound) for end, bound in value.items()}
        elif isinstance(value, bool):
            query[name] = "true" if value else "false"
        else:
            query[name] = value
    return query
