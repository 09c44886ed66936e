"""The only place that reads a context as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Self

import msgspec
from httpx_sse import EventSource

from redismem.conversation import ContextReply, ContextRequest, Stage
from redismem.errors import Unavailable
from redismem.sdk.calls import UserCalls
from redismem.sdk.failures import told_error, translated
from redismem.sdk.values import decoded


class ContextStream:
    """A context on its way: yields each stage when it is there; `whole` returns all of it.

    The request is sent when the first stage is asked for. Leaving `async with` ends it, and the service's
    work for it; so does `aclose`. A `for` that is left without either ends it some time later.

    Raises, while it is read:
        RedisMemError: as for `UserMemory.context`; before the first stage it was repeated, later it is not.
        Unavailable: the stream broke off.
    """

    def __init__(self, calls: UserCalls, request: ContextRequest) -> None:
        self._parts = self._read(calls, request)
        self._stages: list[Stage] = []
        self._reply: ContextReply | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Stage:
        self._stages.append(await anext(self._parts))
        return self._stages[-1]

    async def whole(self) -> ContextReply:
        """Wait for the stages that are still to come, and return the context with all of them."""
        async for _ in self:
            pass
        if self._reply is None:
            raise Unavailable("the context is not whole: its stream was left, or broke off")
        return msgspec.structs.replace(self._reply, stages=list(self._stages))

    async def aclose(self) -> None:
        """End the request, if it has not ended."""
        await self._parts.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *failure: object) -> None:
        await self.aclose()

    async def _read(self, calls: UserCalls, request: ContextRequest) -> AsyncGenerator[Stage, None]:
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        body = msgspec.json.encode(request)
        response = await calls.send("POST", "context", body=body, headers=headers, stream=True)
        async with aclosing(response), aclosing(EventSource(response).aiter_sse()) as events:
            with translated():
                # to its end, not to the last event: the connection serves the next request then
                async for event in events:
                    if event.event == "stage":
                        yield decoded(event.data, Stage)
                    elif event.event == "done":
                        self._reply = decoded(event.data, ContextReply)
                    elif event.event == "error":
                        raise told_error(event.data)
        if self._reply is None:
            raise Unavailable("the stream ended before the context was whole")
