"""Counts of tokens that are remembered."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from redismem import tokens
from redismem.embed.deterministic import DeterministicEmbedder
from redismem.tokens import TokenCounts


class Noted(DeterministicEmbedder):
    """Notes what it is asked to count."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[list[str]] = []

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        self.asked.append(list(texts))
        return super().count_tokens(texts)


def test_counts_are_the_embedder_s_in_the_order_of_the_texts() -> None:
    embedder = Noted()
    texts = ["one two three", "", "one", "a\nb", "one two three", "\U0001f600 smile", "\ud800"]
    assert TokenCounts(embedder)(texts) == DeterministicEmbedder().count_tokens(texts)
    assert embedder.asked == [list(dict.fromkeys(texts))]


def test_a_known_text_is_not_counted_again() -> None:
    embedder = Noted()
    counts = TokenCounts(embedder)
    first = counts(["a b", "c"])
    assert counts(["c", "a b", "c"]) == [first[1], first[0], first[1]]
    assert counts([]) == []
    assert len(embedder.asked) == 1
    assert counts(["c", "new one"]) == [first[1], 2]
    assert embedder.asked[1:] == [["new one"]]


def test_texts_that_differ_in_one_character_are_counted_apart() -> None:
    embedder = Noted()
    counts = TokenCounts(embedder)
    counts(["tea", "Tea", "tea ", "te\u0301a", "t\u00e9a"])
    assert [len(texts) for texts in embedder.asked] == [5]


def test_the_oldest_counts_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MOST_COUNTS", 3)
    embedder = Noted()
    counts = TokenCounts(embedder)
    assert counts([f"number {i}" for i in range(5)]) == [2] * 5  # more at once than are kept
    assert counts(["number 4", "number 3", "number 2"]) == [2] * 3
    assert len(embedder.asked) == 1
    counts(["number 1"])
    counts(["number 2"])
    assert embedder.asked[1:] == [["number 1"], ["number 2"]]
