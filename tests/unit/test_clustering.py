"""Topics: planted groups come back, keep their numbers, and are named by words that are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from redismem import clustering
from redismem.clustering import Centre, Known, assigned, clustered
from redismem.material import Material, Topic
from redismem.words import text_words

DIM = 96

#: what the memories of each planted group are about
SUBJECTS = (
    "pottery kiln glaze",
    "marathon training shoes",
    "sourdough oven flour",
    "telescope saturn orbit",
    "violin orchestra concert",
    "tomatoes greenhouse compost",
)
ASIDES = "ladder umbrella stapler ribbon anchor cobalt hammock trolley magnet saddle".split()

Planted = tuple[list[Material], NDArray[np.float32]]


def unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    made: NDArray[np.float64] = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return made


def planted(sizes: Sequence[int], noise: int = 0, *, seed: int = 1, spread: float = 0.4) -> Planted:
    """Return groups around random centres, `g<group>-<n>`, and vectors anywhere, `noise-<n>`, shuffled."""
    random = np.random.default_rng(seed)
    materials, rows = [], []
    for group, size in enumerate(sizes):
        centre = unit(random.normal(size=DIM))
        for place in range(size):
            text = f"{SUBJECTS[group]} {ASIDES[place % 10]}"
            materials.append(Material(id=f"g{group}-{place}", text=text, moment_s=float(place)))
            rows.append(centre + spread * random.normal(size=DIM) / DIM**0.5)
    for place in range(noise):
        materials.append(Material(id=f"noise-{place}", text=ASIDES[place % 10], moment_s=float(place)))
        rows.append(random.normal(size=DIM))
    order = random.permutation(len(rows))
    vectors = unit(np.array(rows).reshape(-1, DIM)).astype(np.float32)
    return [materials[row] for row in order], vectors[order]


def part(given_: Planted, keep: Sequence[bool]) -> Planted:
    return [one for one, kept in zip(given_[0], keep, strict=True) if kept], given_[1][np.array(keep)]


def sets(topics: Sequence[Topic]) -> list[set[str]]:
    return [set(topic.members) for topic in topics]


def group_of(materials: Sequence[Material], group: int) -> set[str]:
    return {one.id for one in materials if one.id.startswith(f"g{group}-")}


def known(topics: Sequence[Topic]) -> list[Known]:
    return [Known(topic.number, frozenset(topic.members)) for topic in topics]


def watch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets how many rows HDBSCAN sees."""
    seen: list[int] = []
    dense = clustering._dense

    def watched(rows: NDArray[np.float32]) -> NDArray[np.intp]:
        seen.append(len(rows))
        return dense(rows)

    monkeypatch.setattr(clustering, "_dense", watched)
    return seen


