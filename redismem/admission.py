"""Decides how many requests may be worked on at once, from how long they take.

The idea is TCP's: additive increase, multiplicative decrease (Jacobson 1988; for services see Netflix'
concurrency-limits). Where requests take longer than they should, they wait for each other: fewer are let in.
Where they are fast although the limit was reached, one more is. What is not let in is refused at once, so
what is let in stays fast however much is asked. Departure: the signal is the share of slow requests among the
last `_SAMPLE`, not each single one, because machines are noisy.
"""

from __future__ import annotations

from typing import Final

#: requests that a decision looks at; the time it takes to see an overload, at the least
_SAMPLE: Final = 16

#: share of slow ones from which the limit shrinks, and to how much of it: it settles that near to the best
_SLOW_SHARE: Final = 0.3
_SHRINK: Final = 0.9

#: requests at once that are always let in: fewer would leave cores idle while Redis answers
LEAST: Final = 6


class Admission:
    """The limit of one process, and what is in flight.

    Args:
        most: highest limit, and the first.
        slow_s: seconds from which a request counts as slow; 0: the limit stays.
    """

    def __init__(self, *, most: int, slow_s: float) -> None:
        self._most = most
        self._least = min(LEAST, most)
        self._slow_s = slow_s
        self._limit = float(most)
        self._seen = self._slow = 0
        self._peak = 0
        self.in_flight = 0

    @property
    def limit(self) -> int:
        return int(self._limit)

    def enter(self) -> bool:
        """Let a request in, or return False: refuse it. Whoever was let in calls `leave`."""
        if self.in_flight >= int(self._limit):
            self._peak = self.in_flight
            return False
        self.in_flight += 1
        self._peak = max(self._peak, self.in_flight)
        return True

    def leave(self, took_s: float | None) -> None:
        """Let a request go.

        Args:
            took_s: seconds; None if they tell nothing about the load (bulk work, a client that went away).
        """
        self.in_flight -= 1
        if took_s is None or not self._slow_s:
            return
        self._seen += 1
        self._slow += took_s > self._slow_s
        if self._seen < _SAMPLE:
            return
        if self._slow >= _SLOW_SHARE * self._seen:
            if self._peak > self._least:  # else they are slow by themselves, and do not wait for each other
                # from what was really at work: an idle service's limit says nothing
                self._limit = max(self._least, min(self._limit, self._peak) * _SHRINK)
        elif self._peak >= int(self._limit):
            self._limit = min(self._most, self._limit + 1)
        self._seen = self._slow = 0
        self._peak = self.in_flight
