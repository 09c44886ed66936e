"""Answers a request that carries an Idempotency-Key once, and its repetitions with the same reply."""

from __future__ import annotations

import re
from functools import wraps

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive

from redismem.errors import InvalidInput
from redismem.http.operation import Handler
from redismem.http.routes import owner_of, service_of
from redismem.http.wire import GENERATION_HEADER, read_body

KEY_HEADER, REPLAYED_HEADER = "Idempotency-Key", "Idempotency-Replayed"

_KEY = re.compile(r"[\x21-\x7e]{1,255}")


class _Kept(Struct):
    """A reply, as it is kept."""

    status: int
    generation: str | None
    body: msgspec.Raw


def idempotency_key(request: Request) -> str | None:
    """Return the Idempotency-Key of a request; None without one.

    Raises:
        InvalidInput: there are several, or it is none.
    """
    given = request.headers.getlist(KEY_HEADER)
    if not given:
        return None
    if len(given) > 1 or not _KEY.fullmatch(given[0]):
        raise InvalidInput(f"`{KEY_HEADER}` takes 1 to 255 printable ASCII characters", field=KEY_HEADER)
    return given[0]


def once(handler: Handler) -> Handler:
    """Return the handler of a write so that its repetition changes nothing.

    Errors are not kept: after one the request may be sent again. Cost: two round trips where there is a key.
    """

    @wraps(handler)
    async def answered_once(request: Request) -> Response:
        key = idempotency_key(request)
        if key is None:
            return await handler(request)
        service, scope = service_of(request), request.scope
        body = await read_body(request, service.settings.max_body_bytes)
        asked = b"\n".join((scope["path"].encode("latin-1"), scope["query_string"], body))
        claim = await service.idempotency.claim(owner_of(request), key, asked)
        if isinstance(claim, bytes):
            return _replayed(msgspec.json.decode(claim, type=_Kept))
        try:
            response = await handler(Request(scope, _again(body, request.receive)))
            generation = response.headers.get(GENERATION_HEADER)
            kept = _Kept(response.status_code, generation, msgspec.Raw(response.body))
            await service.idempotency.answered(claim, msgspec.json.encode(kept))
        except BaseException:  # also when it took too long
            await service.idempotency.released(claim)
            raise
        return response

    return answered_once


def _again(body: bytes, rest: Receive) -> Receive:
    """Return what receives a body that was read already."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return left.pop() if left else await rest()

    return receive


def _replayed(kept: _Kept) -> Response:
    headers = {REPLAYED_HEADER: "true"}
    if kept.generation is not None:
        headers[GENERATION_HEADER] = kept.generation
    return Response(bytes(kept.body), kept.status, headers, "application/json")
