"""A service process on a free port, set up by REDISMEM_*: `python serve_child.py SECONDS_PER_EMBEDDING`.

Prints the port before it serves.
"""

from __future__ import annotations

import asyncio
import socket
import sys

import uvicorn

from redismem.embed.deterministic import DeterministicEmbedder
from redismem.embed.protocol import Vectors
from redismem.http.app import create_app
from redismem.settings import Settings


def slow_down(seconds: float) -> None:
    """Make each embedding take a while, so that other requests overtake it."""
    embed = DeterministicEmbedder.embed

    async def slow(self: DeterministicEmbedder, texts: list[str], *, urgent: bool = True) -> Vectors:
        await asyncio.sleep(seconds)
        return await embed(self, texts, urgent=urgent)

    DeterministicEmbedder.embed = slow  # type: ignore[method-assign]  # this process serves one test


def main() -> None:
    slow_down(float(sys.argv[1]))
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    config = uvicorn.Config(create_app(settings=Settings.from_environment()), log_level="warning")
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
