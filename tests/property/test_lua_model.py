"""lua/write.lua against a model of its contract: thousands of random calls, some of them late."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import fakeredis
import numpy as np
import pytest

from redismem.client import Argument
from redismem.keys import Owner
from redismem.lualib import shipped_libraries
from redismem.query import index_schema
from redismem.service import Service
from redismem.words import speaker
from redismem.write import record_arguments

EMBEDDER, DIM, FIELD, LOG_LENGTH, STEP = "x", 4, "embedding", 1000, 1048576
IDS = ["a", "A", "1", "n", "pad", "a b", "l{x}", "é😀", "00"]
SESSIONS = [None, "s", "S", "t s"]
TEXTS = ["tea", "Anna: tea", "Mary Ann: coffee", "rain"]

Call = Callable[..., Awaitable[Any]]
#: of a record, what is compared
SHOWN = "text content_hash session_id superseded_by version created_at embedding embedder".split()


@dataclass
class Record:
    """A stored memory. `made_from` is its vector's own text and the one before; None without a vector."""

    id: str
    text: str
    content_hash: str
    session: str | None
    superseded_by: str | None
    version: int
    created_us: int
    made_from: tuple[str, str | None] | None = None


@dataclass
class Written:
    """A record as it is sent; `vector` says what its vector was made from."""

    id: str
    kind: str
    text: str
    flavour: int
    session: str | None
    prev: tuple[str, str] = ("", "")
    superseded_by: str | None = None
    created_us: int | None = None
    vector: bytes | None = None

    @property
    def content_hash(self) -> str:
        return f"{self.text}#{self.flavour}#{self.session}"

    def arguments(self) -> list[Argument]:
        fields: dict[str, str | bytes] = {"text": self.text, "content_hash": self.content_hash}
        maybe = {"session_id": self.session, "superseded_by": self.superseded_by, "embedding": self.vector}
        fields |= {name: value for name, value in maybe.items() if value is not None}
        created = "" if self.created_us is None else f"{self.created_us / 1e6:.6f}"
        return record_arguments(self.id, self.kind, fields, *self.prev, created)


