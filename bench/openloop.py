"""Sends requests when they are due, whether or not earlier ones were answered, and keeps what became of each.

A request counts from when it was due. What waits for a free connection, or for this process to get to it,
waits as its sender would; that part is kept apart as the generator's lag, so that a reader sees whether the
generator was the bottleneck.

Bounded: at most `most_open` requests are outstanding, one a connection; one without a reply, or without a
connection, for `patience_s` is given up and counted as such.
"""

from __future__ import annotations

import asyncio
import random
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from ipaddress import ip_address
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

#: what stands for the status of a request without a reply
LOST, UNREACHABLE, TIMEOUT, UNSENT = 0, 1, 2, 3
NO_REPLY = {
    LOST: "connection lost",
    UNREACHABLE: "connection refused",
    TIMEOUT: "no reply in time",
    UNSENT: "never sent",
}
REFUSED = (429, 503)

#: seconds between two looks for what has waited too long
_SWEEP_S = 0.2
#: idle connections are closed by us before uvicorn does it (5 s), else a request may meet the closing
_IDLE_S = 3.0
#: requests sent before replies are looked at again
_AT_ONCE = 64


class Due(NamedTuple):
    """A request, and when it is due: seconds since the begin of the run."""

    at_s: float
    name: str
    content: bytes


#: told each request that ended: its status (or LOST …), when it ended (`at_s`), the reply with its head
Seen = Callable[[Due, int, float, bytes], None]


class Phase(NamedTuple):
    """So many users for so many seconds."""

    name: str
    users: int
    seconds: float


def arrivals(
    phases: Iterable[Phase], rate_per_user: float, chooser: random.Random, began_s: float = 0.0
) -> Iterator[float]:
    """Yield when requests of the phases are due, seconds since the begin, ascending.

    Each user is a Poisson process of its own; together they are one of their summed rate, which is what is
    drawn. None depends on a reply.
    """
    for phase in phases:
        at_s, began_s = began_s, began_s + phase.seconds
        while (at_s := at_s + chooser.expovariate(phase.users * rate_per_user)) < began_s:
            yield at_s


class Table(NamedTuple):
    """Records as columns; `kind` is an index into `names`, `tier` 1, 2, 3 or 0 where no reply tells it."""

    names: Sequence[str]
    due_s: NDArray[np.float64]
    kind: NDArray[np.uint8]
    status: NDArray[np.uint16]
    took_ms: NDArray[np.float32]
    lag_ms: NDArray[np.float32]
    tier: NDArray[np.uint8]

    @property
    def ok(self) -> NDArray[np.bool_]:
        return (self.status >= 200) & (self.status < 300)

    @property
    def refused(self) -> NDArray[np.bool_]:
        return np.isin(self.status, REFUSED)

    def where(self, mask: NDArray[np.bool_]) -> Table:
        """Return the rows of a mask."""
        return Table(self.names, *(column[mask] for column in self[1:]))

    def between(self, begin_s: float, end_s: float) -> Table:
        """Return what was due then."""
        return self.where((self.due_s >= begin_s) & (self.due_s < end_s))

    def named(self, *names: str) -> Table:
        """Return what has one of the names."""
        return self.where(np.isin(self.kind, [i for i, name in enumerate(self.names) if name in names]))


class Records:
    """What became of each request, in 20 bytes each: hours fit."""

    def __init__(self) -> None:
        self._kinds: dict[str, int] = {}
        self._columns = (array("d"), array("B"), array("H"), array("f"), array("f"), array("B"))
        #: the highest number of requests outstanding at once
        self.most_open = 0

    def __len__(self) -> int:
        return len(self._columns[0])

    def add(self, due: Due, status: int, sent_s: float, done_s: float, reply: bytes) -> None:
        """Add a request that ended at `done_s` and was sent at `sent_s`."""
        at = reply.rfind(b'"served_by":"l') if status == 200 else -1
        row: tuple[float, ...] = (
            due.at_s,
            self._kinds.setdefault(due.name, len(self._kinds)),
            status,
            (done_s - due.at_s) * 1000,
            (sent_s - due.at_s) * 1000,
            reply[at + 14] - ord("0") if at > 0 else 0,
        )
        for column, value in zip(self._columns, row, strict=True):
            column.append(value)

    def table(self) -> Table:
        """Return a copy of everything so far; in the order of the replies."""
        due_s, kind, status, took_ms, lag_ms, tier = (
            np.array(column, dtype=column.typecode) for column in self._columns
        )
        return Table(tuple(self._kinds), due_s, kind, status, took_ms, lag_ms, tier)


