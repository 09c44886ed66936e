"""How many requests are let in at once: less while they are slow, more again when they are not."""

from __future__ import annotations

import random
from collections import deque

import hypothesis.strategies as st
import pytest
from hypothesis import given

from redismem.admission import LEAST, Admission

SLOW_S = 0.1
FAST, SLOW = 0.01, 0.2


def worked(admission: Admission, seconds: list[float], *, at_once: int) -> None:
    """Let requests in `at_once` at a time, each of which takes so long; as many as fit are let in."""
    left = list(seconds)
    while left:
        inside = [took_s for took_s in left[:at_once] if admission.enter()]
        assert inside
        del left[: len(inside)]
        for took_s in inside:
            admission.leave(took_s)


def test_what_is_beyond_the_limit_is_refused_until_one_leaves() -> None:
    admission = Admission(most=2, slow_s=SLOW_S)
    assert [admission.enter() for _ in range(4)] == [True, True, False, False]
    assert admission.in_flight == 2
    admission.leave(FAST)
    assert [admission.enter(), admission.enter()] == [True, False]


def test_many_slow_ones_shrink_the_limit_and_fast_ones_grow_it_back() -> None:
    admission = Admission(most=64, slow_s=SLOW_S)
    worked(admission, [SLOW] * 640, at_once=64)
    shrunk = admission.limit
    assert shrunk < 32
    worked(admission, [FAST] * 10_000, at_once=64)
    assert admission.limit == 64


def test_the_limit_never_goes_below_the_least_nor_above_the_most() -> None:
    admission = Admission(most=32, slow_s=SLOW_S)
    worked(admission, [SLOW] * 5000, at_once=32)
    assert admission.limit == LEAST
    worked(admission, [FAST] * 50_000, at_once=32)
    assert admission.limit == 32


@pytest.mark.parametrize("most", [1, 2, LEAST - 1])
def test_a_most_below_the_least_is_the_limit_whatever_happens(most: int) -> None:
    admission = Admission(most=most, slow_s=SLOW_S)
    worked(admission, [SLOW] * 500, at_once=most)
    assert admission.limit == most


def test_a_few_slow_ones_among_many_change_nothing() -> None:
    """Machines are noisy: one request in ten is slow for reasons of its own."""
    admission = Admission(most=64, slow_s=SLOW_S)
    worked(admission, ([SLOW] + [FAST] * 9) * 100, at_once=64)
    assert admission.limit == 64


def test_what_tells_nothing_about_the_load_changes_nothing() -> None:
    admission = Admission(most=64, slow_s=SLOW_S)
    for _ in range(1000):
        assert admission.enter()
        admission.leave(None)
    assert (admission.limit, admission.in_flight) == (64, 0)


def test_without_a_bound_of_slowness_the_limit_stays() -> None:
    admission = Admission(most=64, slow_s=0)
    worked(admission, [1000.0] * 1000, at_once=64)
    assert admission.limit == 64


def test_the_limit_does_not_grow_where_it_was_not_reached() -> None:
    admission = Admission(most=64, slow_s=SLOW_S)
    worked(admission, [SLOW] * 1280, at_once=64)
    shrunk = admission.limit
    worked(admission, [FAST] * 1000, at_once=1)
    assert admission.limit == shrunk


def test_a_refusal_lets_the_limit_grow_as_reaching_it_does() -> None:
    admission = Admission(most=64, slow_s=SLOW_S)
    worked(admission, [SLOW] * 1280, at_once=64)
    shrunk = admission.limit
    worked(admission, [FAST] * 16 * 5, at_once=shrunk + 1)
    assert admission.limit > shrunk


def test_it_settles_where_requests_are_just_fast_enough() -> None:
    """A server that does 20 at once without their waiting; of more each takes as much longer."""
    admission, rng = Admission(most=256, slow_s=SLOW_S), random.Random(0)
    limits = []
    for _ in range(3000):
        inside = [admission.enter() for _ in range(300)]
        load = sum(inside)
        for _ in range(load):
            admission.leave(0.08 * max(1.0, load / 20) * rng.uniform(0.9, 1.1))
        limits.append(admission.limit)
    assert all(10 <= limit <= 30 for limit in limits[1000:])


@given(
    most=st.integers(1, 40),
    slow_s=st.sampled_from([0.0, SLOW_S]),
    steps=st.lists(st.sampled_from(["enter", "fast", "slow", "nothing"]), max_size=400),
)
def test_in_flight_is_what_was_let_in_and_did_not_leave(most: int, slow_s: float, steps: list[str]) -> None:
    admission = Admission(most=most, slow_s=slow_s)
    inside: deque[None] = deque()
    for step in steps:
        if step == "enter":
            limit = admission.limit
            assert admission.enter() == (len(inside) < limit)
            if len(inside) < limit:
                inside.append(None)
        elif inside:
            inside.pop()
            admission.leave({"fast": FAST, "slow": SLOW, "nothing": None}[step])
        assert admission.in_flight == len(inside)
        assert min(LEAST, most) <= admission.limit <= most
