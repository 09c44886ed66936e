"""A service process on a free port, set up by REDISMEM_*: `python serve_child.py EMBED_S REDIS_S`.

Prints the port before it serves. An embedding takes EMBED_S seconds and a Redis call up to REDIS_S more than
it would, so that other requests overtake what stands between two round trips.
"""

from __future__ import annotations

import asyncio
import random
import socket
import sys
from typing import Any

import uvicorn

from redismem.client import Argument, Client
from redismem.embed.deterministic import DeterministicEmbedder
from redismem.embed.protocol import Vectors
from redismem.http.app import create_app
from redismem.settings import Settings


def slow_down(embed_s: float, redis_s: float) -> None:
    embed, execute = DeterministicEmbedder.embed, Client.execute
    rng = random.Random(0)

    async def slow_embed(self: DeterministicEmbedder, texts: list[str], *, urgent: bool = True) -> Vectors:
        await asyncio.sleep(embed_s)
        return await embed(self, texts, urgent=urgent)

    async def slow_execute(self: Client, *command: Argument) -> Any:
        await asyncio.sleep(rng.random() * redis_s)
        return await execute(self, *command)

    DeterministicEmbedder.embed = slow_embed  # type: ignore[method-assign]  # this process serves one test
    Client.execute = slow_execute  # type: ignore[method-assign]


def main() -> None:
    slow_down(float(sys.argv[1]), float(sys.argv[2]))
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    config = uvicorn.Config(create_app(settings=Settings.from_environment()), log_level="warning")
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
