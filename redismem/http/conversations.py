"""What the routes of sessions and contexts do with a request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Send

from redismem.conversation import (
    ClosedReply,
    ContextBatch,
    ContextBatchReply,
    ContextReply,
    ContextRequest,
    MessageBatch,
    MessageInput,
    OpenedReply,
    SessionInput,
    SessionPatch,
    Stage,
    TypingInput,
    TypingReply,
)
from redismem.errors import InvalidInput, RedisMemError
from redismem.fields import checked_name
from redismem.http.once import idempotency_key
from redismem.http.routes import body_of, flag_of, owner_of, service_of
from redismem.http.wire import converted, decoded, error_body, json_response, path_part, read_body
from redismem.idempotency import named
from redismem.trace import current

T = TypeVar("T")

EVENTS = "text/event-stream"

#: what a context is called that comes as a stream
STREAM = "context_stream"

#: messages of a session that are shown
_SHOWN, MOST_SHOWN = 20, 200

#: proxies must pass each event on at once
_UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class _SessionQuery(Struct, kw_only=True):
    limit: Annotated[int, Meta(ge=0, le=MOST_SHOWN)] = _SHOWN


def _session_id(request: Request) -> str:
    try:
        return checked_name(path_part(request, "session"), "session")
    except ValueError as exc:
        raise InvalidInput(str(exc), field="session") from exc


async def open_session(request: Request) -> Response:
    """Open a session, or join an open one; the first stage of its context comes along."""
    service, owner = service_of(request), owner_of(request)
    wanted = await body_of(request, SessionInput)
    if (key := idempotency_key(request)) is not None:
        wanted.id = wanted.id or named(key)
    session, outcome = await service.sessions.open(owner, wanted)
    service.warmer.begin(owner)
    context = await service.contexts.whole(owner, ContextRequest(session_id=session.id, stages=1))
    reply = OpenedReply(session=session, outcome=outcome, context=context)
    return json_response(reply, 201, generation=context.generation)


async def get_session(request: Request) -> Response:
    """Read a session and its newest messages."""
    limit = converted(dict(request.query_params), _SessionQuery).limit
    return json_response(
        await service_of(request).sessions.get(owner_of(request), _session_id(request), limit)
    )


async def change_session(request: Request) -> Response:
    """Set the active topics or the pins of a session."""
    owner, session_id = owner_of(request), _session_id(request)
    patch = await body_of(request, SessionPatch)
    return json_response(await service_of(request).sessions.change(owner, session_id, patch))


async def close_session(request: Request) -> Response:
    """Close a session; its summary is made, its messages stay memories."""
    session = await service_of(request).sessions.close(owner_of(request), _session_id(request))
    return json_response(ClosedReply(session=session))


async def add_messages(request: Request) -> Response:
    """Store a message of a session, or several; what it may need next is loaded in the background."""
    service, owner, session_id = service_of(request), owner_of(request), _session_id(request)
    wait = flag_of(request, "wait", default=True)
    body = await read_body(request, service.settings.max_body_bytes)
    if "messages" in decoded(body, dict[str, msgspec.Raw]):
        messages = decoded(body, MessageBatch).messages
    else:
        messages = [decoded(body, MessageInput)]
    if (key := idempotency_key(request)) is not None:
        for i, message in enumerate(messages):
            # with its text, or a key that is used again after its time would overwrite a message
            message.id = message.id or named(key, session_id, i, message.text)
    reply = await service.sessions.say(owner, session_id, messages, wait=wait)
    return json_response(reply, 201 if wait else 202, generation=reply.generation)


async def typing(request: Request) -> Response:
    """Tell what is being typed, so that what it needs is there when it is sent. Nothing is stored."""
    owner, session_id = owner_of(request), _session_id(request)
    body = await body_of(request, TypingInput)
    service_of(request).prefetcher.typed(owner, session_id, body.partial)
    return json_response(TypingReply(), 202)


async def context(request: Request) -> Response:
    """Assemble a context: as JSON, or with `Accept: text/event-stream` a stage an event."""
    contexts, owner = service_of(request).contexts, owner_of(request)
    wanted = await body_of(request, ContextRequest)
    if EVENTS not in request.headers.get("accept", "").lower():
        try:
            reply = await _while_there(request, contexts.whole(owner, wanted))
        except _Gone:
            return _NOBODY
        return json_response(reply, generation=reply.generation)
    stages = contexts.stages(owner, wanted)
    try:
        # what is wrong with the request is told by the status, as ever
        first: Stage | ContextReply = await _while_there(request, _first(stages))
    except _Gone:
        await stages.aclose()
        return _NOBODY
    except BaseException:
        await stages.aclose()
        raise
    if (trace := current.get()) is not None:
        trace.operation = STREAM
    return _EventStream(_events(first, stages, request.state.request_id))


async def context_batch(request: Request) -> Response:
    """Assemble up to 20 contexts of one user; their texts are embedded together."""
    contexts, owner = service_of(request).contexts, owner_of(request)
    batch = await body_of(request, ContextBatch)
    try:
        made = await _while_there(request, contexts.batch(owner, batch.contexts))
    except _Gone:
        return _NOBODY
    generation = min(one.generation for one in made)
    return json_response(ContextBatchReply(contexts=made), generation=generation)


class _Gone(Exception):
    """Nobody waits for the reply any more."""


#: what is "sent" to a client that went away
_NOBODY = Response(status_code=499)


async def _while_there(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what some work comes to, unless the client goes away: then it ends.

    Raises:
        _Gone: the client went away.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _Gone
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        # what it holds is given back before anything else goes on
        await asyncio.gather(task, gone, return_exceptions=True)


async def _first(stages: AsyncIterator[T]) -> T:
    return await anext(stages)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _EventStream(StreamingResponse):
    """Server-sent events; a client that goes away ends what makes them at once."""

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(events, headers=_UNBUFFERED, media_type=EVENTS)
        self._events = events

    async def stream_response(self, send: Send) -> None:
        try:
            await super().stream_response(send)
        finally:
            await self._events.aclose()


async def _events(
    first: Stage | ContextReply, rest: AsyncGenerator[Stage | ContextReply, None], request_id: str
) -> AsyncGenerator[bytes, None]:
    async with aclosing(rest):
        yield _event(first)
        try:
            async for part in rest:
                yield _event(part)
        except RedisMemError as exc:  # the status is sent: it is told in the stream
            yield b"event: error\ndata: %b\n\n" % error_body(exc, request_id)


def _event(part: Stage | ContextReply) -> bytes:
    name = b"stage"
    if isinstance(part, ContextReply):
        name, part = b"done", msgspec.structs.replace(part, stages=msgspec.UNSET)
    return b"event: %b\ndata: %b\n\n" % (name, msgspec.json.encode(part))
