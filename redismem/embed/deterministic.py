"""The embedder of the tests: no model, no meaning, the same vector in every process.

Feature hashing (Weinberger et al. 2009): each lower-case word, and with a smaller weight each of its
letter trigrams, adds +1 or -1 to one of `dim` places. Texts that share words or stems are near;
unrelated ones have a cosine of 0 +- 1/sqrt(dim), which is 0.05 at 384.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from redismem.embed.protocol import Vectors, estimated_tokens

_TRIGRAM_WEIGHT = 0.3  # a third of the squared length of a word of 6 letters: stems count, words decide


class DeterministicEmbedder:
    """Hashes words into unit vectors; texts without a word all get the same one."""

    def __init__(self, dim: int = 384) -> None:
        self.name = f"deterministic-{dim}"
        self.dim = dim

    async def embed(self, texts: list[str], *, urgent: bool = True) -> Vectors:  # noqa: ARG002  # the contract's
        """Return one row per text, at once; see `Embedder.embed`."""
        vectors = np.zeros((len(texts), self.dim), np.float32)
        for row, text in zip(vectors, texts, strict=True):
            row[:] = self._vector(text)
        return vectors

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Estimate the tokens of each text; see `Embedder.count_tokens`."""
        return [estimated_tokens(text) for text in texts]

    async def close(self) -> None:
        """Do nothing: there is nothing to free."""

    def _vector(self, text: str) -> NDArray[np.float64]:
        vector = np.zeros(self.dim)
        for word in re.findall(r"\w+", text.lower()):
            self._add(vector, word, 1.0)
            framed = f"<{word}>"
            for start in range(len(framed) - 2):
                self._add(vector, "3:" + framed[start : start + 3], _TRIGRAM_WEIGHT)
        norm = float(np.linalg.norm(vector))
        if norm == 0:  # no word, or collisions of opposite sign that cancel
            vector[0] = norm = 1.0
        return vector / norm

    def _add(self, vector: NDArray[np.float64], feature: str, weight: float) -> None:
        digest = blake2b(feature.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        number = int.from_bytes(digest, "big")
        vector[(number >> 1) % self.dim] += weight if number & 1 else -weight
