"""Clients that all work at once on few memories, through several processes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from typing import Literal

from tests.accept.history import Operation
from tests.accept.history_actor import IDS, MESSAGES, USERS, Actor, Ground, Offers, Trace
from tests.accept.history_talk import Talker

CLIENTS = 32
Mix = Mapping[Operation | Literal["close"], float]
#: percent of the operations
MIX: Mix = {
    "search": 52,
    "get": 14,
    "batch": 2.5,
    "list": 2.5,
    "put": 8,
    "patch": 5,
    "delete": 5,
    "correct": 2,
    "forget": 0.3,
    "context": 2,
    "stream": 3,
    "say": 3.5,
    "close": 0.2,
}
#: the same where most is said and told
TALK: Mix = {
    "search": 4,
    "get": 3,
    "put": 20,
    "patch": 5,
    "delete": 4,
    "correct": 4,
    "forget": 0.2,
    "context": 14,
    "stream": 30,
    "say": 15,
    "close": 0.8,
}
#: times a second that the users and ids change at which half of the operations meet
HOT_HZ = 10


class Load:
    """The clients of one run. `ports` has a port per process; whoever replaces a process replaces it."""

    def __init__(self, ports: list[int], offers: Offers, mix: Mix = MIX) -> None:
        self._ground = Ground(ports, offers)
        self._mix = mix
        self._stopped = asyncio.Event()
        self._clients = [self._client(number) for number in range(CLIENTS)]

    def _client(self, number: int) -> Talker:
        return Talker(self._ground, number, Actor(self._ground, CLIENTS + number))

    def stop(self) -> None:
        """Let each client finish its request."""
        self._stopped.set()

    @property
    def trace(self) -> Trace:
        """What was seen so far."""
        return self._ground.trace

    async def run(self) -> None:
        """Work until `stop`."""
        async with asyncio.TaskGroup() as group:
            for number, client in enumerate(self._clients):
                group.create_task(self._work(client, random.Random(number)))

    async def say_more(self) -> None:
        """Let each user tell of somebody, so that what names them is loaded ahead."""
        async with asyncio.TaskGroup() as group:
            for client, user in zip(self._clients, USERS, strict=False):
                group.create_task(client.tell_of_somebody(user))

    async def look_at_loaded(self) -> None:
        """Let each user remove something, and ask for what was loaded ahead and nothing else."""
        before = self.trace.shown["prefetched"]
        async with asyncio.TaskGroup() as group:
            for client, user in zip(self._clients, USERS, strict=False):
                group.create_task(client.look_at_loaded(user))
        self.trace.prefetched_alone += self.trace.shown["prefetched"] - before

    def close(self) -> None:
        """Close every connection."""
        for client in self._clients:
            client.close()

    async def _work(self, client: Talker, rng: random.Random) -> None:
        operations, weights = list(self._mix), list(self._mix.values())
        while not self._stopped.is_set():
            (operation,) = rng.choices(operations, weights)
            hot = random.Random(int(asyncio.get_running_loop().time() * HOT_HZ))
            chosen = hot if rng.random() < 0.5 else rng
            ids = IDS if operation in ("put", "get") else IDS + MESSAGES
            await client.do(operation, chosen.choice(USERS), chosen.choice(ids))