def test_planted_groups_come_back_largest_first() -> None:
    materials, vectors = planted([12, 20, 5, 8])
    assert sets(clustered(materials, vectors)) == [group_of(materials, group) for group in (1, 0, 3, 2)]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_topics_near_each_other_stay_apart(seed: int) -> None:
    random = np.random.default_rng(seed)
    fields = unit(random.normal(size=(3, 1, 1, DIM)))
    topics = unit(fields + 0.5 * unit(random.normal(size=(3, 2, 1, DIM))))
    vectors = unit(topics + 0.4 * random.normal(size=(3, 2, 9, DIM)) / DIM**0.5).reshape(-1, DIM)
    materials = [Material(id=str(row), text=SUBJECTS[row // 9]) for row in range(54)]
    apart = [{str(row) for row in range(first, first + 9)} for first in range(0, 54, 9)]
    assert sets(clustered(materials, vectors.astype(np.float32))) == apart


def test_what_is_near_nothing_stays_out() -> None:
    materials, vectors = planted([12, 20, 9], noise=30)
    assert sets(clustered(materials, vectors)) == [group_of(materials, group) for group in (1, 0, 2)]


def test_a_topic_of_most_memories_does_not_make_a_topic_of_the_rest() -> None:
    materials, vectors = planted([60], noise=20, spread=0.3)
    topics = clustered(materials, vectors)
    assert topics
    assert all(members <= group_of(materials, 0) for members in sets(topics))


@pytest.mark.parametrize("noise", [0, 1, 4, 5, 9, 40, 200])
def test_vectors_without_groups_have_no_topics(noise: int) -> None:
    assert clustered(*planted([], noise)) == []


@pytest.mark.parametrize("size", [1, 4])
def test_fewer_than_five_alike_are_no_topic(size: int) -> None:
    materials, vectors = planted([12, size, 12])
    assert sorted(map(len, sets(clustered(materials, vectors)))) == [12, 12]


def test_model_with_all_vectors_alike_still_has_topics() -> None:
    materials, vectors = planted([12, 9], noise=20)
    common = np.zeros(DIM, np.float32)
    common[0] = 1.5
    alike = unit((vectors + common).astype(np.float64)).astype(np.float32)
    assert (alike @ alike.T).min() > 0.3
    assert sets(clustered(materials, alike)) == [group_of(materials, 0), group_of(materials, 1)]


def test_same_input_has_the_same_topics() -> None:
    first, second = (clustered(*planted([12, 20], noise=20, spread=0.8)) for _ in range(2))
    assert first
    for one, other in zip(first, second, strict=True):
        assert (one.number, one.words, one.reach, one.members) == (
            other.number,
            other.words,
            other.reach,
            other.members,
        )
        assert np.array_equal(one.centroid, other.centroid)


def test_members_are_in_the_order_of_the_memories() -> None:
    materials, vectors = planted([12, 9])
    order = {one.id: place for place, one in enumerate(materials)}
    for topic in clustered(materials, vectors):
        assert list(topic.members) == sorted(topic.members, key=order.__getitem__)


def test_equal_vectors_are_one_topic_beside_others() -> None:
    materials, vectors = planted([10, 10], spread=0.0)
    topics = clustered(materials, vectors)
    assert sets(topics) == sets(clustered(*planted([10, 10])))
    # an eleventh of them belongs to it
    assert assigned(vectors, centres(topics)) == [
        next(topic.number for topic in topics if one.id in topic.members) for one in materials
    ]


def test_only_equal_vectors_are_no_topic() -> None:
    assert clustered(*planted([10], spread=0.0)) == []


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_memory_without_a_direction_is_in_no_topic(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    materials, vectors = planted([14, 14], noise=14)
    broken = np.array([one.id in {"g0-3", "g1-5"} or one.id.startswith("noise") for one in materials])
    vectors[broken] = value
    whole = {one.id for one, bad in zip(materials, broken, strict=True) if not bad}
    seen = watch(monkeypatch)
    topics = clustered(materials, vectors)
    assert seen == [26]
    assert len(topics) == 2
    assert set().union(*sets(topics)) == whole
    assert assigned(vectors[broken], centres(topics)) == [0] * 16


def test_short_messages_found_no_topic_but_may_join_one() -> None:
    materials, vectors = planted([12, 12, 12])
    said = [
        replace(one, memory_type="message", text="Ann: Pottery, yeah!" if one.id[:2] == "g0" else one.text)
        for one in materials
    ]
    assert set().union(*sets(clustered(said, vectors))) == group_of(materials, 1) | group_of(materials, 2)
    some = [one if int(one.id[3:]) >= 6 else other for one, other in zip(said, materials, strict=True)]
    joined = next(members for members in sets(clustered(some, vectors)) if "g0-0" in members)
    assert {f"g0-{place}" for place in range(6)} < joined <= group_of(materials, 0)


def test_more_memories_than_are_clustered_join_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "MAX_CLUSTERED", 60)
    materials, vectors = planted([100, 80, 60], spread=0.3)
    seen = watch(monkeypatch)
    topics = clustered(materials, vectors)
    assert seen == [60]
    for members in sets(topics):
        assert len({one[:2] for one in members}) == 1
    assert sum(map(len, sets(topics))) > 0.6 * 240


def test_sample_is_spread_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "MAX_CLUSTERED", 5)
    materials = [Material(id=str(row), text="", moment_s=float(-row)) for row in range(101)]
    assert clustering._spread(materials, range(101)).tolist() == [100, 75, 50, 25, 0]


# numbers


def test_numbers_count_from_the_first_one_given() -> None:
    assert [topic.number for topic in clustered(*planted([12, 9]), first_number=7)] == [7, 8]


def test_numbers_stay_when_memories_come_and_go() -> None:
    before = planted([12, 20, 9, 8])
    numbers = {topic.members[0][:2]: topic.number for topic in clustered(*before)}
    # groups 0 and 2 lose and win the first place
    after = part(
        planted([30, 20, 9, 14]), [not one.id.endswith(("-2", "-7")) for one in planted([30, 20, 9, 14])[0]]
    )
    topics = clustered(*after, known(clustered(*before)))
    assert {topic.members[0][:2]: topic.number for topic in topics} == numbers


def groups(*sizes: tuple[str, int]) -> list[frozenset[str]]:
    """Return groups of ids: `("ab", 3)` is a0, a1, a2, b0, b1, b2."""
    return [
        frozenset(f"{letter}{place}" for letter in letters for place in range(size))
        for letters, size in sizes
    ]


def test_larger_part_of_a_split_topic_keeps_its_number() -> None:
    (whole,) = groups(("a", 20))
    small, large = (frozenset(sorted(whole)[:8]), frozenset(sorted(whole)[8:]))
    assert clustering._numbers([small, large], [Known(4, whole)], 1) == [5, 4]


def test_merged_topic_has_the_number_of_the_larger_part() -> None:
    small, large, merged = groups(("a", 8), ("b", 20), ("ab", 20))
    assert clustering._numbers([merged], [Known(9, small), Known(2, large)], 1) == [2]


def test_topic_that_doubles_or_halves_keeps_its_number() -> None:
    single, double = groups(("a", 10), ("ab", 10))
    assert clustering._numbers([double], [Known(3, single)], 1) == [3]
    assert clustering._numbers([single], [Known(3, double)], 1) == [3]


def test_topic_with_a_majority_of_a_known_one_keeps_its_number() -> None:
    old, new = groups(("a", 10), ("b", 6))
    assert clustering._numbers([new | frozenset(sorted(old)[:6])], [Known(3, old)], 1) == [3]


def test_topic_with_a_minority_of_a_known_one_is_new() -> None:
    old, new = groups(("a", 10), ("b", 6))
    assert clustering._numbers([new | frozenset(sorted(old)[:4])], [Known(3, old)], 1) == [4]


def test_topic_of_which_two_are_left_is_not_the_same() -> None:
    old, new = groups(("a", 2), ("ab", 10))
    assert clustering._numbers([new], [Known(3, old)], 1) == [4]


def test_number_of_a_topic_that_is_gone_does_not_come_back() -> None:
    gone, new = groups(("a", 10), ("b", 10))
    assert clustering._numbers([new], [Known(6, gone)], 1) == [7]
    assert clustering._numbers([new], [Known(6, gone)], 12) == [12]


def test_deleted_members_do_not_count_against_a_topic() -> None:
    materials, vectors = planted([12, 9])
    old = [
        Known(5, frozenset(sorted(group_of(materials, 0))[:4] + [f"deleted-{place}" for place in range(8)]))
    ]
    numbers = {topic.members[0][:2]: topic.number for topic in clustered(materials, vectors, old)}
    assert numbers == {"g0": 5, "g1": 6}


@settings(deadline=None)
@given(
    st.lists(st.frozensets(st.integers(0, 30).map(str), min_size=1), max_size=5),
    st.lists(st.integers(0, 5), min_size=31, max_size=31),
    st.integers(1, 40),
)
def test_each_number_is_given_once_and_new_ones_are_new(
    old: list[frozenset[str]], place: list[int], first: int
) -> None:
    now = [frozenset(str(one) for one in range(31) if place[one] == group) for group in range(5)]
    topics = [Known(3 * index + 1, members) for index, members in enumerate(old)]
    numbers = clustering._numbers(now, topics, first)
    assert len(set(numbers)) == 5
    used = {topic.number for topic in topics}
    assert all(number in used or number >= max({first, *(one + 1 for one in used)}) for number in numbers)


# reach


def centres(topics: Sequence[Topic]) -> list[Centre]:
    return [Centre(topic.number, topic.centroid, topic.reach) for topic in topics]


def test_centroid_is_the_unit_mean_and_most_members_are_within_reach() -> None:
    materials, vectors = planted([30, 20], noise=20, spread=0.8)
    place = {one.id: row for row, one in enumerate(materials)}
    for topic in clustered(materials, vectors):
        rows = vectors[[place[one] for one in topic.members]]
        assert topic.centroid.dtype == np.float32
        assert topic.centroid == pytest.approx(unit(rows.sum(axis=0).astype(np.float64)), abs=1e-5)
        assert 0.7 <= np.mean(rows @ topic.centroid >= topic.reach) < 1.0


def test_reach_is_what_a_new_memory_of_the_topic_has() -> None:
    # small groups: a member is a fifth of its own centroid
    materials, vectors = planted([10] * 6, spread=1.0)
    old = np.array([int(one.id[3:]) < 5 for one in materials])
    found = clustered(*part((materials, vectors), old.tolist()))
    assert len(found) == 6
    numbers = assigned(vectors[~old], centres(found))
    own = {topic.members[0][:2]: topic.number for topic in found}
    fresh = [one.id[:2] for one, was in zip(materials, old, strict=True) if not was]
    assert np.mean([own[group] == number for group, number in zip(fresh, numbers, strict=True)]) >= 0.5


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 30), st.integers(0, 6))
def test_assigned_is_the_nearest_topic_that_reaches(seed: int, count: int, topics: int) -> None:
    random = np.random.default_rng(seed)
    vectors = unit(random.normal(size=(count, 4))).astype(np.float32)
    tops = [
        Centre(10 + index, unit(random.normal(size=4)).astype(np.float32), float(random.uniform(-0.2, 0.9)))
        for index in range(topics)
    ]
    expected = []
    for vector in vectors:
        met = [
            (float(vector @ top.centroid), top.number) for top in tops if vector @ top.centroid >= top.reach
        ]
        expected.append(max(met)[1] if met else 0)
    assert assigned(vectors, tops) == expected


