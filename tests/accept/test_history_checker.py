"""The checker of histories: what it must find, what it must let pass, what it says of simulated stores."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.accept.history import Bounds, Event, Item, Operation, check
from tests.accept.history_simulation import IDS, USERS, Simulation, Step

BOUNDS = Bounds(memory_s=30, search_s=60)


def event(operation: Operation, began: float, ended: float, **more: Any) -> Event:
    return Event(**{"client": 0, "operation": operation, "user": "u", "began": began, "ended": ended, **more})


def put(text: str, began: float, ended: float, **more: Any) -> Event:
    return event("put", began, ended, **{"id": "m", "text": text, **more})


def patch(text: str, began: float, ended: float, **more: Any) -> Event:
    return event("patch", began, ended, **{"id": "m", "text": text, **more})


def say(text: str, began: float, ended: float, **more: Any) -> Event:
    return event("say", began, ended, **{"id": "m", "text": text, **more})


def delete(began: float, ended: float, **more: Any) -> Event:
    return event("delete", began, ended, **{"id": "m", **more})


def correct(text: str, began: float, ended: float, **more: Any) -> Event:
    return event("correct", began, ended, **{"id": "n", "text": text, "replaced": ("m",), **more})


def get(text: str | None, began: float, ended: float, **more: Any) -> Event:
    memory_id = more.get("id", "m")
    returned = () if text is None else (Item(memory_id, text),)
    return event("get", began, ended, **{"id": memory_id, "complete": True, "returned": returned, **more})


def search(items: dict[str, str], began: float, ended: float, **more: Any) -> Event:
    returned = tuple(Item(*item) for item in items.items())
    return event("search", began, ended, **{"complete": True, "returned": returned, **more})


def stage(text: str, began: float, compared: float, ended: float, **more: Any) -> Event:
    """Return a stage of a context that showed a text, or with `quoted` met it in another."""
    item = Item("m", text, quoted=more.pop("quoted", False))
    return event("stream", began, ended, **{"stage": 2, "compared": compared, "returned": (item,), **more})


STRONG = {"consistency": "strong"}
A, B = put("a", 0, 1, generation=1), put("b", 2, 3, generation=2)
SUPERSEDED = (Item("m", "a", current=False),)


def since(generation: int) -> dict[str, Any]:
    return {"consistency": "session", "min_version": generation}


FINE: dict[str, list[Event]] = {
    "a read of what was written": [A, get("a", 2, 3), search({"m": "a"}, 2, 3)],
    "a read during the write": [put("a", 0, 9), get("a", 1, 2), get(None, 3, 4)],
    "a read that began before the delete was answered": [A, delete(2, 5), get("a", 4.9, 9), get(None, 3, 4)],
    "absence after the delete": [A, delete(2, 3), get(None, 4, 5, **STRONG), search({}, 4, 5, **STRONG)],
    "re-creation after the delete": [
        A,
        delete(2, 3),
        put("b", 4, 5),
        get("b", 6, 7),
        search({"m": "b"}, 6, 7),
    ],
    "a write that may have come after the delete": [
        put("a", 0, 2.5),
        delete(2, 3),
        get("a", 4, 5),
        get(None, 4, 5),
    ],
    "a write without a reply that came late": [
        put("a", 0, 1, outcome="unknown"),
        delete(2, 3),
        get("a", 4, 5),
    ],
    "a write without a reply that never came": [
        put("a", 0, 1, outcome="unknown"),
        get(None, 9, 10, **STRONG),
    ],
    "a delete at the moment the write ended": [A, delete(1, 2), get("a", 3, 4)],
    "a delete at the moment the read ended": [A, delete(5, 6), get(None, 4, 5, **STRONG)],
    "a write at the moment the delete ended": [A, delete(2, 3), put("b", 3, 4), get(None, 5, 6, **STRONG)],
    "a strong read at the moment the write ended": [A, get(None, 1, 2, **STRONG)],
    "a correction without a reply": [A, correct("c", 2, 3, outcome="unknown"), search({"m": "a"}, 4, 5)],
    "a read at the moment the delete ended": [A, delete(2, 3), get("a", 3, 4)],
    "a strong read that failed": [
        *[A, get(None, 2, 3, complete=False, outcome="unknown", **STRONG), get("a", 4, 5, **STRONG)],
    ],
    "a delete without a reply": [
        A,
        delete(2, 3, outcome="unknown"),
        get("a", 4, 5),
        get(None, 99, 99, **STRONG),
    ],
    "a refused delete": [A, delete(2, 3, outcome="failed"), get("a", 4, 5, **STRONG)],
    "a correction": [A, correct("c", 2, 3), search({"n": "c"}, 4, 5, **STRONG), get("c", 4, 5, id="n")],
    "the superseded memory, marked": [A, correct("c", 2, 3), get("a", 4, 5, returned=SUPERSEDED)],
    "an update of a superseded memory stays hidden": [
        *[A, correct("c", 2, 3, generation=2)],
        patch("b", 4, 5, generation=3, returned=(Item("m", "b", current=False),)),
        *[
            search({"n": "c"}, 6, 7, **STRONG),
            search({"n": "c"}, 6, 7, **since(3)),
            get("b", 6, 7, returned=(Item("m", "b", current=False),)),
        ],
    ],
    "a forgotten user": [A, event("forget", 2, 3), get(None, 4, 5, **STRONG), search({}, 4, 5, **STRONG)],
    "a memory within its time": [A, B, get("a", 33, 34), search({"m": "a"}, 63, 64)],
    "a search that does not know a young memory": [A, search({}, 61, 62)],
    "a search that ran out of time": [A, search({}, 99, 99, complete=False)],
    "a delete during a late search": [A, delete(90, 99), search({}, 89, 91), search({"m": "a"}, 89, 91)],
    "concurrent updates, either way": [A, put("b", 0, 1), get("a", 2, 3, **STRONG), get("a", 4, 5, **STRONG)],
    "strong reads while one writes": [A, put("b", 2, 9), get("a", 3, 6, **STRONG), get("b", 5, 7, **STRONG)],
    "a session that asks for less": [A, B, search({"m": "a"}, 4, 5, **since(1))],
    "a session that knows no deletes": [A, delete(2, 3), search({}, 4, 5, **since(1))],
    "a stage that was compared before the delete was answered": [A, delete(4, 6), stage("a", 3, 5.9, 9)],
    "a stage that was compared when the delete was answered": [A, delete(4, 6), stage("a", 3, 6, 9)],
    "a stage that was compared during a strong update": [A, put("b", 4, 6, **STRONG), stage("a", 3, 5, 9)],
    "a context that has no room": [A, event("context", 99, 99, stage=1, compared=99)],
    "a stage within its time": [A, B, stage("a", 63, 64, 65)],
    "a stage of an older session": [A, B, stage("a", 4, 5, 6, **since(1))],
    "a stage that a plain update overtook": [A, B, stage("a", 2.5, 4, 5, **STRONG)],
    "a quoted text within its time": [A, B, stage("a", 303, 304, 305, quoted=True)],
    "a quoted text in a session or strong context": [
        *[A, B, stage("a", 4, 5, 6, quoted=True, **since(2)), stage("a", 4, 5, 6, quoted=True, **STRONG)],
        get("b", 7, 8, **STRONG),
    ],
    "a message said anew after the delete": [
        A,
        delete(2, 3),
        say("b", 4, 5),
        get("b", 6, 7),
    ],
    "a message that was not stored": [A, say("b", 2, 3, outcome="failed"), get("a", 99, 99)],
    "the reply of an update that was overtaken": [
        A,
        patch("b", 2, 5, returned=(Item("m", "c"),)),
        put("c", 2, 4),
    ],
}

WRONG: dict[str, tuple[list[Event], list[str]]] = {
    "a text nobody wrote": ([A, get("x", 2, 3)], ["ghost"]),
    "a text before it was written": ([A, put("b", 5, 6), get("b", 2, 4)], ["ghost"]),
    "a text under another id": ([A, get("a", 2, 3, id="n")], ["ghost"]),
    "a text of a refused write": ([put("a", 0, 1, outcome="failed"), get("a", 2, 3)], ["ghost"]),
    "a text of another user": ([A, get("a", 2, 3, user="v")], ["foreign"]),
    "a deleted text": ([A, delete(2, 3), get("a", 3.1, 4), search({"m": "a"}, 3.1, 4)], ["removed"] * 2),
    "a deleted text in a list": (
        [A, delete(2, 3), event("list", 4, 5, returned=(Item("m", "a"),))],
        ["removed"],
    ),
    "a deleted text after re-creation": ([A, delete(2, 3), put("b", 4, 5), get("a", 6, 7)], ["removed"]),
    "a deleted text before re-creation": ([A, put("b", 6, 7), delete(2, 3), get("a", 4, 5)], ["removed"]),
    "a deleted text, marked as superseded": (
        [A, correct("c", 2, 3), delete(4, 5), get("a", 6, 7, returned=SUPERSEDED)],
        ["removed"],
    ),
    "a text of a forgotten user": ([A, event("forget", 2, 3), search({"m": "a"}, 4, 5)], ["removed"]),
    "the second of two deletes": (
        [A, delete(0.5, 1.5), delete(2, 3), get("a", 2.5, 4), get("a", 3.5, 4)],
        ["removed"],
    ),
    "a corrected text": ([A, correct("c", 2, 3), search({"m": "a", "n": "c"}, 4, 5)], ["removed"]),
    "a corrected text, not marked": ([A, correct("c", 2, 3), get("a", 4, 5)], ["removed"]),
    "a text put anew strongly": ([A, put("b", 2, 3, **STRONG), search({"m": "a"}, 4, 5)], ["removed"]),
    "a text updated strongly": ([A, patch("b", 2, 3, **STRONG), get("a", 4, 5)], ["removed"]),
    "a text that was resurrected by a read's reply": (
        [A, delete(2, 3), patch("b", 4, 5, returned=(Item("m", "a"),))],
        ["removed"],
    ),
    "a memory kept too long": ([A, B, get("a", 34.1, 35)], ["stale"]),
    "a search kept too long": ([A, B, search({"m": "a"}, 64.1, 65)], ["stale"]),
    "an overwritten text in a strong read": ([A, B, get("a", 3.1, 4, **STRONG)], ["stale"]),
    "a text overwritten by a write that another had seen": (
        [A, put("b", 2, 9, outcome="unknown"), get("b", 3, 4), get("a", 5, 6, **STRONG), get("b", 7, 8)],
        ["stale"],
    ),
    "two strong reads in the wrong order": (
        [put("a", 0, 1), put("b", 0, 1), get("a", 2, 3, **STRONG), get("b", 4, 5, **STRONG)],
        ["backwards"],
    ),
    "a text after a strong read found nothing": (
        [A, delete(2, 9, outcome="unknown"), get(None, 3, 4, **STRONG), search({"m": "a"}, 5, 6, **STRONG)],
        ["backwards"],
    ),
    "a session that misses an update": ([A, B, search({"m": "a"}, 4, 5, **since(2))], ["session"]),
    "a session that misses a new memory": ([A, search({}, 2, 3, **since(1))], ["session"]),
    "a session that misses an older write of another": (
        [
            put("a", 0, 9, generation=1),
            put("b", 1, 2, id="n", generation=2),
            search({"n": "b"}, 3, 4, **since(2)),
        ],
        ["session"],
    ),
    "a stage compared after the delete was answered": (
        [A, delete(4, 6), stage("a", 3, 6.1, 9), stage("a", 3, 5.9, 9)],
        ["removed"],
    ),
    "a stage compared after the correction was answered": (
        [A, correct("c", 4, 6), stage("a", 3, 6.1, 9)],
        ["removed"],
    ),
    "a stage compared after the user was forgotten": (
        [A, event("forget", 4, 6), stage("a", 3, 6.1, 9)],
        ["removed"],
    ),
    "a stage compared after a strong update": (
        [A, put("b", 4, 6, **STRONG), stage("a", 3, 6.1, 9)],
        ["removed"],
    ),
    "a deleted text that is quoted": ([A, delete(4, 6), stage("a", 3, 6.1, 9, quoted=True)], ["removed"]),
    "a corrected text that is quoted": (
        [A, correct("c", 4, 6), stage("a", 3, 6.1, 9, quoted=True)],
        ["removed"],
    ),
    "a quoted text of another user": ([A, stage("a", 3, 4, 5, quoted=True, user="v")], ["foreign"]),
    "a quoted text that nobody wrote": ([A, stage("x", 3, 4, 5, quoted=True)], ["ghost"]),
    "a stage kept too long": ([A, B, stage("a", 64.1, 65, 66)], ["stale"]),
    "a quoted text kept too long": ([A, B, stage("a", 304.1, 305, 306, quoted=True)], ["stale"]),
    "a strong context that misses an update": ([A, B, stage("a", 3.1, 4, 5, **STRONG)], ["stale"]),
    "a context of a session that misses an update": ([A, B, stage("a", 4, 5, 6, **since(2))], ["session"]),
    "a message of which the older text is kept too long": (
        [A, say("b", 2, 3), get("a", 34.1, 35)],
        ["stale"],
    ),
    "a deleted message": (
        [say("a", 0, 1), delete(2, 3), stage("a", 3, 4, 5)],
        ["removed"],
    ),
    "a lost message": ([say("a", 0, 1), get(None, 2, 3, **STRONG)], ["missing"]),
    "a lost memory": ([A, get(None, 2, 3, **STRONG)], ["missing"]),
    "a memory lost after a refused delete": (
        [A, delete(1, 2, outcome="failed"), get(None, 3, 4, **STRONG)],
        ["missing"],
    ),
    "a lost update": ([A, delete(1.5, 1.8), B, search({}, 4, 5, **STRONG)], ["missing"]),
    "a memory that searches find too late": ([A, search({}, 62.1, 63)], ["missing"]),
    "a memory that is missed before its delete": ([A, delete(99, 100), get(None, 50, 51)], ["missing"]),
    "a correction whose text is lost": ([A, correct("c", 2, 3), search({}, 4, 5, **STRONG)], ["missing"]),
}


@pytest.mark.parametrize("name", FINE)
def test_what_can_be_explained_passes(name: str) -> None:
    assert check(FINE[name], BOUNDS) == []


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_explained_is_found(name: str) -> None:
    events, rules = WRONG[name]
    for order in (events, events[::-1]):
        assert [violation.rule for violation in check(order, BOUNDS)] == rules


def test_a_violation_names_the_read_the_removal_and_the_write() -> None:
    removal, read = delete(2, 3, process="p1"), get("a", 4, 5, process="p2")
    (violation,) = check([A, removal, read], BOUNDS)
    assert (violation.read, violation.cause, violation.written) == (read, removal, A)
    assert all(part in str(violation) for part in ("removed", "p1", "p2", "'a'"))


STEPS = st.lists(
    st.builds(
        Step,
        operation=st.sampled_from(
            ["put", "put", "patch", "delete", "correct", "forget", "get", "search", "search", "context"]
        ),
        memory_id=st.sampled_from(IDS),
        user=st.sampled_from(USERS),
        began=st.integers(0, 400),
        length=st.integers(1, 30),
        share=st.floats(0, 1),
        lost=st.booleans(),
        process=st.integers(0, 1),
    ),
    min_size=20,
    max_size=120,
)


@given(STEPS)
def test_a_store_without_a_cache_passes_even_as_strong(steps: list[Step]) -> None:
    simulated = Simulation(steps)
    assert check(simulated.events, BOUNDS) == []
    assert check([_as_session(read, simulated.events) for read in simulated.events], BOUNDS) == []


def _as_session(read: Event, events: list[Event]) -> Event:
    """Return the read as one that asks for the newest generation its user may know."""
    known = [e.generation for e in events if e.generation and e.ended < read.began and e.user == read.user]
    if read.operation != "search" or not known:
        return read
    return replace(read, consistency="session", min_version=max(known))


@given(STEPS)
def test_one_after_the_other_exactly_the_removed_texts_of_a_deaf_cache_are_found(steps: list[Step]) -> None:
    apart = [replace(step, began=100 * i, lost=False) for i, step in enumerate(steps)]
    simulated = Simulation(apart, deaf=1)
    found = check(simulated.events, Bounds(1e9, 1e9, 1e9))
    assert {violation.rule for violation in found} <= {"removed"}
    removed = [read for read in simulated.old if _holds_removed(read, simulated.events)]
    assert sorted({violation.read.began for violation in found}) == sorted(read.began for read in removed)


def _holds_removed(read: Event, events: list[Event]) -> bool:
    """Return whether a removal stands between the write of a returned text and the read; nothing overlaps."""
    for item in read.returned:
        (written,) = [e for e in events if e.text == item.text and e.outcome == "ok"]
        for between in events:
            if not written.began < between.began < read.began:
                continue
            if between.outcome != "ok" or between.user != read.user:
                continue
            gone = between.operation == "forget" or (between.operation == "delete" and between.id == item.id)
            if gone or (between.operation == "correct" and item.current and item.id in between.replaced):
                return True
    return False


def test_a_cache_that_misses_most_invalidations_is_found_among_concurrent_clients() -> None:
    rng = random.Random(0)
    operations: list[Operation] = ["put", "patch", "delete", "correct", "get", "search", "search", "context"]
    for _ in range(20):
        steps = [
            Step(
                operation=rng.choice(operations),
                memory_id=rng.choice(IDS),
                user="u",
                began=rng.randrange(10_000),
                length=rng.randint(1, 30),
                share=rng.random(),
                lost=rng.random() < 0.1,
                process=rng.randrange(2),
            )
            for _ in range(1000)
        ]
        assert check(Simulation(steps).events, BOUNDS) == []
        rules = {violation.rule for violation in check(Simulation(steps, deaf=0.9).events, BOUNDS)}
        assert "removed" in rules
