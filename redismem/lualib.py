"""The only place that loads and calls our Functions (lua/): versions, keys and arguments of each.

A library is loaded when it is missing or older than ours, never when it is newer: while a fleet
rolls, old processes keep calling the `_v1` functions that a newer library still holds.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from redismem.client import Argument, Client, FunctionMissing
from redismem.errors import Misconfigured, RedisUnavailable, StoreError
from redismem.keys import FUNCTIONS_LOCK

_NAME = re.compile(r"\A#!lua name=(\w+)")
_PART = re.compile(r"^-- part: (\w+)$", re.MULTILINE)
_VERSION = re.compile(r"^-- Version: (\d+)$", re.MULTILINE)

#: the lock outlives any load; a crashed loader delays the next by this much
_LOCK_MS = 10_000

_UNLOCK = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


@dataclass(frozen=True)
class Library:
    """One file of lua/, with the parts that it shares with others put in."""

    name: str
    version: int
    code: str

    @classmethod
    def parsed(cls, code: str) -> Library:
        """Return the library of a source; version 0 when it states none."""
        name, version = _NAME.search(code), _VERSION.search(code)
        return cls(name[1] if name else "", int(version[1]) if version else 0, code)


@cache
def shipped_libraries() -> tuple[Library, ...]:
    """Return the libraries of this package, from the wheel or from the source tree."""
    here = Path(__file__).parent
    folder = next(f for f in (here / "lua", here.parent / "lua") if f.is_dir())
    parts = {path.stem: path.read_text().rstrip() for path in (folder / "parts").glob("*.lua")}
    return tuple(
        Library.parsed(_PART.sub(lambda match: parts[match[1]], path.read_text()))
        for path in sorted(folder.glob("*.lua"))
    )


async def loaded_versions(client: Client) -> dict[str, int]:
    """Return the version of each of our libraries that the server holds. Cost: one round trip."""
    versions = {}
    for row in await client.execute("FUNCTION", "LIST", "LIBRARYNAME", "redismem_*", "WITHCODE"):
        entry = dict(zip(row[::2], row[1::2], strict=True))
        library = Library.parsed(entry[b"library_code"].decode())
        versions[library.name] = library.version
    return versions


async def load_libraries(client: Client) -> list[str]:
    """Load what is missing or older than ours; return the names that were loaded.

    Raises:
        RedisUnavailable: another starter held the lock for too long.
        Misconfigured: the server refused a library.
    """
    if not _outdated(await loaded_versions(client)):
        return []
    token = secrets.token_hex(8)
    for _ in range(2 * _LOCK_MS // 50):
        if await client.execute("SET", FUNCTIONS_LOCK, token, "NX", "PX", _LOCK_MS):
            break
        await asyncio.sleep(0.05)
        if not _outdated(await loaded_versions(client)):
            return []
    else:
        raise RedisUnavailable("another process is loading the function libraries")
    try:
        loaded = await loaded_versions(client)
        # in one step, and new libraries last: a Function that moved to one must have left its old one
        outdated = sorted(_outdated(loaded), key=lambda library: library.name not in loaded)
        loads = [("FUNCTION", "LOAD", "REPLACE", library.code) for library in outdated]
        if loads:
            await client.execute_atomically(loads)
    except StoreError as exc:
        raise Misconfigured(f"Redis refused our function libraries; it needs FUNCTION LOAD: {exc}") from exc
    finally:
        await client.execute("EVAL", _UNLOCK, 1, FUNCTIONS_LOCK, token)
    return [library.name for library in outdated]


def _outdated(loaded: dict[str, int]) -> list[Library]:
    return [library for library in shipped_libraries() if loaded.get(library.name, -1) < library.version]


class Functions:
    """Calls our Functions and reloads them when the server lost them.

    Cost: one round trip a call, three more after a FUNCTION FLUSH.
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        self._loading: asyncio.Task[list[str]] | None = None

    async def call(self, name: str, keys: Sequence[str], *args: Argument, read: bool = False) -> Any:
        """Return the raw reply of one Function; `read` ones may run on replicas.

        Raises:
            StoreError: misuse, or a key of ours has a foreign type.
        """
        return (await self.call_each(name, [(keys, args)], read=read))[0]

    async def call_each(
        self, name: str, calls: Sequence[tuple[Sequence[str], Sequence[Argument]]], *, read: bool = False
    ) -> list[Any]:
        """Return the raw replies of one Function for several arguments. Cost: one round trip."""
        return await self.send([fcall(name, keys, *args, read=read) for keys, args in calls])

    async def send(self, commands: Sequence[Sequence[Argument]]) -> list[Any]:
        """Return the raw replies of commands, some of them made by `fcall`. Cost: one round trip."""
        try:
            return await self._sent(commands)
        except FunctionMissing:
            if self._loading is None or self._loading.done():  # one load, however many calls found them gone
                self._loading = asyncio.create_task(load_libraries(self.client))
            await asyncio.shield(self._loading)
            return await self._sent(commands)

    async def _sent(self, commands: Sequence[Sequence[Argument]]) -> list[Any]:
        if len(commands) == 1:
            return [await self.client.execute(*commands[0])]
        return await self.client.pipeline(commands)


def fcall(name: str, keys: Sequence[str], *args: Argument, read: bool = False) -> Sequence[Argument]:
    """Return the command that calls a Function; `read` ones may run on replicas."""
    return ("FCALL_RO" if read else "FCALL", name, len(keys), *keys, *args)
