"""The only place of the client that sends requests, repeats them, and tells what went wrong.

A request that fails in passing (no connection, 429, 502, 503, 504 of a proxy) is sent again with exponential
back-off and jitter, not before Retry-After, while there is time. One that must not be done twice is sent
again only if it cannot have been received, or was refused before anything was done (429, overload).
"""

from __future__ import annotations

import asyncio
import random
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from redismem.errors import (
    DeadlineExceeded,
    InvalidInput,
    Overloaded,
    RateLimited,
    RedisMemError,
    Unavailable,
)
from redismem.sdk.failures import PASSING, error_of, transport_error
from redismem.sdk.values import decoded

T = TypeVar("T")

Query = Mapping[str, str | Sequence[str]]

JSON = "application/json"

#: seconds before the first repetition and between two at most; each doubles, less up to half of it
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.1, 2.0

#: seconds that opening a connection may take; a host that is away must not cost all the time
_CONNECT_S = 3.0

#: users whose last writes are remembered; of more, those that wrote longest ago see at most 60 s old searches
_MOST_USERS = 10_000

_GENERATION = "Redismem-Generation"
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")

#: nothing was sent
_UNSENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


class Calls:
    """The connections to one service, and what each user has written through them."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None,
        timeout_s: float,
        retries: int,
        connections: int,
        read_your_writes: bool,
        transport: httpx.AsyncBaseTransport | None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise InvalidInput("`url` must begin with http:// or https://", field="url")
        self._http = httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_S)),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
            transport=transport,
        )
        self._timeout_s = timeout_s
        self._retries = retries
        self._read_your_writes = read_your_writes
        self._written: OrderedDict[str, int] = OrderedDict()

    async def close(self) -> None:
        await self._http.aclose()

    async def is_ready(self) -> bool:
        """Return whether the service says that it can serve; False when it cannot be reached."""
        try:
            return (await self._http.get("/health/ready")).is_success
        except httpx.RequestError:
            return False

    async def send(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        query: Query | None = None,
        headers: Mapping[str, str] | None = None,
        repeatable: bool = True,
        stream: bool = False,
    ) -> httpx.Response:
        """Return the answer to a request, if it is a good one; with `stream`, unread: close it.

        Raises:
            RedisMemError: the service refused, and repetition did not help or was not allowed.
            Unavailable: there was no answer.
            DeadlineExceeded: there was none in time.
        """
        kind = {"Content-Type": JSON} if body is not None else {}
        request = self._http.build_request(
            method, path, content=body, params=dict(query or {}), headers={**kind, **(headers or {})}
        )
        loop = asyncio.get_running_loop()
        until, delay_s, left = loop.time() + self._timeout_s, _FIRST_DELAY_S, self._retries
        while True:
            error: RedisMemError
            cause: httpx.RequestError | None = None
            try:
                async with asyncio.timeout_at(until):
                    response = await self._http.send(request, stream=stream)
                    if response.is_success:
                        return response
                    await response.aread()
                error = error_of(response)
            except TimeoutError as exc:
                raise DeadlineExceeded(f"no answer within {self._timeout_s:g} s") from exc
            except httpx.RequestError as exc:
                error, cause = transport_error(exc), exc
            asked_s = vars(error).get("retry_after_s", 0)
            wait_s = max(asked_s, delay_s * random.uniform(0.5, 1.0))  # noqa: S311  # jitter is no secret
            delay_s = min(2 * delay_s, _LONGEST_DELAY_S)
            again = _may_be_sent_again(error, cause, repeatable=repeatable)
            if not again or left <= 0 or loop.time() + wait_s >= until:
                raise error from cause
            left -= 1
            await asyncio.sleep(wait_s)

    # read-your-writes ---------------------------------------------------------------------------

    def note_write(self, user: str, response: httpx.Response) -> None:
        """Remember the generation that a write made."""
        told = response.headers.get(_GENERATION, "")
        if self._read_your_writes and told.isdigit():
            self._written[user] = max(int(told), self._written.pop(user, 0))
            if len(self._written) > _MOST_USERS:
                self._written.popitem(last=False)

    def written(self, user: str) -> int | None:
        """Return the generation of the user's latest write; None without one."""
        return self._written.get(user)


def _may_be_sent_again(error: RedisMemError, cause: Exception | None, *, repeatable: bool) -> bool:
    if cause is not None:
        return isinstance(error, Unavailable) and (repeatable or isinstance(cause, _UNSENT))
    if isinstance(error, RateLimited | Overloaded) or error.status == httpx.codes.TOO_MANY_REQUESTS:
        return True  # it was refused before anything was done
    return repeatable and error.status in PASSING and not isinstance(error, DeadlineExceeded)


@dataclass(frozen=True, slots=True)
class UserCalls:
    """Calls of one user. `request_id` goes along with each; without one the service makes them."""

    calls: Calls
    user: str
    request_id: str | None = None

    def __post_init__(self) -> None:
        if not self.user:
            raise InvalidInput("`user` must not be empty", field="user")
        if self.request_id is not None and not _REQUEST_ID.fullmatch(self.request_id):
            raise InvalidInput("`request_id` takes 1 to 128 printable ASCII characters", field="request_id")

    async def send(
        self,
        method: str,
        *parts: str,
        body: bytes | None = None,
        query: Query | None = None,
        headers: Mapping[str, str] | None = None,
        repeatable: bool = True,
        stream: bool = False,
    ) -> httpx.Response:
        """Send a request about something of the user; see `Calls.send`."""
        tag = {"X-Request-ID": self.request_id} if self.request_id is not None else {}
        return await self.calls.send(
            method,
            "/".join(("/v1/users", _segment(self.user), *map(_segment, parts))),
            body=body,
            query=query,
            headers={**tag, **(headers or {})},
            repeatable=repeatable,
            stream=stream,
        )

    async def read(
        self,
        kind: type[T],
        method: str,
        *parts: str,
        body: msgspec.Struct | None = None,
        query: Query | None = None,
    ) -> T:
        """Return the reply to a request that changes nothing."""
        raw = None if body is None else msgspec.json.encode(body)
        return decoded((await self.send(method, *parts, body=raw, query=query)).content, kind)

    async def write(
        self,
        kind: type[T],
        method: str,
        *parts: str,
        body: msgspec.Struct | bytes | None = None,
        query: Query | None = None,
        headers: Mapping[str, str] | None = None,
        repeatable: bool = True,
    ) -> T:
        """Return the reply to a write, and remember its generation."""
        raw = msgspec.json.encode(body) if isinstance(body, msgspec.Struct) else body
        response = await self.send(
            method, *parts, body=raw, query=query, headers=headers, repeatable=repeatable
        )
        self.calls.note_write(self.user, response)
        return decoded(response.content, kind)

    def current(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return a request's fields with the wish to see the user's writes, unless it says what it wants."""
        written = self.calls.written(self.user)
        if written is None or "consistency" in given or "min_version" in given:
            return dict(given)
        return {**given, "consistency": "session", "min_version": written}


def _segment(part: str) -> str:
    """Return a part of a path; `.` and `..` too, which a URL library would resolve."""
    return quote(part, safe="").replace(".", "%2E")
