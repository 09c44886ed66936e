"""The table of routes: what OpenAPI says of each, and what answers it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote_to_bytes

from starlette.requests import Request
from starlette.responses import Response

from redismem.browse import CURSOR
from redismem.conversation import (
    ClosedReply,
    ContextBatch,
    ContextBatchReply,
    ContextReply,
    ContextRequest,
    MessageBatch,
    MessageInput,
    MessageReply,
    OpenedReply,
    Session,
    SessionInput,
    SessionPatch,
    SessionReply,
    TypingInput,
    TypingReply,
)
from redismem.errors import InvalidInput
from redismem.http import conversations, routes
from redismem.http.routes import MOMENTS, Health, MemoryBatch
from redismem.types import (
    BatchReply,
    BatchRequest,
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
    PutReply,
    SearchReply,
    SearchRequest,
    StatsReply,
)
from redismem.views import ConflictsReply, Profile, ProfilePatch, SimilarReply, Summary, TopicsReply

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One method of one path: what OpenAPI says of it and what answers it."""

    method: str
    path: str
    handler: Handler
    summary: str
    request: tuple[type[Any], ...] = ()
    reply: type[Any] | None = None
    #: success statuses
    statuses: tuple[int, ...] = (200,)
    #: error statuses besides 422 (bad path), 503 and, with a body, 400 and 413
    errors: tuple[int, ...] = ()
    #: query parameters: name -> JSON schema
    query: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: heads of query parameters with any tail, such as `metadata` of `metadata.color`
    open_query: tuple[str, ...] = ()
    #: request header parameters: name -> description
    headers: dict[str, str] = field(default_factory=dict)
    ndjson: bool = False
    #: the reply may also come as server-sent events
    events: bool = False


def guarded(operation: Operation) -> Handler:
    """Return the operation's handler behind a check of its query parameters.

    An unknown parameter is refused by name: a misspelt one would be a wish ignored.
    """
    heads = {name.partition(".")[0] for name in operation.query if "." in name} | set(operation.open_query)

    async def checked(request: Request) -> Response:
        try:
            unquote_to_bytes(request.scope["query_string"]).decode()
        except UnicodeDecodeError as exc:
            raise InvalidInput("the query string is not UTF-8") from exc
        if operation.path.startswith("/health/"):
            return await operation.handler(request)  # a probe may carry a cache-buster
        for name in request.query_params:
            told = operation.query.get(name, {})
            if told.get("type") != "array" and len(request.query_params.getlist(name)) > 1:
                raise InvalidInput(f"`{name}` may be given once", field=name)
            if name not in operation.query and not ("." in name and name.partition(".")[0] in heads):
                raise InvalidInput(f"there is no query parameter `{name}` here; see /docs", field=name)
        return await operation.handler(request)

    return checked


_USER = "/v1/users/{user}"
_MEMORY = _USER + "/memories/{id}"
_SESSION = _USER + "/sessions/{session}"
_WAIT = {
    "type": "boolean",
    "default": True,
    "description": "false: stored and searchable by words at once, embedded within 0.5 s",
}
_WRITE_CONSISTENCY = {
    "type": "string",
    "enum": ["eventual", "strong"],
    "default": "eventual",
    "description": "strong: answered when no process returns the old content, as deletes always are",
}
_READ_CONSISTENCY: dict[str, dict[str, Any]] = {
    "consistency": {"type": "string", "enum": ["eventual", "session", "strong"], "default": "eventual"},
    "min_version": {
        "type": "integer",
        "minimum": 0,
        "maximum": 2**53,
        "description": "session: the generation that a write returned, which the reply must show",
    },
}


def _list_parameters() -> dict[str, dict[str, Any]]:
    names = {"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": 256}}
    parameters: dict[str, dict[str, Any]] = {
        "limit": {"type": "integer", "minimum": 1, "maximum": 500, "default": 50},
        "cursor": {"type": "string", "minLength": 1, "pattern": CURSOR},
        "memory_type": {"type": "array", "items": {"type": "string", "pattern": "^[a-z][a-z0-9_-]{0,63}$"}},
        **dict.fromkeys(("topics", "entities", "session_id", "cluster"), names),
        "pinned": {"type": "boolean"},
        "superseded": {"type": "string", "enum": ["exclude", "include", "only"]},
    }
    for name in MOMENTS:
        parameters |= {f"{name}.{end}": {"type": "string", "format": "date-time"} for end in ("gte", "lt")}
    for name in ("importance", "confidence"):
        parameters |= {f"{name}.{end}": {"type": "number"} for end in ("gte", "lt")}
    return parameters