class OpenLoop:
    """One run of requests against one address of this machine.

    Args:
        most_open: connections, and so requests that may be outstanding.
        patience_s: seconds from when it was due until a request is given up.
        records: those that a source of requests looks at while it makes them.

    Raises:
        ValueError: the address is not on this machine.
    """

    def __init__(
        self,
        url: str,
        *,
        most_open: int = 1000,
        patience_s: float = 10.0,
        records: Records | None = None,
        seen: Seen | None = None,
    ) -> None:
        parts = urlsplit(url)
        self._host, self._port = str(parts.hostname), int(parts.port or 80)
        if not is_loopback(url):
            raise ValueError(f"load goes to this machine only, and {self._host} is not it: use 127.0.0.1")
        self._most_open, self._patience_s, self._seen = most_open, patience_s, seen
        self.records = Records() if records is None else records
        self._waiting: deque[Due] = deque()
        self._free: list[_Wire] = []
        self._busy: set[_Wire] = set()
        self._connecting: set[asyncio.Task[None]] = set()
        self._next: Due | None = None

    async def run(self, requests: Iterable[Due]) -> Records:
        """Send requests when they are due; return when each has ended.

        Args:
            requests: in the order in which they are due; taken one by one as time goes on.
        """
        self._loop = asyncio.get_running_loop()
        self._requests = iter(requests)
        self._ended = self._loop.create_future()
        self._began_s = time.perf_counter()
        self._next = next(self._requests, None)
        sweeping = self._loop.create_task(self._sweep())
        self._pump()
        try:
            await self._ended
        finally:
            sweeping.cancel()
            for task in self._connecting:
                task.cancel()
            for wire in (*self._free, *self._busy):
                wire.transport.abort()
        return self.records

    def now_s(self) -> float:
        """Return the seconds since the begin."""
        return time.perf_counter() - self._began_s

    def _pump(self) -> None:
        """Take what is due, send it, and come back when the next one is."""
        try:
            now_s = self.now_s()
            for _ in range(_AT_ONCE):
                if self._next is None or self._next.at_s > now_s:
                    break
                self._waiting.append(self._next)
                self._next = next(self._requests, None)
            self._send()
            if self._next is not None:
                self._loop.call_later(max(0.0, self._next.at_s - now_s), self._pump)
        except BaseException as exc:
            if self._ended.done():
                raise
            # a source that fails must not leave `run` waiting
            self._ended.set_exception(exc)
            return
        self._look_for_end()

    def _send(self) -> None:
        now_s = self.now_s()
        while self._waiting and self._free:
            wire = self._free.pop()  # the one that was used last: if it is too old, all are
            if now_s - wire.since_s > _IDLE_S:
                wire.transport.abort()
                continue
            self._busy.add(wire)
            self.records.most_open = max(self.records.most_open, len(self._busy))
            wire.send(self._waiting.popleft(), now_s)
        room = self._most_open - len(self._busy) - len(self._connecting)
        for _ in range(min(room, len(self._waiting) - len(self._connecting))):
            task = self._loop.create_task(self._connect())
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    async def _connect(self) -> None:
        try:
            await self._loop.create_connection(lambda: _Wire(self), self._host, self._port)
        except OSError:
            if self._waiting:
                due = self._waiting.popleft()
                self._end(due, UNREACHABLE, self.now_s(), b"")

    def _end(self, due: Due, status: int, sent_s: float, reply: bytes) -> None:
        done_s = self.now_s()
        self.records.add(due, status, sent_s, done_s, reply)
        if self._seen is not None:
            self._seen(due, status, done_s, reply)
        self._look_for_end()

    def _look_for_end(self) -> None:
        if self._next is None and not self._waiting and not self._busy and not self._ended.done():
            self._ended.set_result(None)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            given_up_s = self.now_s() - self._patience_s
            while self._waiting and self._waiting[0].at_s < given_up_s:
                self._end(self._waiting.popleft(), UNSENT, self.now_s(), b"")
            for wire in [wire for wire in self._busy if wire.due and wire.due.at_s < given_up_s]:
                due, wire.due = wire.due, None
                self._busy.discard(wire)
                wire.transport.abort()
                assert due is not None
                self._end(due, TIMEOUT, wire.since_s, b"")

    # what a connection tells

    def connected(self, wire: _Wire) -> None:
        self._free.append(wire)
        wire.since_s = self.now_s()
        self._send()

    def answered(self, wire: _Wire, due: Due, reply: bytes) -> None:
        status, sent_s = int(reply[9:12]), wire.since_s
        self._busy.discard(wire)
        if (
            status != 200
            and b"\r\nconnection: close\r\n" in reply.partition(b"\r\n\r\n")[0].lower() + b"\r\n"
        ):
            wire.transport.abort()
        else:
            self._free.append(wire)
            wire.since_s = self.now_s()
        self._end(due, status, sent_s, reply)
        if self._waiting:
            self._send()

    def lost(self, wire: _Wire) -> None:
        self._busy.discard(wire)
        if wire in self._free:
            self._free.remove(wire)
        if wire.due is not None:
            due, wire.due = wire.due, None
            self._end(due, LOST, wire.since_s, b"")
        if self._waiting:
            self._send()


class _Wire(asyncio.Protocol):
    """A keep-alive connection: reads just enough of a reply to see its end."""

    def __init__(self, owner: OpenLoop) -> None:
        self._owner = owner
        self.due: Due | None = None
        #: when its request was sent or it got free
        self.since_s = 0.0
        self._reply = b""
        self._length = 0

    def connection_made(self, transport: Any) -> None:  # uvloop's is no asyncio.Transport
        self.transport = transport
        self._owner.connected(self)

    def send(self, due: Due, now_s: float) -> None:
        self.due, self.since_s = due, now_s
        self._reply, self._length = b"", 0
        self.transport.write(due.content)

    def data_received(self, data: bytes) -> None:
        reply = self._reply = self._reply + data if self._reply else data
        if not self._length:
            head = reply.find(b"\r\n\r\n")
            if head < 0:
                return
            at = reply.index(b"content-length: ", 0, head) + 16  # uvicorn's are lower case
            self._length = head + 4 + int(reply[at : reply.index(b"\r", at)])
        if len(reply) >= self._length and self.due is not None:
            due, self.due = self.due, None
            self._owner.answered(self, due, reply)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # the signature is asyncio's
        self._owner.lost(self)


def is_loopback(url: str) -> bool:
    """Return whether a URL's host is this machine by its address; names are not looked up."""
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
