from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redismem.circuit import FIRST_BACKOFF_S, LONGEST_BACKOFF_S, Circuit


def circuit(jitter: float = 0.0) -> Circuit:
    return Circuit(lambda: jitter)


def test_a_new_circuit_is_closed_and_admits_everything() -> None:
    one = circuit()
    assert one.state == "closed"
    assert one.retry_after_s(5) == 0
    assert one.admits(5)
    assert one.admits(5)


def test_it_refuses_until_the_back_off_has_passed_and_then_admits_one_trial() -> None:
    one = circuit()
    one.fail(10)
    assert one.state == "open"
    assert one.retry_after_s(10) == pytest.approx(FIRST_BACKOFF_S)
    assert not one.admits(10 + FIRST_BACKOFF_S / 2)
    assert one.admits(10.001 + FIRST_BACKOFF_S)
    assert one.state == "half-open"
    assert not one.admits(10 + FIRST_BACKOFF_S)
    assert not one.admits(1000), "the trial has not ended"
    assert one.retry_after_s(1000) == 0


def test_success_closes_it_and_the_next_failure_starts_from_the_first_back_off() -> None:
    one = circuit()
    one.fail(0)
    for _ in range(4):
        assert one.admits(one.retry_after_s(0) + 100)
        one.fail(0)
    one.succeed()
    assert one.state == "closed"
    one.fail(50)
    assert one.retry_after_s(50) == pytest.approx(FIRST_BACKOFF_S)


def test_the_back_off_doubles_up_to_its_limit() -> None:
    one, now_s, waits = circuit(), 0.0, []
    for _ in range(9):
        one.fail(now_s)
        waits.append(round(one.retry_after_s(now_s), 6))
        now_s += waits[-1] + 1e-6
        assert one.admits(now_s)
    assert waits == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0]


def test_late_failures_do_not_put_the_trial_off() -> None:
    one = circuit()
    one.fail(0)
    for now_s in (0.01, 0.02, 0.049):
        one.fail(now_s)
    assert one.admits(FIRST_BACKOFF_S)


def test_jitter_shortens_a_back_off_by_up_to_half() -> None:
    for jitter, share in ((0.0, 1.0), (0.5, 0.75), (1.0, 0.5)):
        one = circuit(jitter)
        one.fail(0)
        assert one.retry_after_s(0) == FIRST_BACKOFF_S * share


@given(st.lists(st.tuples(st.sampled_from(["fail", "succeed", "admits"]), st.floats(0, 3))), st.integers())
def test_whatever_happens_one_trial_at_a_time_and_never_later_than_the_limit(
    steps: list[tuple[str, float]], seed: int
) -> None:
    one, now_s, trials = Circuit(random.Random(seed).random), 0.0, 0
    for step, pause_s in steps:
        now_s += pause_s
        before = one.state
        if step == "fail":
            one.fail(now_s)
            trials = 0
            assert one.state == "open"
        elif step == "succeed":
            one.succeed()
            trials = 0
            assert one.state == "closed"
        elif one.admits(now_s):
            trials += before == "open"
            assert before != "half-open"
            assert trials <= 1
        else:
            assert before != "closed"
        assert 0 <= one.retry_after_s(now_s) <= LONGEST_BACKOFF_S
        assert one.state == "open" or one.retry_after_s(now_s) == 0
