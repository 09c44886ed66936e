"""One run of a user's archive: the only place that lets a memory leave Redis without a delete.

A memory leaves only when a file that holds it was read back, compared with its sha256 and decoded, and has a
manifest; and then only if what Redis stores is, field by field, what was decoded from that file
(lua/archive.lua). The ids that are archived are known to Redis; a line of a file whose id is not among them
is dead: deleted, restored, or never taken out.

So a crash at any point leaves a memory in Redis, in a file, or in both, where Redis's counts, and the next
run goes on. Redis numbers the runs. It takes nothing out for a run that is not the newest, and a run removes
only files of lower numbers that it has replaced: one that was stopped for however long spoils nothing.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field

from redismem import filters
from redismem.archivefiles import Files, runs_of
from redismem.archivelines import PART, Copy, Draft, Line, Manifest, line_of
from redismem.client import Argument, Client
from redismem.errors import ArchiveDamaged, Conflict, InvalidInput, RedisMemError
from redismem.keys import Owner
from redismem.lualib import Functions


@dataclass(frozen=True)
class Run:
    """The newest run of an owner's archive, as far as it knows.

    Raises:
        Conflict: another process began a newer one, and goes on.
        Unavailable, ArchiveDamaged: see `Archive`.
    """

    functions: Functions
    files: Files
    owner: Owner
    log_length: int
    number: int
    #: content of the turns that this run wrote, by id: those after them may be read when they have left Redis
    turns: dict[str, str] = field(default_factory=dict)

    @classmethod
    async def begun(cls, functions: Functions, files: Files, owner: Owner, log_length: int) -> Run | None:
        """Stop all runs before, and return a new one; None when Redis knows no such owner."""
        lowest = int(time.time() * 1_000_000)
        while True:
            raw = await functions.call("rm_archive_begin_v1", [owner.meta], lowest)
            if raw == b"GONE":
                return None
            # a Redis that lost its last second may not know the run that wrote the newest file
            newest = max(runs_of(await asyncio.to_thread(files.names, owner)).values(), default=0)
            if newest < int(raw):
                return cls(functions, files, owner, log_length, int(raw))
            lowest = newest + 1

    async def rewrite(self, quarter: str, ids: Sequence[str]) -> tuple[int, int]:
        """Put `ids`, and what is archived of a quarter, into one new file; take `ids` out of Redis.

        Returns:
            How many were taken out, and how many dead memories the files before had.
        """
        found = await manifests_of(self.files, self.owner, quarter)
        old = [manifest for manifest in found if manifest.run < self.number]
        moved = kept = 0
        if ids or await archived_ids(self.functions.client, self.owner, quarter):
            try:
                moved, kept = await self._moved(quarter, ids, old)
            except ArchiveDamaged as exc:
                if await self._is_newest() or not await self._is_known():
                    raise
                raise self._overtaken() from exc  # who is newer removes the files of who is not
        is_empty = not await recounted(self.functions, self.owner, quarter)
        # only now: until its memories were found elsewhere, a file without a manifest may be all there is
        names = await asyncio.to_thread(self.files.names, self.owner)
        await self.remove(
            [name for name, run in runs_of(names, quarter).items() if run < self.number + is_empty]
        )
        return moved, sum(manifest.count for manifest in old) - kept

    async def _moved(self, quarter: str, ids: Sequence[str], old: list[Manifest]) -> tuple[int, int]:
        """Write the new file, take `ids` out; return how many were, and how many of old files were kept."""
        draft = await asyncio.to_thread(self.files.draft, self.owner, quarter, self.number)
        try:
            # what was archived before goes first: a turn needs the one before it to get its vector back
            gone = await archived_ids(self.functions.client, self.owner, quarter)
            kept = await self._add_archived(draft, quarter, old, gone - set(ids))
            new = await self._add_stored(draft, quarter, ids)
            kept += await self._add_archived(draft, quarter, old, gone & set(ids) - new)
            raw = await self.functions.client.execute("HMGET", self.owner.meta, "embedder", "dim")
            embedder, dim = (raw[0] or b"").decode(), int(raw[1] or 0)
            manifest = await asyncio.to_thread(
                self.files.finished, self.owner, draft, embedder=embedder, dim=dim
            )
            copy = await asyncio.to_thread(self.files.copy, self.owner, manifest)
        except BaseException:
            await asyncio.to_thread(draft.abandon)
            with suppress(RedisMemError):
                await asyncio.to_thread(self.files.remove, self.owner, [draft.name])
            raise
        with closing(copy):
            await asyncio.to_thread(copy.check)
            moved = 0
            if is_newest := await self._is_newest():
                await asyncio.to_thread(self.files.save, self.owner, manifest)
                moved, is_newest = await self._take_out(copy, quarter, new)
        if not is_newest:
            # what it has taken out only its file has
            if not moved or not await recounted(self.functions, self.owner, quarter):
                await self.remove([manifest.name, manifest.file])
            if await self._is_known():
                raise self._overtaken()
        return moved, kept

    async def _add_stored(self, draft: Draft, quarter: str, ids: Sequence[str]) -> set[str]:
        """Write memories from Redis; return their ids."""
        owner, new = self.owner, set[str]()
        for first in range(0, len(ids), PART):
            part = ids[first : first + PART]
            vector, *rows = await self.functions.call(
                "rm_records_ro_v1", [owner.meta, owner.turns], owner.memory_prefix, *part, read=True
            )
            found = [line_of(vector, *row) for row in zip(*[iter(rows)] * 4, strict=True)]
            lines = [line for line in found if line is not None and line.fields.get("partition") == quarter]
            for line in lines:
                line.prev_hash = line.prev_hash or self.turns.get(line.prev, "")
            new.update(line.id for line in lines)
            await self._add(draft, lines)
        return new

    async def _add_archived(self, draft: Draft, quarter: str, old: list[Manifest], live: set[str]) -> int:
        """Write what is still archived from old files; return how many that are."""
        kept = 0
        for manifest in old:
            if not live:
                break
            with closing(await asyncio.to_thread(self.files.copy, self.owner, manifest)) as copy:
                parts = copy.parts()
                while part := await asyncio.to_thread(next, parts, None):
                    lines = [line for line in part if line.id in live]
                    live.difference_update(line.id for line in lines)
                    kept += len(lines)
                    await self._add(draft, lines)
        await check_found(self.functions.client, self.owner, quarter, live)
        return kept

    async def _add(self, draft: Draft, lines: Sequence[Line]) -> None:
        turns = [line for line in lines if "session_id" in line.fields]
        self.turns.update((line.id, line.fields.get("content_hash", "")) for line in turns)
        await asyncio.to_thread(draft.add, lines)

    async def _take_out(self, copy: Copy, quarter: str, new: set[str]) -> tuple[int, bool]:
        """Take out of Redis what is there as it is in the file; return how many, and whether we may go on."""
        moved, parts = 0, copy.parts()
        while part := await asyncio.to_thread(next, parts, None):
            lines = [line for line in part if line.id in new]
            while lines:
                state, *rest = await self.functions.call(
                    "rm_archive_v1",
                    self.owner.written,
                    *(self.owner.memory_prefix, now_ms(), self.log_length, self.number, quarter),
                    *records(lines),
                )
                if state == b"LOST":
                    return moved, False
                moved += rest[0].count(b"ARCHIVED")
                lines = waiting(lines, rest[0])
        return moved, True

    async def remove(self, names: Sequence[str]) -> None:
        """Remove files of earlier runs, or its own."""
        await asyncio.to_thread(self.files.remove, self.owner, names)

    async def _is_newest(self) -> bool:
        raw = await self.functions.client.execute("HGET", self.owner.meta, "archive_run")
        return raw is not None and int(raw) == self.number

    async def _is_known(self) -> bool:
        return bool(await self.functions.client.execute("EXISTS", self.owner.meta))

    def _overtaken(self) -> Conflict:
        return Conflict(f"another process archives {self.owner.user!r} now, and goes on")


async def manifests_of(files: Files, owner: Owner, quarter: str = "") -> list[Manifest]:
    """Return an owner's manifests, of one quarter if it is named; see `Files.manifests`."""
    return await asyncio.to_thread(lambda: files.manifests(owner, files.names(owner), quarter))


