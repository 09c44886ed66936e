"""Checks what clients saw against what the service promises. Pure; the only place that knows the rules.

The idea: every text is written once, so a text names its write. A write takes effect at a moment from
`began` to `ended`; one without a reply at any moment after `began`, or never; a refused one never. What was
read is wrong only if no choice of these moments explains it. So each rule compares ends with beginnings
and nothing else, and what it finds is a proof; what can be explained in any way is not found.

Rules:
    ghost     the text was never written under this id of this user before the read ended, or was refused
    foreign   the text is another user's
    removed   it was there before a delete, correction, forget or strong update that was answered before
    stale     it was overwritten longer ago than the read may lag (strong: at all)
    backwards a strong read met a state that an earlier strong read had found replaced
    session   a read with `min_version` missed a write of that generation or an older one
    missing   what had been written longer ago than the read may lag, and not removed since, was not there

A stage of a context is compared with removals after the request began, and tells when: `removed` counts from
there. A text that a summary or a profile quotes is judged as a memory would be, but it may lag for longer,
and no session or strong read is promised of it. Nothing is missing from a context: it has budgets.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Operation = Literal[
    "put",
    "patch",
    "say",
    "delete",
    "correct",
    "forget",
    "get",
    "search",
    "batch",
    "list",
    "context",
    "stream",
]
Outcome = Literal["ok", "failed", "unknown"]
Rule = Literal["ghost", "foreign", "removed", "stale", "backwards", "session", "missing"]

#: seconds for what lies between a TTL and the moment a client can see it
MARGIN_S = 1.0


class Item(NamedTuple):
    """A memory in a reply. `current`: not marked as superseded, or of a read that leaves those out.

    `quoted`: its text was met in one that was made of memories.
    """

    id: str
    text: str
    current: bool = True
    quoted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One request and its reply; times are of one monotonic clock, in seconds.

    `outcome` of a write: ok, failed (surely without effect), unknown (with effect from `began` on, or never).
    `id` is the one read or written, `replaced` are the old ids of a correction. `generation` is what the
    reply of a write told. `complete`: a read named all current memories of the user (`get`: of the id).
    `stage` of a context, 0 for anything else; `compared`: with removals, at this moment or later.
    """

    client: int
    operation: Operation
    user: str
    began: float
    ended: float
    outcome: Outcome = "ok"
    id: str = ""
    text: str = ""
    replaced: tuple[str, ...] = ()
    returned: tuple[Item, ...] = ()
    consistency: Literal["eventual", "session", "strong"] = "eventual"
    min_version: int | None = None
    generation: int | None = None
    complete: bool = False
    process: str = ""
    stage: int = 0
    compared: float | None = None

    @property
    def is_strong_write(self) -> bool:
        """Whether the reply promises that nobody reads what it replaced or removed."""
        asked = self.operation in ("put", "patch") and self.consistency == "strong"
        return asked or self.operation in ("delete", "correct", "forget")

    @property
    def knows_removals_of(self) -> float:
        """The moment before which no removal may be answered of what the read returns."""
        return self.began if self.compared is None else self.compared

    def __str__(self) -> str:
        told = " ".join(
            filter(None, (self.operation, self.user, self.id, repr(self.text) if self.text else ""))
        )
        more = f" replacing {','.join(self.replaced)}" if self.replaced else ""
        level = f" {self.consistency}" if self.consistency != "eventual" else ""
        since = f" >={self.min_version}" if self.min_version is not None else ""
        at = f" generation {self.generation}" if self.generation is not None else ""
        at += f" stage {self.stage} compared {self.compared:.6f}" if self.compared is not None else ""
        where = f"client {self.client} at {self.process}" if self.process else f"client {self.client}"
        return f"[{self.began:.6f} {self.ended:.6f}] {told}{more}{level}{since}{at} {self.outcome} ({where})"


