"""Extractive summaries: what counts as a sentence, which memories and which sentences are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
from numpy.typing import NDArray

from redismem.embed.deterministic import DeterministicEmbedder
from redismem.embed.protocol import estimated_tokens
from redismem.extract import Extract, Sentence, extracted, sentences, shortlist
from redismem.material import Material

DAY_S = 86_400.0
START_S = datetime(2023, 5, 8, 12, tzinfo=UTC).timestamp()


def count_tokens(texts: Sequence[str]) -> list[int]:
    return [estimated_tokens(text) for text in texts]


def told(text: str, **fields: object) -> list[str]:
    return [item.text for item in sentences(Material(id="m", text=text, **fields))]  # type: ignore[arg-type]


def rows(*texts: str) -> NDArray[np.float32]:
    embedder = DeterministicEmbedder()
    return np.array([embedder._vector(text) for text in texts], np.float32)


def statement(text: str, day: float = 0, weight: float = 0.5, source: str = "") -> Sentence:
    return Sentence(text, source or text, START_S + day * DAY_S, weight)


def summary(*candidates: Sentence, budget: int = 100, dated: bool = False) -> Extract:
    vectors = rows(*(item.text for item in candidates)) if candidates else np.empty((0, 384), np.float32)
    return extracted(candidates, vectors, budget, count_tokens, dated=dated)


FACTS = [
    statement(text, day)
    for day, text in enumerate(
        [
            "Nora: I planted tomatoes behind the garage.",
            "Nora: My sister Ida opened a bakery in Bergen.",
            "Paul: I sold the old motorcycle to a neighbour.",
            "Nora: The bakery of Ida won a prize for its rye bread.",
            "Paul: My knee surgery is planned for October.",
            "Nora: I repaired the greenhouse roof after the storm.",
        ]
    )
]


def test_each_sentence_of_a_turn_says_who_speaks() -> None:
    assert told("Mary Ann: I moved to Oslo. My cat hates it!\nThe flat is on Park Street.") == [
        "Mary Ann: I moved to Oslo.",
        "Mary Ann: My cat hates it!",
        "Mary Ann: The flat is on Park Street.",
    ]


def test_several_turns_in_one_memory_keep_their_speakers() -> None:
    assert told("Nora: I planted beans.\nPaul: My beans drowned.") == [
        "Nora: I planted beans.",
        "Paul: My beans drowned.",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "Dr. Berg of St. Olav lives at 3.5 km, e.g. near J. Holm.",
        "Likes v2.0 of the app, not 1.9!",
        "Works at Nordlys (see nordlys.example) since 2019",
    ],
)
def test_points_inside_a_sentence_do_not_end_it(text: str) -> None:
    assert told(text) == [text]


def test_lists_quotes_captions_and_scripts_without_blanks_are_split() -> None:
    assert told("- plays the oboe\n2. sings bass") == ["plays the oboe", "sings bass"]
    assert told('She said "I quit." Then she left.') == ['She said "I quit."', "Then she left."]
    assert told("Nora: I built a shed [image: a red shed]") == [
        "Nora: I built a shed",
        "Nora: [image: a red shed]",
    ]
    assert told("我住在上海。我喜欢茶。") == ["我住在上海。", "我喜欢茶。"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n ",
        "...",
        "Nora: Hey Paul!",
        "Nora: Thanks!",
        "Nora: 👍😂",
        "Wow! That's so cool.",
        "Nora: How are you? Did Paul call?",
        "Nora: Talk to you soon!",
    ],
)
def test_chatter_is_dropped(text: str) -> None:
    assert told(text, memory_type="message") == []


def test_a_short_fact_is_no_chatter() -> None:
    assert told("Nora: Hi! I'm vegetarian.") == ["Nora: I'm vegetarian."]
    assert told("Is happy") == ["Is happy"]  # stored as a fact, not said in talk


def test_an_important_plain_statement_weighs_more_than_a_question_or_an_unimportant_one() -> None:
    def weight(text: str, importance: float = 0.5, *, pinned: bool = False) -> float:
        material = Material(id="m", text=text, importance=importance, pinned=pinned)
        return sentences(material)[0].weight

    plain = weight("Nora: I visited the glass museum in Trondheim with Ida.")
    assert plain > weight("Nora: Did Ida visit the glass museum in Trondheim?")
    assert plain > weight("Nora: It has visited the glass museum in Trondheim with Ida.")
    assert plain > weight("Nora: You visited the glass museum in Trondheim with Ida.")
    assert plain < weight("Nora: I visited the glass museum in Trondheim with Ida.", 0.9)
    assert weight("Pin of the garage is 4711", 0.5, pinned=True) > weight("Pin of the garage is 4711", 1.0)


def test_a_very_long_sentence_is_cut_at_a_word() -> None:
    (cut,) = told("Nora: " + "gardening " * 100)
    assert len(cut) <= len("Nora: ") + 240
    assert cut.endswith("gardening\u2026")
    (blob,) = told("x" * 5_000)
    assert len(blob) == 240


def test_a_huge_memory_gives_few_sentences() -> None:
    assert len(told("Rain fell on town. " * 50_000)) == 40


def test_the_text_is_in_the_order_of_time_and_names_its_sources_once() -> None:
    mixed = [FACTS[i] for i in (4, 1, 5, 0, 3, 2)]
    found = summary(*mixed, budget=200)
    assert found.sources == tuple(item.source for item in FACTS)
    assert found.text.splitlines() == [
        FACTS[0].text + " My sister Ida opened a bakery in Bergen.",
        FACTS[2].text,
        FACTS[3].text,
        FACTS[4].text,
        FACTS[5].text,
    ]
    twice = summary(statement("Eats figs.", 0, source="a"), statement("Rides a mule.", 0, source="a"))
    assert (twice.text, twice.sources) == ("Eats figs. Rides a mule.", ("a",))


@pytest.mark.parametrize("dated", [False, True])
@pytest.mark.parametrize("budget", range(0, 110, 3))
def test_the_budget_is_never_exceeded_and_the_tokens_are_those_of_the_whole_text(
    budget: int, dated: bool
) -> None:
    found = summary(*FACTS, budget=budget, dated=dated)
    assert found.tokens == estimated_tokens(found.text) <= budget
    assert bool(found.text) == bool(found.sources)
    assert found.text or budget < 12


def test_when_no_sentence_fits_the_beginning_of_the_best_is_told() -> None:
    found = summary(statement("Nora: " + "green gardening tools " * 9, source="a"), budget=12)
    assert found.text.startswith("Nora: green gardening")
    assert found.text.endswith("\u2026")
    assert found.sources == ("a",)


def test_nothing_gives_an_empty_extract() -> None:
    assert summary() == Extract("", (), 0)


def test_a_fact_is_told_once() -> None:
    found = summary(
        statement("Ida opened a bakery in Bergen.", 0, source="a"),
        statement("Ida has opened a bakery in Bergen!", 1, source="b"),
        statement("A bakery in Bergen.", 2, source="c"),
        statement("Paul sold his motorcycle.", 3, source="d"),
    )
    assert len({"a", "b", "c"} & set(found.sources)) == 1
    assert "d" in found.sources


def test_what_is_near_by_meaning_alone_is_told_once() -> None:
    vectors = np.eye(3, dtype=np.float32)
    vectors[1] = [0.9, np.sqrt(1 - 0.81), 0]
    candidates = [statement("Owns a hound."), statement("Keeps a dog."), statement("Rents a boat.")]
    found = extracted(candidates, vectors, 100, count_tokens)
    assert len(found.sources) == 2
    assert "Rents a boat." in found.text


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("The monthly rent of the flat in Bergen is 900.", "The monthly rent of the flat in Bergen is 950."),
        ("Nora: I eat meat and fish on Fridays.", "Nora: I do not eat meat and fish on Fridays."),
    ],
)
def test_of_two_versions_the_later_one_is_told(older: str, newer: str) -> None:
    vectors = rows(older, newer, FACTS[0].text)
    vectors[1] = vectors[0]
    candidates = [statement(older, 0, 0.9), statement(newer, 1, 0.5), FACTS[0]]
    assert set(extracted(candidates, vectors, 100, count_tokens).sources) == {newer, FACTS[0].source}
    turned = [statement(older, 1, 0.5), statement(newer, 0, 0.9), FACTS[0]]
    assert older in extracted(turned, vectors, 100, count_tokens).sources


def test_statements_that_differ_in_words_too_are_no_versions() -> None:
    vectors = np.ones((2, 1), np.float32)
    candidates = [statement("Ida baked 3 rye loaves.", 0, 0.9), statement("Ida baked 4 plum cakes.", 1, 0.1)]
    assert extracted(candidates, vectors, 100, count_tokens).text == "Ida baked 3 rye loaves."


def test_weight_outdoes_a_little_more_centrality() -> None:
    light = [statement(f"{name} sold boats.", 0, 0.3) for name in ("Paul", "Ida", "Nora")]
    heavy = statement("Moss grows slowly.", 1, 0.6)
    vectors = np.array([[1, 0, 0], [0.8, 0.6, 0], [0.8, -0.6, 0], [0.5, 0, 0.866]], np.float32)
    assert extracted([*light, heavy], vectors, 5, count_tokens).text == "Moss grows slowly."
    equal = [*light, statement("Moss grows slowly.", 1, 0.3)]
    assert extracted(equal, vectors, 5, count_tokens).text == "Paul sold boats."


def test_the_central_and_the_pinned_go_before_the_odd() -> None:
    bakery = [statement(f"Ida sells {bread} bread in her bakery.", day) for day, bread in enumerate("ABC")]
    odd = statement("Moss grows slowly.", 4)
    pinned = statement("Allergic against penicillin.", 5, weight=1.5)
    found = summary(*bakery, odd, pinned, budget=15)
    assert pinned.source in found.sources
    assert any(item.source in found.sources for item in bakery)
    assert odd.source not in found.sources


def test_dated_lines_begin_with_the_day_where_it_changes() -> None:
    found = summary(
        statement("Nora: I planted tomatoes.", 0),
        statement("Paul: My motorcycle is sold.", 0.1),
        statement("Paul: Rain flooded our cellar", 3),
        statement("Paul: Two pumps arrived.", 3.1),
        dated=True,
    )
    assert found.text.splitlines() == [
        "8 May 2023: Nora: I planted tomatoes.",
        "Paul: My motorcycle is sold.",
        "11 May 2023: Paul: Rain flooded our cellar. Two pumps arrived.",
    ]


def memories(count: int) -> tuple[list[Material], NDArray[np.float32]]:
    """Facts of one kind, a day apart, in a shuffled order."""
    rng = np.random.default_rng(3)
    days = rng.permutation(count)
    items = [
        Material(id=str(day), text=f"Nora: I baked bread number {day} with rye.", moment_s=day * DAY_S)
        for day in days
    ]
    return items, rows(*(item.text for item in items))


def test_a_small_group_is_listed_whole() -> None:
    items, vectors = memories(7)
    assert shortlist(items, vectors, 7) == list(range(7))
    assert shortlist([], np.empty((0, 384), np.float32)) == []


def test_the_shortlist_is_ascending_distinct_and_spread_in_time() -> None:
    items, vectors = memories(300)
    listed = shortlist(items, vectors, 40)
    assert listed == sorted(set(listed))
    assert len(listed) == 40
    tenths = {int(items[place].moment_s // (30 * DAY_S)) for place in listed}
    assert tenths == set(range(10))


def test_the_shortlist_holds_the_pinned_and_the_important_and_leaves_chatter_out() -> None:
    items, vectors = memories(300)
    for place, fields in {5: {"pinned": True}, 120: {"importance": 0.9}}.items():  # far from the centroid
        items[place] = Material(id=f"x{place}", text="Nora: Moss grows slowly.", **fields)  # type: ignore[arg-type]
        vectors[place] = rows("Moss grows slowly.")[0]
    for place in range(40, 56):  # more than the quarter that is kept for the important
        items[place] = replace(items[place], pinned=True)
    for place in range(200, 240):
        items[place] = Material(id=f"c{place}", text="Nora: Thanks!", moment_s=items[place].moment_s)
    listed = shortlist(items, vectors, 40)
    assert 120 in shortlist([replace(item, pinned=False) for item in items], vectors, 40)
    assert {5, *range(40, 56)} <= set(listed)
    assert not set(range(200, 240)) & set(listed)
