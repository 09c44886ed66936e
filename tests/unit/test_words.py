"""Words: what a query asks for is what the index holds."""

from __future__ import annotations

import re
from datetime import UTC, datetime

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from redismem.words import (
    MAX_QUERY_WORDS,
    STOP_WORDS,
    day_words,
    extra_words,
    query_words,
    speaker,
    text_words,
)

#: what RediSearch 2.10.5 splits on (found by trying each ASCII character); line ends are not in it
SEPARATORS = " \t,.<>{}[]\"':;!@#$%^&*()-+=~|/?`"


def indexed(text: str) -> set[str]:
    """Words that RediSearch finds in a text: ASCII lowered, split at its separators."""
    lowered = "".join(char.lower() if char.isascii() else char for char in text)
    return set(re.split(f"[{re.escape(SEPARATORS)}]+", lowered))


@given(st.text(st.characters(exclude_characters="\\", exclude_categories=["Cs"])))
@example("the first line\nthe second\r\nthe third")
@example("a\x0bb\x0cc\x1fd\x00e")
@example("Ünïcode “quoted” word\u2019s 東京タワー 😀 İstanbul ﬁn x²")
def test_every_word_of_a_text_is_in_the_index(text: str) -> None:
    assert set(text_words(text)) <= indexed(text) | indexed(extra_words(text))


@given(st.text())
def test_extra_words_need_no_extra_words(text: str) -> None:
    extra = extra_words(text)
    assert {word for word in extra.split() if len(word) > 1} <= set(text_words(text))
    assert "\\" not in extra


@given(st.text(st.characters(codec="ascii", min_codepoint=32, exclude_characters="\\\x7f")))
def test_plain_text_has_no_extra_words(text: str) -> None:
    assert extra_words(text) == ""


def test_a_windows_path_is_found_by_its_parts() -> None:
    assert set(extra_words(r"see C:\Users\Anna").split()) >= {"users", "anna"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello, World", ["hello", "world"]),
        ("Straße", ["strasse"]),
        ("café", ["café", "cafe"]),
        ("東京タワー", ["東京", "京タ", "タワ", "ワー"]),
        ("水", ["水"]),
        ("iPhone15 買う", ["iphone15", "買う"]),
        ("go 😀!", ["go", "😀"]),
        ("ﬁne", ["fine"]),
        ("", []),
        ("?!", []),
    ],
)
def test_words_of(text: str, words: list[str]) -> None:
    assert text_words(text) == words


@given(st.text())
def test_words_are_never_empty_and_hold_no_space(text: str) -> None:
    assert all(word and not re.search(r"\s", word) for word in text_words(text))


@given(st.text())
def test_query_words_are_distinct_bounded_and_all_of_the_text(text: str) -> None:
    words = query_words(text)
    assert len(words) == len(set(words)) <= MAX_QUERY_WORDS
    assert set(words) <= set(text_words(text))
    assert bool(words) == bool(text_words(text))


def test_stop_words_are_dropped_unless_nothing_else_is_left() -> None:
    assert query_words("What is the name of my dog?") == ["name", "dog"]
    assert query_words("to be or not to be") == ["to", "be", "or", "not"]
    assert all(word == word.casefold() for word in STOP_WORDS)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Mary: hello", "mary"),
        ("Mary Ann: hello", "mary ann"),
        ("  Dr. No: hello", "dr no"),
        ("Jean-Luc O'Neil: hello", "jean luc o neil"),
        ("Élodie: salut", "élodie elodie"),
        ("王: 你好", "王"),
        ("mary: hello", ""),
        ("Mary:hello", ""),
        ("Mary said: hello there", "mary said"),
        ("He went to the shop: it was closed", ""),
        ("12:30 is fine", ""),
        ("1: one", ""),
        (": hello", ""),
        ("hello", ""),
        ("", ""),
    ],
)
def test_the_speaker_of(text: str, name: str) -> None:
    assert speaker(text) == name


@given(st.text())
def test_a_speaker_is_made_of_words(text: str) -> None:
    assert set(speaker(text).split()) <= set(text_words(text))


@given(st.datetimes(timezones=st.just(UTC)))
def test_the_words_of_a_day_do_not_depend_on_the_locale(moment: datetime) -> None:
    assert re.fullmatch(r"\d{1,2} [A-Z][a-z]+ \d{1,4} [A-Z][a-z]+day", day_words(moment))


def test_a_day_in_words() -> None:
    assert day_words(datetime(2023, 5, 8, tzinfo=UTC)) == "8 May 2023 Monday"
