"""The only place that keeps the history of counts: what all processes did, by minute and by day.

A count is a name of `slo` and how often it happened. Processes add differences, so that those that restart
lose nothing and nobody needs to know how many there are. Periods are in UTC.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from redismem.client import Argument
from redismem.keys import series_keys
from redismem.lualib import Functions

_MINUTE_S, _DAY_S = 60, 86_400

#: seconds for which the counts of a minute and of a day are kept after the last addition: the last hour,
#: and the 30 days of a budget, each with a margin
KEPT_S = (2 * 3600, 32 * _DAY_S)

#: names in one call of rm_count, as many as ten seconds of a busy process make; holds Redis for about 2 ms
BATCH = 200


class Series:
    """The history, read and added to. Errors of Redis pass through."""

    def __init__(self, functions: Functions) -> None:
        self._functions = functions

    async def add(self, counts: Mapping[str, int], now_s: float) -> None:
        """Add what happened since the last call to the periods of `now_s`. Cost: one round trip.

        After an error it is not known whether it was added; who calls again may count twice.

        Args:
            counts: name -> how often, whole and not negative; zeros are left out.

        Raises:
            StoreError: a count is negative or above 2^53.
        """
        keys = series_keys(now_s)
        flat: list[Argument] = [item for pair in counts.items() if pair[1] for item in pair]
        calls: list[tuple[Sequence[str], Sequence[Argument]]] = [
            (keys, [*KEPT_S, *flat[first : first + 2 * BATCH]]) for first in range(0, len(flat), 2 * BATCH)
        ]
        if calls:
            await self._functions.call_each("rm_count_v1", calls)

    async def minutes(self, now_s: float, count: int) -> list[tuple[int, Counter[str]]]:
        """Return the begin (epoch s) and the counts of so many minutes, oldest first, also empty ones.

        The last is the one that runs. Cost: one round trip, O(minutes x names).
        """
        begun = int(now_s) // _MINUTE_S * _MINUTE_S
        begins = [begun - _MINUTE_S * ago for ago in reversed(range(count))]
        raw = await self._hashes([series_keys(begin)[0] for begin in begins])
        return list(zip(begins, map(_counts, raw), strict=True))

    async def days(self, now_s: float, count: int) -> Counter[str]:
        """Return the sum of so many days; the last is the one that runs. Cost: one round trip."""
        total: Counter[str] = Counter()
        for raw in await self._hashes([series_keys(now_s - _DAY_S * ago)[1] for ago in range(count)]):
            total.update(_counts(raw))
        return total

    async def _hashes(self, keys: Sequence[str]) -> list[Any]:
        return await self._functions.client.pipeline([("HGETALL", key) for key in keys])


def _counts(raw: Sequence[bytes]) -> Counter[str]:
    # a value that is no number was not written by us, and must not hide those that were
    pairs = zip(raw[::2], raw[1::2], strict=True)
    return Counter({name.decode(errors="replace"): int(value) for name, value in pairs if value.isdigit()})
