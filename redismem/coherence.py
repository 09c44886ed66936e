"""Keeps L1 true in every process: pushed invalidations, a lease, and the barrier of strong writes.

One connection a process listens. Redis pushes on it the key of every memory, profile and session that
changes, and that of the API keys (`CLIENT TRACKING ON BCAST`, redirected to the connection itself, so that
the tracking cannot be lost while the connection lives), our processes' barriers, and this process's own
heartbeats.

**Lease.** A heartbeat carries the moment it was sent. When it comes back on that connection, everything
pushed before it has been handled, so L1 misses nothing that is older than that moment. L1 may answer
until `lease_s` after it: no heartbeat, no answers. The clock is CLOCK_BOOTTIME, which goes on while a
process or its machine sleeps (a hypervisor that stops the whole machine is not seen).

**Barrier.** After a strong write, the writer publishes what it invalidates and waits until each process that
may hold a lease has acknowledged: it dropped that from its L1, and voided the tickets of reads on their way.
A heartbeat names its process in a hash of Redis in the same step in which it is published, for `lease_s` and
a margin; so a process that is not in the hash when the barrier is published has no lease from before it,
and one from after it comes behind the barrier on its connection. A process that does not answer (killed,
stopped, cut off) is waited for until it is gone from the hash. Whatever happens, MAX_LEASE_S after the
write's reply every lease that may have missed it has run out, so the wait ends there.

The barrier carries the invalidation itself because the order of pushes and messages depends on Redis: it
flushes pushes at the end of an event-loop turn, before that turn's replies, but its I/O threads may reply
earlier.
The clock of Redis must not jump by more than the margin within a lease. A Redis without append-only file
that was just started has forgotten the hash: nothing strong is acknowledged before every lease of before
has run out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
from redis.asyncio.connection import Connection, parse_url

from redismem.client import Argument, Client, translated
from redismem.errors import RedisMemError
from redismem.keys import (
    API_KEYS,
    API_KEYS_ID,
    COHERENCE_CHANNEL,
    LEASES,
    MEMORY_PREFIX,
    PROFILE_ID,
    PROFILE_PREFIX,
    SESSION_PREFIX,
    Owner,
    session_mark,
    split_memory_key,
    split_profile_key,
    split_session_key,
)
from redismem.l1 import L1, Entry
from redismem.rules import RULES, Event
from redismem.settings import MAX_LEASE_S
from redismem.trace import waiting

logger = logging.getLogger(__name__)

#: heartbeats a lease: three may be lost or late
_BEATS_PER_LEASE = 4

#: how much longer than a lease Redis remembers a process: what its clock may jump ahead
_MARGIN_S = 0.5

#: how often a barrier looks whether a silent process is still remembered
_POLL_S = 0.1

_RECONNECT_S = (0.02, 1.0)

_INVALIDATE = b"__redis__:invalidate"

_BEAT = (
    "redis.call('HSET', KEYS[1], ARGV[1], '') redis.call('HPEXPIRE', KEYS[1], ARGV[2], 'FIELDS', 1, ARGV[1]) "
    "return redis.call('PUBLISH', ARGV[3], ARGV[4])"
)
_BARRIER = "redis.call('PUBLISH', ARGV[1], ARGV[2]) return redis.call('HKEYS', KEYS[1])"


def now_s() -> float:
    """Return seconds since boot, sleep included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class _Message(msgspec.Struct, tag_field="kind", tag=str.lower):
    """What processes tell each other."""


class Beat(_Message):
    """To itself: everything published before has been handled."""

    sent_s: float


class Barrier(_Message):
    """To all: drop this (owner tag -> memory ids, null for all of the owner), then acknowledge."""

    sender: str
    number: int
    gone: dict[str, list[str] | None]


class Ack(_Message):
    """To the sender of a barrier."""

    sender: str
    number: int


_decoder = msgspec.json.Decoder(Beat | Barrier | Ack)
_encode = msgspec.json.encode


