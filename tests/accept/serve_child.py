"""A service process on a free port, set up by REDISMEM_*; its arguments: EMBED_S REDIS_S HOLD.

Tells the port before it serves. An embedding takes EMBED_S seconds and a Redis call up to REDIS_S more than
it would, so that other requests overtake what stands between two round trips. While there is a file HOLD, no
embedding is made.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import Callable, Sequence
from typing import Any

import uvicorn

from redismem.client import Argument, Client
from redismem.embed.deterministic import DeterministicEmbedder
from redismem.embed.protocol import Vectors
from redismem.http.app import create_app
from redismem.settings import Settings

#: seconds until it is looked again whether embeddings are held back
_LOOK_S = 0.02


def slow_down(embed_s: float, redis_s: float, hold: str) -> None:
    embed, execute = DeterministicEmbedder.embed, Client.execute
    rng = random.Random(0)

    async def slow_embed(self: DeterministicEmbedder, texts: list[str], *, urgent: bool = True) -> Vectors:
        await asyncio.sleep(embed_s)
        while os.path.exists(hold):  # noqa: ASYNC110, ASYNC240, PTH110  # another process removes it
            await asyncio.sleep(_LOOK_S)
        return await embed(self, texts, urgent=urgent)

    async def slow_execute(self: Client, *command: Argument) -> Any:
        await asyncio.sleep(rng.random() * redis_s)
        return await execute(self, *command)

    DeterministicEmbedder.embed = slow_embed  # type: ignore[method-assign]  # this process serves one test
    Client.execute = slow_execute  # type: ignore[method-assign]


def main(arguments: Sequence[str], tell_port: Callable[[int], None]) -> None:
    embed_s, redis_s, hold = arguments
    slow_down(float(embed_s), float(redis_s), hold)
    listener = socket.create_server(("127.0.0.1", 0))
    tell_port(listener.getsockname()[1])
    config = uvicorn.Config(create_app(settings=Settings.from_environment()), log_level="warning")
    uvicorn.Server(config).run(sockets=[listener])
