"""The only place that counts the requests of an API key against its limit.

All processes share one bucket a key in Redis (lua/limits.lua). So that most requests cost no round trip, a
process takes a twentieth of a second's worth ahead, or as many as wait; what it has not used after a second
is void. So over the fleet never more than burst + rate * t is granted; a key that many processes serve in
trickles may get less, by that twentieth a process and second.

A process that was refused asks again when there can be a token at the earliest: until then it refuses by
itself, and a flood of refused requests costs Redis nothing. While Redis is away everything passes: the
request meets the same Redis behind this.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from redismem.apikeys import KeyFacts
from redismem.errors import RedisUnavailable
from redismem.flight import Abandoned, Flight
from redismem.keys import rate_key
from redismem.lualib import Functions

#: share of a second's requests that a process takes ahead
GRANT_S = 0.05

#: seconds until a grant that was not used is void
VOID_AFTER_S = 1.0


class _Purse:
    """What one process has of one key."""

    __slots__ = ("asking", "closed_until_s", "left", "void_at_s", "waiting")

    def __init__(self) -> None:
        self.left = 0
        self.void_at_s = 0.0
        #: before this Redis has no token
        self.closed_until_s = 0.0
        #: callers of `take`
        self.waiting = 0
        self.asking: Flight[None] | None = None

    def spend(self, now_s: float) -> bool:
        """Return whether there was one for the caller."""
        if self.left and now_s < self.void_at_s:
            self.left -= 1
            return True
        return False


class Limiter:
    """The limits of all keys, kept by one process.

    Args:
        clock: epoch seconds, for the bucket that processes share.
        elapsed: seconds, for what this process holds.
    """

    def __init__(
        self,
        functions: Functions,
        *,
        clock: Callable[[], float] = time.time,
        elapsed: Callable[[], float] = time.monotonic,
    ) -> None:
        self._functions = functions
        self._clock = clock
        self._elapsed = elapsed
        self._purses: dict[str, _Purse] = {}

    def try_take(self, key: KeyFacts) -> bool:
        """Return whether a request passes by what is at hand; False: ask `take`. Cost: no I/O."""
        if key.rate_per_s is None:
            return True
        purse = self._purses.get(key.id)
        return purse is not None and purse.spend(self._elapsed())

    async def take(self, key: KeyFacts) -> float:
        """Return 0.0 where a request passes, else the seconds after which another try makes sense.

        Cost: nothing with a grant at hand, or within the time of a refusal; else one round trip, which all
        who wait share.
        """
        if key.rate_per_s is None:
            return 0.0
        purse = self._purses.setdefault(key.id, _Purse())
        purse.waiting += 1
        try:
            while not purse.spend(now_s := self._elapsed()):
                if purse.closed_until_s > now_s:
                    return purse.closed_until_s - now_s
                await self._asked(key, key.rate_per_s, purse)
        except RedisUnavailable:
            return 0.0
        finally:
            purse.waiting -= 1
        return 0.0

    async def _asked(self, key: KeyFacts, rate_per_s: float, purse: _Purse) -> None:
        """Ask Redis for a grant, or join whoever asks now."""
        if purse.asking is not None:
            try:
                return await purse.asking.join()
            except Abandoned:
                return None
        flight: Flight[None] = Flight()
        purse.asking = flight
        try:
            await self._ask(key, rate_per_s, purse)
            flight.land(None)
        except BaseException as exc:
            flight.fail(exc)
            raise
        finally:
            purse.asking = None

    async def _ask(self, key: KeyFacts, rate_per_s: float, purse: _Purse) -> None:
        asked_s = self._elapsed()
        want = min(key.capacity, max(1, int(rate_per_s * GRANT_S), purse.waiting))
        granted, wait_ms = await self._functions.call(
            "rm_take_v1", [rate_key(key.id)], int(self._clock() * 1000), rate_per_s, key.capacity, want
        )
        if granted:
            purse.left, purse.void_at_s = granted, asked_s + VOID_AFTER_S
        else:
            purse.closed_until_s = self._elapsed() + wait_ms / 1000
