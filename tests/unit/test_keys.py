"""Names: one owner, one set of keys; nothing a user id holds may leave its place."""

from __future__ import annotations

import re

from hypothesis import example, given
from hypothesis import strategies as st

from redismem.keys import META_PATTERN, VECTOR_FIELDS, Owner

characters = st.characters(exclude_categories=["Cs"])
hostile = st.text(st.one_of(st.sampled_from("/%{}:|,*?[]~\\'\" aA1é😀\u202eא\u0301\x7f"), characters))
users = hostile.filter(lambda text: 0 < len(text) <= 256)
namespaces = hostile.filter(lambda text: len(text) <= 256)
owners = st.builds(Owner, users, namespaces)


def names(owner: Owner) -> list[str]:
    keys = [owner.index, owner.ids, owner.meta, owner.log, owner.turns, owner.memory_prefix]
    return keys + [owner.physical_index(name) for name in VECTOR_FIELDS]


@given(owners)
@example(Owner("/", "/"))
@example(Owner("%2F", "%"))
@example(Owner("a/b"))
@example(Owner("😀" * 256, "א" * 256))
def test_an_owner_is_read_back_from_its_tag(owner: Owner) -> None:
    assert Owner.from_tag(owner.tag) == owner
    assert Owner.from_meta_key(owner.meta) == owner


@given(owners, owners)
@example(Owner("a/b"), Owner("b", "a"))
@example(Owner("b/c", "a"), Owner("c", "a/b"))
@example(Owner("a%2Fb"), Owner("a/b"))
@example(Owner("U1"), Owner("u1"))
@example(Owner("a,b"), Owner("a|b"))
@example(Owner("u1"), Owner("u10"))
@example(Owner("}:x"), Owner("x"))
@example(Owner("e\u0301"), Owner("\u00e9"))
def test_two_owners_share_no_name(one: Owner, other: Owner) -> None:
    assert (one == other) == (one.tag == other.tag)
    if one != other:
        assert not set(names(one)) & set(names(other))


@given(owners, owners, users)
def test_no_memory_key_of_one_owner_begins_with_the_prefix_of_another(
    one: Owner, other: Owner, memory_id: str
) -> None:
    if one != other:
        assert not one.memory(memory_id).startswith(other.memory_prefix)


@given(owners)
def test_a_tag_holds_only_characters_that_mean_nothing_to_redis(owner: Owner) -> None:
    assert re.fullmatch(r"[A-Za-z0-9._%/-]+", owner.tag)


@given(owners)
def test_every_name_carries_the_hash_tag_of_its_owner(owner: Owner) -> None:
    for name in names(owner):
        assert re.findall(r"\{([^{}]*)\}", name) == [owner.tag]


@given(owners, users, users)
def test_memory_ids_give_different_keys(owner: Owner, one: str, other: str) -> None:
    assert (owner.memory(one) == owner.memory(other)) == (one == other)


@given(owners)
def test_the_meta_key_matches_the_pattern_that_finds_owners(owner: Owner) -> None:
    assert owner.meta.startswith(META_PATTERN.removesuffix("*"))