def test_assigned_is_the_same_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    materials, vectors = planted([12, 9], noise=20)
    tops = centres(clustered(materials, vectors))
    whole = assigned(vectors, tops)
    assert set(whole) == {0, 1, 2}
    monkeypatch.setattr(clustering, "BATCH", 7)
    assert assigned(vectors, tops) == whole


# labels


def labelled(*texts: str, topics: tuple[str, ...] = (), others: str = "") -> Topic:
    """Return the topic of memories with these texts, clustered beside a dozen others."""
    materials, vectors = planted([len(texts), 12])
    said = [
        replace(one, text=texts[int(one.id[3:])], topics=topics)
        if one.id.startswith("g0")
        else replace(one, text=f"{one.text} {others}")
        for one in materials
    ]
    return next(topic for topic in clustered(said, vectors) if topic.members[0].startswith("g0"))


def words_of(topic: Topic) -> list[str]:
    return [entry.word for entry in topic.words]


def test_label_says_what_a_topic_is_about() -> None:
    for topic in clustered(*planted([12, 20, 9, 8])):
        assert set(topic.label.split(", ")) == set(SUBJECTS[int(topic.members[0][1])].split())


def test_witnesses_are_members_that_have_the_word_spread_over_time() -> None:
    materials, vectors = planted([12, 20, 9], noise=10, spread=0.6)
    by_id = {one.id: one for one in materials}
    for topic in clustered(materials, vectors):
        assert 1 <= len(topic.words) <= 8
        for entry in topic.words:
            having = [one for one in topic.members if entry.word in text_words(by_id[one].text)]
            having.sort(key=lambda one: by_id[one].moment_s)
            assert set(entry.witnesses) <= set(having)
            assert len(entry.witnesses) == len(set(entry.witnesses)) == min(3, len(having))
            assert (entry.witnesses[0], entry.witnesses[-1]) == (having[0], having[-1])


