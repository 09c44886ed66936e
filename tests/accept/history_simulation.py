"""A simulated store of memories, with or without a cache that misses invalidations."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tests.accept.history import Event, Item, Operation

IDS, USERS = ("m", "n", "o"), ("u", "v")
READS = ("get", "search", "context")


@dataclass(frozen=True)
class Step:
    """One operation of a simulated client: its times in ticks, and when in between it takes effect."""

    operation: Operation
    memory_id: str
    user: str
    began: int
    length: int
    share: float
    lost: bool
    process: int


class Simulation:
    """A store that does each step at one moment.

    Args:
        deaf: None: every read is of the store. Else reads at process 1 are of a cache, in which each
            write is forgotten to be invalidated with this probability.
    """

    def __init__(self, steps: Sequence[Step], *, deaf: float | None = None) -> None:
        self._memories: dict[tuple[str, str], tuple[str, bool]] = {}
        self._cache: dict[tuple[str, str], tuple[Item, ...]] = {}
        self._numbers = itertools.count()
        self._deaf, self._rng = deaf, random.Random(0)
        #: reads that returned what the store no longer held
        self.old: list[Event] = []
        self.events: list[Event] = []
        for step in sorted(steps, key=lambda step: step.began + step.share * step.length):
            self.events.append(self._done(step))

    def _done(self, step: Step) -> Event:
        lost = step.lost and step.operation not in READS
        told = getattr(self, f"_{step.operation}")(step)
        common: dict[str, Any] = {
            "client": 0,
            "operation": step.operation,
            "user": step.user,
            "process": str(step.process),
        }
        done = Event(**common, began=step.began, ended=step.began + step.length, **told)
        if lost and done.outcome == "ok":
            done = replace(done, outcome="unknown", generation=None, returned=())
        if done.operation in READS:
            now = set(self._found(step))
            if set(done.returned) - now:
                self.old.append(done)
        elif self._deaf is not None and self._rng.random() >= self._deaf:
            self._cache = {key: found for key, found in self._cache.items() if key[0] != step.user}
        return done

    def _written(self, step: Step, memory_id: str, *, current: bool = True) -> dict[str, Any]:
        number = next(self._numbers)
        self._memories[step.user, memory_id] = (f"t{number}", current)
        return {"id": memory_id, "text": f"t{number}", "generation": number}

    def _put(self, step: Step) -> dict[str, Any]:
        return self._written(step, step.memory_id)

    def _patch(self, step: Step) -> dict[str, Any]:
        if (step.user, step.memory_id) not in self._memories:
            return {"id": step.memory_id, "text": f"t{next(self._numbers)}", "outcome": "failed"}
        _, current = self._memories[step.user, step.memory_id]
        told = self._written(step, step.memory_id, current=current)
        return told | {"returned": (Item(step.memory_id, told["text"], current),)}

    def _delete(self, step: Step) -> dict[str, Any]:
        gone = self._memories.pop((step.user, step.memory_id), None)
        return {"id": step.memory_id, "outcome": "ok" if gone else "failed"}

    def _correct(self, step: Step) -> dict[str, Any]:
        new = IDS[(IDS.index(step.memory_id) + 1) % len(IDS)]
        known = {"replaced": (step.memory_id,)}
        if (step.user, step.memory_id) not in self._memories or (step.user, new) in self._memories:
            return {"id": new, "text": f"t{next(self._numbers)}", "outcome": "failed", **known}
        self._memories[step.user, step.memory_id] = (self._memories[step.user, step.memory_id][0], False)
        return self._written(step, new) | known

    def _forget(self, step: Step) -> dict[str, Any]:
        for memory_id in IDS:
            self._memories.pop((step.user, memory_id), None)
        return {}

    def _found(self, step: Step) -> Iterator[Item]:
        for memory_id in [step.memory_id] if step.operation == "get" else IDS:
            text, current = self._memories.get((step.user, memory_id), ("", False))
            if text and (current or step.operation == "get"):
                yield Item(memory_id, text, current)

    def _get(self, step: Step) -> dict[str, Any]:
        return {"id": step.memory_id} | self._read(step, step.memory_id)

    def _search(self, step: Step) -> dict[str, Any]:
        return self._read(step, "")

    def _context(self, step: Step) -> dict[str, Any]:
        # what it shows is read and compared in the moment in which the step takes effect
        moment = step.began + step.share * step.length
        return self._read(step, "") | {"complete": False, "stage": 1, "compared": moment}

    def _read(self, step: Step, what: str) -> dict[str, Any]:
        found = tuple(self._found(step))
        if self._deaf is None:
            return {"complete": True, "returned": found, "consistency": "strong"}
        if step.process == 1:
            found = self._cache.setdefault((step.user, what), found)
        return {"complete": True, "returned": found}
