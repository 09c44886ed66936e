"""What fits into a context: budgets, order, cutting, and taking out again."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest

from redismem.conversation import STAGE_TOKENS, Stage
from redismem.errors import InvalidInput
from redismem.packing import LEAST_LONG, PASSED_OVER, Packer
from redismem.rendering import rendered, templated
from redismem.types import Hit, Memory

DAY = datetime(2023, 5, 8, 12, tzinfo=UTC)
#: tokens of "- 8 May 2023:" and of a heading "## M", by words
DATE, HEAD = 4, 2


class Words:
    """Counts words, and how often it is asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, texts: Sequence[str]) -> list[int]:
        self.calls += 1
        return [len(text.split()) for text in texts]


def memory(name: str, text: str = "", **fields: Any) -> Memory:
    given: dict[str, Any] = {
        "id": name,
        "text": text or name,
        "memory_type": "message",
        "topics": [],
        "entities": [],
        "created_at": DAY,
        "updated_at": DAY,
        "importance": 0.5,
        "confidence": 1.0,
        "pinned": False,
        "metadata": {},
        "version": 1,
        "embedded": True,
    }
    return (Hit if "score" in fields else Memory)(**given | fields)


def sized(name: str, words: int) -> Memory:
    """A memory whose line has so many words."""
    return memory(name, " ".join([name] * (words - DATE)))


def opened(stage: int = 1, max_tokens: int = 4_000, template: str | None = None) -> Packer:
    # with one stage, its bound is what it may be
    packer = Packer(Words(), max_tokens=max_tokens, stages=1 if max_tokens < 500 else 4, template=template)
    packer.begin(stage)
    return packer


def shown(stage: Stage) -> list[list[str]]:
    return [[one.id for one in block.memories] for block in stage.blocks]


def test_a_stage_says_what_it_shows_and_what_that_costs() -> None:
    packer = opened()
    assert packer.add_text("profile", "Profile", "Name: Mara", ["x"], "derived")
    assert packer.add_memories("pinned", "M", [memory("a"), memory("b")], "l1", why={"b": "pinned"}) == 2
    stage = packer.end(1.5)
    profile, pinned = stage.blocks
    assert (profile.text, profile.memory_ids, profile.tokens) == ("Name: Mara", ["x"], 4)
    assert (pinned.source, pinned.tokens) == ("l1", HEAD + 2 * (DATE + 1))
    assert [one.why for one in pinned.memories] == [None, "pinned"]
    assert (stage.stage, stage.at_ms, stage.tokens, stage.text) == (1, 1.5, 16, rendered(stage.blocks))
    assert (stage.partial, stage.skipped, stage.reason) == (False, [], None)


def test_a_memory_keeps_what_its_reader_needs() -> None:
    packer = opened()
    happened = datetime(2020, 1, 2, tzinfo=UTC)
    packer.add_memories(
        "pinned",
        "M",
        [memory("a", "One\ntwo", score=0.7, session_id="s", event_date=happened), memory("b")],
        "l3",
    )
    one, other = packer.end(0).blocks[0].memories
    assert (one.text, one.at, one.score, one.session_id) == ("One\ntwo", happened, 0.7, "s")
    assert (other.at, other.score, other.memory_type) == (DAY, None, "message")


def test_a_stage_with_a_reason_is_partial() -> None:
    stage = opened().end(3, skipped=["topics"], reason="deadline")
    assert (stage.partial, stage.skipped, stage.reason) == (True, ["topics"], "deadline")
    assert (stage.text, stage.blocks, stage.tokens) == ("", [], 0)


@pytest.mark.parametrize("max_tokens", [300, 900, 4_000])
def test_every_stage_ends_at_its_bound_and_uses_what_was_left(max_tokens: int) -> None:
    packer = Packer(Words(), max_tokens=max_tokens)
    for stage, most in STAGE_TOKENS.items():
        packer.begin(stage)
        bound = most * max_tokens // STAGE_TOKENS[4]
        left = bound - packer.tokens_used
        assert packer.room == left
        # the first stage leaves a fifth of its tokens
        names = [f"{stage}-{number}" for number in range(400)]
        packer.add_memories(
            "deep",
            "M",
            [sized(name, 10) for name in names],
            "l3",
            tokens=4 * bound // 5 if stage == 1 else None,
        )
        used = packer.end(0).tokens
        assert used == packer.tokens_used
        assert used <= bound
        if stage > 1 and left:
            assert used > bound - 10
        assert packer.room == 0