def test_word_that_all_memories_have_tells_nothing() -> None:
    texts = [f"canoe paddle river kitchen {aside}" for aside in ASIDES]
    assert words_of(labelled(*texts, others="kitchen"))[-1] == "kitchen"


def test_filler_names_numbers_and_short_words_are_no_label() -> None:
    texts = [f"Zora: yeah wow that 2024 ox canoe was awesome, she won't {aside}" for aside in ASIDES]
    assert words_of(labelled(*texts))[0] == "canoe"
    assert {"zora", "yeah", "wow", "2024", "ox", "awesome", "won", "was"}.isdisjoint(
        words_of(labelled(*texts))
    )


@pytest.mark.parametrize(
    "forms",
    [
        ("canoe", "canoes"),
        ("hobby", "hobbies"),
        ("movie", "movies"),
        ("camp", "camping"),
        ("swim", "swimming"),
        ("dance", "dancing"),
        ("paint", "painted"),
        ("class", "classes"),
    ],
)
def test_two_forms_of_a_word_are_one_label_word(forms: tuple[str, str]) -> None:
    texts = [f"{forms[place % 3 > 0]} {aside}" for place, aside in enumerate(ASIDES)]
    topic = labelled(*texts)
    # six members have the second form, four the first
    assert forms[1] in words_of(topic)
    assert forms[0] not in words_of(topic)
    # and those that have it in the first do not witness it
    entry = next(entry for entry in topic.words if entry.word == forms[1])
    assert not {f"g0-{place}" for place in range(0, 10, 3)} & set(entry.witnesses)


