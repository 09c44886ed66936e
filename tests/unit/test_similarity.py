"""Neighbours against plain search, and which pairs are flagged.

The cosines are those of the bundled model (all-MiniLM-L6-v2, int8).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from redismem import similarity
from redismem.material import Material
from redismem.similarity import DUPLICATE, NEAREST, SIMILAR, SIMILAR_UNTAGGED, Flag, flagged, nearest

CONTRADICTIONS = [
    ("I live in Berlin.", "I live in Munich now.", 0.707, "value"),
    ("Anna lives in Berlin", "Anna lives in Hamburg", 0.849, "value"),
    ("My favorite color is blue.", "My favorite color is green.", 0.815, "value"),
    ("I work as a nurse.", "I work as a teacher.", 0.730, "value"),
    ("The user prefers dark mode.", "The user prefers light mode.", 0.867, "value"),
    ("Emma is a software engineer at Shopify.", "Emma is a product manager at Shopify.", 0.926, "value"),
    ("The wifi password is tulip42.", "The wifi password is rose77.", 0.833, "value"),
    ("The meeting is at 3 pm.", "The meeting is at 4 pm.", 0.916, "number"),
    ("The kids' school starts at 8 am.", "The kids' school starts at 8:30 am.", 0.981, "number"),
    ("My rent is 900 euros a month.", "My rent is 1,050 euros a month.", 0.935, "number"),
    ("My daughter is 7 years old.", "My daughter is eight years old.", 0.936, "number"),
    ("The dentist appointment is on Tuesday.", "The dentist appointment is on Thursday.", 0.934, "number"),
    ("Our anniversary is June 14.", "Our anniversary is June 16.", 0.974, "number"),
    ("Ben is allergic to peanuts.", "Ben is not allergic to peanuts.", 0.950, "negation"),
    ("I love spicy food.", "I hate spicy food.", 0.829, "negation"),
    ("I can swim.", "I can\u2019t swim.", 0.853, "negation"),
    ("I drink coffee every morning.", "I no longer drink coffee in the morning.", 0.777, "negation"),
    ("Kim plays on the school team.", "Kim quit the school team.", 0.749, "negation"),
]

HARMLESS = [
    ("I live in Berlin.", "I live in Berlin, Germany.", 0.927),
    ("Is the meeting at 3 pm?", "The meeting is at 4 pm.", 0.834),
    ("If it rains, I don't cycle to work.", "I cycle to work.", 0.695),
    ("My sister is a nurse.", "My brother is a nurse.", 0.878),
    ("My son is 7 years old.", "My daughter is 9 years old.", 0.789),
    ("I have a dog.", "I have a cat.", 0.742),
    ("I speak French.", "I speak Spanish.", 0.717),
    ("I bought two books yesterday.", "I bought three books yesterday.", 0.938),
    ("I watched 3 episodes last night.", "I watched 5 episodes last night.", 0.873),
    ("We hiked 12 km on Saturday.", "We hiked 15 km on Sunday.", 0.822),
    ("Paul scored 2 goals in the match.", "Paul scored 3 goals in the match.", 0.958),
    ("I haven't finished the report.", "I finished the report.", 0.799),
    ("I painted a sunset over the lake.", "I painted a sunset over the sea.", 0.904),
    ("The new phone is great.", "The new phone is awesome.", 0.947),
    ("Not only does Anna paint, she also sings.", "Anna paints and sings.", 0.889),
    ("Invoice 1001 was sent to Miller.", "Invoice 1002 was sent to Miller.", 0.974),
    ("Bus 12 goes to the station.", "Bus 14 goes to the station.", 0.853),
    ("Ben: I have two dogs.", "Anna: I have three dogs.", 0.716),
]

#: as alike as can be: only the words keep them apart
HARMLESS_BY_WORDS = [
    (
        "My sister has 2 red hens, a pond, a mill and a barn.",
        "My aunt has 3 red hens, a pond, a mill and a barn.",
    ),
    ("Dinner is on Tuesday at 7.", "Dinner is on Thursday at 8."),
    ("I work on a song.", "I work on a novel."),
    ("The meeting is at 3 pm?", "The meeting is at 4 pm."),
    ("The meeting would be at 3 pm.", "The meeting is at 4 pm."),
    ("Look! [The meeting is at 3 pm]", "The meeting is at 4 pm."),
    ("Not Mia!", "Mia!"),
    ("I have 2 hens.", "I have a vet appointment for my hens at 4."),
    ("My cousin plays the violin.", "My cousin does not play football."),
    ("Tom owns 3 red hens.", "Tom does not own 4 red hens."),
    ("I am 3.", "I am 4."),
    ("I live in Oslo.", "I live near harbour, bridge and market."),
    ("I live in Oslo.", "Well, " * 200 + "that is it. I live in Bergen."),
]


def memory(text: str, moment_s: float = 0.0, **fields: object) -> Material:
    plain = Material(id=text, text=text, moment_s=moment_s, topics=("one",))
    return replace(plain, **fields)  # type: ignore[arg-type]


def flag(one: str, other: str, cosine: float = 0.9) -> Flag | None:
    return flagged(memory(one, 0.0), memory(other, 1.0), cosine)


def contradiction(why: str) -> Flag:
    return Flag("contradiction", why)


@pytest.mark.parametrize(("one", "other", "cosine", "why"), CONTRADICTIONS)
def test_a_statement_with_another_number_negation_or_value_contradicts(
    one: str, other: str, cosine: float, why: str
) -> None:
    assert flag(one, other, cosine) == contradiction(why)
    assert flag(other, one, cosine) == contradiction(why)


@pytest.mark.parametrize(("one", "other", "cosine"), HARMLESS)
def test_what_can_both_be_true_is_not_flagged(one: str, other: str, cosine: float) -> None:
    assert flag(one, other, cosine) is None
    # nor would a model that finds them more alike change that
    assert flag(one, other, DUPLICATE - 0.01) is None


@pytest.mark.parametrize(("one", "other"), HARMLESS_BY_WORDS)
def test_other_subjects_occasions_guesses_and_quantities_contradict_nothing(one: str, other: str) -> None:
    assert flag(one, other, DUPLICATE - 0.01) is None


def test_the_end_of_a_habit_counts_whenever_it_was() -> None:
    assert flag("I smoke cigars.", "I quit smoking cigars last year.") == contradiction("negation")


@given(st.sampled_from([pair[:2] for pair in CONTRADICTIONS]))
def test_the_same_moment_is_no_contradiction_and_no_duplicate_either(pair: tuple[str, str]) -> None:
    one, other = map(memory, pair)
    assert flagged(one, other, 0.9) is None
    assert flagged(one, other, 0.99) is None


@given(st.sampled_from([text for pair in CONTRADICTIONS for text in pair[:2]]))
def test_the_same_text_again_is_a_duplicate_from_the_documented_cosine_on(text: str) -> None:
    assert flag(text, text, 1.0) == flag(text, text, DUPLICATE) == Flag("duplicate", "")
    assert flag(text, text, DUPLICATE - 0.001) is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("We keep 2 hens. Dad keeps 3 hens.", "We keep 2 hens. Dad keeps 3 hens!"),
        ("The meeting is at 3 pm.", "The meeting is at 15:00."),
        ("The budget is $1,000.", "The budget is $1000."),
        ("Mia: Totally! Bye Zoe!", "Mia: Bye Zoe!"),
        ("I own twenty-five hens.", "I own 25 hens."),
        ("The barn holds two hundred hens.", "The barn holds 200 hens."),
    ],
)
def test_what_is_only_written_in_another_way_is_a_duplicate(one: str, other: str) -> None:
    assert flag(one, other, 0.98) == Flag("duplicate", "")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Invoice 1001 was sent to Miller.", "Invoice 1002 was sent to Miller."),
        ("I haven't finished the report.", "I have finished the report."),
        ("We visited Rome in spring.", "We visited Oslo in spring."),
    ],
)
def test_a_near_text_that_tells_something_else_is_no_duplicate(one: str, other: str) -> None:
    assert flag(one, other, 0.99) is None


def test_a_contradiction_is_found_between_sentences_of_longer_texts() -> None:
    one = "Mia: Lovely to see you! I live in Oslo. How about you?"
    other = "Mia: So much rain here. I live in Bergen. Do you like rain?"
    assert flag(one, other) == contradiction("value")


def test_what_both_texts_say_contradicts_nothing() -> None:
    one = "The barn holds 2 hens. The barn holds 3 hens."
    assert flag(one, "The barn holds 2 hens. The barn is far away.") is None


def test_a_label_with_a_colon_is_no_speaker() -> None:
    assert flag("Favorite color: blue", "Favorite color: green") == contradiction("value")


def test_am_is_not_pm_but_an_hour_without_either_is_left_alone() -> None:
    assert flag("The shop opens at 9 am.", "The shop opens at 9 pm.") == contradiction("number")
    assert flag("The shop opens at 9 am.", "The shop opens at 9.") is None


def test_two_negations_are_none() -> None:
    assert flag("I don't plan to stop eating meat.", "I plan to eat meat.") is None


def test_a_shared_topic_or_cluster_lowers_the_cosine_that_is_asked() -> None:
    older, newer = memory("I live in Oslo."), memory("I live in Bergen.", 1.0)
    between = (SIMILAR + SIMILAR_UNTAGGED) / 2
    assert flagged(older, newer, SIMILAR) == contradiction("value")
    assert flagged(older, newer, SIMILAR - 0.001) is None
    assert flagged(replace(older, topics=()), newer, between) is None
    assert flagged(replace(older, topics=()), newer, SIMILAR_UNTAGGED) == contradiction("value")
    clusters = [replace(item, topics=(), cluster="7") for item in (older, newer)]
    assert flagged(clusters[0], clusters[1], SIMILAR) == contradiction("value")


def test_other_topics_are_never_one_topic() -> None:
    older, newer = memory("I live in Oslo."), memory("I live in Bergen.", 1.0, topics=("other",))
    assert flagged(older, newer, 0.99) != contradiction("value")
    assert flagged(older, replace(newer, topics=("ONE", "other")), 0.9) == contradiction("value")


def test_two_memories_about_somebody_share_an_entity() -> None:
    older = memory("Anna lives in Oslo.", entities=("Anna", "Oslo"))
    newer = memory("Anna lives in Bergen.", 1.0, entities=("anna", "Bergen"))
    assert flagged(older, newer, 0.9) == contradiction("value")
    assert flagged(older, replace(newer, entities=("Bergen",)), 0.9) is None
    assert flagged(older, replace(newer, entities=()), 0.9) == contradiction("value")


def test_two_memories_about_the_user_are_about_one_whatever_their_entities() -> None:
    older = memory("I live in Oslo.", entities=("Oslo",))
    newer = memory("The user lives in Bergen.", 1.0, entities=("Bergen",))
    assert flagged(older, newer, 0.9) == contradiction("value")


def test_what_two_speakers_say_of_somebody_else_can_contradict() -> None:
    assert flag("Ben: Tom has two hens.", "Mia: Tom has three hens.") == contradiction("number")
    assert flag("Ben: Mine are two hens.", "Mia: I have three hens.") is None


@pytest.mark.parametrize("text", ["", "?", ":", "Ich wohne in Köln.", "猫が好きです", "\x00", "a" * 5_000])
def test_any_text_can_be_read(text: str) -> None:
    assert flag(text, "I live in Oslo.") is None


@given(st.text(), st.text(), st.sampled_from([0.71, 0.9, 0.99]))
def test_a_flag_does_not_depend_on_the_order(one: str, other: str, cosine: float) -> None:
    assert flag(one, other, cosine) == flag(other, one, cosine)


def unit_rows(count: int, dim: int = 16) -> NDArray[np.float32]:
    rows = np.random.default_rng(3).standard_normal((count, dim)).astype(np.float32)
    unit: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


@pytest.mark.parametrize("block_scores", [1, 700, 8_000_000])
def test_neighbours_are_those_of_a_full_search(monkeypatch: pytest.MonkeyPatch, block_scores: int) -> None:
    monkeypatch.setattr(similarity, "_BLOCK_SCORES", block_scores)
    vectors = unit_rows(300)
    exact = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    rows = [7, 0, 299, 7]
    for row, found in zip(rows, nearest(vectors, rows), strict=True):
        order = [int(at) for at in np.argsort(-exact[row]) if at != row][:NEAREST]
        assert [at for at, _ in found] == order
        assert [cosine for _, cosine in found] == pytest.approx(exact[row, order], abs=2e-6)


def test_equal_neighbours_come_in_the_order_of_their_rows() -> None:
    vectors = np.tile(unit_rows(1, 384), (1_000, 1))
    assert [at for at, _ in nearest(vectors, [3])[0]] == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]
    assert {cosine for _, cosine in nearest(vectors, [3])[0]} == {1.0}


@pytest.mark.parametrize("count", [1, 2, NEAREST, NEAREST + 1, NEAREST + 2])
def test_a_memory_is_not_its_own_neighbour_and_few_memories_have_few(count: int) -> None:
    found = nearest(unit_rows(count), range(count))
    assert [len(line) for line in found] == [min(NEAREST, count - 1)] * count
    assert all(row != at for row, line in enumerate(found) for at, _ in line)


def test_no_rows_have_no_neighbours() -> None:
    assert nearest(unit_rows(5), []) == []
    assert nearest(np.empty((0, 16), np.float32), []) == []