def test_no_memory_is_shown_twice() -> None:
    packer = opened()
    assert packer.add_memories("pinned", "M", [memory("a"), memory("a"), memory("b")], "l1") == 2
    assert packer.add_memories("pinned", "N", [memory("b"), memory("c")], "l1") == 1
    packer.end(0)
    packer.begin(2)
    assert packer.add_memories("matches", "M", [memory("c"), memory("a")], "l1") == 0
    assert packer.end(0).blocks == []
    assert packer.ids() == {"a", "b", "c"}


def test_what_a_text_was_made_from_may_still_be_shown() -> None:
    packer = opened()
    packer.add_text("session", "S", "We met.", ["a"], "derived")
    assert packer.add_memories("pinned", "M", [memory("a"), memory("b")], "l1") == 2
    assert packer.ids() == {"a", "b"}
    packer.drop({"b"})
    assert packer.stage_ids() == {"a"}
    packer.end(0)
    packer.begin(2)
    assert packer.stage_ids() == set()


def test_the_same_part_and_title_again_extends_the_block() -> None:
    packer = opened()
    packer.add_memories("pinned", "M", [memory("a")], "l1")
    packer.add_memories("pinned", "Other", [memory("b")], "l1")
    packer.add_memories("pinned", "M", [memory("c")], "l1")
    packer.add_text("pinned", "M", "A text.", [], "derived")
    packer.add_memories("pinned", "M", [memory("d")], "l1")
    stage = packer.end(0)
    assert shown(stage) == [["a", "c", "d"], ["b"], []]
    assert stage.tokens == sum(block.tokens for block in stage.blocks) == len(stage.text.split())
    packer.begin(2)
    packer.add_memories("pinned", "M", [memory("e")], "l1")
    assert shown(packer.end(0)) == [["e"]]


def test_a_memory_that_does_not_fit_is_passed_over_for_a_smaller_one() -> None:
    packer = opened(max_tokens=HEAD + 30)
    given = [sized("a", 12), sized("b", 20), sized("c", 15), sized("d", 6), sized("e", 5)]
    assert packer.add_memories("pinned", "M", given, "l1") == 2
    assert shown(packer.end(0)) == [["a", "c"]]


def test_after_so_many_that_do_not_fit_no_more_are_looked_at() -> None:
    for missed, expected in ((PASSED_OVER, 1), (PASSED_OVER + 1, 0)):
        packer = opened(max_tokens=HEAD + 10)
        given = [*(sized(f"long{number}", 30) for number in range(missed)), sized("a", 6)]
        assert packer.add_memories("pinned", "M", given, "l1") == expected


def test_an_empty_block_is_not_kept() -> None:
    packer = opened(max_tokens=HEAD + 5)
    assert packer.add_memories("pinned", "M", [sized("a", 6)], "l1") == 0
    assert packer.add_memories("pinned", "M", [], "l1") == 0
    assert (packer.tokens_used, packer.end(0).blocks) == (0, [])


def test_a_block_is_bounded_by_count_and_by_tokens() -> None:
    packer = opened()
    many = [sized(f"m{number}", 10) for number in range(20)]
    assert packer.add_memories("pinned", "M", many, "l1", most=3) == 3
    assert packer.add_memories("pinned", "M", many, "l1", tokens=HEAD + 59) == 2
    assert packer.add_memories("pinned", "N", many, "l1", tokens=HEAD + 39) == 3
    assert packer.end(0).tokens == 2 * HEAD + 80


def test_counting_is_batched() -> None:
    words = Words()
    packer = Packer(words, max_tokens=4_000)
    packer.begin(4)
    packer.add_memories("deep", "M", [memory(f"m{number}") for number in range(50)], "l3")
    packer.add_text("profile", "P", "One. Two.", [], "derived")
    assert words.calls == 2


def test_a_long_memory_is_cut_at_the_end_of_a_sentence() -> None:
    third = STAGE_TOKENS[1] // 3
    said = " ".join(f"This is sentence {number} of many." for number in range(100))
    packer = opened()
    assert packer.add_memories("pinned", "M", [memory("a", said)], "l1") == 1
    text = packer.end(0).blocks[0].memories[0].text
    assert text.endswith("of many. \u2026")
    assert said.startswith(text.removesuffix(" \u2026"))
    assert third // 2 < len(text.split()) + DATE <= third
    assert packer.tokens_used == HEAD + DATE + len(text.split())


def test_a_long_memory_without_sentences_is_cut_at_the_end_of_a_word() -> None:
    said = " ".join(f"word{number}" for number in range(3_000))
    packer = opened()
    packer.add_memories("pinned", "M", [memory("a", said)], "l1")
    text = packer.end(0).blocks[0].memories[0].text.removesuffix(" \u2026")
    assert said.startswith(text + " ")
    assert len(text) > 100


