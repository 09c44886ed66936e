"""A service process of the history test, set up by REDISMEM_*: `python history_child.py SLOW_S [broken]`.

Prints its port before it serves, and ends with its parent. Before and after each Redis call it waits for up
to SLOW_S, so that invalidations overtake the replies they belong to. `broken`: strong writes wait for nobody,
and what Redis pushes is handled LATE_S late.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import inspect
import random
import signal
import socket
import sys
from typing import Any

import uvicorn

from redismem.client import Argument, Client
from redismem.http.app import create_app
from redismem.settings import Settings

LATE_S = 0.3
_PR_SET_PDEATHSIG = 1
#: seconds; an idle connection that the service closes would look like a lost request
_KEEP_ALIVE_S = 600


def slow_down(slow_s: float) -> None:
    execute, rng = Client.execute, random.Random(0)

    async def slow_execute(self: Client, *command: Argument) -> Any:
        await asyncio.sleep(rng.random() * slow_s)
        reply = await execute(self, *command)
        await asyncio.sleep(rng.random() * slow_s)
        return reply

    Client.execute = slow_execute  # type: ignore[method-assign]  # this process serves one test


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


def main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if float(sys.argv[1]):
        slow_down(float(sys.argv[1]))
    if "broken" in sys.argv:
        break_barrier()
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    print(listener.getsockname()[1], flush=True)
    app = create_app(settings=Settings.from_environment())
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=_KEEP_ALIVE_S)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
