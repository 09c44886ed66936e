"""The only place of the client that makes errors: of what the service told, and of what broke on the way.

Each is one of `redismem.errors`: the service's own by its code, with `status`, `code`, `request_id` and, if
told, `retry_after_s` as it sent them; `Unavailable` where no answer came, `DeadlineExceeded` where none came
in time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import msgspec

from redismem.errors import DeadlineExceeded, RedisMemError, Unavailable
from redismem.sdk.values import decoded

#: of a proxy, or of a service that takes no more requests: it may do better soon
PASSING = {429, 502, 503, 504}


class _Told(msgspec.Struct):
    code: str
    message: str
    request_id: str | None = None
    field: str | None = None


class _Failure(msgspec.Struct):
    error: _Told


def _errors_by_code() -> dict[str, type[RedisMemError]]:
    found: dict[str, type[RedisMemError]] = {}
    kinds = [RedisMemError]
    for kind in kinds:  # parents first: a child without a code of its own is told as its parent
        found.setdefault(kind.code, kind)
        kinds += kind.__subclasses__()
    return found


ERRORS = _errors_by_code()


@contextmanager
def translated() -> Iterator[None]:
    """Turn what breaks a stream that is being read into ours."""
    try:
        yield
    except httpx.RequestError as exc:
        raise transport_error(exc) from exc


def told_error(raw: bytes | str) -> RedisMemError:
    """Return the error that the service tells as JSON.

    Raises:
        RedisMemError: this is none.
    """
    told = decoded(raw, _Failure).error
    error = ERRORS.get(told.code, RedisMemError)(told.message, field=told.field)
    vars(error).update(code=told.code, request_id=told.request_id)
    return error


def error_of(response: httpx.Response) -> RedisMemError:
    try:
        error = told_error(response.content)
    except RedisMemError:  # of a proxy
        kind = Unavailable if response.status_code in PASSING else RedisMemError
        error = kind(f"the service's address answered {response.status_code} {response.reason_phrase}")
        vars(error)["request_id"] = response.headers.get("X-Request-ID")
    vars(error)["status"] = response.status_code
    if (asked := response.headers.get("Retry-After", "")).isdigit():
        vars(error)["retry_after_s"] = int(asked)
    return error


def transport_error(exc: httpx.RequestError) -> RedisMemError:
    if isinstance(exc, httpx.ReadTimeout | httpx.WriteTimeout):
        return DeadlineExceeded("the service said nothing for too long")
    return Unavailable(f"the service does not answer: {exc or type(exc).__name__}")
