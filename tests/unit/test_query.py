"""The query language: whatever a caller writes stays a value."""

from __future__ import annotations

import re
import string
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from redismem.errors import InvalidInput
from redismem.filters import Filters, NumberRange, TagMatch, TimeRange
from redismem.keys import Owner
from redismem.query import (
    epoch,
    filter_query,
    index_schema,
    metadata_tag,
    metadata_tags,
    packed_tags,
    unpacked_tags,
    words_query,
)
from redismem.types import MemoryInput
from redismem.words import query_words

characters = st.characters(exclude_categories=["Cs", "Cc"])
hostile = st.text(
    st.one_of(st.sampled_from("|%{}()[]@:;,.<>~*?!\"'\\/+-=_&^$# aAz09é😀א"), characters),
    min_size=1,
    max_size=40,
)
names = hostile.map(str.strip).filter(bool)
numbers = st.floats(allow_nan=False, allow_infinity=False)
moments = st.datetimes(timezones=st.one_of(st.none(), st.just(UTC)))
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), numbers, st.text(characters, max_size=20)
)


def ranges(kind: type[Any], values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    low = st.sampled_from(["gt", "gte"])
    high = st.sampled_from(["lt", "lte"])
    return st.builds(lambda a, x, b, y: kind(**{a: x, b: y}), low, values, high, values)


tag_filters = st.one_of(
    names,
    st.lists(names, min_size=1, max_size=4),
    st.builds(TagMatch, any=st.lists(names, min_size=1, max_size=3), none=st.lists(names, max_size=3)),
    st.builds(TagMatch, all=st.lists(names, min_size=1, max_size=3)),
)
filters = st.builds(
    Filters,
    memory_type=st.one_of(st.none(), st.sampled_from(["semantic", ["episodic", "a-b_c"]])),
    topics=st.one_of(st.none(), tag_filters),
    entities=st.one_of(st.none(), tag_filters),
    session_id=st.one_of(st.none(), names, st.lists(names, min_size=1, max_size=3)),
    importance=st.one_of(st.none(), ranges(NumberRange, numbers)),
    created_at=st.one_of(st.none(), ranges(TimeRange, moments)),
    metadata=st.one_of(st.none(), st.dictionaries(names, scalars, max_size=3)),
    pinned=st.one_of(st.none(), st.booleans()),
    superseded=st.sampled_from(["exclude", "include", "only"]),
)

TRUE, FALSE = True, False

#: a whole filter query: tag sets whose values hold no bare ASCII punctuation, numeric ranges, ismissing
VALUE = r"(?:[0-9A-Za-z\x80-\U0010ffff]|\\[^0-9A-Za-z\x80-\U0010ffff])*"
NUMBER = r"\(?(?:[-+]inf|-?[0-9.]+(?:e[-+]?[0-9]+)?)"
PART = (
    rf"-?(?:ismissing\(@superseded_by\)|@[a-z_]+:\{{{VALUE}(?:\|{VALUE})*\}}|@[a-z_]+:\[{NUMBER} {NUMBER}\])"
)
QUERY = re.compile(rf"\*|{PART}(?: {PART})*")


@given(filters)
def test_a_filter_leaves_no_character_of_a_caller_unescaped(given_filters: Filters) -> None:
    assert QUERY.fullmatch(filter_query(given_filters))


@given(names, names)
@example("a|b", "a,b")
@example("A", "a")
def test_filters_of_different_values_differ(one: str, other: str) -> None:
    for name in ("topics", "entities", "session_id", "metadata"):
        first, second = (
            filter_query(msgspec.convert({name: {"key": value} if name == "metadata" else value}, Filters))
            for value in (one, other)
        )
        assert (first == second) == (one == other)


@pytest.mark.parametrize("value", [" ", "\t", "a\0b", "\x7f", "\n", "a\x1fb"])
@pytest.mark.parametrize("name", ["topics", "entities", "session_id"])
def test_a_filter_value_that_no_memory_can_have_is_refused_while_it_is_read(name: str, value: str) -> None:
    for shape in (value, [value]):
        with pytest.raises((msgspec.ValidationError, InvalidInput)):
            filter_query(msgspec.json.decode(msgspec.json.encode({name: shape}), type=Filters))


@pytest.mark.parametrize("bound", ["gt", "gte", "lt", "lte"])
def test_a_bound_that_is_not_a_number_is_refused(bound: str) -> None:
    with pytest.raises((msgspec.ValidationError, InvalidInput)):
        filter_query(msgspec.convert({"importance": {bound: "nan"}}, Filters, strict=False))


def test_all_memories_is_a_star() -> None:
    assert filter_query(Filters(superseded="include")) == "*"
    assert filter_query(Filters()) == "ismissing(@superseded_by)"


@given(st.lists(hostile, max_size=6))
@example(["|", "%", "%7C", "%257C", "%|", "|%7C|"])
def test_tags_are_unpacked_as_they_were_packed(values: list[str]) -> None:
    assert unpacked_tags(packed_tags(values)) == values


@given(st.lists(hostile, min_size=1, max_size=6))
def test_a_packed_tag_list_splits_only_between_values(values: list[str]) -> None:
    assert packed_tags(values).count("|") == len(values) - 1


@given(names, names, scalars, scalars)
@example("a", "a", 1, 1.0)
@example("a", "a", 1, TRUE)
@example("a", "a", 0, FALSE)
@example("a", "a", 0.0, -0.0)
@example("a", "a", "1", 1)
@example("a", "a", "true", TRUE)
@example("a", "a", "null", None)
@example("a", "a=b", "b=c", "c")
@example("k", "k", "x" * 400, "x" * 401)
@example("k", "k", 2**53, float(2**53))
def test_metadata_tags_are_equal_exactly_when_key_and_value_are(
    key: str, other_key: str, value: object, other: object
) -> None:
    same_kind = isinstance(value, bool) == isinstance(other, bool)
    equal = key == other_key and same_kind and value == other
    assert (metadata_tag(key, value) == metadata_tag(other_key, other)) == equal


@given(st.text(characters, max_size=300), st.one_of(scalars, st.text(characters, max_size=2000)))
def test_a_metadata_tag_fits_into_the_index(key: str, value: object) -> None:
    tag = metadata_tag(key, value)
    assert len(tag.encode()) <= 256
    assert "|" not in tag


def test_nested_metadata_has_no_tags() -> None:
    assert metadata_tags({"a": [1], "b": {"c": 1}, "d": None, "e": "x"}) == ["d=null", "e='x"]


@given(st.text(min_size=1, max_size=200))
@example("the of will there interview")
@example("ismissing(@superseded_by) isempty(x) as inf nan")
@example('@text:(a|b) -c ~d %e% "f g"~3 => [KNN 5 @embedding $v] w*')
def test_a_query_holds_only_words_and_our_own_operators(text: str) -> None:
    words = query_words(text)
    assert all(not set(word) & (set(string.punctuation + string.whitespace) - {"_"}) for word in words)
    for filter_ in ("*", "@pinned:{1}"):
        query = words_query(words, filter_)
        assert bool(query) == bool(words)
        bare = query.replace(filter_, "") if filter_ != "*" else query
        bare = bare.replace("w'ismissing'", "ismissing")  # a keyword of the language, as a pattern
        assert not set(bare) & (set(string.punctuation + string.whitespace) - set("_|() "))


@given(moments)
def test_a_time_without_zone_is_utc(moment: datetime) -> None:
    assert epoch(moment.replace(tzinfo=None)) == epoch(moment.replace(tzinfo=UTC))


def test_the_index_has_no_stop_words_and_small_blocks() -> None:
    schema = index_schema(Owner("alice"), "embedding", 384)
    joined = " ".join(schema)
    for part in ("STOPWORDS 0", "BLOCK_SIZE 64", "SKIPINITIALSCAN", "DIM 384", "FLAT", "PREFIX 1"):
        assert part in joined
    assert schema[schema.index("PREFIX") + 2].endswith(":")


def test_a_tag_match_without_a_value_is_refused() -> None:
    with pytest.raises(ValueError, match="needs"):
        TagMatch()
    with pytest.raises(msgspec.ValidationError, match="needs"):
        msgspec.json.decode(b'{"topics":{"any":[]}}', type=Filters)


@given(names)
def test_a_topic_is_filtered_as_it_is_stored(topic: str) -> None:
    stored = MemoryInput(text="x", topics=[f"  {topic} "]).topics
    assert filter_query(Filters(topics=TagMatch(any=[f" {topic}"]))) == filter_query(Filters(topics=stored))
