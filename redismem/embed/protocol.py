"""What an embedder is: the contract that its implementations share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]  # (n, dim), rows of L2 norm 1

# Two digits, the first six letters of a word (four of a capitalised one: names are rare), four further
# ones, or anything else that is not blank.
_TOKEN = re.compile(r"\d{1,2}|(?<![A-Za-z])(?:[A-Z][a-z]{0,3}|[a-z]{1,6})|[A-Za-z]{1,4}|\S")
_BEYOND_BMP = re.compile("[\U00010000-\U0010ffff]")  # emoji: byte-level tokenizers need about three for each


class Embedder(Protocol):
    """Turns texts into unit vectors.

    Attributes:
        name: identifies model and variant; stored with every vector, so it changes when vectors do.
        dim: length of a vector.
    """

    name: str
    dim: int

    async def embed(self, texts: list[str], *, urgent: bool = True) -> Vectors:
        """Return one unit row per text, in order; shape (len(texts), dim), float32.

        Args:
            texts: any strings, also empty ones.
            urgent: a query that someone waits for; bulk work (False) lets it pass.

        Raises:
            EmbedderUnavailable: no answer now (endpoint away, deadline passed, closed).
        """
        ...

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return the tokens of each text: special tokens left out, not truncated.

        Where the model's tokenizer is not at hand it is an estimate: see `estimated_tokens`.

        Cost: O(length), at once, in the calling thread; about 1 ms for 1 kB.
        """
        ...

    async def close(self) -> None:
        """Finish what was accepted, then free threads and connections."""
        ...


def estimated_tokens(text: str) -> int:
    """Return about as many tokens as a model's tokenizer finds in `text`, for English rather too many.

    Checked on 3,150 turns and notes in English (8 to 60 tokens) against WordPiece of all-MiniLM-L6-v2 and
    the byte-pair encodings cl100k and o200k: below the true count for 2 % of the texts, 13, 16 and 20 %
    above it on average. Of passages of about 280 tokens 1 in 400 was below, by 11 %, the others never.
    Other Latin scripts come out up to a third too low.

    Cost: O(length), 0.1 s for 1 MB.
    """
    return len(_TOKEN.findall(text)) + 2 * len(_BEYOND_BMP.findall(text))
