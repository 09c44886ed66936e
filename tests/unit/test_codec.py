"""Memories to hash fields and back: nothing is lost, and equal content has one identity."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from redismem.codec import (
    READ_FIELDS,
    content_hash,
    derived_id,
    memory_fields,
    memory_from_raw,
    quarter,
    unit,
    vector_bytes,
)
from redismem.types import MemoryInput

characters = st.characters(exclude_categories=["Cs", "Cc"])
names = st.text(st.one_of(st.sampled_from("|%{},\\ aA"), characters), min_size=1, max_size=20).filter(
    str.strip
)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(
    str.strip
)
shares = st.floats(0, 1)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.text(characters, max_size=9)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
# years that a person's memories may name; microseconds are exact in them
moments = st.datetimes(datetime(1800, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC))
memories = st.builds(
    MemoryInput,
    text=texts,
    memory_type=st.sampled_from(["semantic", "episodic"]),
    topics=st.lists(names, max_size=3),
    entities=st.lists(names, max_size=3),
    session_id=st.none() | names,
    event_date=st.none() | moments,
    importance=shares,
    confidence=shares,
    pinned=st.booleans(),
    metadata=st.dictionaries(names, values, max_size=3),
)


def raw_of(fields: dict[str, str | bytes]) -> list[bytes | None]:
    stored = {name: value.encode() if isinstance(value, str) else value for name, value in fields.items()}
    return [stored.get(name) for name in READ_FIELDS]


def content(memory: MemoryInput) -> tuple[Any, ...]:
    return (
        *(memory.text, memory.memory_type, sorted(memory.topics), sorted(memory.entities), memory.session_id),
        *(memory.event_date, memory.importance, memory.confidence, memory.pinned),
        msgspec.json.encode(memory.metadata, order="deterministic"),
    )


@given(memories)
def test_a_memory_comes_back_from_its_fields(memory: MemoryInput) -> None:
    back = memory_from_raw(raw_of(memory_fields(memory, 0.0)))
    assert back is not None
    for name in (
        *("text", "memory_type", "topics", "entities", "session_id", "event_date", "importance"),
        *("confidence", "pinned", "metadata"),
    ):
        assert getattr(back, name) == getattr(memory, name), name


@given(memories)
def test_what_comes_back_is_the_same_content(memory: MemoryInput) -> None:
    back = memory_from_raw(raw_of(memory_fields(memory, 0.0)))
    assert back is not None
    again = MemoryInput(
        **{name: getattr(back, name) for name in MemoryInput.__struct_fields__ if name != "id"}
    )
    assert content_hash(again) == content_hash(memory)


@given(memories, memories)
def test_content_hashes_are_equal_exactly_when_content_is(one: MemoryInput, other: MemoryInput) -> None:
    assert (content_hash(one) == content_hash(other)) == (content(one) == content(other))


@given(memories, st.sampled_from(MemoryInput.__struct_fields__), st.data())
@settings(max_examples=200)
def test_any_change_of_content_changes_the_hash(memory: MemoryInput, name: str, data: st.DataObject) -> None:
    assume(name != "id")
    changed = msgspec.structs.replace(memory, **{name: getattr(data.draw(memories), name)})
    assert (content_hash(changed) == content_hash(memory)) == (content(changed) == content(memory))


def test_an_id_is_not_content_and_order_of_topics_is_not() -> None:
    one = MemoryInput(text="x", id="1", topics=["a", "b"], metadata={"p": 1, "q": 2})
    other = MemoryInput(text="x", id="2", topics=["b", "a"], metadata={"q": 2, "p": 1})
    assert content_hash(one) == content_hash(other)


def test_a_topic_moved_to_the_entities_is_other_content() -> None:
    assert content_hash(MemoryInput(text="x", topics=["a"])) != content_hash(
        MemoryInput(text="x", entities=["a"])
    )
    assert content_hash(MemoryInput(text="x", topics=["ab"])) != content_hash(
        MemoryInput(text="x", topics=["a", "b"])
    )


def test_each_attempt_gives_another_id_and_the_first_is_the_hash() -> None:
    ids = [derived_id("abc", attempt) for attempt in range(100)]
    assert ids[0] == "abc"
    assert len(set(ids)) == 100


def test_metadata_is_bounded() -> None:
    with pytest.raises(ValueError, match="metadata"):
        memory_fields(MemoryInput(text="x", metadata={"a": "b" * 16_384}), 0.0)


@given(st.datetimes(timezones=st.just(UTC)))
@example(datetime(1, 1, 1, tzinfo=UTC))
@example(datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC))
def test_an_event_of_any_year_is_stored_or_refused_as_a_value(moment: datetime) -> None:
    try:
        fields = memory_fields(MemoryInput(text="x", event_date=moment), 0.0)
    except ValueError:
        assert moment.year in (1, 9999)
        return
    back = memory_from_raw(raw_of(fields))
    assert back is not None
    assert back.event_date is not None
    assert abs((back.event_date - moment).total_seconds()) < 0.001


@given(
    st.sampled_from(READ_FIELDS),
    st.binary(max_size=12) | st.sampled_from([b"inf", b"-inf", b"nan", b"1e999"]),
)
@example("version", b"inf")
@example("version", b"nan")
@example("metadata", b'"\xff')
@example("metadata", b"[" * 5000)
@example("created_at", b"1e30")
def test_a_field_that_another_service_garbled_hides_no_memory(name: str, value: bytes) -> None:
    raw: list[bytes | None] = [None] * len(READ_FIELDS)
    raw[READ_FIELDS.index("text")] = b"still here"
    raw[READ_FIELDS.index(name)] = value
    memory = memory_from_raw(raw)
    assert memory is not None
    msgspec.json.encode(memory)


def test_a_hash_without_text_is_no_memory() -> None:
    assert memory_from_raw([b"id"] + [None] * (len(READ_FIELDS) - 1)) is None


@pytest.mark.parametrize(
    ("moment", "name"),
    [
        (datetime(2026, 1, 1, tzinfo=UTC), "2026-Q1"),
        (datetime(2026, 3, 31, 23, 59, tzinfo=UTC), "2026-Q1"),
        (datetime(2026, 4, 1, tzinfo=UTC), "2026-Q2"),
        (datetime(2025, 12, 31, tzinfo=UTC), "2025-Q4"),
    ],
)
def test_a_quarter_begins_with_its_first_month(moment: datetime, name: str) -> None:
    assert quarter(moment.timestamp()) == name


@given(st.lists(st.floats(-1e150, 1e150), min_size=2, max_size=20))
@example([1e-160, 0.0])
def test_a_unit_vector_has_length_one_or_is_zero(numbers: list[float]) -> None:
    row = unit(np.array(numbers))
    length = float(np.linalg.norm(row))
    assert abs(length - 1) < 1e-3 or (length == 0 and np.linalg.norm(numbers) == 0)


def test_vectors_are_stored_in_two_bytes_a_number() -> None:
    raw = vector_bytes(np.array([1.0, -0.5, 0.25]))
    assert np.frombuffer(raw, np.float16).tolist() == [1.0, -0.5, 0.25]
