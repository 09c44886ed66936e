"""The write path: memories in, corrections, deletes, forgetting. Every change is one Function call.

A write is acknowledged when it is stored and indexed. A memory is stored even when its embedding
fails or has to wait: it is found by words at once, and by meaning when `Backfill` is through.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec

from redismem.archive import Archive
from redismem.backfill import SLICE, Backfill
from redismem.browse import Browser
from redismem.client import Argument
from redismem.codec import (
    content_hash,
    derived_id,
    memory_fields,
    vector_bytes,
)
from redismem.coherence import Coherence
from redismem.embed import Embedder
from redismem.errors import Conflict, InvalidInput, NotFound, StoreError, Unavailable, VersionMismatch
from redismem.index import Indexes
from redismem.jobs import Jobs
from redismem.keys import VECTOR_FIELDS, Owner
from redismem.lualib import Functions
from redismem.query import epoch, packed_tags
from redismem.queryvectors import QueryVectors
from redismem.rules import RULES, Event, confidence_event
from redismem.types import (
    CorrectionReply,
    CorrectionRequest,
    DeleteReply,
    ForgetReply,
    ImportRecord,
    Memory,
    MemoryInput,
    MemoryPatch,
    PutItem,
    PutReply,
)
from redismem.vectors import Turn, turn_vectors
from redismem.words import speaker

#: memories deleted by one call of rm_forget; holds Redis for about 10 ms
FORGET_SLICE = 500

#: a request of so few memories is embedded among the queries, because someone waits for it
_URGENT_MEMORIES = 4

#: a derived id met other content this often: the content changed back and forth as often
_MAX_ID_ATTEMPTS = 100

#: a PATCH without If-Match is merged again when another write overtakes it
_MAX_MERGES = 20


@dataclass(slots=True)
class _Record:
    """A memory on its way into rm_put."""

    place: int
    memory: MemoryInput
    fields: dict[str, str | bytes]
    id: str
    attempt: int = 0
    prev_id: str | bytes = ""
    prev_hash: str | bytes = ""
    prev_text: str | None = None

    def arguments(self) -> list[Argument]:
        kind = "given" if self.memory.id is not None else "derived"
        created = getattr(self.memory, "created_at", None)
        moment = format(epoch(created), ".6f") if created is not None else ""
        return record_arguments(self.id, kind, self.fields, self.prev_id, self.prev_hash, moment)


def record_arguments(
    memory_id: str,
    kind: str,
    fields: dict[str, str | bytes],
    prev_id: str | bytes = "",
    prev_hash: str | bytes = "",
    created_at: str = "",
) -> list[Argument]:
    """Return a record as lua/write.lua reads it."""
    name = speaker(str(fields["text"]))
    flat: list[Argument] = [memory_id, kind, prev_id, prev_hash, created_at, name, len(fields)]
    for name, value in fields.items():
        flat += [name, value]
    return flat


class Writer:
    """Writes one store."""

    def __init__(
        self,
        functions: Functions,
        embedder: Embedder,
        backfill: Backfill,
        indexes: Indexes,
        archive: Archive,
        coherence: Coherence,
        jobs: Jobs,
        vectors: QueryVectors,
        *,
        log_length: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._functions = functions
        self._embedder = embedder
        self._backfill = backfill
        self._indexes = indexes
        self._archive = archive
        self._coherence = coherence
        self._jobs = jobs
        self._vectors = vectors
        self._browser = Browser(functions)
        self._log_length = log_length
        self._clock = clock

    async def put(
        self, owner: Owner, memories: Sequence[MemoryInput], *, wait: bool = True, strong: bool = False
    ) -> PutReply:
        """Store memories; idempotent by id, and by content where no id is given.

        Args:
            wait: embed before the reply; False stores first and embeds within 0.5 s.
            strong: return when no process answers with the old content of memories that changed.

        Returns:
            One item per memory, in order; an invalid one is reported and does not stop the others.

        Cost: one round trip a slice of 64, one more when a session is continued.
        """
        items: list[PutItem | None] = [None] * len(memories)
        records = []
        for place, memory in enumerate(memories):
            try:
                fields = self._fields(memory)
            except ValueError as exc:
                error = InvalidInput.from_value(exc)
                items[place] = PutItem(
                    id=memory.id, outcome="INVALID", error=error.message, field=error.field
                )
                continue
            records.append(
                _Record(place, memory, fields, memory.id or derived_id(str(fields["content_hash"])))
            )
        await self._find_previous(owner, records)
        generation = 0
        for first in range(0, len(records), SLICE):
            part = records[first : first + SLICE]
            if wait:
                await self._embed(part)
            generation = await self._put_slice(owner, part, items)
        # UNCHANGED too: it may be the repetition of a write whose reply, and barrier, were lost
        changed = [str(item.id) for item in items if item and item.outcome in ("UPDATED", "UNCHANGED")]
        if changed:
            await self._coherence.changed(Event.UPDATED, owner, changed, strong=strong)
        if not records:
            generation = int(await self._functions.client.execute("HGET", owner.meta, "generation") or 0)
        return PutReply(memories=[item for item in items if item is not None], generation=generation)

    def _fields(self, memory: MemoryInput) -> dict[str, str | bytes]:
        fields = memory_fields(memory, self._clock())
        if isinstance(memory, ImportRecord):
            if memory.superseded_by is not None:
                fields["superseded_by"] = memory.superseded_by
            if memory.sources:
                fields["sources"] = packed_tags(memory.sources)
        return fields

    async def _find_previous(self, owner: Owner, records: list[_Record]) -> None:
        last: dict[str, _Record] = {}
        heads = []
        for record in records:
            session = record.memory.session_id
            if session is None:
                continue
            if before := last.get(session):
                record.prev_id, record.prev_hash = before.id, before.fields["content_hash"]
                record.prev_text = before.memory.text
            else:
                heads.append(record)
            last[session] = record
        if not heads:
            return
        sessions = [str(record.memory.session_id) for record in heads]
        tails = await self._functions.call(
            "rm_tails_ro_v1", [owner.turns], owner.memory_prefix, *sessions, read=True
        )
        for i, record in enumerate(heads):
            prev_id, text, prev_hash = tails[3 * i : 3 * i + 3]
            if prev_id:
                record.prev_id, record.prev_hash = prev_id, prev_hash
                record.prev_text = text.decode("utf-8", "replace")

    async def _embed(self, records: list[_Record]) -> None:
        turns = [Turn(record.memory.text, record.prev_text) for record in records]
        try:
            is_urgent = len(turns) <= _URGENT_MEMORIES
            # what was just said is what a context is asked for next
            is_said = is_urgent and all(record.memory.memory_type == "message" for record in records)
            keep = self._vectors.keep if is_said else None
            vectors = await turn_vectors(self._embedder, turns, urgent=is_urgent, keep=keep)
        except Unavailable:
            return  # stored without vectors; Backfill tries again
        for record, vector in zip(records, vectors, strict=True):
            record.fields["embedding"] = vector_bytes(vector)

    async def _put_slice(self, owner: Owner, records: list[_Record], items: list[PutItem | None]) -> int:
        generation, unembedded = 0, []
        for _ in range(_MAX_ID_ATTEMPTS * len(records)):
            arguments = [argument for record in records for argument in record.arguments()]
            reply = await self._write(owner, "rm_put_v1", len(records), *arguments)
            generation = int(reply[1])
            unembedded += [raw_id.decode() for raw_id in reply[2]]
            left = []
            for i, record in enumerate(records):
                outcome, raw_id, version, embedded = reply[3][4 * i : 4 * i + 4]
                if outcome == b"TAKEN":
                    record.attempt += 1
                    record.id = derived_id(str(record.fields["content_hash"]), record.attempt)
                if outcome in (b"TAKEN", b"WAITING"):
                    left.append(record)
                    continue
                if not embedded:
                    unembedded.append(raw_id.decode())
                items[record.place] = PutItem(
                    id=raw_id.decode(),
                    outcome=outcome.decode(),
                    version=int(version),
                    embedded=bool(embedded),
                )
            records = left
            if not records:
                break
        else:
            raise Conflict("too many versions of the same content; give the memory an id", field="id")
        self._backfill.add(owner, unembedded)
        return generation

    async def _write(
        self, owner: Owner, function: str, *arguments: Argument, now_ms: int | None = None
    ) -> Any:
        """Return the reply of a writing Function, after giving a new owner an index."""
        now_ms = int(self._clock() * 1000) if now_ms is None else now_ms
        head: tuple[Argument, ...] = (owner.memory_prefix, now_ms, self._embedder.name, self._embedder.dim)
        for _ in range(3):  # a concurrent forget may remove the index again
            reply = await self._functions.call(function, owner.written, *head, self._log_length, *arguments)
            if reply[0] != b"NOINDEX":
                return reply
            await self._indexes.open(owner)
        raise StoreError(
            "the index of this user disappears as soon as it is made; is another process forgetting it?"
        )

    async def update(
        self,
        owner: Owner,
        memory_id: str,
        patch: MemoryPatch,
        *,
        expected_version: int | None = None,
        strong: bool = False,
    ) -> Memory:
        """Change fields of a memory; compare-and-set on its version.

        Args:
            strong: return when no process answers with the old content.

        Raises:
            NotFound: there is no such memory.
            VersionMismatch: `expected_version` is not the stored one, or writes keep overtaking.
            InvalidInput: the result would not be a valid memory.

        Cost: two round trips, and an embedding and two more when the text or the session changed.
        """
        for _ in range(_MAX_MERGES):
            old = await self._browser.get(owner, memory_id)
            if expected_version is not None and old.version != expected_version:
                break
            merged = _merged(old, patch)
            event = _event(old, merged)
            moved = merged.text != old.text or merged.session_id != old.session_id
            kind = "given" if moved else "keep" if RULES[event].drops_searches else "minor"
            try:
                record = record_arguments(memory_id, kind, self._fields(merged))
            except ValueError as exc:
                raise InvalidInput.from_value(exc) from exc
            now_ms = int(self._clock() * 1000)
            reply = await self._write(owner, "rm_update_v1", old.version, *record, now_ms=now_ms)
            if reply[0] == b"MISSING":
                raise NotFound(f"there is no memory {memory_id!r}")
            if reply[0] == b"OK":
                await self._coherence.changed(event, owner, [memory_id], strong=strong)
                stale = [raw.decode() for raw in reply[3]]
                left = await self._embed_soon(owner, [memory_id] if not reply[2] else [], stale)
                # not read again: whoever deletes it now must not make this write look failed
                return msgspec.structs.replace(
                    old,
                    **{name: getattr(merged, name) for name in MemoryPatch.__struct_fields__},
                    version=int(reply[1]),
                    updated_at=datetime.fromtimestamp(now_ms / 1000, UTC),
                    embedded=not left,
                )
        raise VersionMismatch(
            f"memory {memory_id!r} is at version {old.version}; read it again", field="If-Match"
        )

    async def delete(self, owner: Owner, memory_id: str) -> DeleteReply:
        """Remove a memory and everything made from it; no later read returns it.

        Raises:
            NotFound: there is no such memory (any more).

        Cost: one round trip, and a barrier.
        """
        reply = await self._functions.call(
            "rm_delete_v1",
            owner.written,
            *(owner.memory_prefix, int(self._clock() * 1000), self._log_length, memory_id),
        )
        _, generation, stale, outcomes = reply
        # also when it was gone: whoever deleted it may have died before its barrier
        await self._coherence.changed(Event.DELETED, owner, [memory_id])
        if outcomes != [b"DELETED"]:
            raise NotFound(f"there is no memory {memory_id!r}")
        self._backfill.add(owner, [raw.decode() for raw in stale])
        return DeleteReply(id=memory_id, outcome="DELETED", generation=int(generation))

    async def correct(self, owner: Owner, request: CorrectionRequest) -> CorrectionReply:
        """Store a memory that replaces others; from the reply on, searches return only the new one.

        Raises:
            NotFound: one of `ids` does not exist; nothing was changed.
            Conflict: the new memory's id belongs to another memory.

        Cost: one round trip, a barrier, an embedding and two more round trips for it.
        """
        memory = request.memory
        try:
            fields = self._fields(memory)
        except ValueError as exc:
            raise InvalidInput.from_value(exc, "memory") from exc
        held = self._coherence.held(owner, request.ids)
        for attempt in range(_MAX_ID_ATTEMPTS):
            new_id = memory.id or derived_id(content_hash(memory), attempt)
            if new_id in request.ids:
                continue
            record = record_arguments(new_id, "given", fields)
            reply = await self._write(owner, "rm_correct_v1", len(request.ids), *request.ids, *record)
            if reply[0] == b"MISSING":
                raise NotFound(f"there is no memory {reply[1].decode()!r}", field="ids")
            if reply[0] != b"TAKEN":
                created = reply[0] == b"CREATED"
                event = Event.USER_CORRECTION if created else Event.CONTRADICTION_RESOLVED
                await self._coherence.changed(event, owner, [*request.ids, new_id])
                await self._embed_soon(
                    owner, [] if reply[3] else [new_id], [raw.decode() for raw in reply[4]]
                )
                if RULES[event].rewarms:
                    self._coherence.rewarm(held)
                return CorrectionReply(
                    id=new_id,
                    outcome=reply[0].decode(),
                    superseded=request.ids,
                    generation=int(reply[1]),
                    version=int(reply[2]),
                )
            if memory.id is not None:
                break
        raise Conflict(f"memory {new_id!r} exists with other content; choose another id", field="memory.id")

    async def _embed_soon(self, owner: Owner, awaited: list[str], later: list[str]) -> list[str]:
        """Embed now what is awaited and soon the rest; return what is still without a vector."""
        self._backfill.add(owner, [memory_id for memory_id in later if memory_id not in awaited])
        try:
            left = await self._backfill.embed_now(owner, awaited, urgent=True) if awaited else []
        except Unavailable:
            left = awaited
        self._backfill.add(owner, left)
        return left

    async def forget(self, owner: Owner) -> ForgetReply:
        """Remove everything that is stored of an owner, index and archive included.

        Raises:
            Conflict: memories of this owner are archived where this process cannot reach them.
            Unavailable: their files cannot be reached now; repeat it.

        Cost: one round trip per 500 memories, and a barrier; Redis is never held for longer than one slice.
        """
        memories = keys = 0
        has_archive = self._archive.is_configured
        if not has_archive and await self._functions.client.execute("EXISTS", owner.archived):
            raise Conflict("memories of this user are archived: set REDISMEM_ARCHIVE_URL to forget them")
        while True:
            reply = await self._functions.call(
                "rm_forget_v1",
                [owner.index, *owner.forgotten],
                *(owner.memory_prefix, FORGET_SLICE),
                *(
                    owner.physical_index(field, again=again)
                    for field in VECTOR_FIELDS
                    for again in (False, True)
                ),
            )
            memories += reply[1]
            keys += reply[2]
            if reply[3]:
                await self._coherence.changed(Event.FORGOTTEN, owner, None)
                await self._jobs.cancel(owner)
                # last: a run of the archive that is on its way finds nothing to move any more
                archived = await self._archive.forget(owner) if has_archive else 0
                return ForgetReply(memories=memories + archived, keys=memories + keys)


def _event(old: Memory, new: MemoryInput) -> Event:
    changed = {name for name in MemoryPatch.__struct_fields__ if getattr(old, name) != getattr(new, name)}
    if not changed <= {"confidence", "importance"}:
        return Event.UPDATED
    return confidence_event(old.confidence, new.confidence)


def _merged(old: Memory, patch: MemoryPatch) -> MemoryInput:
    values = {name: getattr(old, name) for name in MemoryPatch.__struct_fields__}
    for name in values:
        if (change := getattr(patch, name)) is not msgspec.UNSET:
            values[name] = change
    try:
        return MemoryInput(**values)
    except ValueError as exc:
        raise InvalidInput.from_value(exc) from exc