@dataclass
class Model:
    """What the Functions promise, in Python. Methods return the reply that the Function must give."""

    made_from: dict[bytes, tuple[str, str | None]] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)
    chains: dict[str, list[str]] = field(default_factory=dict)
    places: dict[str, tuple[int, str]] = field(default_factory=dict)
    sessions: int = 0
    generation: int | None = None
    last_created_us: int = 0
    now_ms: int = 1_800_000_000_000
    stale: list[str] = field(default_factory=list)

    def session_of(self, memory_id: str) -> str | None:
        return next((name for name, chain in self.chains.items() if memory_id in chain), None)

    def neighbour(self, memory_id: str, offset: int) -> str:
        chain = self.chains.get(self.session_of(memory_id) or "", [])
        at = chain.index(memory_id) + offset if chain else -1
        return chain[at] if 0 <= at < len(chain) else ""

    def bump(self) -> int:
        self.generation = (self.now_ms * 1000 if self.generation is None else self.generation) + 1
        return self.generation

    def drop_successor(self, memory_id: str) -> None:
        if after := self.neighbour(memory_id, 1):
            self.records[after].made_from = None
            self.stale.append(after)

    def unlink(self, memory_id: str) -> None:
        session = self.session_of(memory_id)
        if session is not None:
            self.drop_successor(memory_id)
            self.chains[session].remove(memory_id)
            del self.places[memory_id]
            if not self.chains[session]:
                del self.chains[session]

    def relink(self, memory_id: str, wanted: str | None, name: str) -> None:
        if self.session_of(memory_id) != wanted:
            self.unlink(memory_id)
        if wanted is None:
            return
        chain = self.chains.setdefault(wanted, [])
        if memory_id in chain:
            position = self.places[memory_id][0]
        elif chain:
            position = self.places[chain[-1]][0] + 1
        else:
            self.sessions += 1
            position = self.sessions * STEP
        if memory_id not in chain:
            chain.append(memory_id)
        self.places[memory_id] = position, name

    def fits(self, memory_id: str, prev: tuple[str, str]) -> bool:
        before = self.neighbour(memory_id, -1)
        return before == prev[0] and (not before or self.records[before].content_hash == prev[1])

    def new_created_us(self) -> int:
        self.last_created_us = max(self.now_ms * 1000, self.last_created_us + 1)
        return self.last_created_us

    def store(self, new: Written, superseded_by: str | None, made_from: Any, embedder: str) -> Record:
        """Write a record that has its place in time; the caller bumped the generation for it."""
        old = self.records.get(new.id)
        self.relink(new.id, None if superseded_by else new.session, speaker(new.text))
        if new.vector and embedder == EMBEDDER and self.fits(new.id, new.prev):
            made_from = self.made_from[new.vector]
        created = old.created_us if old else new.created_us
        record = Record(
            *(new.id, new.text, new.content_hash, new.session, superseded_by, self.generation or 0),
            *(self.new_created_us() if created is None else created, made_from),
        )
        self.records[new.id] = record
        return record

    def put_one(self, new: Written, embedder: str) -> list[Any]:
        old = self.records.get(new.id)
        if old and (old.content_hash, old.superseded_by) == (new.content_hash, new.superseded_by):
            return ["UNCHANGED", new.id, old.version, int(old.made_from is not None)]
        if old and new.kind == "derived":
            return ["TAKEN", new.id, old.version, 0]
        self.bump()
        record = self.store(new, new.superseded_by, None, embedder)
        self.drop_successor(new.id)
        return ["UPDATED" if old else "CREATED", new.id, record.version, int(record.made_from is not None)]

    def put(self, news: list[Written], embedder: str) -> list[Any]:
        self.stale = []
        outcomes: list[Any] = []
        for new in news:
            waiting = outcomes and outcomes[-4] in ("TAKEN", "WAITING")
            outcomes += ["WAITING", new.id, 0, 0] if waiting else self.put_one(new, embedder)
        return ["OK", self.generation, self.stale, outcomes]

    def update(self, new: Written, version: int, embedder: str) -> list[Any]:
        old, self.stale = self.records.get(new.id), []
        if old is None:
            return ["MISSING"]
        if old.version != version:
            return ["STALE", old.version]
        keep = new.kind == "keep"
        self.bump()
        record = self.store(new, old.superseded_by, old.made_from if keep else None, embedder)
        if not keep:
            self.drop_successor(new.id)
        return ["OK", record.version, int(record.made_from is not None), self.stale]

    def delete(self, ids: list[str]) -> list[Any]:
        self.stale, outcomes = [], []
        for memory_id in ids:
            self.unlink(memory_id)
            outcomes.append("DELETED" if self.records.pop(memory_id, None) else "MISSING")
            if outcomes[-1] == "DELETED":
                self.bump()
        return ["OK", self.generation or 0, self.stale, outcomes]

    def correct(self, olds: list[str], new: Written, embedder: str) -> list[Any]:
        self.stale = []
        for memory_id in olds:
            if memory_id not in self.records:
                return ["MISSING", memory_id]
        there = self.records.get(new.id)
        same = there and there.content_hash == new.content_hash and there.superseded_by is None
        done = all(self.records[memory_id].superseded_by == new.id for memory_id in olds)
        if there and same and done:
            return ["UNCHANGED", self.generation, there.version, int(there.made_from is not None), []]
        if there and not same:
            return ["TAKEN", new.id]
        outcome = self.put_one(new, embedder)[0]
        for memory_id in olds:
            if self.neighbour(memory_id, -1):
                self.records[memory_id].made_from = None
                self.stale.append(memory_id)
            self.unlink(memory_id)
            self.records[memory_id].superseded_by = new.id
            self.records[memory_id].version = self.bump()
        record = self.records[new.id]
        return [outcome, self.generation, record.version, int(record.made_from is not None), self.stale]

    def embed(self, turns: list[tuple[str, str, str, str, bytes]], embedder: str) -> list[Any]:
        words = []
        for memory_id, content_hash, prev_id, prev_hash, vector in turns:
            record = self.records.get(memory_id)
            if record is None:
                words.append("MISSING")
            elif embedder != EMBEDDER or self.generation is None:
                words.append("REFUSED")
            elif record.content_hash != content_hash or not self.fits(memory_id, (prev_id, prev_hash)):
                words.append("STALE")
            else:
                record.made_from = self.made_from[vector]
                words.append("OK")
        if "OK" in words:
            self.bump()
        return words

    def forget(self) -> None:
        self.records, self.chains, self.places = {}, {}, {}
        self.sessions, self.generation, self.last_created_us = 0, None, 0


