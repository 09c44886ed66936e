"""Clients that read and write few memories at once through several processes, and note what they saw."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import msgspec

from tests.accept.history import Event, Item, Operation, Outcome
from tests.accept.history_client import HttpClient, Reply

CLIENTS = 32
#: ids that a careless prefix, case or path would mix up
USERS = ("u", "u1", "u10", "U1", "u1/a", "ü")
IDS = tuple(f"m{i}" for i in range(12))
WORDS = "amber basil cedar delta ember fern".split()
#: every text holds the word `common`, so every query finds all current memories of the user
QUERIES = (
    ("common", "keyword"),
    ("common amber", "hybrid"),
    ("common basil cedar", "keyword"),
    ("common delta", "hybrid"),
    ("common ember fern", "hybrid"),
)
LIMIT = 2 * len(IDS)
#: percent of the operations
MIX: dict[Operation, float] = {
    "search": 59.7,
    "get": 15,
    "batch": 2.5,
    "list": 2.5,
    "put": 8,
    "patch": 5,
    "delete": 5,
    "correct": 2,
    "forget": 0.3,
}
CONSISTENCY = {"eventual": 84, "session": 8, "strong": 8}
#: times a second that the users and ids change at which half of the operations meet
HOT_HZ = 10
#: seconds a client rests after a request without a useful reply
REST_S = 0.03
#: share of the strong writes whose client looks at once whether another process knows
PROBE = 0.5
DONE = {200, 201, 202}


class _Memory(msgspec.Struct):
    id: str
    text: str
    version: int = 0
    superseded_by: str | None = None


class _Found(msgspec.Struct):
    memories: list[_Memory]
    served_by: str = ""
    partial: bool = False
    cursor: str | None = None


class _Batch(msgspec.Struct):
    results: list[_Found]


class _Receipt(msgspec.Struct):
    generation: int | None = None


_memory = msgspec.json.Decoder(_Memory)
_found = msgspec.json.Decoder(_Found)
_batch = msgspec.json.Decoder(_Batch)
_receipt = msgspec.json.Decoder(_Receipt)


@dataclass
class Trace:
    """What all clients noted."""

    events: list[Event] = field(default_factory=list)
    served_by: Counter[str] = field(default_factory=Counter)
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    #: requests that availability counts against the service: (began, ended, what)
    errors: list[tuple[float, float, str]] = field(default_factory=list)
    requests: int = 0


@dataclass(frozen=True)
class Offers:
    """What the service is said to understand in its OpenAPI document."""

    strong_get: bool = False
    session_get: bool = False
    strong_put: bool = False
    strong_patch: bool = False


class Load:
    """The clients of one run. `ports` has a port per process; whoever replaces a process replaces it."""

    def __init__(self, ports: list[int], offers: Offers, seed: int = 0) -> None:
        self.trace = Trace()
        self.ports, self.offers, self.seed = ports, offers, seed
        self.numbers = itertools.count()
        self.generations: defaultdict[str, int] = defaultdict(int)
        self.stopped = asyncio.Event()

    def stop(self) -> None:
        """Let each client finish its request."""
        self.stopped.set()

    async def run(self) -> Trace:
        """Work until `stop`; return what was seen."""
        async with asyncio.TaskGroup() as group:
            for number in range(CLIENTS):
                group.create_task(_Actor(self, number).work())
        return self.trace


class _Actor:
    """One client: one request at a time, each to a process chosen at random.

    Every other client leaves one process out, so that a stopped process does not catch all of them.
    """

    def __init__(self, load: Load, number: int) -> None:
        self._load, self._number = load, number
        self._rng = random.Random(load.seed * CLIENTS + number)
        self._http = HttpClient()
        slots = range(len(load.ports))
        self._slots = [i for i in slots if number % 2 == 0 or i != number // 2 % len(slots)]

    async def work(self) -> None:
        operations, weights = list(MIX), list(MIX.values())
        try:
            while not self._load.stopped.is_set():
                (operation,) = self._rng.choices(operations, weights)
                hot = random.Random(int(asyncio.get_running_loop().time() * HOT_HZ))
                rng = hot if self._rng.random() < 0.5 else self._rng
                await self._do(operation, rng.choice(USERS), rng.choice(IDS))
        finally:
            self._http.close()

    async def _do(self, operation: Operation, user: str, memory_id: str) -> None:
        match operation:
            case "search" | "batch" | "list" | "forget":
                await getattr(self, f"_{operation}")(user)
            case _:
                await getattr(self, f"_{operation}")(user, memory_id)

    async def _send(self, method: str, path: str, body: Any = None, *, avoid: str = "") -> tuple[Reply, str]:
        """Return the reply of a process, and its name; rest when it was no good."""
        slot = self._rng.choice([i for i in self._slots if f"p{i}" != avoid])
        content = b"" if body is None else msgspec.json.encode(body)
        reply = await self._http.request(self._load.ports[slot], method, path, content)
        trace, name = self._load.trace, f"p{slot}"
        trace.requests += 1
        if reply.status == 0 or reply.status >= 500:
            what = f"{method} {path} at {name}: {reply.status or reply.why} {reply.body[:200].decode()}"
            trace.errors.append((reply.began, reply.ended, what))
            await asyncio.sleep(REST_S)
        return reply, name

    def _note(self, operation: Operation, user: str, reply: Reply, process: str, **more: Any) -> None:
        self._load.trace.statuses[operation, reply.status] += 1
        if reply.status in DONE:
            outcome: Outcome = "ok"
        else:
            outcome = "failed" if not reply.sent or 400 <= reply.status < 500 else "unknown"
        if outcome == "ok" and more.get("generation"):
            self._load.generations[user] = max(self._load.generations[user], more["generation"])
        note = {"client": self._number, "operation": operation, "user": user, "process": process}
        times = {"began": reply.began, "ended": reply.ended}
        self._load.trace.events.append(Event(**{"outcome": outcome, **note, **times, **more}))

    def _text(self, user: str, memory_id: str) -> str:
        words = " ".join(self._rng.sample(WORDS, 2))
        return f"common {words} of {user} {memory_id} n{next(self._load.numbers)}"

    async def _put(self, user: str, memory_id: str) -> None:
        text = self._text(user, memory_id)
        wait = "" if self._rng.random() < 0.7 else "?wait=false"
        strong = self._load.offers.strong_put and self._rng.random() < 0.2
        path = f"{_home(user)}/memories" + ("?consistency=strong" if strong else wait)
        reply, process = await self._send("POST", path, {"id": memory_id, "text": text})
        more: dict[str, Any] = {"consistency": "strong"} if strong else {}
        more |= {"id": memory_id, "text": text, "generation": _generation(reply)}
        self._note("put", user, reply, process, **more)
        if strong and reply.status in DONE:
            await self._probe(user, memory_id, process)

    async def _patch(self, user: str, memory_id: str) -> None:
        text = self._text(user, memory_id)
        strong = self._load.offers.strong_patch and self._rng.random() < 0.5
        path = _path(user, memory_id) + ("?consistency=strong" if strong else "")
        reply, process = await self._send("PATCH", path, {"text": text})
        more: dict[str, Any] = {"id": memory_id, "text": text}
        more["consistency"] = "strong" if strong else "eventual"
        if reply.status in DONE:
            memory = _memory.decode(reply.body)
            more |= {"returned": (_item(memory),), "generation": memory.version}
        self._note("patch", user, reply, process, **more)
        if strong:
            await self._probe(user, memory_id, process)

    async def _delete(self, user: str, memory_id: str) -> None:
        reply, process = await self._send("DELETE", _path(user, memory_id))
        self._note("delete", user, reply, process, id=memory_id, generation=_generation(reply))
        if reply.status in DONE:
            await self._probe(user, memory_id, process)

    async def _correct(self, user: str, memory_id: str) -> None:
        new = self._rng.choice([other for other in IDS if other != memory_id])
        text = self._text(user, new)
        body = {"ids": [memory_id], "memory": {"id": new, "text": text}}
        reply, process = await self._send("POST", f"{_home(user)}/corrections", body)
        more = {"id": new, "text": text, "replaced": (memory_id,), "generation": _generation(reply)}
        self._note("correct", user, reply, process, **more)
        if reply.status in DONE:
            await self._probe(user, memory_id, process)

    async def _forget(self, user: str) -> None:
        reply, process = await self._send("DELETE", _home(user))
        self._note("forget", user, reply, process)
        if reply.status in DONE:
            await self._probe(user, self._rng.choice(IDS), process)

    async def _probe(self, user: str, memory_id: str, writer: str) -> None:
        if self._rng.random() < PROBE:
            await self._search(user, avoid=writer)
            await self._get(user, memory_id, avoid=writer)

    async def _get(self, user: str, memory_id: str, *, avoid: str = "") -> None:
        offers, dice, wish = self._load.offers, self._rng.random(), ""
        more: dict[str, Any] = {"id": memory_id}
        if offers.strong_get and dice < 0.1:
            more["consistency"], wish = "strong", "?consistency=strong"
        elif offers.session_get and dice > 0.9:
            known = self._load.generations[user]
            more |= {"consistency": "session", "min_version": known}
            wish = f"?consistency=session&min_version={known}"
        reply, process = await self._send("GET", _path(user, memory_id) + wish, avoid=avoid)
        if reply.status == 200:
            more |= {"complete": True, "returned": (_item(_memory.decode(reply.body)),)}
        elif reply.status == 404:
            more |= {"complete": True, "outcome": "ok"}
        self._note("get", user, reply, process, **more)

    def _query(self, user: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return a query and what to note of it."""
        text, mode = self._rng.choice(QUERIES)
        (consistency,) = self._rng.choices(list(CONSISTENCY), list(CONSISTENCY.values()))
        query: dict[str, Any] = {"text": text, "search_mode": mode, "limit": LIMIT}
        told: dict[str, Any] = {"consistency": consistency}
        if consistency == "session":
            told["min_version"] = self._load.generations[user]
        return query | (told if consistency != "eventual" else {}), told

    async def _search(self, user: str, *, avoid: str = "") -> None:
        query, told = self._query(user)
        reply, process = await self._send("POST", f"{_home(user)}/search", query, avoid=avoid)
        found = [_found.decode(reply.body)] if reply.status in DONE else []
        self._note_found("search", user, reply, process, found, [told])

    async def _batch(self, user: str) -> None:
        queries = [self._query(user) for _ in range(2)]
        body = {"queries": [query for query, _ in queries]}
        reply, process = await self._send("POST", f"{_home(user)}/search/batch", body)
        found = _batch.decode(reply.body).results if reply.status in DONE else []
        self._note_found("batch", user, reply, process, found, [told for _, told in queries])

    async def _list(self, user: str) -> None:
        reply, process = await self._send("GET", f"{_home(user)}/memories?limit={LIMIT}")
        found = [_found.decode(reply.body)] if reply.status in DONE else []
        self._note_found("list", user, reply, process, found, [{}])

    def _note_found(
        self,
        operation: Operation,
        user: str,
        reply: Reply,
        process: str,
        found: Sequence[_Found],
        told: Sequence[dict[str, Any]],
    ) -> None:
        if not found:
            self._note(operation, user, reply, process)
        for one, known in zip(found, told, strict=False):
            returned = tuple(Item(memory.id, memory.text) for memory in one.memories)
            complete = not one.partial and one.cursor is None
            self._load.trace.served_by[one.served_by or operation] += 1
            self._note(operation, user, reply, process, returned=returned, complete=complete, **known)


def _home(user: str) -> str:
    return f"/v1/users/{quote(user, safe='')}"


def _path(user: str, memory_id: str) -> str:
    return f"{_home(user)}/memories/{quote(memory_id, safe='')}"


def _item(memory: _Memory) -> Item:
    return Item(memory.id, memory.text, memory.superseded_by is None)


def _generation(reply: Reply) -> int | None:
    return _receipt.decode(reply.body).generation if reply.status in DONE else None
