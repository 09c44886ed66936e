"""A thread for work that would hold the event loop.

The worker of `redismem serve` is a process of its own, with low priority, so its threads take nothing from
reads. Here they only keep the loop free for Redis: a worker that is silent loses its jobs to another.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, TypeVarTuple

A = TypeVarTuple("A")
T = TypeVar("T")


class Pool:
    """One thread: side by side on few cores nothing is done sooner, but all of it needs memory."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="redismem-worker")

    async def run(self, work: Callable[[*A], T], *args: *A) -> T:
        """Return what `work` returns, or raise what it raises."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, work, *args)

    async def close(self) -> None:
        """End the thread, after the work that it is at."""
        await asyncio.to_thread(self._executor.shutdown, cancel_futures=True)
