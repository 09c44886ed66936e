"""Entities: which of a user's names a text mentions, and what its capitals give away."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from redismem.entities import MOST_TOKENS, MOST_WORDS, Entity, KnownNames, capitalised, entities_of


def found(text: str, *names: str) -> list[str]:
    return KnownNames(names).found(text)


def test_names_come_in_order_of_appearance_and_once() -> None:
    assert found("Bob met Anna, then Bob left", "Anna", "Bob", "Carl") == ["Bob", "Anna"]


def test_the_longest_name_goes_first() -> None:
    names = ("York", "New York", "New York Times")
    assert found("in New York", *names) == ["New York"]
    assert found("the New York Times of York", *names) == ["New York Times", "York"]
    assert found("New Yorkers", *names) == []


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        ("met Ann.", True),
        ("(Ann)", True),
        ("Ann's dog, or Ann\u2019s", True),
        ("Ann'd know", True),
        ("Ann-approved", True),
        ("ex-Ann", True),
        ("@Ann #Ann", True),
        ("Annさん", True),
        ("Anna", False),
        ("JoAnn", False),
        ("Ann2", False),
        ("Ann_", False),
        ("Ann-Marie", False),
        ("Mary-Ann", False),
        ("O'Ann", False),
        ("Ann'Marie", False),
        ("Ann\u0316", False),  # a mark that has no letter of its own with n
        ("Ann++ and Ann#", False),
        ("ann-like, we met ann-marie", False),
    ],
)
def test_a_name_ends_where_its_word_ends(text: str, is_found: bool) -> None:
    assert found(text, "Ann") == ["Ann"] * is_found


@pytest.mark.parametrize(
    ("text", "name", "is_found"),
    [
        ("I met anna", "Anna", False),
        ("met anna", "Anna", True),
        ("MET ANNA TODAY", "Anna", True),
        ("I met ANNA", "Anna", True),
        ("I met aNNa", "Anna", False),
        ("MET JO TODAY", "Jo", True),
        ("I met JO", "Jo", False),
        ("in new york", "New York", True),
        ("i will go", "Will", False),
        ("I WILL GO", "Will", False),
        ("I met Will", "Will", True),
        ("a rose for you", "Rose", False),
        ("tell us", "US", False),
        ("in the US", "US", True),
        ("rose tyler called", "Rose Tyler", True),
        ("my IPHONE or iPhone", "iphone", True),
        ("I like Jazz", "jazz", True),
        ("STRASSE", "straße", True),
    ],
)
def test_case_tells_a_name_from_a_word(text: str, name: str, is_found: bool) -> None:
    assert found(text, name) == [name] * is_found


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        ("Will you come?", False),
        ("Yes. Will you?", False),
        ("so\nWill you?", False),
        ('He asked: "Will you?"', False),
        ("Will: I come", True),
        ("Will, come", True),
        ("Will's dog", True),
        ("Today, Will came", True),
        ("Is it Will?", True),
    ],
)
def test_a_word_that_opens_a_sentence_is_no_name(text: str, is_found: bool) -> None:
    assert found(text, "Will") == ["Will"] * is_found


def test_pronouns_and_stop_words_are_never_names() -> None:
    assert found("so I think he told Me the thing", "I", "he", "Me", "the") == []


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("我喜欢王小明的狗", "王小明"),
        ("東京タワーに行った", "タワー"),
        ("철수가 왔다", "철수"),
        ("I love 🐶!", "🐶"),
        ("we use C++ and C#", "C++"),
        ("we use C++ and C#", "C#"),
        ("on .NET", ".NET"),
        ("at AT&T", "AT&T"),
        ("with O'Neill", "O'Neill"),
        ("in St. John", "St. John"),
        ("in  New\nYork", "New York"),
        ("at Cafe\u0301 Luna", "Café Luna"),
        ("at Café Luna", "Cafe\u0301 Luna"),
        (".*+?(", ".*+?("),
    ],
)
def test_a_name_may_hold_any_character(text: str, name: str) -> None:
    assert found(text, name) == [name]


def test_blanks_and_accents_are_part_of_a_name() -> None:
    assert found("AT & T", "AT&T") == []
    assert found("New-York", "New York") == []
    assert found("Cafe Luna", "Café Luna") == []


def test_names_are_returned_as_given_and_the_first_of_equals_wins() -> None:
    assert found("met anna", " Anna ", "ANNA", "Anna") == [" Anna "]


def test_blank_and_endless_names_are_never_found() -> None:
    assert found("x " * 400, "", " ", " " * 256, "x " * (MOST_TOKENS + 1)) == []
    assert found("x " * 400, "x " * MOST_TOKENS) == ["x " * MOST_TOKENS]


AB = st.lists(st.sampled_from(["ka", "lo"]), min_size=1, max_size=4)


@given(st.lists(AB, max_size=6), st.lists(st.sampled_from(["ka", "lo"]), max_size=12))
def test_the_names_found_are_those_of_a_greedy_search(names: list[list[str]], words: list[str]) -> None:
    expected: list[str] = []
    place = 0
    while place < len(words):
        lengths = [len(name) for name in names if words[place : place + len(name)] == name]
        if lengths:
            expected.append(" ".join(words[place : place + max(lengths)]))
        place += max(lengths, default=1)
    assert KnownNames(map(" ".join, names)).found(" ".join(words)) == list(dict.fromkeys(expected))


@given(st.lists(st.text(max_size=8), max_size=6), st.text())
@example(["İ", "ß", "\ud800"], "İ ß \ud800")
@example(["A-", "'B"], "A-'B-A-")
def test_any_text_and_names_raise_nothing(names: list[str], text: str) -> None:
    known = KnownNames(names)
    for said in (text, " ".join(names) + text):
        assert set(known.found(said)) <= set(names)
        capitalised(said)
        assert len(entities_of(said, known, names)) <= 3


def test_many_names_cost_no_more_than_few() -> None:
    text = "we met Kalo Mine and Ruvi at the harbour of Salo, then we had dinner " * 14
    few, many = KnownNames(["Ruvi"]), KnownNames([f"Ka{n}lo Mi{n}" for n in range(10_000)])
    assert min(_seconds(many, text) for _ in range(9)) < 3 * min(_seconds(few, text) for _ in range(9))


def test_hostile_names_take_linear_time() -> None:
    known = KnownNames(["a " * n + "b" for n in range(1, 128)])
    short, long = (min(_seconds(known, "a " * n) for _ in range(5)) for n in (1_000, 8_000))
    assert long < 20 * short  # eight times the text


def _seconds(known: KnownNames, text: str) -> float:
    start = time.perf_counter()
    known.found(text)
    return time.perf_counter() - start


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Marie Curie met Knight Ventures in New York", ["Marie Curie", "Knight Ventures", "New York"]),
        ("ACME, O'Neill and Jean-Luc", ["ACME", "O'Neill", "Jean-Luc"]),
        ("at the Bank of the West with Vincent van Gogh", ["Bank of the West", "Vincent van Gogh"]),
        ("Mary Ann: I saw Will", ["Mary Ann", "Will"]),
        ("Mary: hi\nBob Ray: hello", ["Mary", "Bob Ray"]),
        ("Note: we met Kim", ["Kim"]),
        ("Mary said: hello Bob", ["Mary", "Bob"]),
        ("met Anna of the old Bob, Carl of the de Dora", ["Anna", "Bob", "Carl", "Dora"]),
        ("Hey Anna, thanks!", ["Anna"]),
        ("Why didn't Melanie come?", ["Melanie"]),
        ("Yesterday Anna's dog met Dr. Smith", ["Anna", "Dr. Smith"]),
        ("J. R. Tolkien wrote it", ["J. R. Tolkien"]),
        ("Visiting Paris", ["Paris"]),
        ("Alfred called. Emily too", ["Alfred", "Emily"]),
        ("I think I'm fine, Anna. I am", ["Anna"]),
        ("it was Anna I met", ["Anna"]),
        ("watching The Office", ["The Office"]),
        ("April Jones came in April, on Monday", ["April Jones"]),
        ("Will you come? Hope so. Loving it. Dairy-free too", []),
        ("I am SO happy, OMG", []),
        ("I said Yes", []),
        ("THE CAT SAT", []),
        ("no capitals here, 王小明", []),
        ("Anna called Anna", ["Anna"]),
        ("of Anna of", ["Anna"]),
        ("Élodie et Zoë", ["Élodie", "Zoë"]),
        ("", []),
    ],
)
def test_capitals_give_names_away(text: str, names: list[str]) -> None:
    assert capitalised(text) == names


def test_a_long_run_of_capitals_is_a_headline() -> None:
    assert capitalised("see " + " ".join(["Kalo"] * MOST_WORDS)) == [" ".join(["Kalo"] * MOST_WORDS)]
    assert capitalised("see " + " ".join(["Kalo"] * (MOST_WORDS + 1))) == []


def test_no_more_names_than_asked_for() -> None:
    text = "we met Anna, Bob, Carl and Dora"
    assert capitalised(text, most=2) == ["Anna", "Bob"]
    assert capitalised("Mary: hi\nAnna, Bob", most=1) == ["Mary"]


def test_known_names_go_before_spacys_and_those_before_capitals() -> None:
    known = KnownNames(["Rex"])
    assert entities_of("Zoe and Kim saw Rex", known, also=["Kim"]) == [
        Entity("Rex", is_known=True),
        Entity("Kim", is_known=False),
        Entity("Zoe", is_known=False),
    ]
    assert entities_of("Zoe and Kim saw Rex", known, also=["Kim"], most=2) == [
        Entity("Rex", is_known=True),
        Entity("Kim", is_known=False),
    ]


def test_a_part_of_a_name_is_not_named_again() -> None:
    known = KnownNames(["New York", "Anna"])
    names = [
        entity.name for entity in entities_of("Anna Lee left New York", known, also=["York", "new york"])
    ]
    assert names == ["Anna", "New York", "Anna Lee"]
    assert [entity.name for entity in entities_of("Ann, not Anna", KnownNames(["Anna"]))] == ["Anna", "Ann"]
