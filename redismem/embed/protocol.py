"""What an embedder is: the contract that its implementations share."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]  # (n, dim), rows of L2 norm 1


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

    async def close(self) -> None:
        """Finish what was accepted, then free threads and connections."""
        ...
