"""Answers searches, and reads of memories and profiles that L1 has, before the framework is entered.

Routing, a Request and a Response cost more than a hit. Whatever is not plainly one of these goes on to the
application as it came, which checks it and tells what is wrong.
"""

from __future__ import annotations

from urllib.parse import unquote_to_bytes

import msgspec
from starlette.applications import Starlette
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from redismem.errors import RedisMemError
from redismem.fields import checked_name
from redismem.http.admitted import admitted
from redismem.http.operation import USERS
from redismem.http.wire import GENERATION_HEADER, STALE_HEADER, failure_response, namespace_of, note
from redismem.keys import Owner
from redismem.service import Service
from redismem.tiers import Answer
from redismem.types import SearchRequest

_SEARCH = b"/search"
_MEMORIES = b"/memories/"
_PROFILE = b"/profile"

_GENERATION = GENERATION_HEADER.lower().encode()
_JSON = (b"content-type", b"application/json")
_STALE = (STALE_HEADER[0].encode(), STALE_HEADER[1].encode())

#: owners by namespace of the key and path segment; forgotten together when there are more
_MAX_OWNERS = 10_000

_decoder = msgspec.json.Decoder(SearchRequest)


class HotPath:
    """Wraps the application; `inner` is what it wraps, `app` where the service is found."""

    def __init__(self, inner: ASGIApp, app: Starlette) -> None:
        self._inner = inner
        self._app = app
        self._owners: dict[tuple[str | None, bytes], Owner] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not scope["query_string"]:
            path: bytes = scope.get("raw_path") or b""
            method = scope["method"]
            if method == "POST" and path.endswith(_SEARCH) and path.startswith(USERS):
                unread = await self._search(path[len(USERS) : -len(_SEARCH)], scope, receive, send)
                if unread is None:
                    return
                receive = unread
            elif method == "GET" and path.startswith(USERS):
                if path.endswith(_PROFILE):
                    if await self._profile(path[len(USERS) : -len(_PROFILE)], scope, send):
                        return
                    await self._inner(scope, receive, send)
                    return
                user, found, memory = path[len(USERS) :].partition(_MEMORIES)
                if found and b"/" not in memory and await self._memory(user, memory, scope, send):
                    return
        await self._inner(scope, receive, send)

    async def _search(self, user: bytes, scope: Scope, receive: Receive, send: Send) -> Receive | None:
        """Answer and return None, or return where the application can read the body from its start."""
        if next((value for name, value in scope["headers"] if name == b"content-type"), b"") != _JSON[1]:
            return receive
        first = await receive()
        body = first.get("body", b"")
        too_long = len(body) > self._service().settings.max_body_bytes
        if first["type"] != "http.request" or first.get("more_body") or too_long:
            return _replayed(first, receive)
        try:
            request, owner = _decoder.decode(body), self._owner(user, scope)
        except (ValueError, RecursionError, RedisMemError):
            return _replayed(first, receive)
        service = self._service()
        try:
            answer = service.tiers.known_search(owner, request)
            if answer is None:
                async with admitted(service, "search"):
                    answer = await service.tiers.search(owner, request, missed=True)
        except Exception as exc:  # noqa: BLE001  # nothing catches it further up
            response = failure_response(exc, "POST", scope["state"]["request_id"])
            await response(scope, receive, send)
        else:
            await _send(answer, send)
        return None

    async def _memory(self, user: bytes, memory: bytes, scope: Scope, send: Send) -> bool:
        try:
            memory_id = checked_name(unquote_to_bytes(memory).decode(), "id")
            answer = self._service().tiers.known_memory(self._owner(user, scope), memory_id)
        except (ValueError, RedisMemError):
            return False
        if answer is None:
            scope["l1_missed"] = True
            return False
        etag = b"etag", b'"%d"' % answer.generation
        await _send(answer, send, etag)
        return True

    async def _profile(self, user: bytes, scope: Scope, send: Send) -> bool:
        try:
            answer = self._service().tiers.known_profile(self._owner(user, scope))
        except (ValueError, RedisMemError):
            return False
        if answer is None:
            scope["l1_missed"] = True
            return False
        await _send(answer, send)
        return True

    def _service(self) -> Service:
        service: Service = self._app.state.service
        return service

    def _owner(self, segment: bytes, scope: Scope) -> Owner:
        namespace = namespace_of(scope)
        owner = self._owners.get((namespace, segment))
        if owner is None:
            if b"/" in segment:
                raise ValueError("another route")
            owner = self._service().owner(unquote_to_bytes(segment).decode(), namespace)
            if len(self._owners) >= _MAX_OWNERS:
                self._owners.clear()
            self._owners[namespace, segment] = owner
        return owner


def _replayed(first: Message, receive: Receive) -> Receive:
    """Return a `receive` that gives `first` again, then goes on."""
    pending: list[Message] = [first]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


async def _send(answer: Answer, send: Send, *more: tuple[bytes, bytes]) -> None:
    note(answer)
    if answer.stale:
        more = (*more, _STALE)
    await send(
        {
            "type": "http.response.start",
            "status": 200,
            "headers": [
                _JSON,
                (b"content-length", b"%d" % len(answer.body)),
                (_GENERATION, b"%d" % answer.generation),
                *more,
            ],
        }
    )
    await send({"type": "http.response.body", "body": answer.body})