def test_a_long_memory_in_a_script_without_blanks_is_cut_between_characters() -> None:
    packer = Packer(lambda texts: [len(text) for text in texts], max_tokens=4_000)
    packer.begin(1)
    assert packer.add_memories("pinned", "M", [memory("a", "\u6211" * 5_000)], "l1") == 1
    text = packer.end(0).blocks[0].memories[0].text
    assert set(text.removesuffix(" \u2026")) == {"\u6211"}
    assert packer.tokens_used <= STAGE_TOKENS[1] // 3 + len("## M")


def test_a_memory_is_not_cut_into_what_is_left() -> None:
    # its first sentence would fit, and fill half of a third
    long = memory("long", "fine " * 90 + "end. " + "word " * 500)
    third = STAGE_TOKENS[1] // 3
    for left, expected in ((third, ["a", "b", "c", "long"]), (third - 1, ["a", "b", "c", "d"])):
        packer = opened()
        sizes = {"a": 160, "b": 160, "c": STAGE_TOKENS[1] - HEAD - 320 - left}
        packer.add_memories("pinned", "M", [sized(*item) for item in sizes.items()], "l1")
        assert packer.room == left
        packer.add_memories("pinned", "M", [long, sized("d", 90)], "l1")
        assert shown(packer.end(0)) == [expected]


def test_a_block_with_a_bound_shows_a_long_memory_shortened() -> None:
    packer = opened(2)
    assert packer.add_memories("matches", "M", [sized("a", 350)], "l1", tokens=300) == 1
    assert 100 < packer.tokens_used <= 150 + HEAD


def test_under_a_small_bound_a_short_memory_is_not_cut() -> None:
    packer = opened(max_tokens=100)
    assert packer.add_memories("pinned", "M", [sized("a", LEAST_LONG)], "l1") == 1
    assert "\u2026" not in packer.end(0).text


def test_a_text_is_cut_at_the_end_of_a_line_or_sentence() -> None:
    text = "Known:\n- boats\n- tea\nHe lives in St. Ives. Aged 3.5 years. His cat sleeps."
    cuts = []
    for most in range(20):
        packer = opened()
        added = packer.add_text("profile", "P", text, ["x"], "derived", most=most)
        stage = packer.end(0)
        assert added == bool(stage.blocks)
        assert stage.tokens <= most
        cuts += [block.text for block in stage.blocks]
    assert list(dict.fromkeys(cuts)) == [
        "Known:\n- boats",
        "Known:\n- boats\n- tea",
        "Known:\n- boats\n- tea\nHe lives in St. Ives.",
        "Known:\n- boats\n- tea\nHe lives in St. Ives. Aged 3.5 years.",
        text,
    ]


def test_a_text_is_not_cut_behind_the_number_of_an_item() -> None:
    packer = opened()
    packer.add_text("profile", "P", "1. Boats.\n2. Tea", [], "derived", most=HEAD + 3)
    assert packer.end(0).blocks[0].text == "1. Boats."
    assert not opened().add_text("profile", "P", "1. Boats and tea", [], "derived", most=HEAD + 2)


def test_a_text_of_which_no_sentence_fits_leaves_no_trace() -> None:
    packer = opened(max_tokens=8)
    assert not packer.add_text("profile", "P", "One two three four five six seven. Eight.", ["x"], "derived")
    assert not packer.add_text("profile", "P", " \n ", ["x"], "derived")
    assert (packer.tokens_used, packer.stage_ids(), packer.end(0).blocks) == (0, set(), [])


def test_an_escaped_line_is_counted_as_it_is_shown() -> None:
    packer = Packer(lambda texts: [len(text) for text in texts], max_tokens=4_000)
    packer.begin(1)
    packer.add_text("profile", "P", "# a\r\n# b", [], "derived")
    stage = packer.end(0)
    assert stage.text == "## P\n\\# a\n\\# b"
    assert stage.tokens == len("## P") + 2 * len("\\# a")
    assert stage.blocks[0].text == "# a\n# b"


def test_nothing_is_added_where_no_stage_is_open() -> None:
    packer = Packer(Words(), max_tokens=4_000)
    assert packer.room == 0
    assert packer.add_memories("pinned", "M", [memory("a")], "l1") == 0
    assert not packer.add_text("profile", "P", "A.", [], "derived")