class Coherence:
    """The listening connection of one process, and its part in the barriers of all."""

    def __init__(
        self,
        client: Client,
        l1: L1,
        *,
        lease_s: float,
        keep_when_lost: bool = False,
        answers: bool = True,
    ) -> None:
        self.id = secrets.token_hex(6)
        #: told what L1 held before a change whose rule re-warms
        self.rewarm: Callable[[list[Entry]], None] = lambda _: None
        #: told that the API keys changed
        self.on_keys: Callable[[], None] = lambda: None
        #: told owner tag and id of each memory that Redis says was written
        self.on_push: Callable[[str, str], None] = lambda _tag, _id: None
        self._client = client
        self._l1 = l1
        self._lease_s = lease_s
        self._keep_when_lost = keep_when_lost
        # a process without L1 needs no lease, and nobody need wait for it
        self._answers = answers
        self._live_until_s = -math.inf
        self._certain_from_s = -math.inf
        #: whether the listening connection stands
        self.is_listening = False
        self._beat_now = asyncio.Event()
        self._lived = asyncio.Event()
        self._number = 0
        self._acknowledged: set[str] = set()
        self._ack_arrived = asyncio.Event()
        self._waiting: list[tuple[dict[str, list[str] | None], asyncio.Future[None]]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._rounds: asyncio.Task[None] | None = None
        self.counts = {"pushes": 0, "barriers": 0, "barrier_timeouts": 0, "connections": 0, "flushes": 0}

    def is_live(self) -> bool:
        """Return whether L1 may answer and be filled now."""
        return now_s() < self._live_until_s

    async def lived(self) -> None:
        """Return when L1 could answer for the first time."""
        await self._lived.wait()

    def start(self) -> None:
        """Connect in the background; until then L1 is bypassed."""
        self._spawn(self._listen())
        self._spawn(self._beat())

    async def close(self) -> None:
        """Give the lease back and stop; a barrier need not wait for this process any more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._l1.clear()
        with contextlib.suppress(RedisMemError):
            await self._client.execute("HDEL", LEASES, self.id)

    # writers ----------------------------------------------------------------------------------

    def held(self, owner: Owner, ids: Sequence[str]) -> list[Entry]:
        """Return what L1 holds of these memories: to ask before a change, whose push may outrun its reply."""
        return self._l1.holding(owner.tag, ids)

    async def changed(
        self,
        event: Event,
        owner: Owner,
        ids: Sequence[str] | None,
        *,
        strong: bool = False,
    ) -> None:
        """Make a change that Redis has carried out hold here, and by its rule everywhere.

        Args:
            ids: the memories; None for all of the owner.
            strong: wait for every process although the rule does not ask for it.
        """
        self._drop(owner.tag, ids)
        if RULES[event].barrier or strong:
            await self.barrier({owner.tag: None if ids is None else list(ids)})

    async def barrier(self, gone: dict[str, list[str] | None]) -> None:
        """Return when no process can answer from before now with what is `gone`.

        Barriers of one process go out together, one round at a time. Cost: two hops through Redis; as
        long as a lease when a process does not answer.
        """
        self.counts["barriers"] += 1
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((gone, done))
        if self._rounds is None or self._rounds.done():
            self._rounds = self._spawn(self._run_rounds())
        try:
            async with asyncio.timeout(MAX_LEASE_S + _MARGIN_S / 10):
                with waiting("barrier"):
                    await done
        except TimeoutError:
            self.counts["barrier_timeouts"] += 1

    async def _run_rounds(self) -> None:
        while self._waiting:
            waiting, self._waiting = self._waiting, []
            gone: dict[str, list[str] | None] = {}
            for part, _ in waiting:
                for tag, ids in part.items():
                    known = gone.get(tag, [])
                    gone[tag] = None if ids is None or known is None else known + ids
            try:
                async with asyncio.timeout(MAX_LEASE_S + _MARGIN_S):
                    await self._round(gone)
            except (RedisMemError, TimeoutError) as exc:
                logger.warning("a barrier waits for leases to run out: %s", exc or "a process is silent")
                continue  # whoever waits goes on when every lease has run out
            for _, done in waiting:
                if not done.done():
                    done.set_result(None)

    async def _round(self, gone: dict[str, list[str] | None]) -> None:
        self._number += 1
        self._acknowledged = set()
        message = _encode(Barrier(self.id, self._number, gone))
        members = await self._client.execute("EVAL", _BARRIER, 1, LEASES, COHERENCE_CHANNEL, message)
        # its own message shows that this process hears the same Redis
        needed = {self.id, *(raw.decode() for raw in members)}
        while needed - self._acknowledged:
            self._ack_arrived.clear()
            try:
                async with asyncio.timeout(_POLL_S):
                    await self._ack_arrived.wait()
            except TimeoutError:
                members = await self._client.execute("HKEYS", LEASES)
                needed &= {self.id, *(raw.decode() for raw in members)}
        await asyncio.sleep(self._certain_from_s - now_s())

    # listening --------------------------------------------------------------------------------

    async def _listen(self) -> None:
        pause_s = _RECONNECT_S[0]
        while True:
            options = parse_url(self._client.url)
            kind = options.pop("connection_class", Connection)
            options |= {"protocol": 2, "client_name": "redismem-push", "socket_timeout": None}
            connection: Connection = kind(**options)
            try:
                with translated():
                    await self._subscribe(connection)
                    pause_s = _RECONNECT_S[0]
                    while True:
                        # own heartbeats come several times a lease: silence means that nothing comes through
                        async with asyncio.timeout(2 * self._lease_s):
                            reply = await connection.read_response()
                        self._handle(reply)
            except (RedisMemError, TimeoutError) as exc:
                logger.info("the push connection is down, L1 is bypassed: %s", exc or "silence")
            except Exception:  # without a listener this process would never hold a lease again
                logger.exception("the push connection is made anew after a defect")
            finally:
                self.is_listening = False
                self._live_until_s = -math.inf
                if not self._keep_when_lost:
                    self._l1.clear()
                await connection.disconnect(nowait=True)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _RECONNECT_S[1])

    async def _subscribe(self, connection: Connection) -> None:
        async def command(*words: str | int) -> Any:
            await connection.send_command(*words, check_health=False)
            return await connection.read_response()

        async with asyncio.timeout(self._lease_s):
            await connection.connect()
            facts = await command("INFO", "server", "persistence")
            own_id = await command("CLIENT", "ID")
            watched = (MEMORY_PREFIX, PROFILE_PREFIX, SESSION_PREFIX, API_KEYS)
            prefixes = [word for prefix in watched for word in ("PREFIX", prefix)]
            await command("CLIENT", "TRACKING", "ON", "REDIRECT", own_id, "BCAST", *prefixes)
            channels = (_INVALIDATE.decode(), COHERENCE_CHANNEL, self._channel(self.id))
            await connection.send_command("SUBSCRIBE", *channels, check_health=False)
            confirmed = 0
            while confirmed < len(channels):  # messages may come between; L1 does not answer yet
                confirmed += (await connection.read_response())[0] == b"subscribe"
        # not before: Redis drops pushes for a connection that has not subscribed, and tickets of reads on
        # their way must not outlive that
        self._l1.clear()
        if has_forgotten(facts):
            self._certain_from_s = now_s() + MAX_LEASE_S
        self.is_listening = True
        self.counts["connections"] += 1
        self._beat_now.set()

    def _handle(self, reply: list[Any]) -> None:
        word, channel, content = reply
        if word != b"message":
            return
        if channel == _INVALIDATE:
            self._invalidated(content)
            return
        try:
            message = _decoder.decode(content)
        except msgspec.MsgspecError:
            logger.warning("somebody else publishes on %s", channel)
            return
        match message:
            case Beat(sent_s):
                if self._answers:
                    self._live_until_s = max(self._live_until_s, sent_s + self._lease_s)
                self._lived.set()
            case Barrier(sender, number, _) if sender == self.id:
                self._acknowledge(sender, number)
            case Barrier(sender, number, gone):
                for tag, ids in gone.items():
                    self._drop(tag, ids)
                self._spawn(self._send_ack(sender, number))
            case Ack(sender, number):
                self._acknowledge(sender, number)

    def _invalidated(self, keys: list[bytes] | None) -> None:
        """Drop what Redis says was written; None: the whole database was flushed, our lease with it."""
        if keys is None:
            self.counts["flushes"] += 1
            self._live_until_s = -math.inf
            self._l1.clear()
            self._beat_now.set()
            return
        self.counts["pushes"] += len(keys)
        for raw in keys:
            key = raw.decode("utf-8", "replace")
            if found := split_memory_key(key):
                self._l1.invalidate(found[0], (found[1],))
                self.on_push(*found)
            elif tag := split_profile_key(key):
                self._l1.invalidate(tag, (PROFILE_ID,))
            elif session := split_session_key(key):
                self._l1.invalidate(session[0], (session_mark(session[1]),))
            elif key == API_KEYS:
                self._drop("", (API_KEYS_ID,))

    def _drop(self, tag: str, ids: Iterable[str] | None) -> None:
        if ids is None:
            self._l1.invalidate_owner(tag)
        else:
            self._l1.invalidate(tag, ids)
        if not tag:
            self.on_keys()

    def _acknowledge(self, sender: str, number: int) -> None:
        if number == self._number:
            self._acknowledged.add(sender)
            self._ack_arrived.set()

    async def _send_ack(self, sender: str, number: int) -> None:
        with contextlib.suppress(RedisMemError):  # the sender waits out our lease instead
            await self._client.execute("PUBLISH", self._channel(sender), _encode(Ack(self.id, number)))

    async def _beat(self) -> None:
        while True:
            if self.is_listening:
                beat = _encode(Beat(now_s()))
                command: tuple[Argument, ...] = ("PUBLISH", self._channel(self.id), beat)
                if self._answers:
                    remembered_ms = int((self._lease_s + _MARGIN_S) * 1000)
                    command = ("EVAL", _BEAT, 1, LEASES, self.id, remembered_ms, *command[1:])
                with contextlib.suppress(RedisMemError):
                    await self._client.execute(*command)
            self._beat_now.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._lease_s / _BEATS_PER_LEASE):
                    await self._beat_now.wait()

    @staticmethod
    def _channel(process: str) -> str:
        return f"{COHERENCE_CHANNEL}:{process}"

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def has_forgotten(info: bytes) -> bool:
    """Return whether Redis started too lately, and without a log, to know the leases that still run."""
    facts = dict(line.split(b":", 1) for line in info.splitlines() if b":" in line)
    uptime_s = int(facts.get(b"uptime_in_seconds", 0))
    return facts.get(b"aof_enabled") != b"1" and uptime_s <= MAX_LEASE_S + 1
