"""The way in: a client of one service, from which each user's memory is reached."""

from __future__ import annotations

from typing import Self

import httpx

from redismem.sdk.calls import Calls, UserCalls
from redismem.sdk.users import UserMemory
from redismem.sdk.values import decoded
from redismem.types import StatsReply


class Client:
    """A client of one service, for any number of users and tasks at once.

    What fails in passing is repeated with back-off where that does no harm (each method says), until it
    succeeds, `retries` are used up, or `timeout_s` would be exceeded. What a user wrote through this client
    is seen by the searches, reads and contexts of that user that follow through it.

    Args:
        url: address of the service.
        api_key: sent as `Authorization: Bearer`.
        timeout_s: seconds for a call, repetitions included; in streams between two parts.
        retries: repetitions of a call at most.
        connections: requests and streams at once; more wait.
        read_your_writes: False asks for consistency as the service has it by default.
        transport: in place of the network, such as httpx.ASGITransport of an application.

    Raises:
        InvalidInput: `url` is none.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = 10.0,
        retries: int = 4,
        connections: int = 100,
        read_your_writes: bool = True,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._calls = Calls(
            url,
            api_key=api_key,
            timeout_s=timeout_s,
            retries=retries,
            connections=connections,
            read_your_writes=read_your_writes,
            transport=transport,
        )

    def user(self, user: str, *, request_id: str | None = None) -> UserMemory:
        """Return a user's memory. `request_id`: sent as X-Request-ID with what is asked of it."""
        return UserMemory(UserCalls(self._calls, user, request_id))

    async def stats(self) -> StatsReply:
        """Return what one process of the service did since its start. Repeated."""
        return decoded((await self._calls.send("GET", "/v1/stats")).content, StatsReply)

    async def ready(self) -> bool:
        """Return whether the service can serve; False when it cannot be reached. Asked once."""
        return await self._calls.is_ready()

    async def close(self) -> None:
        """Close the connections; streams that are open end."""
        await self._calls.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *failure: object) -> None:
        await self.close()
