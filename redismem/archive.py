"""Moves old quarters of a user to files, and back.

What makes this safe is told in `archiverun`, what a file is in `archivefiles`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from contextlib import closing, suppress

from redismem.archivefiles import Files, leftovers
from redismem.archivelines import Line, Manifest
from redismem.archiverun import (
    Run,
    archived_ids,
    check_found,
    manifests_of,
    now_ms,
    quarter_number,
    records,
    recounted,
    waiting,
)
from redismem.codec import quarter as quarter_of
from redismem.embed import Embedder
from redismem.errors import ArchiveDamaged, Conflict, Misconfigured, StoreError
from redismem.index import Indexes
from redismem.keys import STORE, Owner
from redismem.lualib import Functions
from redismem.settings import Settings

logger = logging.getLogger(__name__)

#: a restored quarter is not archived again for so long, unless it is named
RESTORED_STAYS_S = 30 * 86_400.0

#: ids looked at by one call; holds Redis for up to 4 ms
_WALK = 500

#: a restore starts anew when a run replaces the files under it
_MAX_TRIES = 5


class Archive:
    """Archives and restores the quarters of one store's users.

    Every call but `is_configured` raises:
        Misconfigured: REDISMEM_ARCHIVE_URL is not set, cannot be used, or is another store's.
        Unavailable: Redis or the archive cannot be reached; call again to go on.
        ArchiveDamaged: a file is missing or altered; what does not need it is done, and Redis lost nothing.
    """

    def __init__(self, functions: Functions, settings: Settings, embedder: Embedder) -> None:
        self._functions = functions
        self._client = functions.client
        self._settings = settings
        self._indexes = Indexes(functions, embedder)
        self._opened: Files | None = None

    @property
    def is_configured(self) -> bool:
        """Return whether there is a place for an archive."""
        return bool(self._settings.archive_url)

    async def check(self) -> None:
        """Return if the archive can be used; makes it if it is new."""
        await self._files()

    async def archive_old(self, owner: Owner, now_s: float, quarter: str | None = None) -> dict[str, int]:
        """Move what is old enough to files; return the number of memories moved, by quarter.

        Pinned memories stay, and quarters that were restored within RESTORED_STAYS_S.

        Args:
            now_s: epoch seconds; the quarter they are in is the current one.
            quarter: only this one, also if it was restored lately.

        Raises:
            InvalidInput: that is no quarter.
            Conflict: another process archives this user at the same time, and goes on.

        Cost: 10 us a memory of the user for the look; 0.3 ms a memory moved, in slices of 64 that hold
        Redis for 5 ms.
        """
        files = await self._files()
        limit = quarter_number(quarter_of(now_s)) - self._settings.archive_after_quarters
        found = await self._aged(owner, limit)
        if quarter is None:
            stays = await self._restored_since(owner, list(found), now_s - RESTORED_STAYS_S)
            found = {name: ids for name, ids in found.items() if name not in stays}
        else:
            quarter_number(quarter)
            found = {name: ids for name, ids in found.items() if name == quarter}
        if not found or (run := await self._run(files, owner)) is None:
            return {}
        moved, damage = {}, None
        for name, ids in sorted(found.items()):
            try:
                count, _ = await run.rewrite(name, ids)
            except ArchiveDamaged as exc:
                damage = damage or exc
                continue
            if count:
                moved[name] = count
        if damage is not None:
            raise damage
        return moved

    async def tend(self, owner: Owner, now_s: float) -> int:
        """Archive what is old and purge what is dead, for rounds of maintenance; return how many moved.

        Cost: one round trip where nothing was written since the last time; a full look once a day.
        """
        limit = quarter_number(quarter_of(now_s)) - self._settings.archive_after_quarters
        raw = await self._client.execute("HMGET", owner.meta, "generation", "archive_seen")
        state = f"{(raw[0] or b'').decode()} {limit} {now_s // 86_400:.0f}"
        if raw[0] is None or raw[1] == state.encode():
            return 0
        moved = await self.archive_old(owner, now_s)
        await self.purge(owner)
        await self._functions.call("rm_archive_seen_v1", [owner.meta], raw[0], state)
        return sum(moved.values())

    async def restore(self, owner: Owner, quarter: str | None = None) -> dict[str, int]:
        """Bring archived memories back; return their number by quarter. Deleted ones stay deleted.

        A memory comes back without its vector if the user has another embedder by now, or the turn before it
        is gone or changed; `redismem reembed` embeds it.

        Args:
            quarter: only this one.

        Raises:
            InvalidInput: that is no quarter.
            Conflict: runs of the archive keep replacing the files.

        Cost: 0.25 ms a memory, in slices of 64 that hold Redis for 10 ms.
        """
        files, restored = await self._files(), {}
        for name in [quarter] if quarter is not None else await self._quarters(owner):
            if count := await self._restore(files, owner, name):
                restored[name] = count
        return restored

    async def purge(self, owner: Owner, quarter: str | None = None) -> int:
        """Take out of the files whatever is not archived any more; return how many memories that were.

        After it, nothing that was deleted is in a file. Files of runs that died go as well.

        Args:
            quarter: only this one.

        Raises:
            InvalidInput, Conflict: see `archive_old`.

        Cost: a listing, and a new file for each quarter that changed.
        """
        files = await self._files()
        names = await asyncio.to_thread(files.names, owner)
        manifests = await asyncio.to_thread(files.manifests, owner, names)
        if names and not await self._client.execute("EXISTS", owner.meta):
            return await self.forget(owner)
        left = leftovers(names)
        quarters = dict.fromkeys(await self._quarters(owner), 0)
        for manifest in manifests:
            quarters[manifest.quarter] = quarters.get(manifest.quarter, 0) + manifest.count
        counts = {name: await recounted(self._functions, owner, name) for name in quarters}
        stale = [name for name in quarters if quarters[name] != counts[name] and quarter in (None, name)]
        # a leftover may be of a run that still goes on; a new one stops it
        if not (stale or left) or (run := await self._run(files, owner)) is None:
            return 0
        dropped = [(await run.rewrite(name, []))[1] for name in sorted(stale)]
        await run.remove(left)
        return sum(dropped)

    async def forget(self, owner: Owner) -> int:
        """Remove all files of an owner; return how many memories were archived. Safe to repeat.

        For owners who were forgotten in Redis before: a run that is on its way then finds nothing to move.
        """
        files = await self._files()
        count = int(await self._client.execute("ZCARD", owner.archived))
        names = await asyncio.to_thread(files.names, owner)
        if not count:
            with suppress(ArchiveDamaged):
                manifests = await asyncio.to_thread(files.manifests, owner, names)
                count = sum(manifest.count for manifest in manifests)
        await asyncio.to_thread(files.remove, owner, names)
        return count

    async def quarters(self, owner: Owner) -> list[Manifest]:
        """Return the manifests of an owner's files, quarters in order. `count` includes dead memories."""
        return await manifests_of(await self._files(), owner)

    async def _files(self) -> Files:
        if not self.is_configured:
            raise Misconfigured(
                "there is no archive: set REDISMEM_ARCHIVE_URL to a directory or an fsspec URL such as "
                "s3://bucket/path",
                field="archive_url",
            )
        if self._opened is None:
            await self._client.execute("HSETNX", STORE, "archive", secrets.token_hex(16))
            store = (await self._client.execute("HGET", STORE, "archive")).decode()
            self._opened = await asyncio.to_thread(Files.opened, self._settings.archive_url, store)
        return self._opened

    async def _run(self, files: Files, owner: Owner) -> Run | None:
        return await Run.begun(self._functions, files, owner, self._settings.log_length)

    async def _quarters(self, owner: Owner) -> list[str]:
        raw = await self._client.execute("HGET", owner.meta, "archived")
        return raw.decode().split() if raw else []

    async def _restored_since(self, owner: Owner, quarters: list[str], since_s: float) -> set[str]:
        if not quarters:
            return set()
        fields = [f"restored:{name}" for name in quarters]
        moments = await self._client.execute("HMGET", owner.meta, *fields)
        return {name for name, raw in zip(quarters, moments, strict=True) if raw and float(raw) >= since_s}

    async def _aged(self, owner: Owner, limit: int) -> dict[str, list[str]]:
        """Return the ids that may be archived, by quarter, oldest first."""
        found: dict[str, list[str]] = {}
        offset, count = 0, _WALK
        while count == _WALK:
            count, *pairs = await self._functions.call(
                "rm_aged_ro_v1", [owner.ids], owner.memory_prefix, offset, _WALK, max(0, limit), read=True
            )
            offset += count
            for raw_id, name in zip(pairs[::2], pairs[1::2], strict=True):
                with suppress(UnicodeDecodeError):  # another hand's; JSON cannot hold it
                    found.setdefault(name.decode(), []).append(raw_id.decode())
        return found

    async def _restore(self, files: Files, owner: Owner, quarter: str) -> int:
        restored = 0
        for _ in range(_MAX_TRIES):
            run = await self._client.execute("HGET", owner.meta, "archive_run") or b""
            wanted = await archived_ids(self._client, owner, quarter)
            try:
                for manifest in await manifests_of(files, owner, quarter) if wanted else []:
                    if wanted:
                        restored += await self._restore_file(files, owner, manifest, run, wanted)
                await check_found(self._client, owner, quarter, wanted)
            except (_Moved, ArchiveDamaged):
                if (await self._client.execute("HGET", owner.meta, "archive_run") or b"") == run:
                    raise
            else:
                await recounted(self._functions, owner, quarter)
                return restored
        raise Conflict(f"other processes keep archiving {owner.user!r}: restore when they are through")

    async def _restore_file(
        self, files: Files, owner: Owner, manifest: Manifest, run: bytes, wanted: set[str]
    ) -> int:
        """Restore what is wanted of one file, and take it from `wanted`; return how many came back."""
        restored = bare = 0
        with closing(await asyncio.to_thread(files.copy, owner, manifest)) as copy:
            # A turn needs the one before it to get its vector back. Mostly that stands before it in the file
            # too; a quarter that was archived bit by bit may need a second pass.
            for is_last in (False, False, True):
                parts = copy.parts()
                while wanted and (part := await asyncio.to_thread(next, parts, None)):
                    lines = []
                    for line in part:
                        if line.id in wanted and (is_last or line.prev not in wanted):
                            wanted.remove(line.id)
                            lines.append(line)
                    while lines:
                        words = await self._put_back(owner, run, lines)
                        bare += words.count(b"BARE")
                        restored += words.count(b"RESTORED") + words.count(b"BARE")
                        lines = waiting(lines, words)
        if bare:
            logger.warning("%d restored memories have no vector until `redismem reembed`", bare)
        return restored

    async def _put_back(self, owner: Owner, run: bytes, lines: list[Line]) -> list[bytes]:
        for _ in range(3):  # the index may be parked again
            state, *words = await self._functions.call(
                "rm_restore_v1",
                owner.written,
                *(owner.memory_prefix, now_ms(), self._settings.log_length, run, *records(lines)),
            )
            if state == b"MOVED":
                raise _Moved(f"the archive of {owner.user!r} changed")
            if state == b"OK":
                return list(words[0])
            await self._indexes.complete(owner, None)
        raise StoreError("the index of this user disappears as soon as it is made")


class _Moved(Conflict):
    """A newer run replaced the files that are being read."""
