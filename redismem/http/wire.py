"""The only place that reads request bodies and writes replies and errors."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import AsyncIterator, Iterable
from typing import TypeVar
from urllib.parse import unquote_to_bytes

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Scope

from redismem.apikeys import ApiKey
from redismem.errors import (
    InProgress,
    InvalidInput,
    MalformedBody,
    Overloaded,
    PayloadTooLarge,
    RateLimited,
    RedisMemError,
    Unauthorized,
    Unavailable,
)
from redismem.tiers import Answer
from redismem.trace import current

logger = logging.getLogger(__name__)

T = TypeVar("T")

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")

_WHERE = re.compile(r" - at `(?:key in )?\$?\.?(.*?)`$")
_QUOTED = re.compile(r"`([A-Za-z_]+)`")

_encoder = msgspec.json.Encoder()


#: header of replies that show or make a state of an owner: the generation to hand back as `min_version`
GENERATION_HEADER = "Redismem-Generation"

STALE_HEADER = ("warning", '110 - "Response is Stale"')


def json_response(
    value: object, status: int = 200, headers: dict[str, str] | None = None, *, generation: int | None = None
) -> Response:
    """Return a value of `types` as a JSON response."""
    if generation is not None:
        headers = {**(headers or {}), GENERATION_HEADER: str(generation)}
    return Response(_encoder.encode(value), status, headers, "application/json")


def note(answer: Answer) -> None:
    """Tell the request's trace whence it was answered."""
    if (trace := current.get()) is not None:
        trace.cache_status = answer.served_by


def key_of(scope: Scope) -> ApiKey | None:
    """Return the API key of a request; None where none is asked for."""
    key: ApiKey | None = scope["state"].get("key")
    return key


def namespace_of(scope: Scope) -> str | None:
    """Return the namespace that a request's API key is bound to; None without a key."""
    key = key_of(scope)
    return None if key is None else key.namespace


def answer_response(answer: Answer, headers: dict[str, str] | None = None) -> Response:
    """Return a reply that is JSON already."""
    note(answer)
    headers = {**(headers or {}), GENERATION_HEADER: str(answer.generation)}
    if answer.stale:
        headers[STALE_HEADER[0]] = STALE_HEADER[1]
    return Response(answer.body, 200, headers, "application/json")


def request_id_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Return the caller's X-Request-ID if it is fit to be logged and sent back, else a new one."""
    given = next((value for name, value in headers if name == b"x-request-id"), b"")
    return given.decode() if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)


def failure_response(exc: Exception, method: str, request_id: str) -> Response:
    """Log what went wrong on our side, and return it as `error_response` does."""
    if not isinstance(exc, RedisMemError):
        logger.error("%s failed", method, exc_info=exc)
        exc = RedisMemError("an internal error; the service's log has it under this request_id")
    elif exc.status >= 500 and not isinstance(exc, Overloaded):  # a flood must not flood the log too
        logger.warning("%s %s: %s %s", method, exc.code, exc.message, exc.detail)
    return error_response(exc, request_id)


def error_response(error: RedisMemError, request_id: str) -> Response:
    """Return `{"error": {code, message, field?, request_id}}` with the status of the error."""
    headers = {}
    if isinstance(error, Unavailable | RateLimited | InProgress):
        headers["Retry-After"] = str(error.retry_after_s)
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return Response(error_body(error, request_id), error.status, headers, "application/json")


def error_body(error: RedisMemError, request_id: str) -> bytes:
    """Return the JSON of an error."""
    body = {"code": error.code, "message": error.message, "request_id": request_id}
    if error.field:
        body["field"] = error.field
    return _encoder.encode({"error": body})


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """Return the body of a JSON request.

    Raises:
        MalformedBody: it is not declared as JSON (a web page could send it across origins), or was cut off.
        PayloadTooLarge: it is longer than the limit.
    """
    _check_content_type(request, "application/json")
    chunks, size = [], 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit_bytes:
                raise PayloadTooLarge(f"the body is longer than {limit_bytes} bytes; split it")
            chunks.append(chunk)
    except ClientDisconnect as exc:
        raise MalformedBody("the body ended early") from exc
    return b"".join(chunks)


def _check_content_type(request: Request, wanted: str) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != wanted:
        raise MalformedBody(f"send the body with the header `Content-Type: {wanted}`")


async def read_lines(request: Request, limit_bytes: int) -> AsyncIterator[tuple[int, bytes]]:
    """Yield number and content of the lines of an NDJSON body that are not blank, as they arrive.

    Raises:
        MalformedBody: the body is not declared as NDJSON.
        PayloadTooLarge: a line is longer than the limit.
    """
    _check_content_type(request, "application/x-ndjson")
    rest, number = b"", 0
    async for chunk in request.stream():
        *lines, rest = (rest + chunk).split(b"\n")
        if any(len(line) > limit_bytes for line in (*lines, rest)):
            raise PayloadTooLarge(f"a line is longer than {limit_bytes} bytes")
        for line in lines:
            number += 1
            if line.strip():
                yield number, line
    if rest.strip():
        yield number + 1, rest


def decoded(raw: bytes | msgspec.Raw, kind: type[T], where: str = "") -> T:
    """Return a JSON document as a value of `types`.

    Args:
        where: path of the document in the whole body, for errors.

    Raises:
        MalformedBody: not JSON.
        InvalidInput: not of this type; the message and `field` name the place.
    """
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as exc:
        raise invalid(exc, where) from exc
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise MalformedBody(f"the body is not valid JSON: {exc}", field=where or None) from exc
    except RecursionError as exc:
        raise MalformedBody("the body is nested too deeply", field=where or None) from exc


def converted(value: object, kind: type[T]) -> T:
    """Return query parameters as a value of `types`; numbers and booleans come as text.

    Raises:
        InvalidInput: as for `decoded`.
    """
    try:
        return msgspec.convert(value, kind, strict=False)
    except msgspec.ValidationError as exc:
        raise invalid(exc, "") from exc


def invalid(exc: msgspec.ValidationError, where: str) -> InvalidInput:
    """Return our error for one of msgspec's, with the path of the field."""
    text = str(exc)
    place = _WHERE.search(text)
    message = text[: place.start()] if place else text
    path = [where, place[1] if place else ""]
    if (quoted := _QUOTED.search(message)) and not message.startswith("Expected"):
        path.append(quoted[1])
    field = ".".join(part for part in path if part)
    return InvalidInput(message, field=field or None)


def path_part(request: Request, name: str) -> str:
    """Return a percent-decoded part of the raw path; it may hold any character.

    Raises:
        InvalidInput: it is not UTF-8, or holds NUL.
    """
    try:
        value = unquote_to_bytes(request.path_params[name].encode("latin-1")).decode()
    except UnicodeDecodeError as exc:
        raise InvalidInput(f"`{name}` in the path is not UTF-8", field=name) from exc
    if "\0" in value:
        raise InvalidInput(f"`{name}` must not hold NUL characters", field=name)
    return value
