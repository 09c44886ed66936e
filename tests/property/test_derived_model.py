"""What is derived against what it is made from: handlers stop at each round trip, and writes overtake them.

The handlers are the worker's own. Every memory says words that no other ever says, so whatever is left of a
memory that is gone is seen in the raw bytes of what is derived.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np
import pytest
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from redismem.client import Argument, Client
from redismem.errors import StoreError
from redismem.index import Indexes
from redismem.jobs import Jobs
from redismem.keys import Owner
from redismem.lualib import Functions
from redismem.material import digest
from redismem.reembed import Reembedder, is_missing_index
from redismem.service import Service
from redismem.types import CorrectionRequest, MemoryInput, MemoryPatch
from redismem.views import ProfilePatch
from redismem.words import text_words
from redismem.worker.links import link
from redismem.worker.materials import Library
from redismem.worker.pool import A, Pool, T
from redismem.worker.profiles import profile
from redismem.worker.rounds import decay, embed
from redismem.worker.summaries import summary
from redismem.worker.tools import Overtaken, Tools
from redismem.worker.topics import topics

#: runs, and in each writes and steps of handlers
RUNS, STEPS = 2, 1000
#: handlers on their way at the same time
MOST_RUNNING = 3
#: memories of the owner, about
ENOUGH = 18

IDS = [f"id{i:02d}q" for i in range(40)]
THEMES = {
    "garden": "tomatoes compost greenhouse seedlings watering".split(),
    "music": "violin orchestra concert rehearsal sonata".split(),
    "travel": "suitcase airport passport railway harbour".split(),
}
SENTENCES = [
    "I am working on a {token} {0} for the {1} and the {2} and more {3}",
    "My favourite {token} {0} was better than the {1} with {2} near {3}",
    "I was born near the {token} {0} beside the {1}, the {2} and the {3}",
    # two of these contradict each other
    "I pay {price} euros a month for lessons in the old school near my house. It is {token} {0}",
    "Call me {Token}. I like the {0} with {1}, {2} and {3}",
]
DAYS = [datetime(2026, 3, day, 12, tzinfo=UTC) for day in (2, 3)]
NAMED = "Zoe of the caller"
TOKEN, ID = re.compile(rb"zq\d+x"), re.compile(rb"id\d\dq")

#: what must have happened, or the run has shown nothing
EXPECTED = {
    *("rm_profile_v1 OK", "rm_profile_v1 STALE", "rm_summary_v1 OK", "rm_summary_v1 STALE"),
    *("rm_link_v1 OK", "rm_link_v1 STALE", "rm_link_v1 GONE", "rm_topics_v1 OK", "rm_topics_end_v1 OK"),
    *("rm_assign_v1", "rm_decay_v1", "rm_embed_v1 OK"),
    *("put", "update", "delete", "correct", "forget", "change_profile"),
}


class Inline(Pool):
    """Computes at once: a process for each run would take seconds to start.

    With one thread: small matrices take ten times as long where threads wait for a core.
    """

    async def run(self, work: Callable[[*A], T], *args: *A) -> T:
        with threadpool_limits(limits=1, user_api="blas"):
            return work(*args)


class Gated(Client):
    """A client whose calls wait, each until it is let through."""

    def __init__(self, client: Client, seen: Counter[str]) -> None:
        self._client = client
        self._seen = seen
        self._go = asyncio.Semaphore(0)
        self.stopped = asyncio.Event()

    async def execute(self, *command: Argument) -> Any:
        await self._turn()
        reply = await self._client.execute(*command)
        if command[0] == "FCALL":
            words = reply if isinstance(reply, list) else [reply]
            for word in words:
                shown = f" {word.decode()}" if isinstance(word, bytes) and word.isupper() else ""
                self._seen[f"{command[1]!s}{shown}"] += 1
        return reply

    async def pipeline(self, commands: Sequence[Sequence[Argument]]) -> list[Any]:
        if not commands:
            return []
        await self._turn()
        return await self._client.pipeline(commands)

    async def _turn(self) -> None:
        self.stopped.set()
        await self._go.acquire()

    def let_through(self) -> None:
        self.stopped.clear()
        self._go.release()


class Handler:
    """A job on its way, from one round trip to the next."""

    def __init__(
        self, service: Service, seen: Counter[str], work: Callable[[Tools], Awaitable[None]], name: str
    ) -> None:
        self.name = name
        self._client = client = Gated(service.client, seen)
        functions = Functions(client)
        tools = Tools(
            client=client,
            functions=functions,
            embedder=service.embedder,
            indexes=Indexes(functions, service.embedder),
            reembedder=Reembedder(client, functions, service.embedder),
            jobs=Jobs(functions),
            library=Library(client),
            pool=Inline(),
            settings=service.settings,
        )
        self.task = asyncio.ensure_future(work(tools))
        self.task.add_done_callback(lambda _: client.stopped.set())

    async def step(self) -> bool:
        """Let it go on to its next round trip; return whether it has ended."""
        await self._client.stopped.wait()
        if not self.task.done():
            self._client.let_through()
            await self._client.stopped.wait()
        if not self.task.done():
            return False
        with suppress(Overtaken):
            try:
                self.task.result()
            except StoreError as exc:  # the owner was forgotten: the worker would try again, and find that
                if not is_missing_index(exc):
                    raise
        return True


@dataclass
class Stored:
    """Everything of one owner as it stands in Redis, keys by their second part and rest."""

    memories: dict[str, dict[str, bytes]]
    derived: dict[tuple[str, str], Any]

    @property
    def live(self) -> dict[str, dict[str, bytes]]:
        return {one: fields for one, fields in self.memories.items() if "superseded_by" not in fields}

    def hash(self, kind: str, rest: str = "") -> dict[str, bytes]:
        found: dict[str, bytes] = self.derived.get((kind, rest), {})
        return found

    def each(self, kind: str) -> dict[str, dict[str, bytes]]:
        return {rest: value for (found, rest), value in self.derived.items() if found == kind}

    def digest(self, memory_id: str) -> str | None:
        raw = self.live.get(memory_id)
        names = ("text", "topics", "entities", "event_date")
        return digest(*(raw.get(name, b"") for name in names)) if raw else None


KINDS = {"similar", "conflicts", "made", "profile", "summary", "cluster", "fresh", "summaries", "topics"}


async def stored(client: Client, owner: Owner) -> Stored:
    memories: dict[str, dict[str, bytes]] = {}
    derived: dict[tuple[str, str], Any] = {}
    keys = [key.decode() for key in await client.execute("KEYS", f"redismem:*{{{owner.tag}}}*")]
    wanted = [(key.split(":")[1], key.partition("}")[2][1:], key) for key in keys]
    wanted = [item for item in wanted if item[0] in KINDS or item[0] == "memory"]
    reading = {"fresh": ("SMEMBERS",), "summaries": ("ZRANGE", 0, -1), "topics": ("ZRANGE", 0, -1)}
    commands = []
    for kind, _, key in wanted:
        command, *rest = reading.get(kind, ("HGETALL",))
        commands.append((command, key, *rest))
    for (kind, rest, _), value in zip(wanted, await client.pipeline(commands), strict=True):
        if kind in reading:
            derived[kind, rest] = sorted(value)
            continue
        fields = {name.decode(): raw for name, raw in zip(value[::2], value[1::2], strict=True)}
        if kind == "memory":
            memories[rest] = fields
        else:
            derived[kind, rest] = fields
    return Stored(memories, derived)


def check(found: Stored) -> None:
    """Nothing derived says, names or rests on what is gone."""
    check_bytes(found)
    assert {one: items(raw) for one, raw in found.hash("made").items()} == check_sources(found)
    check_edges(found)
    if (known := found.derived.get(("fresh", ""))) is not None:
        assert {raw.decode() for raw in known} <= set(found.live)
    for keys, listed in (("summary", "summaries"), ("cluster", "topics")):
        names = {raw.decode() for raw in found.derived.get((listed, ""), [])}
        assert set(found.each(keys)) == names, keys


def check_bytes(found: Stored) -> None:
    said = b"\n".join(
        fields.get(name, b"") for fields in found.live.values() for name in ("text", "topics", "entities")
    ).lower()
    tokens, ids = set(TOKEN.findall(said)), {one.encode() for one in found.live}
    for (kind, rest), value in found.derived.items():
        if isinstance(value, dict):
            # ids in the digests of a topic outlive their memories: see test_derived.py
            pairs = list(value.items())
            parts = [part for pair in pairs for part in pair]
        else:
            parts = value
        raw = b"\n".join(
            [rest.encode(), *(part.encode() if isinstance(part, str) else part for part in parts)]
        )
        assert set(TOKEN.findall(raw.lower())) <= tokens, (kind, rest)
        assert set(ID.findall(raw)) <= ids, (kind, rest)


def check_sources(found: Stored) -> dict[str, set[str]]:
    """Check what was said by whom; return for each memory the names of what was made from it."""
    names: dict[str, set[str]] = {}
    made = {f"summary:{rest}": fields for rest, fields in found.each("summary").items()}
    if found.hash("profile"):
        made["profile"] = found.hash("profile")
    for name, fields in made.items():
        sources = msgspec.json.decode(fields.get("sources", b"[]"), type=list[str])
        assert [found.digest(one) for one in sources] == fields.get("digests", b"").decode().split(), name
        for one in sources:
            names.setdefault(one, set()).add(name)
        assert name == "profile" or sources, name
    for number, fields in found.each("cluster").items():
        words = msgspec.json.decode(fields["words"], type=list[tuple[str, list[str]]])
        assert fields["label"].decode() == ", ".join(word for word, _ in words[:3])
        for word, witnesses in words:
            assert witnesses, word
            for one in witnesses:
                raw = found.live[one]
                assert word in text_words(b" ".join((raw["text"], raw.get("topics", b""))).decode()), (
                    word,
                    one,
                )
                names.setdefault(one, set()).add(f"cluster:{number}")
    return names


def check_edges(found: Stored) -> None:
    edges = edges_of(found)
    similar = found.hash("similar")
    assert set(edges) == {
        (one, name[1:]) for name in similar if name[0] == "i" for one in items(similar[name])
    }
    pairs = {tuple(pair.split("\x1f")) for pair in found.hash("conflicts")}
    assert pairs <= set(edges) | {(other, one) for one, other in edges}


def check_cosines(found: Stored) -> None:
    """Every edge has the cosine of the vectors that stand there."""
    for ends, cosine in edges_of(found).items():
        one, other = (np.frombuffer(found.live[end]["embedding"], np.float16).astype(float) for end in ends)
        assert cosine == pytest.approx(one @ other, abs=5e-3), ends


def edges_of(found: Stored) -> dict[tuple[str, str], float]:
    edges = {}
    for name, raw in found.hash("similar").items():
        for edge in items(raw) if name[0] == "o" else ():
            other, _, cosine = edge.partition("\x1e")
            edges[name[1:], other] = float(cosine)
    return edges


def items(raw: bytes) -> set[str]:
    return {item for item in raw.decode().split("\x1f") if item}


@dataclass
class Play:
    """One run: what a user does, and what a worker does meanwhile."""

    service: Service
    owner: Owner
    random: random.Random
    running: list[Handler] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    #: ids as of the last look: of memories that are not superseded, and of all
    live: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)
    number: int = 0
    is_named: bool = False

    async def run(self, steps: int) -> None:
        for _ in range(steps):
            roll, has_room = self.random.random(), len(self.running) < MOST_RUNNING
            if self.running and roll < 0.76:
                await self.step(self.random.choice(self.running))
            elif has_room and roll < 0.92:
                self.running.append(await self.started())
            else:
                await self.write()
            await self.check()

    async def step(self, handler: Handler) -> None:
        if await handler.step():
            self.running.remove(handler)

    async def check(self) -> None:
        found = await stored(self.service.client, self.owner)
        check(found)
        check_cosines(found)
        if self.is_named:
            assert found.hash("profile")["display_name"] == msgspec.json.encode(NAMED)

    async def settle(self) -> None:
        while self.running:
            await self.step(self.running[0])
            await self.check()

    async def started(self) -> Handler:
        found = await stored(self.service.client, self.owner)
        kind = self.random.choice(
            ["link", "topics", "topics", "profile", "profile", "embed", "decay", *["summary"] * 5]
        )
        owner = self.owner
        works = {"link": link, "topics": topics, "profile": profile, "embed": embed, "decay": decay}
        if kind != "summary":
            return Handler(self.service, self.seen, lambda tools: works[kind](tools, owner), kind)
        day = self.random.choice([*DAYS, datetime.now(UTC)])
        names = [("day", f"{day:%Y-%m-%d}"), ("month", "2026-03"), ("topic", str(self.random.randint(1, 4)))]
        entities = {raw["entities"].decode() for raw in found.live.values() if "entities" in raw}
        names += [("entity", packed.split("|")[0]) for packed in sorted(entities)[:2]]
        names += [("topic", number) for number in sorted(found.each("cluster"))]
        what, name = self.random.choice(names)
        return Handler(
            self.service, self.seen, lambda tools: summary(tools, owner, what, name), f"{what}:{name}"
        )

    async def write(self) -> None:
        found = await stored(self.service.client, self.owner)
        live, total = sorted(found.live), len(found.live)
        kinds = {
            "put": 6.0,
            "update": 4.0,
            "delete": 1.0,
            "correct": 2.0,
            "forget": 0.15,
            "change_profile": 0.3,
        }
        kinds |= {"put": 20.0} if total < ENOUGH // 2 else {}
        kinds |= {"delete": 5.0} if total > ENOUGH else {}
        kind = self.random.choices(list(kinds), list(kinds.values()))[0]
        if kind in ("update", "delete", "correct") and not live:
            kind = "put"
        if kind == "forget" and total < ENOUGH:
            kind = "put"
        self.seen[kind] += 1
        self.live, self.known = live, sorted(found.memories)
        await getattr(self, f"_{kind}")()

    async def _put(self) -> None:
        await self.service.writer.put(self.owner, [self.memory() for _ in range(self.random.randint(1, 3))])

    async def _update(self) -> None:
        new = self.memory()
        changes: dict[str, Any] = {
            "text": new.text,
            "topics": new.topics,
            "entities": new.entities,
            "importance": self.random.random(),
            "pinned": self.random.random() < 0.5,
            "session_id": new.session_id,
        }
        names = self.random.sample(sorted(changes), self.random.randint(1, 2))
        patch = MemoryPatch(**{name: changes[name] for name in names})
        # a superseded one too
        await self.service.writer.update(self.owner, self.random.choice(self.known), patch)

    async def _delete(self) -> None:
        await self.service.writer.delete(self.owner, self.random.choice(self.known))

    async def _correct(self) -> None:
        old = self.random.sample(self.live, min(len(self.live), self.random.randint(1, 2)))
        free = [one for one in IDS if one not in self.known]
        if free:
            memory = self.memory(self.random.choice(free))
            await self.service.writer.correct(self.owner, CorrectionRequest(ids=old, memory=memory))

    async def _forget(self) -> None:
        self.is_named = False
        await self.service.writer.forget(self.owner)

    async def _change_profile(self) -> None:
        self.is_named = self.random.random() < 0.7
        patch = ProfilePatch(display_name=NAMED if self.is_named else None)
        await self.service.views.change_profile(self.owner, patch)

    def memory(self, memory_id: str | None = None) -> MemoryInput:
        self.number += 1
        token, theme = f"zq{self.number}x", self.random.choice(sorted(THEMES))
        words = self.random.sample(THEMES[theme], 4)
        text = self.random.choice(SENTENCES).format(
            *words, token=token, Token=token.capitalize(), price=self.number
        )
        return MemoryInput(
            id=memory_id or self.random.choice(IDS),
            text=text,
            topics=[theme, f"{theme} {token}"][: self.random.randint(0, 2)],
            entities=self.random.sample(["Ann", "Ben", "Cleo"], self.random.randint(0, 2)),
            memory_type=self.random.choice(["semantic", "fact", "preference", "project"]),
            session_id=self.random.choice([None, None, "s", "t"]),
            event_date=self.random.choice([None, *DAYS]),
        )


@pytest.fixture
async def written(service: Service, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Service]:
    """A service whose writes end with their Function: no barrier, and vectors come from the handlers only."""

    async def unheard(*_args: object, **_options: object) -> None:
        return

    monkeypatch.setattr(service.coherence, "changed", unheard)
    monkeypatch.setattr(service.backfill, "add", lambda *_: None)
    yield service
    monkeypatch.undo()


async def test_nothing_derived_outlives_its_source_whatever_overtakes_what(written: Service) -> None:
    seen: Counter[str] = Counter()
    for seed in range(RUNS):
        play = Play(written, written.owner(f"user {seed}"), random.Random(seed), seen=seen)
        await play.run(STEPS)
        await play.settle()
    assert set(seen) >= EXPECTED, seen


async def test_nothing_derived_is_left_when_the_last_memory_is_deleted(written: Service) -> None:
    play = Play(written, written.owner("a b"), random.Random(1000))
    await play.run(STEPS // 3)
    await play.settle()
    for memory_id in sorted((await stored(written.client, play.owner)).memories):
        await written.writer.delete(play.owner, memory_id)
        await play.check()
    left = await stored(written.client, play.owner)
    assert not left.memories
    assert {kind for kind, _ in left.derived} <= {"cluster", "topics", "profile"}
    assert all(fields["words"] == b"[]" and not fields["label"] for fields in left.each("cluster").values())
    assert set(left.hash("profile")) <= {"patched", "display_name"}