@dataclass(frozen=True, slots=True)
class Bounds:
    """Seconds that a read may lag behind writes that are not strong."""

    memory_s: float = 30.0
    search_s: float = 60.0
    context_s: float = 60.0
    quoted_s: float = 300.0

    def of(self, read: Event, *, quoted: bool = False) -> float:
        """Return the bound of what a read returns, or of what it quotes."""
        if quoted:
            return MARGIN_S + self.quoted_s
        if read.consistency == "strong":
            return 0.0
        if read.operation in ("context", "stream"):
            return MARGIN_S + self.context_s
        return MARGIN_S + (self.search_s if read.operation in ("search", "batch") else self.memory_s)


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken rule: the read, the memory in question, the event that forbids it, and who wrote it."""

    rule: Rule
    read: Event
    id: str
    text: str | None = None
    cause: Event | None = None
    written: Event | None = None

    def __str__(self) -> str:
        lines = [f"{self.rule}: {self.id} {self.text!r}", f"    read    {self.read}"]
        lines += [f"    cause   {self.cause}"] if self.cause else []
        lines += [f"    written {self.written}"] if self.written else []
        return "\n".join(lines)


def check(events: Sequence[Event], bounds: Bounds = Bounds()) -> list[Violation]:
    """Return every read that no order of the operations explains, by the time it began.

    Cost: O(n log n) in events and returned memories, times the ids of a user for reads of all.
    """
    history = _History(events)
    found: list[Violation] = []
    for event in events:
        found.extend(
            violation for item in event.returned for violation in history.judged(event, item, bounds)
        )
        if event.complete and event.outcome == "ok":
            found.extend(history.missed(event, bounds))
    return sorted(found, key=lambda violation: violation.read.began)


class _Mark(NamedTuple):
    """A fact that became true after `at` and is known by `known` (a moment or a generation)."""

    at: float
    known: float
    event: Event
    text: str | None = None


class _First:
    """Of marks made after a moment, the one known first."""

    def __init__(self, marks: Iterable[_Mark]) -> None:
        ordered = sorted(marks, key=lambda mark: mark.at)
        self._at = [mark.at for mark in ordered]
        #: per suffix: the first known, and the first known of another text
        self._best: list[tuple[_Mark, _Mark | None]] = []
        best: tuple[_Mark, _Mark | None] | None = None
        for mark in reversed(ordered):
            best = (mark, None) if best is None else _two_first(*best, mark)
            self._best.append(best)
        self._best.reverse()

    def after(self, moment: float, *, other_than: str | None = "") -> _Mark | None:
        """Return the mark with `at` > moment that is known first; only marks of other texts count."""
        place = bisect_right(self._at, moment)
        if place == len(self._at):
            return None
        first, second = self._best[place]
        return first if first.text != other_than else second


def _two_first(first: _Mark, second: _Mark | None, new: _Mark) -> tuple[_Mark, _Mark | None]:
    if new.known < first.known:
        return new, first if first.text != new.text else second
    if new.text != first.text and (second is None or new.known < second.known):
        return first, new
    return first, second


class _Latest:
    """Of pairs (key, moment): the largest moment among those with a key below a bound, and its event."""

    def __init__(self, pairs: Iterable[tuple[float, float, Event]]) -> None:
        self._keys: list[float] = []
        self._best: list[tuple[float, Event | None]] = [(-math.inf, None)]
        for key, moment, event in sorted(pairs, key=lambda pair: pair[0]):
            self._keys.append(key)
            self._best.append(max(self._best[-1], (moment, event), key=lambda best: best[0]))

    def below(self, bound: float) -> tuple[float, Event | None]:
        return self._best[bisect_left(self._keys, bound)]


class _Fate(NamedTuple):
    """What became of a text: the first proof of each kind that it is over."""

    written: Event
    erased: _Mark | None
    superseded: _Mark | None
    overwritten: _Mark | None
    outdated: _Mark | None


class _Timeline:
    """Everything that happened to one id of one user."""

    def __init__(self) -> None:
        self.writes: dict[str, Event] = {}
        self.removals: list[Event] = []
        self.supersedes: list[Event] = []
        #: text (None: absent) -> strong reads that found it
        self.strong: list[_Mark] = []
        #: text -> end of the first read that saw it: its write had taken effect by then
        self.seen: dict[str, float] = {}
        self._fates: dict[str, _Fate] = {}

    def freeze(self) -> None:
        """Make the indexes; nothing is added afterwards."""
        writes, acked = list(self.writes.values()), [e for e in self.writes.values() if e.outcome == "ok"]
        removed = [e for e in self.removals if e.outcome == "ok"]
        strong = [e for e in acked if e.is_strong_write]
        self._erased = _First(_Mark(e.began, e.ended, e) for e in (*removed, *strong))
        self._superseded = _First(_Mark(e.began, e.ended, e) for e in self.supersedes if e.outcome == "ok")
        known = ((e, min(_end(e), self.seen.get(e.text, math.inf))) for e in writes)
        self._overwritten = _First(_Mark(e.began, at, e, e.text) for e, at in known if at < math.inf)
        numbered = [(e, e.generation) for e in acked if e.generation is not None]
        self._outdated = _First(_Mark(e.began, generation, e, e.text) for e, generation in numbered)
        self._found = _First(self.strong)
        gone = [(e.began, _end(e), e) for e in self.removals]
        self._gone = _Latest(gone)
        self._hidden = _Latest([*gone, *((e.began, _end(e), e) for e in self.supersedes)])
        self._made = _Latest((e.ended, e.began, e) for e in acked)
        self._shown = _Latest((e.ended, e.began, e) for e in acked if _is_current(e))
        self._numbered = _Latest((g, e.began, e) for e, g in numbered)
        self._numbered_shown = _Latest((g, e.began, e) for e, g in numbered if _is_current(e))

    def fate(self, text: str) -> _Fate:
        if text not in self._fates:
            written = self.writes[text]
            end = _end(written)
            self._fates[text] = _Fate(
                written,
                self._erased.after(end),
                self._superseded.after(end),
                self._overwritten.after(end),
                self._outdated.after(end),
            )
        return self._fates[text]

    def replaced_before(self, text: str, read: Event) -> _Mark | None:
        """Return the strong read that had found something else, after the write of `text`."""
        mark = self._found.after(_end(self.writes[text]), other_than=text)
        return mark if mark and mark.known < read.began else None

    def missed(self, read: Event, lag_s: float) -> tuple[Rule, Event] | None:
        """Return the write that the read, which did not return this id, had to see."""
        one = read.operation == "get"
        # every removal that may have come before the end of the read
        gone, _ = (self._gone if one else self._hidden).below(math.nextafter(read.ended, math.inf))
        at, write = (self._made if one else self._shown).below(read.began - lag_s)
        if write and at > gone:
            return "missing", write
        if read.min_version is not None:
            at, write = (self._numbered if one else self._numbered_shown).below(read.min_version + 0.5)
            if write and at > gone:
                return "session", write
        return None


class _History:
    """Timelines by user and id."""

    def __init__(self, events: Sequence[Event]) -> None:
        self._users: defaultdict[str, defaultdict[str, _Timeline]] = defaultdict(
            lambda: defaultdict(_Timeline)
        )
        self._authors: dict[str, str] = {}
        self._refused = {event.text: event for event in events if event.text and event.outcome == "failed"}
        for event in events:
            self._add(event)
        for event in events:
            if event.operation == "forget" and event.outcome != "failed":
                for timeline in self._users[event.user].values():
                    timeline.removals.append(event)
        for user in self._users.values():
            for timeline in user.values():
                timeline.freeze()

    def _add(self, event: Event) -> None:
        user = self._users[event.user]
        if event.id:
            user[event.id]  # also when it is only asked for
        if event.operation in ("put", "patch", "say", "correct") and event.outcome != "failed":
            assert self._authors.setdefault(event.text, event.user) == event.user, "texts must be unique"
            assert event.text not in user[event.id].writes, "texts must be unique"
            user[event.id].writes[event.text] = event
            for old in event.replaced:
                user[old].supersedes.append(event)
        elif event.operation == "delete" and event.outcome != "failed":
            user[event.id].removals.append(event)
        for item in event.returned:
            seen = user[item.id].seen
            seen[item.text] = min(event.ended, seen.get(item.text, math.inf))
            if event.consistency == "strong" and event.operation != "patch" and not item.quoted:
                user[item.id].strong.append(_Mark(event.began, event.ended, event, item.text))
        if (
            event.operation == "get"
            and event.consistency == "strong"
            and event.complete
            and not event.returned
        ):
            user[event.id].strong.append(_Mark(event.began, event.ended, event, None))

    def judged(self, read: Event, item: Item, bounds: Bounds) -> Iterator[Violation]:
        """Yield the worst thing that is wrong with a returned memory, if anything is."""
        timeline = self._users[read.user][item.id]
        written = timeline.writes.get(item.text)
        if written is None or written.began > read.ended:
            rule: Rule = "ghost" if self._authors.get(item.text, read.user) == read.user else "foreign"
            yield Violation(rule, read, item.id, item.text, self._refused.get(item.text), written)
            return
        fate = timeline.fate(item.text)
        broken: list[tuple[Rule, _Mark | None]] = [("removed", _past(fate.erased, read.knows_removals_of))]
        if item.current:
            broken.append(("removed", _past(fate.superseded, read.knows_removals_of)))
        lag_s = bounds.of(read, quoted=item.quoted)
        broken.append(("stale", _past(fate.overwritten, read.began - lag_s)))
        if read.min_version is not None and not item.quoted:
            broken.append(("session", _past(fate.outdated, read.min_version + 0.5)))
        if read.consistency == "strong" and read.operation != "patch" and not item.quoted:
            broken.append(("backwards", timeline.replaced_before(item.text, read)))
        for rule, mark in broken:
            if mark:
                yield Violation(rule, read, item.id, item.text, mark.event, written)
                return

    def missed(self, read: Event, bounds: Bounds) -> Iterator[Violation]:
        """Yield the memories that a complete read had to return and did not."""
        returned = {item.id for item in read.returned}
        user = self._users[read.user]
        for memory_id in [read.id] if read.operation == "get" else list(user):
            if memory_id not in returned and (found := user[memory_id].missed(read, bounds.of(read))):
                rule, write = found
                yield Violation(rule, read, memory_id, None, write)


def _end(event: Event) -> float:
    return event.ended if event.outcome == "ok" else math.inf


def _past(mark: _Mark | None, moment: float) -> _Mark | None:
    return mark if mark and mark.known < moment else None


def _is_current(write: Event) -> bool:
    """Return whether the write surely left a memory that is not superseded; an update keeps that mark."""
    return write.operation != "patch" or Item(write.id, write.text, current=True) in write.returned
