"""One client that reads and writes memories and notes what it saw."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import msgspec

from tests.accept.history import Event, Item, Operation, Outcome
from tests.accept.history_client import HttpClient, Reply

#: ids that a careless prefix, case or path would mix up
USERS = ("u", "u1", "u10", "U1", "u1/a", "ü")
IDS = tuple(f"m{i}" for i in range(12))
SESSIONS = ("s0", "s1")
#: ids of the messages of each session: one that is said again under its id is another text
MESSAGES = tuple(f"{session}c{i}" for session in SESSIONS for i in range(3))
WORDS = "amber basil cedar delta ember fern".split()
#: of whom a part of the texts speaks, and what a part of the memories is about
NAMES, TOPIC = ("Nora", "Ravi"), "herbs"
#: every text holds the word `common`, so every query finds all current memories of the user
QUERIES = (
    ("common", "keyword"),
    ("common amber", "hybrid"),
    ("common basil cedar", "keyword"),
    ("common delta", "hybrid"),
    ("common ember fern", "hybrid"),
)
LIMIT = 2 * len(IDS + MESSAGES)
CONSISTENCY = {"eventual": 84, "session": 8, "strong": 8}
#: seconds a client rests after a request without a useful reply
REST_S = 0.03
#: share of the strong writes whose client looks at once whether another process knows
PROBE = 0.5
#: share of the memories that are important, and of those that are about the topic
IMPORTANT = ABOUT_TOPIC = 0.4
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
    #: blocks of contexts that showed memories or quoted some, by part; partial stages; streams that broke off
    shown: Counter[str] = field(default_factory=Counter)
    #: memories loaded ahead were shown by so many contexts that were asked for nothing else
    prefetched_alone: int = 0
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


@dataclass
class Ground:
    """What the clients of one run share. `ports` has a port per process; whoever replaces one replaces it."""

    ports: list[int]
    offers: Offers
    seed: int = 0
    trace: Trace = field(default_factory=Trace)
    #: makes texts unique
    numbers: Iterator[int] = field(default_factory=itertools.count)
    #: the newest generation that a client knows of each user
    generations: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    #: ids of each user that may be there, the latest written last
    there: defaultdict[str, dict[str, None]] = field(default_factory=lambda: defaultdict(dict))


class Actor:
    """One client: one request at a time, each to a process chosen at random.

    Every other client leaves one process out, so that a stopped process does not catch all of them.
    """

    def __init__(self, ground: Ground, number: int) -> None:
        self._ground, self._number = ground, number
        self._rng = random.Random(f"{ground.seed} {number}")
        self._http = HttpClient()
        slots = range(len(ground.ports))
        self._slots = [i for i in slots if number % 2 == 0 or i != number // 2 % len(slots)]

    async def do(self, operation: str, user: str, memory_id: str) -> None:
        """Do one thing, and what follows from it; not everything is about one memory."""
        match operation:
            case "put" | "patch" | "delete" | "correct" | "get":
                await getattr(self, f"_{operation}")(user, memory_id)
            case _:
                await getattr(self, f"_{operation}")(user)

    def close(self) -> None:
        """Close every connection."""
        self._http.close()

    async def _send(
        self, method: str, path: str, body: Any = None, *, avoid: str = "", accept: str = "application/json"
    ) -> tuple[Reply, str]:
        """Return the reply of a process, and its name; rest when it was no good."""
        slot = self._rng.choice([i for i in self._slots if f"p{i}" != avoid])
        content = b"" if body is None else msgspec.json.encode(body)
        reply = await self._http.request(self._ground.ports[slot], method, path, content, accept=accept)
        trace, name = self._ground.trace, f"p{slot}"
        trace.requests += 1
        if reply.status == 0 or reply.status >= 500:
            what = f"{method} {path} at {name}: {reply.status or reply.why} {reply.body[:200].decode()}"
            trace.errors.append((reply.began, reply.ended, what))
            await asyncio.sleep(REST_S)
        return reply, name

    def _note(self, operation: Operation, user: str, reply: Reply, process: str, **more: Any) -> None:
        if reply.status in DONE:
            outcome: Outcome = "ok"
        else:
            outcome = "failed" if not reply.sent or 400 <= reply.status < 500 else "unknown"
        if outcome == "ok" and more.get("generation"):
            self._ground.generations[user] = max(self._ground.generations[user], more["generation"])
        if outcome == "ok" and not more.get("returned"):
            self._keep_there(operation, user, more.get("id", ""))
        note = {"client": self._number, "operation": operation, "user": user, "process": process}
        times = {"began": reply.began, "ended": reply.ended}
        self._ground.trace.events.append(Event(**{"outcome": outcome, **note, **times, **more}))

    def _keep_there(self, operation: Operation, user: str, memory_id: str) -> None:
        there = self._ground.there[user]
        if operation == "forget":
            there.clear()
        elif operation in ("put", "say", "correct", "delete"):
            there.pop(memory_id, None)
            if operation != "delete":
                there[memory_id] = None

    def _text(self, user: str, memory_id: str, name: str = "") -> str:
        """Return a text that nobody wrote before; it names somebody, or with a name that one."""
        words = self._rng.sample(WORDS, 2)
        words += [name] if name else self._rng.choice([[], [self._rng.choice(NAMES)]])
        return f"common {' '.join(words)} of {user} {memory_id} n{next(self._ground.numbers)}"

    async def _put(self, user: str, memory_id: str, name: str = "") -> None:
        text = self._text(user, memory_id, name)
        wait = "" if self._rng.random() < 0.7 else "?wait=false"
        strong = self._ground.offers.strong_put and self._rng.random() < 0.2
        path = f"{home(user)}/memories" + ("?consistency=strong" if strong else wait)
        body: dict[str, Any] = {"id": memory_id, "text": text, "entities": named(text)}
        if self._rng.random() < IMPORTANT:  # its text gets into the profile
            body["importance"] = 0.9
        if self._rng.random() < ABOUT_TOPIC:
            body["topics"] = [TOPIC]
        reply, process = await self._send("POST", path, body)
        more: dict[str, Any] = {"consistency": "strong"} if strong else {}
        more |= {"id": memory_id, "text": text, "generation": generation_of(reply)}
        self._note("put", user, reply, process, **more)
        if strong and reply.status in DONE:
            await self._probe(user, memory_id, process)

    async def _patch(self, user: str, memory_id: str) -> None:
        text = self._text(user, memory_id)
        strong = self._ground.offers.strong_patch and self._rng.random() < 0.5
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
        self._note("delete", user, reply, process, id=memory_id, generation=generation_of(reply))
        if reply.status in DONE:
            await self._probe(user, memory_id, process)

    async def _correct(self, user: str, memory_id: str) -> None:
        new = self._rng.choice([other for other in IDS if other != memory_id])
        text = self._text(user, new)
        body = {"ids": [memory_id], "memory": {"id": new, "text": text}}
        reply, process = await self._send("POST", f"{home(user)}/corrections", body)
        more = {"id": new, "text": text, "replaced": (memory_id,), "generation": generation_of(reply)}
        self._note("correct", user, reply, process, **more)
        if reply.status in DONE:
            await self._probe(user, memory_id, process)

    async def _forget(self, user: str) -> None:
        reply, process = await self._send("DELETE", home(user))
        self._note("forget", user, reply, process)
        if reply.status in DONE:
            await self._probe(user, self._rng.choice(IDS), process)

    async def _probe(self, user: str, memory_id: str, writer: str) -> None:
        if self._rng.random() < PROBE:
            await self._search(user, avoid=writer)
            await self._get(user, memory_id, avoid=writer)

    async def _get(self, user: str, memory_id: str, *, avoid: str = "") -> None:
        offers, dice, wish = self._ground.offers, self._rng.random(), ""
        more: dict[str, Any] = {"id": memory_id}
        if offers.strong_get and dice < 0.1:
            more["consistency"], wish = "strong", "?consistency=strong"
        elif offers.session_get and dice > 0.9:
            known = self._ground.generations[user]
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
            told["min_version"] = self._ground.generations[user]
        return query | (told if consistency != "eventual" else {}), told

    async def _search(self, user: str, *, avoid: str = "") -> None:
        query, told = self._query(user)
        reply, process = await self._send("POST", f"{home(user)}/search", query, avoid=avoid)
        found = [_found.decode(reply.body)] if reply.status in DONE else []
        self._note_found("search", user, reply, process, found, [told])

    async def _batch(self, user: str) -> None:
        queries = [self._query(user) for _ in range(2)]
        body = {"queries": [query for query, _ in queries]}
        reply, process = await self._send("POST", f"{home(user)}/search/batch", body)
        found = _batch.decode(reply.body).results if reply.status in DONE else []
        self._note_found("batch", user, reply, process, found, [told for _, told in queries])

    async def _list(self, user: str) -> None:
        reply, process = await self._send("GET", f"{home(user)}/memories?limit={LIMIT}")
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
            self._ground.trace.served_by[one.served_by or operation] += 1
            self._note(operation, user, reply, process, returned=returned, complete=complete, **known)


def named(text: str) -> list[str]:
    return [name for name in NAMES if name in text]


def home(user: str) -> str:
    return f"/v1/users/{quote(user, safe='')}"


def _path(user: str, memory_id: str) -> str:
    return f"{home(user)}/memories/{quote(memory_id, safe='')}"


def _item(memory: _Memory) -> Item:
    return Item(memory.id, memory.text, memory.superseded_by is None)


def generation_of(reply: Reply) -> int | None:
    return _receipt.decode(reply.body).generation if reply.status in DONE else None