def plain(reply: Any) -> Any:
    """Return a reply with texts for bytes and numbers."""
    if isinstance(reply, list):
        return [plain(item) for item in reply]
    return reply.decode() if isinstance(reply, bytes) else str(reply)


@dataclass
class Play:
    """Random calls to a server and to the model; both must answer and look alike after each.

    `pipeline` returns the replies of several commands.
    """

    execute: Call
    pipeline: Call
    open_index: Call
    owner: Owner
    rng: random.Random
    model: Model = field(default_factory=Model)
    late: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)
    highest: int = 0
    outcomes: set[str] = field(default_factory=set)

    def vector(self, text: str, prev: tuple[str, str]) -> bytes:
        """Return a vector that was never used, made from a text and, by its hash, the one before."""
        number = len(self.model.made_from)
        raw = np.array([1, number % 2000, number // 2000, 0], np.float16).tobytes()
        self.model.made_from[raw] = text, prev[1].split("#")[0] if prev[0] else None
        return raw

    def written(self, kind: str, memory_id: str | None = None) -> Written:
        rng, model = self.rng, self.model
        text, session = rng.choice(TEXTS), rng.choice(SESSIONS)
        new = Written(memory_id or rng.choice(IDS), kind, text, rng.randint(0, 1), session)
        if kind == "keep" and (old := model.records.get(new.id)):
            new.text, new.session = old.text, old.session
            return new
        if kind != "keep" and rng.random() < 0.8:
            chain = model.chains.get(new.session or "", [])
            before = model.neighbour(new.id, -1) if new.id in chain else chain[-1] if chain else ""
            if rng.random() < 0.2:
                before = rng.choice(IDS)
            record = model.records.get(before)
            new.prev = (before, record.content_hash if record else "tea#0#s" if before else "")
            new.vector = self.vector(new.text, new.prev)
        return new

    def random_call(self) -> tuple[str, tuple[Any, ...]]:
        rng, records = self.rng, self.model.records
        embedder = EMBEDDER if rng.random() < 0.95 else "y"
        some = rng.sample(IDS, rng.randint(1, 3))
        there = rng.choice(list(records)) if records and rng.random() < 0.9 else rng.choice(IDS)
        match rng.choice(["put"] * 5 + ["update"] * 4 + ["embed"] * 5 + ["delete"] * 2 + ["correct"] * 2):
            case "put":
                news = [self.written(rng.choice(["given", "given", "derived"])) for _ in some]
                for new in news:
                    new.superseded_by = rng.choice(IDS) if rng.random() < 0.1 else None
                    new.created_us = rng.randint(1, 4 * 10**15) if rng.random() < 0.2 else None
                return "put", (news, embedder)
            case "update":
                new = self.written(rng.choice(["given", "given", "keep"]), there)
                version = records[there].version if there in records and rng.random() < 0.9 else self.highest
                return "update", (new, version, embedder)
            case "delete":
                return "delete", ([there, *some[1:]],)
            case "correct":
                new = self.written("given", rng.choice([one for one in IDS if one not in some]))
                return "correct", (some if rng.random() < 0.5 or there == new.id else [there], new, embedder)
        turns = []
        for memory_id in [there, *some]:
            text, own = (r.text, r.content_hash) if (r := records.get(memory_id)) else ("tea", "tea#0#s")
            before = self.model.neighbour(memory_id, -1)
            prev = before, records[before].content_hash if before else ""
            turns.append((memory_id, own, *prev, self.vector(text, prev)))
        return "embed", (turns, embedder)

    async def run(self, steps: int) -> None:
        await self.open()
        for _ in range(steps):
            self.model.now_ms += self.rng.choice([0, 1, 1, 5])
            call = self.random_call()
            if self.rng.random() < 0.25:
                self.late.append(call)
                if len(self.late) < 12:
                    continue
                call = self.late.pop(self.rng.randrange(12))
            for _ in range(1 + (self.rng.random() < 0.3)):  # a client that lost the reply asks again
                await self.call(*call)
                await self.compare()
            if self.rng.random() < 0.01:
                await self.forget()
                await self.compare()

    async def open(self) -> None:
        await self.open_index(self.owner, self.model.now_ms)
        self.model.generation = self.model.now_ms * 1000

    async def call(self, name: str, args: tuple[Any, ...]) -> None:
        owner, now = self.owner, self.model.now_ms
        keys = [owner.meta, owner.ids, owner.log, owner.turns]
        head = [owner.memory_prefix, now, args[-1], DIM, LOG_LENGTH]
        match name:
            case "put":
                sent = [*head, len(args[0]), *(item for new in args[0] for item in new.arguments())]
            case "update":
                sent = [*head, args[1], *args[0].arguments()]
            case "delete":
                sent = [owner.memory_prefix, now, LOG_LENGTH, *args[0]]
            case "correct":
                sent = [*head, len(args[0]), *args[0], *args[1].arguments()]
            case _:
                keys = [owner.meta, owner.ids, owner.turns]
                sent = [*head[:4], *(item for turn in args[0] for item in turn)]
        reply = plain(await self.execute("FCALL", f"rm_{name}_v1", len(keys), *keys, *sent))
        if reply[0] == "NOINDEX":
            assert self.model.generation is None
            await self.compare()
            await self.open()
            reply = plain(await self.execute("FCALL", f"rm_{name}_v1", len(keys), *keys, *sent))
        assert reply == plain(getattr(self.model, name)(*args)), (name, args)
        if name in ("put", "delete"):
            reply = [reply[0], *reply[3][:: 4 if name == "put" else 1]]
        self.outcomes.update(
            f"{name} {word}" for word in (reply if name in ("put", "delete", "embed") else reply[:1])
        )

    async def forget(self) -> None:
        owner, reply = self.owner, ["", "", "", "0"]
        while reply[3] == "0":
            keys = owner.index, owner.meta, owner.ids, owner.log, owner.turns
            sent = owner.memory_prefix, 4, owner.physical_index(FIELD)
            reply = plain(await self.execute("FCALL", "rm_forget_v1", 5, *keys, *sent))
        self.model.forget()

    async def compare(self) -> None:
        """Every key of the owner is what the model says, and every vector fits what stands there."""
        model, owner, us = self.model, self.owner, 1_000_000
        turns: dict[str, str] = {}
        if model.sessions:
            turns = {"n": str(model.sessions), "pad": " " * 65}
        for session, chain in model.chains.items():
            turns[f"t{session}"] = f"{chain[-1]}\x1f{model.places[chain[-1]][0]}"
            for before, memory_id, after in zip(["", *chain], chain, [*chain[1:], ""], strict=False):
                position, name = model.places[memory_id]
                turns[f"l{memory_id}"] = "\x1f".join((before, after, str(position), name, session))
        flat, keys, ids, exist, generation, *rows = await self.pipeline(
            [
                ("HGETALL", owner.turns),
                ("KEYS", owner.memory_prefix.replace("{", "?") + "*"),
                ("ZRANGE", owner.ids, 0, -1, "WITHSCORES"),
                ("EXISTS", owner.meta, owner.log, owner.turns, owner.ids),
                ("HGET", owner.meta, "generation"),
                *(("HMGET", owner.memory(memory_id), *SHOWN) for memory_id in model.records),
            ]
        )
        flat, ids = plain(flat), plain(ids)
        assert dict(zip(flat[::2], flat[1::2], strict=True)) == turns
        assert set(plain(keys)) == {owner.memory(memory_id) for memory_id in model.records}
        scores = [round(float(score) * us) for score in ids[1::2]]
        stored = dict(zip(ids[::2], scores, strict=True))
        assert stored == pytest.approx({one.id: one.created_us for one in model.records.values()}, abs=1)
        if model.generation is None:
            assert exist == 0
        else:
            assert plain(generation) == str(model.generation)
        for record, row in zip(model.records.values(), rows, strict=True):
            self.compare_record(record, row)
        fresh = {record.version for record in model.records.values() if record.version > self.highest}
        assert len(fresh) == len([r for r in model.records.values() if r.version in fresh])
        self.highest = max(self.highest, model.generation or 0)

    def compare_record(self, record: Record, row: list[Any]) -> None:
        *raw, vector, embedder = row
        *shown, created = [None if item is None else item.decode() for item in raw]
        wanted = [record.text, record.content_hash, record.session, record.superseded_by, str(record.version)]
        assert shown == wanted
        assert float(created or 0) == float(f"{record.created_us // 10**6}.{record.created_us % 10**6:06d}")
        assert (vector is None) == (embedder is None) == (record.made_from is None)
        if vector is not None:
            assert self.model.made_from[vector] == record.made_from
            before = self.model.records.get(self.model.neighbour(record.id, -1))
            fitting = record.text, before.text if before else None
            assert record.made_from == fitting


EXPECTED = {
    *("put OK", "put CREATED", "put UPDATED", "put UNCHANGED", "put TAKEN", "put WAITING"),
    *("update OK", "update STALE", "update MISSING", "delete OK", "delete DELETED", "delete MISSING"),
    *("correct CREATED", "correct UNCHANGED", "correct MISSING", "correct TAKEN"),
    *("embed OK", "embed STALE", "embed MISSING", "embed REFUSED"),
}


@pytest.mark.parametrize("seed", range(4))
async def test_the_server_does_what_the_model_says(service: Service, seed: int) -> None:
    async def open_index(owner: Owner, now_ms: int) -> None:
        keys = (owner.index, owner.physical_index(FIELD), owner.meta)
        schema = index_schema(owner, FIELD, DIM)
        await service.client.execute("FCALL", "rm_open_v1", 3, *keys, now_ms, EMBEDDER, DIM, FIELD, *schema)

    client = service.client
    play = Play(client.execute, client.pipeline, open_index, service.owner("a{b}"), random.Random(seed))
    await play.run(600)
    await play.forget()
    await play.compare()
    assert play.outcomes == EXPECTED


@pytest.mark.parametrize("seed", range(100, 102))
async def test_a_server_without_search_does_what_the_model_says(seed: int) -> None:
    """Fakeredis: another interpreter of Lua, another Redis, the same contract."""
    server = fakeredis.FakeRedis(server_type="redis", version=(7, 4))
    for library in shipped_libraries():
        if library.name in ("redismem_write", "redismem_owner"):
            server.execute_command("FUNCTION", "LOAD", library.code)

    async def execute(*command: Argument) -> Any:
        reply = server.execute_command(*command)
        if isinstance(reply, dict):
            return [item for pair in reply.items() for item in pair]
        return [item for pair in reply for item in pair] if command[0] == "ZRANGE" else reply

    async def open_index(owner: Owner, now_ms: int) -> None:
        names, values = (
            "index embedder vector_field dim generation",
            ("x", EMBEDDER, FIELD, DIM, now_ms * 1000),
        )
        server.hset(owner.meta, mapping=dict(zip(names.split(), values, strict=True)))

    async def pipeline(commands: list[tuple[Argument, ...]]) -> list[Any]:
        return [await execute(*command) for command in commands]

    play = Play(execute, pipeline, open_index, Owner("a{b}", "n"), random.Random(seed))
    await play.run(250)
    assert play.outcomes >= {"put CREATED", "update OK", "delete DELETED", "correct CREATED", "embed OK"}
