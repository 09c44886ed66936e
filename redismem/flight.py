"""One computation for all who ask for the same thing at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Abandoned(Exception):
    """Whoever computed was cancelled: ask again."""


class Flight(Generic[T]):
    """A computation under way. One computes and lands it or fails it; the others join.

    A failure reaches everyone who joined, once. Whoever joins late gets what it came to.
    """

    __slots__ = ("_end", "_future", "joined")

    def __init__(self) -> None:
        self._future: asyncio.Future[T] | None = None
        self._end: Callable[[asyncio.Future[T]], None] | None = None
        self.joined = 0

    async def join(self) -> T:
        """Return what the computation comes to.

        Raises:
            Abandoned: it was cancelled.
        """
        self.joined += 1
        if self._future is None:  # most flights have no passengers: the first one pays for it
            self._future = asyncio.get_running_loop().create_future()
            self._future.add_done_callback(_retrieve)
            if self._end is not None:
                self._end(self._future)
        # a passenger who leaves must not take the others along
        return await asyncio.shield(self._future)

    def land(self, result: T) -> None:
        """Hand the result to everyone who joined."""
        self._finish(lambda future: future.set_result(result))

    def fail(self, exc: BaseException) -> None:
        """Hand the failure to everyone who joined."""
        error = exc if isinstance(exc, Exception) else Abandoned()
        self._finish(lambda future: future.set_exception(error))

    def _finish(self, end: Callable[[asyncio.Future[T]], None]) -> None:
        self._end = end
        if self._future is not None:
            end(self._future)


def _retrieve(future: asyncio.Future[T]) -> None:
    """Keep asyncio from reporting a failure whose passengers have all left."""
    if not future.cancelled():
        future.exception()
