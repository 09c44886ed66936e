"""A process of its own for work that would hold the event loop; nice, so that reads come first."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from typing import TypeVar, TypeVarTuple

import numpy as np  # noqa: F401  # its threads are limited below
from threadpoolctl import threadpool_limits

A = TypeVarTuple("A")
T = TypeVar("T")

#: seconds without work after which the process ends: with scikit-learn it holds 150 MB
_IDLE_S = 60.0

_NICE = 10


class Pool:
    """One process, started when it is needed and ended when it is not."""

    def __init__(self, *, idle_s: float = _IDLE_S) -> None:
        self._idle_s = idle_s
        self._executor: ProcessPoolExecutor | None = None
        self._running = 0
        self._end: asyncio.TimerHandle | None = None

    async def run(self, work: Callable[[*A], T], *args: *A) -> T:
        """Return what `work`, a function of a module, returns; its arguments are pickled.

        Raises:
            BrokenProcessPool: the process died, of memory perhaps; the next call starts another.
        """
        if self._end is not None:
            self._end.cancel()
        if self._executor is None:
            self._executor = ProcessPoolExecutor(
                1, mp_context=multiprocessing.get_context("spawn"), initializer=_begin
            )
        executor = self._executor
        self._running += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(executor, work, *args)
        except BrokenProcessPool:
            if self._executor is executor:
                self._executor = None
            executor.shutdown(wait=False)
            raise
        finally:
            self._running -= 1
            if not self._running:
                self._end = asyncio.get_running_loop().call_later(self._idle_s, self._stop)

    def _stop(self) -> None:
        if self._executor is not None and not self._running:
            self._executor.shutdown(wait=False)
            self._executor = None

    async def close(self) -> None:
        """End the process, after the work that it is at."""
        if self._end is not None:
            self._end.cancel()
        executor, self._executor = self._executor, None
        if executor is not None:
            await asyncio.to_thread(executor.shutdown, cancel_futures=True)


def _begin() -> None:
    os.nice(_NICE)
    # threads of BLAS wait for each other where the cores are busy: five times as long on two of them
    threadpool_limits(1)
    parent = multiprocessing.parent_process()
    assert parent is not None
    # a worker that was killed cannot end it
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