OPERATIONS = (
    Operation(
        method="POST",
        path=_USER + "/memories",
        handler=routes.add_memories,
        summary="Store one memory or many",
        request=(MemoryInput, MemoryBatch),
        reply=PutReply,
        statuses=(201, 202),
        errors=(409,),
        query={"wait": _WAIT, "consistency": _WRITE_CONSISTENCY},
    ),
    Operation(
        method="GET",
        path=_USER + "/memories",
        handler=routes.list_memories,
        summary="List memories, newest first",
        reply=ListReply,
        query=_list_parameters(),
        open_query=("metadata",),
    ),
    Operation(
        method="GET",
        path=_MEMORY,
        handler=routes.get_memory,
        summary="Read a memory",
        reply=Memory,
        query=_READ_CONSISTENCY,
        errors=(404,),
    ),
    Operation(
        method="PATCH",
        path=_MEMORY,
        handler=routes.change_memory,
        summary="Change a memory",
        request=(MemoryPatch,),
        reply=Memory,
        errors=(404, 412),
        query={"consistency": _WRITE_CONSISTENCY},
        headers={"If-Match": "ETag of the version to change"},
    ),
    Operation(
        method="DELETE",
        path=_MEMORY,
        handler=routes.delete_memory,
        summary="Delete a memory",
        reply=DeleteReply,
        errors=(404,),
    ),
    Operation(
        method="GET",
        path=_MEMORY + "/history",
        handler=routes.memory_history,
        summary="What happened to a memory",
        reply=HistoryReply,
        errors=(404,),
    ),
    Operation(
        method="POST",
        path=_USER + "/search",
        handler=routes.search,
        summary="Find the best memories",
        request=(SearchRequest,),
        reply=SearchReply,
        errors=(409, 504),
    ),
    Operation(
        method="POST",
        path=_USER + "/search/batch",
        handler=routes.search_batch,
        summary="Up to 50 searches at once",
        request=(BatchRequest,),
        reply=BatchReply,
        errors=(409, 504),
    ),
    Operation(
        method="POST",
        path=_USER + "/corrections",
        handler=routes.correct,
        summary="Replace what is no longer true",
        request=(CorrectionRequest,),
        reply=CorrectionReply,
        statuses=(201,),
        errors=(404, 409),
    ),
    Operation(
        method="GET",
        path=_USER + "/export",
        handler=routes.export,
        summary="All memories as NDJSON",
        reply=Memory,
        ndjson=True,
    ),
    Operation(
        method="POST",
        path=_USER + "/import",
        handler=routes.import_memories,
        summary="Store an NDJSON stream",
        request=(ImportRecord,),
        reply=ImportReply,
        errors=(409,),
        ndjson=True,
    ),
    Operation(
        method="DELETE",
        path=_USER,
        handler=routes.forget_user,
        summary="Forget a user",
        reply=ForgetReply,
        errors=(409,),
    ),
    Operation(
        method="GET",
        path=_USER + "/profile",
        handler=routes.get_profile,
        summary="Read the precompiled profile",
        reply=Profile,
    ),
    Operation(
        method="PATCH",
        path=_USER + "/profile",
        handler=routes.change_profile,
        summary="Set fields of the profile",
        request=(ProfilePatch,),
        reply=Profile,
    ),
    Operation(
        method="GET",
        path=_USER + "/topics",
        handler=routes.list_topics,
        summary="List topics",
        reply=TopicsReply,
    ),
    Operation(
        method="GET",
        path=_USER + "/summaries/{kind}/{name}",
        handler=routes.get_summary,
        summary="Read the summary of a topic, day, week, month, entity or session",
        reply=Summary,
        statuses=(200, 202),
        errors=(404,),
    ),
    Operation(
        method="GET",
        path=_MEMORY + "/similar",
        handler=routes.similar_memories,
        summary="The nearest memories",
        reply=SimilarReply,
        errors=(404,),
        query={"limit": {"type": "integer", "minimum": 1, "maximum": 100, "default": 10}},
    ),
    Operation(
        method="GET",
        path=_USER + "/conflicts",
        handler=routes.list_conflicts,
        summary="Possible duplicates and contradictions",
        reply=ConflictsReply,
        query={"limit": {"type": "integer", "minimum": 1, "maximum": 500, "default": 100}},
    ),
    Operation(
        method="POST",
        path=_USER + "/sessions",
        handler=conversations.open_session,
        summary="Open or join a session",
        request=(SessionInput,),
        reply=OpenedReply,
        statuses=(201,),
    ),
    Operation(
        method="GET",
        path=_SESSION,
        handler=conversations.get_session,
        summary="Read a session",
        reply=SessionReply,
        errors=(404,),
        query={
            "limit": {"type": "integer", "minimum": 0, "maximum": conversations.MOST_SHOWN, "default": 20}
        },
    ),
    Operation(
        method="PATCH",
        path=_SESSION,
        handler=conversations.change_session,
        summary="Set active topics or pins",
        request=(SessionPatch,),
        reply=Session,
        errors=(404,),
    ),
    Operation(
        method="DELETE",
        path=_SESSION,
        handler=conversations.close_session,
        summary="Close a session",
        reply=ClosedReply,
        errors=(404,),
    ),
    Operation(
        method="POST",
        path=_SESSION + "/messages",
        handler=conversations.add_messages,
        summary="Store a message or several",
        request=(MessageInput, MessageBatch),
        reply=MessageReply,
        statuses=(201, 202),
        errors=(404, 409),
        query={"wait": _WAIT},
    ),
    Operation(
        method="POST",
        path=_SESSION + "/typing",
        handler=conversations.typing,
        summary="Tell what is being typed",
        request=(TypingInput,),
        reply=TypingReply,
        statuses=(202,),
    ),
    Operation(
        method="POST",
        path=_USER + "/context",
        handler=conversations.context,
        summary="Assemble a context",
        request=(ContextRequest,),
        reply=ContextReply,
        errors=(404, 409),
        events=True,
    ),
    Operation(
        method="POST",
        path=_USER + "/context/batch",
        handler=conversations.context_batch,
        summary="Up to 20 contexts at once",
        request=(ContextBatch,),
        reply=ContextBatchReply,
        errors=(404, 409),
    ),
    Operation(
        method="GET",
        path="/v1/stats",
        handler=routes.stats,
        summary="Caches and coherence of this process",
        reply=StatsReply,
    ),
    Operation(
        method="GET", path="/health/live", handler=routes.live, summary="The process runs", reply=Health
    ),
    Operation(
        method="GET",
        path="/health/ready",
        handler=routes.ready,
        summary="The process can serve",
        reply=Health,
    ),
)
