"""The only place that holds connections to Redis for calls: one connection shared by many callers.

Redis answers the commands of a connection in their order, so the oldest waiting call gets the next reply.
What the tasks of one event-loop turn send goes out in one write.

Invariants: a caller that gives up stays in the queue until its reply has been read and dropped. While the
circuit is open nothing waits: calls are refused at once, and one task tries to connect. What is raised is
redis-py's error (`client.ours` translates), except a refusal of our own.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, cast

from redis import exceptions as foreign
from redis.asyncio.connection import Connection, parse_url

from redismem.circuit import Circuit
from redismem.errors import Misconfigured, RedisUnavailable

logger = logging.getLogger(__name__)

#: seconds for a new connection after one was lost; what waits is repeated on it, else it fails
RECONNECT_S = 0.25
#: bytes of waiting calls, which are kept to be repeated; with more a call is refused
MAX_WAITING_BYTES = 64 * 1024 * 1024
#: options of a URL that belong to redis-py's pools, not to a connection
_OF_POOLS = ("max_connections", "timeout")


@dataclass(slots=True, eq=False)
class _Call:
    """What one caller waits for."""

    packed: bytes
    count: int
    done: asyncio.Future[list[Any]]
    since_s: float
    replies: list[Any] = field(default_factory=list)
    repeated: bool = False

    def fail(self, error: foreign.RedisError) -> None:
        # as a reply: an exception that a cancelled caller leaves in a future would be logged
        if not self.done.done():
            self.done.set_result([_copied(error)])


class Lane:
    """One connection to Redis, made by the first call and whenever it is lost; of one event loop.

    A lost connection is replaced at once, and waiting calls are repeated once on the new one: every write of
    ours may be repeated. When that takes longer than RECONNECT_S, or nothing comes back for `timeout_s`,
    what waits fails and the circuit opens. On a connection that answers, only late calls fail.

    Args:
        url: redis://, rediss:// or unix://, with credentials and database.
        timeout_s: how long a caller waits, and how long a silent connection counts as alive.
        max_in_flight: calls that may wait at once.
    """

    def __init__(self, url: str, *, timeout_s: float, max_in_flight: int) -> None:
        self._options = {name: value for name, value in parse_url(url).items() if name not in _OF_POOLS}
        _check(self._options)
        self._timeout_s = timeout_s
        #: between two looks of the watchdog; it may be two looks late
        self._look_s = timeout_s / 8
        self._late = foreign.TimeoutError(f"no answer within {timeout_s:g} s")
        self._max_in_flight = max_in_flight
        self._circuit = Circuit(random.random)
        #: why calls are refused
        self._trouble: foreign.RedisError | None = None
        self._waiting: deque[_Call] = deque()
        self._waiting_bytes = 0
        self._unsent: list[bytes] = []
        #: of the connection, while it stands
        self._writer: asyncio.StreamWriter | None = None
        self._runner: asyncio.Task[None] | None = None
        #: ends the reading of a connection
        self._reading: asyncio.Timeout | None = None
        self._heard_s = 0.0
        self._watchdog: asyncio.TimerHandle | None = None

    @property
    def is_up(self) -> bool:
        """Return whether calls are let through."""
        return self._trouble is None

    @property
    def retry_after_s(self) -> float:
        """Return the seconds until the next attempt to connect; 0 when it runs or none is needed."""
        return self._circuit.retry_after_s(monotonic())

    async def call(self, packed: bytes, count: int = 1) -> list[Any]:
        """Return the replies of `count` packed commands, which are sent in one write. Cost: one round trip.

        Raises:
            RedisError: the first error among the replies, or why Redis is away.
            RedisUnavailable: too many calls wait.
        """
        if self._trouble is not None:
            raise _copied(self._trouble)
        if len(self._waiting) >= self._max_in_flight or self._waiting_bytes > MAX_WAITING_BYTES:
            raise RedisUnavailable("too many calls wait for Redis")
        if self._runner is None:
            # it outlives the request that happens to be the first
            self._runner = asyncio.get_running_loop().create_task(
                self._run(), name="redismem-lane", context=Context()
            )
            self._runner.add_done_callback(self._ended)
        loop = asyncio.get_running_loop()
        call = _Call(packed, count, loop.create_future(), monotonic())
        if not self._unsent and self._waiting:
            loop.call_soon(self._flush)
        self._unsent.append(packed)
        if not self._waiting:  # nobody to join: a turn of the loop would be lost
            self._flush()
        self._waiting.append(call)
        self._waiting_bytes += len(packed)
        if self._watchdog is None:
            self._watchdog = loop.call_later(self._look_s, self._look)
        replies = await call.done
        for reply in replies:
            if isinstance(reply, foreign.RedisError):
                raise reply
        return replies

    async def close(self) -> None:
        """Fail what waits, and end the connection for good."""
        self._trouble = foreign.ConnectionError("closed by this process")
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)
        if self._watchdog is not None:
            self._watchdog.cancel()

    async def _run(self) -> None:
        patience_s = self._timeout_s
        while True:
            try:
                connection = await self._opened(patience_s)
            except (foreign.RedisError, OSError, TimeoutError) as exc:
                trouble: foreign.RedisError | None = _reason(exc)
            else:
                trouble = await self._talk(connection)
            patience_s = RECONNECT_S
            if trouble is not None:
                if self._trouble is None and self._heard_s:  # else its first caller tells
                    logger.warning("Redis is away: %s", trouble)
                self._trouble = trouble
                self._circuit.fail(monotonic())
                self._fail_all(trouble)
                while not self._circuit.admits(monotonic()):  # noqa: ASYNC110  # for time, not an event
                    await asyncio.sleep(self.retry_after_s)
                patience_s = self._timeout_s

    def _ended(self, runner: asyncio.Task[None]) -> None:
        """Leave nobody waiting: after close, when the loop ends, or after a defect (calls start anew)."""
        self._runner = None
        if runner.cancelled():
            self._trouble = foreign.ConnectionError("closed by this process")
        else:
            logger.error("the connection to Redis ended by a defect", exc_info=runner.exception())
        self._fail_all(self._trouble or foreign.ConnectionError("a defect, see the log"))

    async def _opened(self, patience_s: float) -> Connection:
        """Connect, and see that Redis serves: one that loads its data, or has lost its master, does not."""
        options = {"socket_connect_timeout": self._timeout_s, **self._options, "socket_timeout": None}
        options |= {"protocol": 2, "decode_responses": False, "client_name": "redismem"}
        connection: Connection = options.pop("connection_class", Connection)(**options)
        try:
            async with asyncio.timeout(patience_s):
                await connection.connect()
                await connection.send_command("PING", check_health=False)
                await connection.read_response()
        except BaseException:
            await _close(connection)
            raise
        return connection

    async def _talk(self, connection: Connection) -> foreign.RedisError | None:
        """Exchange commands and replies; return why it ended, or None: replace the connection at once."""
        began_s = self._heard_s = monotonic()
        self._resume(_writer_of(connection))
        try:
            async with asyncio.timeout(None) as self._reading:
                await self._read(connection)
        except TimeoutError:
            return self._late
        except (foreign.RedisError, OSError) as exc:
            lost = _reason(exc)
        finally:
            self._reading = self._writer = None
            await _close(connection)
        if self._heard_s == began_s > monotonic() - RECONNECT_S:
            return lost  # it came and went without an answer: not another one without a pause
        for call in self._waiting:
            if call.repeated:
                call.fail(lost)
            call.repeated = True
        return None

    def _resume(self, writer: asyncio.StreamWriter) -> None:
        """Let calls through, first those that wait."""
        if self._trouble is not None:
            logger.info("Redis answers again")
        self._trouble = None
        self._circuit.succeed()
        self._waiting = deque(call for call in self._waiting if not call.done.done())
        for call in self._waiting:
            call.replies.clear()
        self._unsent = [call.packed for call in self._waiting]
        self._waiting_bytes = sum(map(len, self._unsent))
        self._writer = writer
        self._flush()

    def _fail_all(self, trouble: foreign.RedisError) -> None:
        for call in self._waiting:
            call.fail(trouble)
        self._waiting, self._unsent, self._waiting_bytes = deque(), [], 0

    def _flush(self) -> None:
        """Send what this turn collected; the bounds of `call` are those of the transport's buffer too."""
        if self._unsent and self._writer is not None and not self._writer.is_closing():
            self._writer.write(b"".join(self._unsent))
            self._unsent = []

    async def _read(self, connection: Connection) -> None:
        waiting = self._waiting
        while True:
            try:
                reply = await connection.read_response(disconnect_on_error=False)
            except foreign.ResponseError as exc:
                reply = exc
            self._heard_s = monotonic()
            call = waiting[0]
            call.replies.append(reply)
            if len(call.replies) == call.count:
                waiting.popleft()
                self._waiting_bytes -= len(call.packed)
                if not call.done.done():
                    call.done.set_result(call.replies)

    def _look(self, again: bool = False) -> None:  # call_later passes by position
        """Watch: fail calls that are late; end a connection on which nothing comes back."""
        self._watchdog = None
        if not self._waiting:
            return
        late_s = monotonic() - self._timeout_s
        is_late = self._waiting[0].since_s <= late_s
        if is_late and again:  # not at the first look: this process may have stood still, with replies unread
            if self._reading and self._heard_s <= late_s:
                self._reading.reschedule(0)
                self._reading = None
            for call in self._waiting:
                if call.since_s <= late_s:
                    call.fail(self._late)
        self._watchdog = asyncio.get_running_loop().call_later(self._look_s, self._look, is_late)