async def archived_ids(client: Client, owner: Owner, quarter: str) -> set[str]:
    """Return the ids of a quarter that are archived. Cost: one round trip, 0.1 ms per 1,000."""
    number = quarter_number(quarter)
    return {raw.decode() for raw in await client.execute("ZRANGEBYSCORE", owner.archived, number, number)}


async def recounted(functions: Functions, owner: Owner, quarter: str) -> int:
    """Return how many memories of a quarter are archived; makes the owner's meta say whether any are."""
    return int(await functions.call("rm_recount_v1", [owner.meta, owner.archived], quarter))


async def check_found(client: Client, owner: Owner, quarter: str, missing: set[str]) -> None:
    """Check that what was in no file is not archived any more: it was deleted or restored meanwhile.

    Raises:
        ArchiveDamaged: it is.
    """
    if missing and (missing := missing & await archived_ids(client, owner, quarter)):
        raise ArchiveDamaged(
            f"{len(missing)} archived memories of {quarter} are in no file: bring the file back from a "
            "backup, or delete them"
        )


def quarter_number(quarter: str) -> int:
    """Return the number of a quarter that somebody named.

    Raises:
        InvalidInput: it is not like `2024-Q1`.
    """
    if not re.fullmatch(r"[0-9]{4}-Q[1-4]", quarter):
        raise InvalidInput("a quarter is like 2024-Q1", field="quarter")
    return filters.quarter_number(quarter)


def records(lines: Sequence[Line]) -> list[Argument]:
    """Return lines as lua/archive.lua reads them."""
    flat: list[Argument] = []
    for line in lines:
        flat += (line.id, line.prev, line.prev_hash, line.vector, len(line.fields) + len(line.binary))
        for values in (line.fields, line.binary):
            for item in values.items():
                flat += item
    return flat


def waiting(lines: Sequence[Line], words: Sequence[bytes]) -> list[Line]:
    """Return the lines that a Function wants to be sent again."""
    return [line for line, word in zip(lines, words, strict=True) if word == b"WAITING"]


def now_ms() -> int:
    return int(time.time() * 1000)
