"""Answers from L1 before the framework is entered: routing, a Request and a Response cost more than the hit.

Whatever is not plainly a search or a read of a memory that L1 can answer goes on to the application as it
came; all checks and all errors are there.
"""

from __future__ import annotations

import secrets
from urllib.parse import unquote_to_bytes

import msgspec
from starlette.applications import Starlette
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from redismem.errors import RedisMemError
from redismem.http.wire import GENERATION_HEADER, is_request_id
from redismem.keys import Owner
from redismem.service import Service
from redismem.tiers import Answer
from redismem.types import SearchRequest, checked_name

_USERS = b"/v1/users/"
_SEARCH = b"/search"
_MEMORIES = b"/memories/"

_GENERATION = GENERATION_HEADER.lower().encode()
_JSON = (b"content-type", b"application/json")

#: owners by their path segment; forgotten together when there are more
_MAX_OWNERS = 10_000

_decoder = msgspec.json.Decoder(SearchRequest)


class HotPath:
    """Wraps the application; `inner` is what it wraps, `app` where the service is found."""

    def __init__(self, inner: ASGIApp, app: Starlette) -> None:
        self._inner = inner
        self._app = app
        self._owners: dict[bytes, Owner] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not scope["query_string"]:
            path: bytes = scope.get("raw_path") or b""
            method = scope["method"]
            if method == "POST" and path.endswith(_SEARCH) and path.startswith(_USERS):
                receive = await self._search(path[len(_USERS) : -len(_SEARCH)], scope, receive, send)
            elif method == "GET" and path.startswith(_USERS):
                user, found, memory = path[len(_USERS) :].partition(_MEMORIES)
                if found and b"/" not in memory and await self._memory(user, memory, scope, send):
                    return
            if receive is _answered:
                return
        await self._inner(scope, receive, send)

    async def _search(self, user: bytes, scope: Scope, receive: Receive, send: Send) -> Receive:
        """Answer, or return where the application can read the body that was taken here."""
        if not any(
            name == b"content-type" and value == b"application/json" for name, value in scope["headers"]
        ):
            return receive
        first = await receive()
        if first["type"] != "http.request" or first.get("more_body"):
            return _replayed(first, receive)
        try:
            request = _decoder.decode(first.get("body", b""))
            answer = self._service().tiers.known_search(self._owner(user), request)
        except (ValueError, RecursionError, RedisMemError):
            return _replayed(first, receive)  # the application will tell what is wrong
        if answer is None:
            scope["l1_missed"] = True
            return _replayed(first, receive)
        await _send(answer, scope, send)
        return _answered

    async def _memory(self, user: bytes, memory: bytes, scope: Scope, send: Send) -> bool:
        try:
            memory_id = checked_name(unquote_to_bytes(memory).decode(), "id")
            answer = self._service().tiers.known_memory(self._owner(user), memory_id)
        except (ValueError, RedisMemError):
            return False
        if answer is None:
            scope["l1_missed"] = True
            return False
        await _send(answer, scope, send, (b"etag", b'"%d"' % answer.generation))
        return True

    def _service(self) -> Service:
        service: Service = self._app.state.service
        return service

    def _owner(self, segment: bytes) -> Owner:
        owner = self._owners.get(segment)
        if owner is None:
            if b"/" in segment:
                raise ValueError("another route")
            owner = self._service().owner(unquote_to_bytes(segment).decode())
            if len(self._owners) >= _MAX_OWNERS:
                self._owners.clear()
            self._owners[segment] = owner
        return owner


async def _answered() -> Message:
    raise AssertionError("the request was answered")


def _replayed(first: Message, receive: Receive) -> Receive:
    """Return a `receive` that gives `first` again, then goes on."""
    pending: list[Message] = [first]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


async def _send(answer: Answer, scope: Scope, send: Send, *more: tuple[bytes, bytes]) -> None:
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    request_id = given if is_request_id(given) else secrets.token_hex(8).encode()
    await send(
        {
            "type": "http.response.start",
            "status": 200,
            "headers": [
                _JSON,
                (b"content-length", b"%d" % len(answer.body)),
                (_GENERATION, b"%d" % answer.generation),
                *more,
                (b"x-request-id", request_id),
            ],
        }
    )
    await send({"type": "http.response.body", "body": answer.body})