def _check(options: dict[str, Any]) -> None:
    """Raise Misconfigured when a URL has an option that its kind of connection does not take."""
    kind = options.get("connection_class", Connection)
    try:
        kind(**{name: value for name, value in options.items() if name != "connection_class"})
    except TypeError as exc:
        raise Misconfigured(f"REDISMEM_REDIS_URL has an option that does not fit its scheme: {exc}") from exc


def _copied(error: foreign.RedisError) -> foreign.RedisError:
    """Return an error of one caller's own: a shared one would collect the tracebacks of all."""
    return type(error)(*error.args)


def _reason(exc: Exception) -> foreign.RedisError:
    if isinstance(exc, TimeoutError):
        return foreign.TimeoutError("no connection in time")
    for error in (exc.__cause__, exc):  # redis-py 8 wraps what Redis answers on a unix socket
        if isinstance(error, foreign.RedisError):
            return error
    return foreign.ConnectionError(str(exc))


def _writer_of(connection: Connection) -> asyncio.StreamWriter:
    # redis-py 4.2 to 8.1; its own methods cannot write without a task, nor drop what is unsent
    return cast("asyncio.StreamWriter", connection._writer)  # noqa: SLF001


async def _close(connection: Connection) -> None:
    """Close a connection and drop what is unsent: redis-py would keep it until a hung server reads on."""
    if connection.is_connected:
        _writer_of(connection).transport.abort()
    with suppress(foreign.RedisError):
        await connection.disconnect()
