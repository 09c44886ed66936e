"""What an operation of the API is, and which one a request asks for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import unquote_to_bytes

from starlette.requests import Request
from starlette.responses import Response

from redismem.errors import InvalidInput

#: what an API key must be allowed to; `open`: no key is needed; `any`: whatever it allows
Access = Literal["open", "any", "read", "write", "admin"]

#: how the raw path of everything that is of a user begins
USERS = b"/v1/users/"
_OF_USER = "/v1/users/{user}/"

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One method of one path: what OpenAPI says of it and what answers it."""

    method: str
    path: str
    handler: Handler
    #: as metrics, traces and logs call it
    name: str
    access: Access
    summary: str
    request: tuple[type[Any], ...] = ()
    reply: type[Any] | None = None
    #: success statuses
    statuses: tuple[int, ...] = (200,)
    #: error statuses besides 422, with a body 400 and 413, and unless it is open 401, 403, 429, 503, 504
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


@dataclass(frozen=True, slots=True)
class Told:
    """What is known of a request before it is looked at."""

    name: str
    access: Access


OTHER = Told("other", "any")


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


class Matcher:
    """Tells the operation of a request from method and raw path, before the framework is entered."""

    def __init__(self, operations: Iterable[tuple[str, str, str, Access]]) -> None:
        """Args: method, path, name and access of each operation."""
        self._known: dict[tuple[str, int], list[tuple[tuple[tuple[int, bytes], ...], Told]]] = {}
        #: by method and what follows the user, where nothing in it varies: most requests
        self._of_user: dict[tuple[str, bytes], Told] = {}
        for method, path, name, access in operations:
            rest = path.removeprefix(_OF_USER)
            if rest != path and "{" not in rest:
                self._of_user[method, rest.encode()] = Told(name, access)
            parts = path.encode().split(b"/")
            fixed = tuple((i, part) for i, part in enumerate(parts) if not part.startswith(b"{"))
            self._known.setdefault((method, len(parts)), []).append((fixed, Told(name, access)))
        for candidates in self._known.values():  # `search/batch` before `{id}` would be
            candidates.sort(key=lambda one: -len(one[0]))

    def told(self, method: str, raw_path: bytes) -> Told:
        """Return name and access; of what is none of them `other`, for which any key will do."""
        if raw_path.startswith(USERS):
            user, _, rest = raw_path[len(USERS) :].partition(b"/")
            known = self._of_user.get((method, rest))
            if known is not None and user:
                return known
        parts = raw_path.split(b"/")
        if b"" in parts[1:]:
            return OTHER
        method = "GET" if method == "HEAD" else method
        for fixed, told in self._known.get((method, len(parts)), ()):
            for i, part in fixed:
                if parts[i] != part:
                    break
            else:
                return told
        return OTHER
