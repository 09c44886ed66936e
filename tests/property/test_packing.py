"""Packing: whatever is added, dropped and replaced, the text keeps its bounds and shows nothing twice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from string import ascii_lowercase, digits, punctuation
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from redismem.conversation import STAGE_OF, STAGE_TOKENS, Part, Stage
from redismem.embed.protocol import estimated_tokens
from redismem.errors import InvalidInput
from redismem.packing import Packer
from redismem.rendering import own_tokens, rendered, templated
from redismem.types import Memory

Count = Callable[[Sequence[str]], list[int]]

DAY = datetime(2023, 5, 8, 12, tzinfo=UTC)
LONG = 6_000


def word_piece() -> Count:
    """A real WordPiece, whose words are whole, of syllables, or of letters."""
    pieces = ["[UNK]", *"the moved boats tea knows may".split(), *ascii_lowercase, *digits, *punctuation, "…"]
    pieces += [f"##{piece}" for piece in [*"ing ed mo ats kno".split(), *ascii_lowercase, *digits]]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = BertNormalizer()
    tokenizer.pre_tokenizer = BertPreTokenizer()
    return lambda texts: [len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts]


COUNTERS: dict[str, Count] = {
    "estimate": lambda texts: [estimated_tokens(text) for text in texts],
    "word_piece": word_piece(),
}

WORDS = st.sampled_from(
    [
        *"the moved boats tea knowing A Abcdefghij 2023 3.5 co-op".split(),
        *(
            "I know.",
            "Dr. Who?",
            "Yes!\n",
            "# Heading\n",
            "```\n",
            "{profile}",
            "\u2028## System\u2029",
            "...",
        ),
        *("\u6211\u5011\u53bb\u3002", "\U0001f375", "x" * 130, "e\u0301\u0301", " \t ", "\r\n---\r\n"),
    ]
)
TEXTS = st.builds(
    lambda words, blank, times: (blank.join(words) * times)[:LONG] + "z",
    st.lists(WORDS, min_size=1, max_size=12),
    st.sampled_from([" ", "", ". "]),
    st.sampled_from([1, 1, 1, 8, 100]),
)
IDS = st.sampled_from([f"m{number}" for number in range(40)])
MEMORIES = st.lists(st.tuples(IDS, TEXTS), max_size=25)
TEMPLATES = st.one_of(
    st.none(),
    st.lists(
        st.sampled_from(
            [
                *("{profile}", "{session}", "{memories}", "{topics}", "{entities}", "{context}", "{{", "}}"),
                *("Known: ", "abcdefghijkl", "the", "ING", " ", "\n", ".", "\U0001f375"),
            ]
        ),
        max_size=8,
    ).map("".join),
)


@dataclass(frozen=True)
class Add:
    memories: list[tuple[str, str]]
    title: str
    most: int | None
    tokens: int | None


@dataclass(frozen=True)
class Tell:
    text: str
    sources: list[str]
    most: int | None


@dataclass(frozen=True)
class Drop:
    ids: set[str]


@dataclass(frozen=True)
class Replace:
    memories: dict[str, str]


STEPS = st.one_of(
    st.builds(
        Add,
        MEMORIES,
        st.sampled_from(["One", "# Two\n"]),
        st.one_of(st.none(), st.integers(0, 9)),
        st.one_of(st.none(), st.integers(0, 300)),
    ),
    st.builds(Tell, TEXTS, st.lists(IDS, max_size=3), st.one_of(st.none(), st.integers(0, 300))),
    st.builds(Drop, st.sets(IDS, max_size=4)),
    st.builds(Replace, st.dictionaries(IDS, TEXTS, max_size=4)),
)
RUNS = st.lists(st.lists(st.tuples(STEPS, st.integers(0, 2)), max_size=6), min_size=4, max_size=4)


def memory(id_: str, text: str) -> Memory:
    at = DAY + timedelta(days=len(text))
    fields: dict[str, Any] = {"memory_type": "message", "topics": [], "entities": [], "metadata": {}}
    fields |= {"importance": 0.5, "confidence": 1.0, "pinned": False, "version": 1, "embedded": True}
    return Memory(id=id_, text=text, created_at=at, updated_at=at, **fields)


class Checked:
    """A packer with what must hold after each of its steps."""

    def __init__(self, packer: Packer) -> None:
        self.packer = packer
        self.stages: list[Stage] = []
        self.dropped = set[str]()
        #: id -> what it says by the latest word of the caller
        self.texts: dict[str, str] = {}
        #: (part, title) -> ids in the order in which they were first offered to the open stage
        self.offered: dict[tuple[Part, str], list[str]] = defaultdict(list)

    def run(self, stage: int, steps: Sequence[tuple[object, int]]) -> None:
        parts = [part for part, first in STAGE_OF.items() if first == stage]
        self.packer.begin(stage)
        self.offered.clear()
        for step, place in steps:
            before, room = self.packer.ids(), self.packer.room
            self._step(step, parts[place % len(parts)])
            if isinstance(step, Drop | Replace):
                assert self.packer.ids() <= before
            else:
                assert self.packer.room <= room
                assert self.packer.ids() >= before
        stage_ids = self.packer.stage_ids()
        ended = self.packer.end(1.0)
        shown = {one.id for block in ended.blocks for one in block.memories}
        assert stage_ids == shown.union(*(block.memory_ids for block in ended.blocks))
        assert not self.dropped & stage_ids
        self._check_order(ended)
        self.stages.append(ended)

    def _step(self, step: object, part: Part) -> None:
        match step:
            case Add():
                given = [(id_, text) for id_, text in step.memories if id_ not in self.packer.ids()]
                count = self.packer.add_memories(
                    part,
                    step.title,
                    [memory(*pair) for pair in step.memories],
                    "l3",
                    most=step.most,
                    tokens=step.tokens,
                )
                added = [pair for pair in dict(given).items() if pair[0] in self.packer.ids()]
                assert count == len(added) <= (len(given) if step.most is None else step.most)
                self.texts |= dict(added)
                self.offered[part, step.title] += [id_ for id_, _ in added]
            case Tell():
                self.packer.add_text(part, "Text", step.text, step.sources, "derived", most=step.most)
            case Drop():
                self.packer.drop(step.ids)
                self.dropped |= step.ids
            case Replace():
                open_ids = self.packer.ids() - {id_ for stage in self.stages for id_ in ids_of(stage)}
                self.packer.replace({id_: memory(id_, text) for id_, text in step.memories.items()})
                self.texts |= {id_: text for id_, text in step.memories.items() if id_ in open_ids}

    def _check_order(self, stage: Stage) -> None:
        for block in stage.blocks:
            assert (block.text is None) != (not block.memories)
            rank = {id_: place for place, id_ in enumerate(self.offered[block.part, block.title])}
            places = [rank[one.id] for one in block.memories]
            assert places == sorted(places)
            for one in block.memories:
                assert one.at == DAY + timedelta(days=len(self.texts[one.id]))
                whole = self.texts[one.id].strip()
                cut = one.text.removesuffix(" \u2026")
                assert one.text.strip() == whole or whole.startswith(cut)


def ids_of(stage: Stage) -> list[str]:
    return [one.id for block in stage.blocks for one in block.memories]


@pytest.mark.parametrize("counter", COUNTERS)
@given(RUNS, TEMPLATES, st.one_of(st.integers(1, 400), st.just(4_000)))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_context_keeps_its_bounds_and_shows_nothing_twice(
    counter: str, runs: list[list[tuple[object, int]]], template: str | None, max_tokens: int
) -> None:
    count = COUNTERS[counter]
    try:
        packer = Packer(count, max_tokens=max_tokens, template=template)
    except InvalidInput:
        assert template is not None
        assume(own_tokens(template, count) < max_tokens)
        raise
    checked, own = Checked(packer), own_tokens(template, count) if template is not None else 0
    for stage, steps in enumerate(runs, 1):
        checked.run(stage, steps)
        stages = checked.stages
        bound = max(int(STAGE_TOKENS[stage] * max_tokens / STAGE_TOKENS[4]), own)
        whole = "\n\n".join(one.text for one in stages if one.text)
        assert count([whole])[0] <= stages[-1].tokens <= bound
        assert all(one.text == rendered(one.blocks) for one in stages)
        if template is None:
            assert stages[-1].tokens == sum(block.tokens for one in stages for block in one.blocks)
        else:
            assert count([templated(template, stages)])[0] <= stages[-1].tokens
        # each block opens with its heading, and nothing else reads as one
        blocks = [block for one in stages for block in one.blocks]
        assert sum(line.startswith("#") for line in whole.splitlines()) == len(blocks)
    shown = [id_ for stage in checked.stages for id_ in ids_of(stage)]
    assert len(shown) == len(set(shown))
    assert set(shown) == packer.ids()
