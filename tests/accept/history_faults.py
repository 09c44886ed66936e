"""Service processes on one Redis, and what is done to them while clients work."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import msgspec

from redismem.client import Client
from redismem.embedded import EmbeddedRedis
from redismem.keys import Owner
from redismem.settings import Settings
from tests.accept import history_child
from tests.accept.forked import Forked
from tests.accept.history_actor import Offers
from tests.accept.history_client import HttpClient
from tests.conftest import until

#: seconds that a Redis call of each process may be delayed, before and after; see history_child
SLOW_S = (0.0, 0.0, 0.003)
#: seconds a process stands still: longer than the lease of its cache, and shorter
LONG_STOP_S, SHORT_STOP_S = 3.0, 1.0
#: seconds after Redis is back in which requests may still fail: dead connections are found one by one
REDIS_GRACE_S = 1.0
#: name of the connections on which Redis pushes invalidations
PUSH_NAME = b"redismem-push"


@dataclass(frozen=True, slots=True)
class Fault:
    """What was done when; `excuses`: requests that overlap it may fail."""

    kind: str
    began: float
    ended: float
    excuses: bool = False


@dataclass
class _Process:
    forked: Forked
    port: int


@dataclass
class Cluster:
    """Three service processes, a port each in `ports`, a worker and their Redis.

    Enter it from the main thread. `broken`: what, in the words of history_child.
    """

    folder: Path
    memory_ttl_s: float
    search_ttl_s: float
    broken: str = ""
    ports: list[int] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    #: connections killed, by how they were chosen
    killed: Counter[str] = field(default_factory=Counter)

    async def __aenter__(self) -> Self:
        self._processes: list[_Process] = []
        self._started = 0
        async with AsyncExitStack() as stack:
            self._redis = await EmbeddedRedis(self.folder / "data").__aenter__()
            stack.push_async_callback(self._close)
            self._processes = list(await asyncio.gather(*(self._start(slot) for slot in range(len(SLOW_S)))))
            self.ports[:] = [process.port for process in self._processes]
            self._processes.append(await self._spawn("worker", ["worker"]))
            stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._close()

    async def _close(self) -> None:
        for process in self._processes:
            process.forked.kill()
        await self._redis.__aexit__(None, None, None)

    async def _start(self, slot: int) -> _Process:
        arguments = [str(SLOW_S[slot]), *([self.broken] if self.broken else [])]
        process = await self._spawn(f"service{slot}", arguments)
        try:
            await until(f"p{slot} is ready", lambda: self._is_ready(process), 30)
        except BaseException:
            process.forked.kill()
            raise
        return process

    async def _spawn(self, name: str, arguments: list[str]) -> _Process:
        """Start a child; return when it has told its port."""
        environ = {"REDISMEM_REDIS_URL": self._redis.url}
        environ |= {"REDISMEM_EMBEDDER": "deterministic", "REDISMEM_TESTING": "1"}
        environ |= {"REDISMEM_OVERLOAD_MS": "0"}  # a slow machine would refuse what is to be seen
        environ |= {"REDISMEM_MEMORY_TTL_S": str(self.memory_ttl_s)}
        environ |= {"REDISMEM_SEARCH_TTL_S": str(self.search_ttl_s)}
        self._started += 1
        forked = Forked(history_child.main, arguments, environ, self.folder / f"{name}-{self._started}.log")
        try:
            port = await asyncio.wait_for(asyncio.to_thread(forked.port), 30)
        except BaseException:
            forked.kill()
            raise
        return _Process(forked, port)

    async def _is_ready(self, process: _Process) -> bool:
        assert process.forked.poll() is None, process.forked.log.read_text()
        http = HttpClient()
        reply = await http.request(process.port, "GET", "/health/ready")
        http.close()
        return reply.status == 200

    async def offers(self) -> Offers:
        """Read what the service understands from its OpenAPI document."""
        http = HttpClient()
        reply = await http.request(self.ports[0], "GET", "/openapi.json")
        http.close()
        paths = msgspec.json.decode(reply.body)["paths"]

        def takes(method: str, path: str, name: str = "consistency") -> bool:
            return any(item.get("name") == name for item in paths[path][method].get("parameters", ()))

        every, one = "/v1/users/{user}/memories", "/v1/users/{user}/memories/{id}"
        return Offers(
            strong_get=takes("get", one),
            session_get=takes("get", one, "min_version"),
            strong_put=takes("post", every),
            strong_patch=takes("patch", one),
        )

    async def context_counts(self) -> Counter[str]:
        """Return what the processes that are there now count of their contexts, in all."""
        counts, http = Counter[str](), HttpClient()
        for port in self.ports:
            counts.update(
                msgspec.json.decode((await http.request(port, "GET", "/v1/stats")).body)["contexts"]
            )
        http.close()
        return counts

    async def kill_process(self, slot: int) -> None:
        """Kill a process and start another in its place."""
        began = time.monotonic()
        self._processes[slot].forked.kill()
        process = await self._start(slot)
        self._processes[slot], self.ports[slot] = process, process.port
        self.faults.append(Fault("kill", began, time.monotonic(), excuses=True))

    async def stop_process(self, slot: int, seconds: float) -> None:
        """Let a process stand still."""
        began, forked = time.monotonic(), self._processes[slot].forked
        forked.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            forked.send_signal(signal.SIGCONT)
        self.faults.append(Fault(f"stop {seconds:g} s", began, time.monotonic()))

    async def cut_push(self) -> None:
        """Close the connections on which the processes hear of invalidations."""
        began, client = time.monotonic(), Client(Settings(), self._redis.url)
        rows = (await client.execute("CLIENT", "LIST")).splitlines()
        named = [row.split(b" ")[0][3:] for row in rows if b" name=" + PUSH_NAME + b" " in row]
        for number in named:
            self.killed["name"] += int(await client.execute("CLIENT", "KILL", "ID", number))
        self.killed["pubsub"] += int(await client.execute("CLIENT", "KILL", "TYPE", "PUBSUB"))
        await client.close()
        self.faults.append(Fault("cut push", began, time.monotonic()))

    async def flush_functions(self) -> None:
        """Remove the Functions, as a fail-over to an empty replica would."""
        began, client = time.monotonic(), Client(Settings(), self._redis.url)
        await client.execute("FUNCTION", "FLUSH")
        await client.close()
        self.faults.append(Fault("function flush", began, time.monotonic()))

    async def restart_redis(self, *, kill: bool = False) -> None:
        """Stop Redis, which writes everything first, or kill it after having it write at once."""
        began = time.monotonic()
        if kill:
            client = Client(Settings(), self._redis.url)
            await client.execute("CONFIG", "SET", "appendfsync", "always")
            await client.close()
            assert self._redis.pid is not None
            os.kill(self._redis.pid, signal.SIGKILL)
        await self._redis.__aexit__(None, None, None)
        self._redis = await EmbeddedRedis(self.folder / "data").__aenter__()
        ended = time.monotonic() + REDIS_GRACE_S
        self.faults.append(Fault("redis kill" if kill else "redis restart", began, ended, excuses=True))

    async def suffer(self, duration_s: float) -> None:
        """Do everything that can happen, spread over the duration; one thing at a time."""
        start = time.monotonic()
        plan: list[tuple[float, Callable[[], Awaitable[None]]]] = [
            (0.08, lambda: self.kill_process(0)),
            (0.20, lambda: self.stop_process(1, LONG_STOP_S)),
            (0.32, self.cut_push),
            (0.42, self.restart_redis),
            (0.52, self.flush_functions),
            (0.60, lambda: self.stop_process(2, SHORT_STOP_S)),
            (0.68, self.cut_push),
            (0.76, lambda: self.restart_redis(kill=True)),
            (0.88, lambda: self.kill_process(2)),
        ]
        for share, fault in plan:
            await asyncio.sleep(max(0.0, start + share * duration_s - time.monotonic()))
            await fault()
        await asyncio.sleep(max(0.0, start + duration_s - time.monotonic()))

    async def loaded(self, users: Sequence[str], sessions: Sequence[str]) -> tuple[int, int]:
        """Return how many memories are loaded ahead for these sessions, and how many of those are gone."""
        client = Client(Settings(), self._redis.url)
        try:
            named = gone = 0
            for owner in map(Owner, users):
                for session in sessions:
                    raw = await client.execute("HGET", owner.session(session), "loaded") or b"[]"
                    for memory_id, _, _ in msgspec.json.decode(raw, type=list[tuple[str, str, float]]):
                        named += 1
                        gone += not await client.execute("EXISTS", owner.memory(memory_id))
        finally:
            await client.close()
        return named, gone

    def logs(self) -> str:
        """Return the ends of what the processes wrote to stderr."""
        paths = sorted(self.folder.glob("*.log"))
        return "\n".join(f"{path.name}: …{path.read_text()[-600:]}" for path in paths if path.stat().st_size)
