"""The only place that turns redis-py's errors into ours, and that chooses a connection for a call.

A process has two connections: what is long must not stand in front of a search.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hiredis import pack_command
from redis import exceptions as foreign

from redismem.errors import Misconfigured, RedisMemError, RedisUnavailable, StoreError, WritesRefused
from redismem.lane import Lane
from redismem.settings import Settings
from redismem.trace import current

Argument = str | bytes | int | float

#: Bytes of a call on the fast connection. Redis reads 16 KB at a time and serves others between two reads, so
#: this much goes through in one piece. Size and not name decides: the same Function carries one memory or a
#: batch. Long replies are not told apart: they cost Redis its time before they cost the connection any.
MAX_FAST_BYTES = 16 * 1024
#: commands of a call on the fast connection: a search and the vectors it keeps are few, an import is many
MAX_FAST_COMMANDS = 16
#: share of the calls in flight that is for bulk
_BULK_SHARE = 8


_REFUSED = (foreign.AuthenticationError, foreign.AuthorizationError, foreign.NoPermissionError)
_READ_ONLY = (foreign.ReadOnlyError, foreign.OutOfMemoryError)
_AWAY = (foreign.ConnectionError, foreign.TimeoutError, foreign.ClusterDownError, foreign.TryAgainError)


class FunctionMissing(StoreError):
    """A function library is not loaded (FUNCTION FLUSH, a fresh server): load it and try again."""


class Client:
    """Two connections to one Redis. RESP2, bytes in and out.

    Calls that run at the same time may overtake each other; awaited ones keep their order.
    """

    def __init__(self, settings: Settings, url: str) -> None:
        self.url = url
        bulk = max(1, settings.redis_in_flight // _BULK_SHARE)
        fast = max(1, settings.redis_in_flight - bulk)
        self._fast = Lane(url, timeout_s=settings.redis_timeout_s, max_in_flight=fast)
        self._bulk = Lane(url, timeout_s=settings.redis_timeout_s, max_in_flight=bulk)

    @property
    def is_up(self) -> bool:
        """Return whether calls are let through, as far as the last of them and the connection show."""
        return self._fast.is_up

    @property
    def retry_after_s(self) -> float:
        """Return the seconds until the next attempt to connect; 0 when it runs or none is needed."""
        return self._fast.retry_after_s

    async def execute(self, *command: Argument) -> Any:
        """Return the reply of one command. Cost: one round trip."""
        return (await self._replies(packed((command,)), 1))[0]

    async def pipeline(self, commands: Sequence[Sequence[Argument]]) -> list[Any]:
        """Return the replies of several commands, in order; not a transaction. Cost: one round trip.

        Raises:
            StoreError: the first error among the replies; the other commands were carried out.
        """
        return await self._replies(packed(commands), len(commands)) if commands else []

    async def execute_atomically(self, commands: Sequence[Sequence[Argument]]) -> list[Any]:
        """Return the replies of several commands that run in one step (MULTI, EXEC). Cost: one round trip.

        Raises:
            StoreError: a command failed; those before and after it were carried out.
        """
        replies = (await self.pipeline([("MULTI",), *commands, ("EXEC",)]))[-1]
        for reply in replies:
            if isinstance(reply, foreign.ResponseError):
                raise ours(reply) from reply
        return list(replies)

    async def close(self) -> None:
        """Fail what waits and close every connection."""
        await self._fast.close()
        await self._bulk.close()

    async def _replies(self, call: bytes, count: int) -> list[Any]:
        is_fast = count <= MAX_FAST_COMMANDS and len(call) <= MAX_FAST_BYTES
        trace, began_s = current.get(), time.perf_counter()
        try:
            return await (self._fast if is_fast else self._bulk).call(call, count)
        except foreign.RedisError as exc:
            raise ours(exc) from exc
        finally:
            if trace is not None:
                trace.round_trips += 1
                trace.add("redis", began_s)


def packed(commands: Iterable[Sequence[Argument]]) -> bytes:
    """Return commands as Redis reads them.

    Raises:
        TypeError: an argument is no str, bytes, int or float.
    """
    return b"".join([pack_command(tuple(command)) for command in commands])  # type: ignore[arg-type]  # its stub asks for one item


@contextmanager
def translated() -> Iterator[None]:
    """Turn redis-py's errors into ours, from exc."""
    try:
        yield
    except foreign.RedisError as exc:
        raise ours(exc) from exc


def ours(exc: foreign.RedisError) -> RedisMemError:
    """Return our error for one of redis-py's.

    redis-py has classes for some of Redis's error codes, and takes the code off their text.
    """
    text = str(exc)
    if isinstance(exc, _REFUSED):
        error: RedisMemError = Misconfigured(f"Redis refused the credentials of REDISMEM_REDIS_URL: {exc}")
    elif isinstance(exc, _READ_ONLY) or text.startswith(("MISCONF", "NOREPLICAS")) or "OOM command" in text:
        error = WritesRefused(f"Redis cannot answer now: {_why_read_only(exc, text)}; reads go on")
    elif isinstance(exc, _AWAY) or text.startswith(("LOADING", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN")):
        error = RedisUnavailable(f"Redis cannot answer now: {_why_away(exc)}")
    elif "Function not found" in text:
        error = FunctionMissing(text)
    elif isinstance(exc, foreign.ResponseError):
        error = StoreError(f"Redis: {text}")
    else:
        error = StoreError(f"redis-py: {exc}")
    if isinstance(error, RedisUnavailable):
        error.detail = f"{type(exc).__name__}: {text}"
    return error


def _why_read_only(exc: foreign.RedisError, text: str) -> str:
    if isinstance(exc, foreign.OutOfMemoryError) or "OOM command" in text:
        return "it is out of memory"
    if text.startswith("MISCONF"):
        return "it cannot save to its disk"
    return "it takes no writes"


def _why_away(exc: foreign.RedisError) -> str:
    if isinstance(exc, foreign.TimeoutError):
        return "it did not answer in time"
    return "it cannot be reached" if type(exc) is foreign.ConnectionError else "it is not ready"
