"""The only place that reads and changes the API keys of a store.

They are one hash in Redis. Its whole content is one entry of L1, kept true like every other: filled with a
ticket, dropped by the push on that hash and by barriers, and used only while the lease of `Coherence` holds.
So a request learns its key in microseconds, and no process accepts a key whose revocation has returned.

A revoked key stays in the hash: a store that ever had a key never counts as one without.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import msgspec

from redismem.apikeys import ApiKey, KeyFacts, KeyTable, issued
from redismem.client import Client
from redismem.coherence import Coherence
from redismem.errors import Conflict, NotFound, RedisUnavailable
from redismem.flight import Abandoned, Flight
from redismem.keys import API_KEYS, API_KEYS_ID
from redismem.l1 import L1, Ticket
from redismem.settings import Settings

#: seconds L1 keeps the table, and how old it may be while Redis is away
TABLE_TTL_S = 30.0

#: the owner of the table in L1; no user's tag is empty
_NOBODY = ""

#: bytes of a key in L1 besides those of its JSON: 551 in all, with 260 of JSON (tracemalloc)
_KEY_BYTES = 300


class _Reading(Flight[KeyTable]):
    """A reading of the table, and the ticket that tells whether a change overtook it."""

    __slots__ = ("ticket",)

    def __init__(self, ticket: Ticket) -> None:
        super().__init__()
        self.ticket = ticket


class KeyRing:
    """The keys of one store, seen by one process."""

    def __init__(
        self,
        client: Client,
        l1: L1,
        coherence: Coherence,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._client = client
        self._l1 = l1
        self._coherence = coherence
        self._settings = settings
        self._clock = clock
        self._reading: _Reading | None = None
        #: as it was last read, however long ago: for operators who look while Redis is away
        self.last: KeyTable | None = None
        coherence.on_keys = self._forget

    def known(self) -> KeyTable | None:
        """Return the table of L1, or None: ask `table`. Cost: microseconds, no I/O."""
        if not self._coherence.is_live():
            return None
        entry = self._l1.get("key", _NOBODY, API_KEYS_ID, time.monotonic())
        return None if entry is None else _table_of(entry.value)

    async def table(self) -> KeyTable:
        """Return all keys. With `stale_if_error`, while Redis is away, as they were TABLE_TTL_S ago at most.

        Raises:
            RedisUnavailable: Redis does not answer.
            StoreError: another hand put something else in the place of the hash.

        Cost: one round trip where L1 does not have it.
        """
        known = self.known()
        if known is not None:
            return known
        try:
            return await self._once()
        except RedisUnavailable:
            if not self._settings.stale_if_error:
                raise
            stale = self._l1.peek_stale("key", _NOBODY, API_KEYS_ID, time.monotonic())
            if stale is None:
                raise
            return _table_of(stale.value)

    async def create(
        self,
        *,
        name: str,
        scopes: Sequence[str],
        namespace: str = "",
        users: Sequence[str] = (),
        rate_per_s: float | None = None,
        burst: int | None = None,
    ) -> tuple[ApiKey, str]:
        """Store a new key; return it and its token, which nobody can show again.

        When this returns every process knows the key, and asks for one if it is the first.

        Raises:
            InvalidInput: a value is outside its contract; the error names the field.

        Cost: one round trip and a barrier.
        """
        while True:
            key, token = issued(
                name=name,
                scopes=scopes,
                namespace=namespace,
                users=users,
                rate_per_s=rate_per_s,
                burst=burst,
                now=self._now(),
            )
            if await self._client.execute("HSETNX", API_KEYS, key.id, msgspec.json.encode(key)):
                await self._changed()
                return key, token

    async def listed(self) -> list[KeyFacts]:
        """Return what may be shown of all keys, the oldest first, as Redis has them."""
        keys = sorted(await self._read(), key=lambda key: (key.created_at, key.id))
        return [key.facts() for key in keys]

    async def revoke(self, key_id: str) -> KeyFacts:
        """Make a key worthless; when this returns no process accepts it. Twice is once.

        Raises:
            NotFound: there is no such key.
            Conflict: a newer redismem wrote it: revoke it with that one.

        Cost: two round trips and a barrier.
        """
        raw = await self._client.execute("HGET", API_KEYS, key_id)
        if raw is None:
            raise NotFound(f"there is no API key {key_id!r}")
        key = KeyTable.parsed({key_id.encode(): raw}).get(key_id)
        if key is None:
            raise Conflict(f"the API key {key_id!r} is of a newer redismem: revoke it with that one")
        if key.revoked_at is None:
            # nothing else ever changes a key, so nothing can come between
            key = msgspec.structs.replace(key, revoked_at=self._now())
            await self._client.execute("HSET", API_KEYS, key_id, msgspec.json.encode(key))
        # of one that was revoked already too: whoever did may have failed before this
        await self._changed()
        return key.facts()

    def _forget(self) -> None:
        self.last = None

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock(), UTC)

    async def _changed(self) -> None:
        self._l1.invalidate(_NOBODY, (API_KEYS_ID,))
        self._forget()
        await self._coherence.barrier({_NOBODY: [API_KEYS_ID]})

    async def _once(self) -> KeyTable:
        """Read the table, or join whoever reads it now, unless a change has overtaken that."""
        while self._coherence.is_live() and self._reading is not None and not self._reading.ticket.void:
            try:
                return await self._reading.join()
            except Abandoned:
                continue
        self._reading = reading = _Reading(self._l1.open(_NOBODY))
        try:
            table = await self._read(reading.ticket)
            reading.land(table)
        except BaseException as exc:
            reading.fail(exc)
            raise
        else:
            return table
        finally:
            self._l1.close(reading.ticket)
            if self._reading is reading:
                self._reading = None

    async def _read(self, ticket: Ticket | None = None) -> KeyTable:
        flat = await self._client.execute("HGETALL", API_KEYS)
        raw = dict(zip(flat[::2], flat[1::2], strict=True))
        table = KeyTable.parsed(raw)
        if ticket is not None and not ticket.void:
            self.last = table
        if ticket is not None and self._coherence.is_live():
            self._l1.fill(
                ticket,
                "key",
                API_KEYS_ID,
                table,
                size_bytes=sum(len(body) + _KEY_BYTES for body in raw.values()),
                ids=(API_KEYS_ID,),
                ttl_s=TABLE_TTL_S,
                now_s=time.monotonic(),
            )
        return table


def _table_of(value: object) -> KeyTable:
    assert isinstance(value, KeyTable)
    return value
