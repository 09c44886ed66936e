"""A process of the history test, set up by REDISMEM_*; its arguments: SLOW_S [what is broken].

Tells its port before it serves, and ends with its parent. Before and after each Redis call it waits for up
to SLOW_S, so that invalidations overtake the replies they belong to; before and after it fills a stage of a
context for up to half of STAGE_S, so that deletes come between stages.

What is broken: `barrier`: strong writes wait for nobody, and what Redis pushes is handled LATE_S late;
`comparison`: stages are handed over as they were filled.

With the argument `worker` it makes what contexts tell instead, AHEAD_S before it is due and without rest.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import inspect
import random
import signal
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import uvicorn

from redismem.client import Argument, Client
from redismem.context import Contexts
from redismem.errors import RedisMemError
from redismem.http.app import create_app
from redismem.service import open_service
from redismem.settings import Settings
from redismem.stages import Turn

LATE_S = 0.3
STAGE_S = 0.03
AHEAD_S, PAUSE_S = 3600.0, 0.02
_PR_SET_PDEATHSIG = 1
#: seconds; an idle connection that the service closes would look like a lost request
_KEEP_ALIVE_S = 600
#: jobs that make nothing that a context tells
_UNTOLD = ("link", "topics", "periods")


def slow_down(slow_s: float) -> None:
    execute, rng = Client.execute, random.Random(0)

    async def slow_execute(self: Client, *command: Argument) -> Any:
        await asyncio.sleep(rng.random() * slow_s)
        reply = await execute(self, *command)
        await asyncio.sleep(rng.random() * slow_s)
        return reply

    Client.execute = slow_execute  # type: ignore[method-assign]  # this process serves one test


def pause_between_stages() -> None:
    rng = random.Random(0)

    def paused(fill: Callable[[Turn], Awaitable[None]]) -> Callable[[Turn], Awaitable[None]]:
        async def fill_slowly(turn: Turn) -> None:
            await asyncio.sleep(rng.random() * STAGE_S / 2)
            await fill(turn)
            await asyncio.sleep(rng.random() * STAGE_S / 2)

        return fill_slowly

    context = importlib.import_module("redismem.context")
    context.STAGES = tuple(map(paused, context.STAGES))


def break_comparison() -> None:
    async def not_compared(self: Contexts, turn: Turn, *_: Any, **more: Any) -> float:
        return turn.elapsed_ms()

    assert inspect.iscoroutinefunction(Contexts._made_true)
    Contexts._made_true = not_compared  # type: ignore[method-assign]  # this process serves one test


def break_barrier() -> None:
    coherence = importlib.import_module("redismem.coherence").Coherence
    handle = coherence._invalidated

    async def no_barrier(self: Any, *args: Any, **more: Any) -> None:
        return

    async def late(self: Any, *args: Any) -> None:
        await asyncio.sleep(LATE_S)
        await handle(self, *args)

    def handle_late(self: Any, *args: Any) -> None:
        asyncio.get_running_loop().call_later(LATE_S, handle, self, *args)

    assert inspect.iscoroutinefunction(coherence.barrier)
    coherence.barrier = no_barrier
    coherence._invalidated = late if inspect.iscoroutinefunction(handle) else handle_late


async def work(tell_port: Callable[[int], None]) -> None:
    async def nothing(*_: Any) -> None:
        return

    importlib.import_module("redismem.worker.worker")._OF_OWNER |= dict.fromkeys(_UNTOLD, nothing)
    # as the worker of `serve`: it answers no reads
    async with open_service(replace(Settings.from_environment(), l1_entries=0)) as service:
        service.jobs._rest = 0.0
        tell_port(0)
        while True:
            with suppress(RedisMemError):  # Redis is away: it goes on when it is back
                await service.worker.step(ahead_s=AHEAD_S)
            await asyncio.sleep(PAUSE_S)


def main(arguments: Sequence[str], tell_port: Callable[[int], None]) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if arguments[0] == "worker":
        asyncio.run(work(tell_port))
    if float(arguments[0]):
        slow_down(float(arguments[0]))
    pause_between_stages()
    if "barrier" in arguments:
        break_barrier()
    if "comparison" in arguments:
        break_comparison()
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    tell_port(listener.getsockname()[1])
    app = create_app(settings=Settings.from_environment())
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=_KEEP_ALIVE_S)
    uvicorn.Server(config).run(sockets=[listener])
