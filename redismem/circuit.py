"""Decides when a service that is away may be tried again; knows no service, no clock and no randomness."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

State = Literal["closed", "open", "half-open"]

#: seconds from the first failure to the first trial: a restart on the same machine takes about as long
FIRST_BACKOFF_S = 0.05
#: seconds between two trials at most: how long after its return a service may go unnoticed
LONGEST_BACKOFF_S = 2.0


class Circuit:
    """A circuit breaker: closed, open after a failure, half-open while one trial runs.

    A failed trial doubles the back-off. A success closes the circuit and forgets the past.

    Args:
        jitter: a number in 0..1; shortens a back-off by up to half, so that a fleet does not try in step.
    """

    def __init__(
        self,
        jitter: Callable[[], float],
        *,
        first_s: float = FIRST_BACKOFF_S,
        longest_s: float = LONGEST_BACKOFF_S,
    ) -> None:
        self._jitter = jitter
        self._first_s = first_s
        self._longest_s = longest_s
        self._backoff_s = first_s
        self._trial_at_s = 0.0
        self._state: State = "closed"

    @property
    def state(self) -> State:
        """Return whether calls pass (closed), are refused (open), or wait for a trial (half-open)."""
        return self._state

    def retry_after_s(self, now_s: float) -> float:
        """Return the seconds until the next trial may start; 0 when closed or half-open."""
        return max(0.0, self._trial_at_s - now_s) if self._state == "open" else 0.0

    def admits(self, now_s: float) -> bool:
        """Return whether a call may pass; when the back-off has ended, the first to ask is the one trial."""
        if self._state == "open" and now_s >= self._trial_at_s:
            self._state = "half-open"
            return True
        return self._state == "closed"

    def fail(self, now_s: float) -> None:
        """Open the circuit; late failures of calls that were let through before change nothing."""
        if self._state == "open":
            return
        self._backoff_s = (
            self._first_s if self._state == "closed" else min(2 * self._backoff_s, self._longest_s)
        )
        self._trial_at_s = now_s + self._backoff_s * (1 - self._jitter() / 2)
        self._state = "open"

    def succeed(self) -> None:
        """Close the circuit."""
        self._state = "closed"