def test_what_is_dropped_frees_its_tokens_and_takes_texts_along() -> None:
    packer = opened()
    packer.add_text("profile", "P", "From a.", ["a"], "derived")
    packer.add_text("session", "S", "From c.", ["c"], "derived")
    packer.add_memories("pinned", "M", [memory("a"), memory("b")], "l1")
    packer.add_memories("pinned", "N", [memory("d")], "l1")
    packer.drop({"a", "d", "unknown"})
    assert packer.ids() == {"b"}
    assert packer.stage_ids() == {"b", "c"}
    stage = packer.end(0)
    assert [block.title for block in stage.blocks] == ["S", "M"]
    assert shown(stage) == [[], ["b"]]
    assert stage.tokens == len(stage.text.split())


def test_what_was_dropped_does_not_come_back() -> None:
    packer = opened()
    packer.drop({"a"})
    assert packer.add_memories("pinned", "M", [memory("a"), memory("b")], "l1") == 1
    assert not packer.add_text("profile", "P", "From a.", ["a"], "derived")
    packer.end(0)
    packer.begin(2)
    assert packer.add_memories("matches", "M", [memory("a")], "l1") == 0


def test_an_ended_stage_stays_as_it_was_sent() -> None:
    packer = opened()
    packer.add_memories("pinned", "M", [memory("a")], "l1")
    stage = packer.end(0)
    packer.begin(2)
    packer.drop({"a"})
    packer.replace({"a": memory("a", "Other.")})
    assert shown(stage) == [["a"]]
    assert packer.ids() == {"a"}
    assert packer.tokens_used == stage.tokens


def test_what_is_replaced_says_what_it_says_now_in_its_place() -> None:
    packer = opened()
    packer.add_text("profile", "P", "From x.", ["x"], "derived")
    packer.add_text("session", "S", "From b.", ["b"], "derived")
    old = [memory("a", score=0.9), memory("b", score=0.8), memory("c", score=0.7)]
    packer.add_memories("pinned", "M", old, "l1", why={"b": "pinned"})
    packer.replace({"b": memory("b", "It is new now."), "elsewhere": memory("elsewhere")})
    stage = packer.end(0)
    assert [block.title for block in stage.blocks] == ["P", "M"]
    assert shown(stage)[1] == ["a", "b", "c"]
    one = stage.blocks[1].memories[1]
    assert (one.text, one.score, one.why) == ("It is new now.", 0.8, "pinned")
    assert stage.tokens == len(stage.text.split())
    assert stage.tokens == sum(block.tokens for block in stage.blocks)


def test_what_is_replaced_and_no_longer_fits_goes() -> None:
    packer = opened(max_tokens=HEAD + 40)
    packer.add_memories("pinned", "M", [sized("a", 10), sized("b", 10), sized("c", 10)], "l1")
    packer.replace({"a": sized("a", 15), "b": sized("b", 26), "c": sized("c", 5)})
    stage = packer.end(0)
    assert shown(stage) == [["a", "c"]]
    assert stage.tokens == HEAD + 20
    assert packer.ids() == {"a", "c"}


def test_a_replaced_memory_that_was_the_only_one_takes_its_heading_along() -> None:
    packer = opened(max_tokens=HEAD + 10)
    packer.add_memories("pinned", "M", [sized("a", 10)], "l1")
    packer.replace({"a": sized("a", 11)})
    assert (packer.tokens_used, packer.ids(), packer.end(0).blocks) == (0, set(), [])


def test_a_template_is_paid_for_first_and_a_part_shown_twice_twice() -> None:
    template = "You know: {context} Mind {memories} always."
    packer = opened(max_tokens=60, template=template)
    assert packer.tokens_used == 4
    packer.add_text("profile", "P", "Name: Mara", [], "derived")
    packer.add_memories("pinned", "M", [sized(f"m{number}", 10) for number in range(5)], "l1")
    stage = packer.end(0)
    assert stage.tokens == 4 + 4 + 2 * (HEAD + 20)
    assert len(templated(template, [stage]).split()) == stage.tokens
    assert packer.room == 0


def test_a_template_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(InvalidInput, match="alone has 50 tokens") as caught:
        Packer(Words(), max_tokens=50, template="word " * 50)
    assert caught.value.field == "template"
    with pytest.raises(InvalidInput, match=r"\{unknown\}"):
        Packer(Words(), max_tokens=50, template="{unknown}")


def test_a_stage_that_the_template_fills_alone_stays_empty() -> None:
    packer = opened(template="word " * 600)
    assert packer.room == 0
    assert packer.add_memories("pinned", "M", [memory("a")], "l1") == 0
    packer.end(0)
    packer.begin(2)
    assert packer.room == STAGE_TOKENS[2] - 600
    assert packer.add_memories("matches", "M", [memory("a")], "l1") == 1
