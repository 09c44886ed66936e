"""Importance without a caller's word, and how it fades."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redismem import weights
from redismem.weights import DAYS, default_importance, half_life_days, temporal_weights

PLAIN = "The kettle stands on the left shelf of the kitchen."
TYPES = st.sampled_from(["identity", "rule", "semantic", "message", "episodic", "something-else"])


def documented(heading: str) -> list[tuple[str, float]]:
    """Rows of the table of the docstring that opens with `heading`."""
    table = (default_importance.__doc__ or "").split(heading)[1].split("\n\n")[0]
    return [
        (name.strip(), float(figure)) for name, figure in re.findall(r"\| (.+?)\|\s*([+-]?[\d.]+)", table)
    ]


@pytest.mark.parametrize(("names", "base"), documented("| type "))
def test_a_plain_statement_has_the_documented_base_of_its_type(names: str, base: float) -> None:
    for name in names.split(", "):
        assert default_importance(name, PLAIN, pinned=False) == base


def test_every_type_with_a_base_is_documented() -> None:
    names = {name for row, _ in documented("| type ") for name in row.split(", ")} - {"others"}
    assert names == set(weights._BASES) - {"*"}


@pytest.mark.parametrize(
    ("row", "text"),
    list(
        enumerate(
            [
                "I am allergic to the shellfish that they serve here.",
                "I always lock the bicycle behind the shed.",
                "We walked 14 miles along the coast.",
                "Which of the shelves holds the kettle?",
                "Thanks, Mia! That sounds great, bye!",
                "Wow, great kettle!",
                "A kettle there.",
            ]
        )
    ),
)
def test_wording_adds_what_the_docstring_says(row: int, text: str) -> None:
    assert default_importance("message", text, pinned=False) == round(
        0.4 + documented("| wording ")[row][1], 2
    )


@pytest.mark.parametrize("text", ["Likes cats", "A vase", "It looks comfortable and stands by the window"])
def test_a_plain_statement_of_type_semantic_has_exactly_a_half(text: str) -> None:
    assert default_importance("semantic", text, pinned=False) == 0.5


@pytest.mark.parametrize(
    "text", ["Hi", "ok", "Thanks a lot!", "Hey Mia, good to see you!", "Zoe: Wow, awesome!"]
)
def test_greetings_and_thanks_of_a_chat_weigh_next_to_nothing(text: str) -> None:
    assert 0.1 <= default_importance("message", text, pinned=False) <= 0.2


@pytest.mark.parametrize(
    ("more", "less"),
    [
        ("I have to carry insulin with me", "I have to carry a towel with me"),
        ("I never eat in the car", "I sometimes eat in the car"),
        ("I met Ursula at the gate", "I met somebody at the gate"),
        ("I love pizza", "Nice pizza"),
        ("The bakery closes early", "Does the bakery close early?"),
        ("The bakery closes early. Did you know?", "Did you know? Does it close early?"),
    ],
)
def test_what_a_reader_would_keep_weighs_more(more: str, less: str) -> None:
    assert default_importance("message", more, pinned=False) > default_importance(
        "message", less, pinned=False
    )


@pytest.mark.parametrize(
    "text",
    [
        "It must have been a long way up the hill",
        "I am always there for you on that hill",
        "You must see the view from that hill",
        "Is he allergic to anything? I forgot to ask before the picnic",
    ],
)
def test_phrases_advice_and_questions_hold_nothing_that_lasts(text: str) -> None:
    assert default_importance("message", text, pinned=False) == 0.4


def test_a_weekday_is_as_particular_as_a_number() -> None:
    assert default_importance("fact", "The choir meets on friday", pinned=False) == 0.65


def test_importance_ends_at_one() -> None:
    assert default_importance("identity", "Has diabetes", pinned=False) == 1.0


def test_the_speaker_and_asides_are_not_read() -> None:
    assert default_importance("message", f"Always: {PLAIN}", pinned=False) == 0.4
    assert default_importance("message", f"{PLAIN} [image: my birthday, 14 candles]", pinned=False) == 0.4


def test_only_the_first_thousand_characters_are_read() -> None:
    near = "kettle " * 140 + "I am allergic"
    far = "kettle " * 150 + "I am allergic"
    assert default_importance("semantic", near, pinned=False) == 0.7
    assert default_importance("semantic", far, pinned=False) == 0.5


@given(TYPES, st.text(), st.booleans())
def test_importance_is_a_share_in_hundredths_and_pinned_is_nine_tenths_at_least(
    memory_type: str, text: str, pinned: bool
) -> None:
    importance = default_importance(memory_type, text, pinned)
    assert (0.9 if pinned else 0.15) <= importance <= 1
    assert importance == round(importance, 2)
    assert importance >= default_importance(memory_type, text, pinned=False)


@given(st.text())
def test_a_type_of_a_higher_base_never_weighs_less(text: str) -> None:
    order = ["identity", "rule", "preference", "fact", "semantic", "message"]
    found = [default_importance(memory_type, text, pinned=False) for memory_type in order[:-1]]
    assert found == sorted(found, reverse=True)
    assert default_importance("message", text, pinned=False) <= found[-1]


def test_half_lives_are_the_documented_multiples_of_that_of_semantic() -> None:
    contract = (half_life_days.__doc__ or "").replace("\n", " ").split("multiply: ")[1]
    seen = {"semantic", "goal", "project", "*"}
    for names, factor in re.findall(r"([a-z, ]+?) ([\d.]+)[;.]", contract):
        for name in names.replace(" ", "").split(","):
            seen.add(name)
            assert half_life_days(name, 180) == 180 * float(factor)
    assert seen == set(weights._HALF_LIVES) | {"others"}
    assert half_life_days("semantic", 180) == 180


def test_the_table_is_the_formula() -> None:
    table = temporal_weights(90)
    assert set(table) >= {"semantic", "message", "identity", "*"}
    for memory_type, by_age in table.items():
        assert len(by_age) == DAYS + 1
        assert by_age[0] == 1
        for age in (1, 45, 365, DAYS):
            assert by_age[age] == pytest.approx(0.5 ** (age / half_life_days(memory_type, 90)))


def test_a_memory_weighs_half_after_its_half_life() -> None:
    table = temporal_weights(180)
    assert table["semantic"][180] == table["message"][45] == table["preference"][360] == 0.5


def test_weights_fall_with_age_and_stay_above_nothing() -> None:
    for by_age in temporal_weights(180).values():
        assert all(later < earlier for earlier, later in pairwise(by_age))
        assert by_age[-1] > 0