@pytest.mark.parametrize(
    "pair", [("news", "new"), ("glass", "gla"), ("string", "strong"), ("cactus", "cactu")]
)
def test_words_that_only_look_alike_stay_apart(pair: tuple[str, str]) -> None:
    assert clustering._stem(pair[0]) != clustering._stem(pair[1])


def test_word_of_three_members_comes_before_rarer_ones() -> None:
    rare = "axle brine cedar dune easel fjord gecko heron ivory joust".split()
    texts = [f"canoe {word}" for word in rare[:5]] + [f"kayak {word}" for word in rare[5:]]
    assert set(words_of(labelled(*texts))[:2]) == {"canoe", "kayak"}
    # of the rarer ones only what fills the label
    assert len(words_of(labelled(*texts))) == 3


def test_word_of_three_members_comes_before_one_of_two_that_tells_more() -> None:
    texts = ["canoe", "canoe", "canoe", "axle", "axle", *ASIDES[:5]]
    assert words_of(labelled(*texts, others="canoe"))[:2] == ["canoe", "axle"]


def test_tag_of_most_members_is_the_best_label() -> None:
    texts = [f"canoe paddle {aside}" for aside in ASIDES]
    topic = labelled(*texts, topics=("Water Sports",))
    assert words_of(topic)[:3] == ["water sports", "canoe", "paddle"]
    assert len(topic.words[0].witnesses) == 3


def test_label_does_not_repeat_a_word_of_a_tag() -> None:
    texts = [f"canoe dancing {aside}" for aside in ASIDES]
    assert words_of(labelled(*texts, topics=("Dance Classes",)))[:2] == ["dance classes", "canoe"]
    assert "dancing" not in words_of(labelled(*texts, topics=("Dance Classes",)))


def test_label_has_eight_words_at_most() -> None:
    texts = [f"axle brine cedar dune easel fjord gecko heron ivory joust {aside}" for aside in ASIDES]
    assert len(words_of(labelled(*texts))) == 8


def test_what_no_word_names_is_no_topic() -> None:
    materials, vectors = planted([12, 9])
    said = [replace(one, text="and then 42") if one.id.startswith("g0") else one for one in materials]
    assert sets(clustered(said, vectors)) == [group_of(materials, 1)]


def test_scripts_without_blanks_are_labelled_by_their_bigrams() -> None:
    texts = [f"陶芸 {aside}" for aside in ASIDES]
    assert words_of(labelled(*texts))[0] == "陶芸"


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 12), max_size=5),
    st.integers(0, 25),
    st.integers(0, 2**16),
    st.floats(0.1, 1.5),
)
def test_topics_are_disjoint_groups_of_given_memories(
    sizes: list[int], noise: int, seed: int, spread: float
) -> None:
    materials, vectors = planted(sizes, noise, seed=seed, spread=spread)
    topics = clustered(materials, vectors)
    members = [one for topic in topics for one in topic.members]
    assert len(members) == len(set(members))
    assert set(members) <= {one.id for one in materials}
    assert all(len(topic.members) >= 5 and topic.words for topic in topics)
    assert [len(topic.members) for topic in topics] == sorted(map(len, sets(topics)), reverse=True)
    assert [topic.number for topic in topics] == list(range(1, len(topics) + 1))
