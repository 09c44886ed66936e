"""Ends requests that take too long. One timer looks after all: one each would cost a tenth of an L1 hit."""

from __future__ import annotations

import asyncio
import time

#: seconds between two looks; a request may take so much longer
_LOOK_S = 0.5


class Deadlines:
    """The requests of one process that have a deadline; of one event loop."""

    def __init__(self) -> None:
        #: asked for once: asyncio looks at its process id each time, a system call
        self._loop: asyncio.AbstractEventLoop | None = None
        self._due_s: dict[asyncio.Task[object], float] = {}
        self._expired: set[asyncio.Task[object]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, limit_s: float) -> asyncio.Task[object]:
        """Give the running task so many seconds, until `end`; then it is cancelled."""
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.get_running_loop()
        task = asyncio.current_task(loop)
        assert task is not None
        self._due_s[task] = time.monotonic() + limit_s
        if self._timer is None:
            self._timer = loop.call_later(_LOOK_S, self._look)
        return task

    def end(self, task: asyncio.Task[object]) -> None:
        """Take the deadline back; twice is once."""
        self._due_s.pop(task, None)
        self._expired.discard(task)

    def has_ended(self, task: asyncio.Task[object]) -> bool:
        """Return whether a task was cancelled by its deadline, and not by anybody else; it may go on then."""
        if task not in self._expired:
            return False
        self._expired.discard(task)
        return task.uncancel() == 0

    def _look(self) -> None:
        now_s = time.monotonic()
        for task in [task for task, due_s in self._due_s.items() if due_s <= now_s]:
            del self._due_s[task]
            self._expired.add(task)
            task.cancel()
        assert self._loop is not None
        self._timer = self._loop.call_later(_LOOK_S, self._look) if self._due_s else None
