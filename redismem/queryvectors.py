"""The only place that remembers the vectors of queries: in L1, and in Redis for other processes.

A vector depends on its text and the embedder alone, so it never goes stale; it is forgotten to save space.
Memories' vectors are not kept here: they go with their memories.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from redismem.client import Argument
from redismem.codec import text_digest, vector_bytes
from redismem.embed import Embedder
from redismem.keys import embedding_key
from redismem.l1 import L1

#: seconds for which a time that was too short for an embedding is not tried again
_REFUSING_S = 1.0


class QueryVectors:
    """Makes and keeps FLOAT16 vectors of texts."""

    def __init__(self, embedder: Embedder, l1: L1, *, ttl_s: float) -> None:
        self._embedder = embedder
        self._l1 = l1
        self._ttl_s = ttl_s
        self._too_short_ms = 0.0
        self._refusing_until_s = 0.0
        self._given_up = 0

    def known(self, text: str) -> bytes:
        """Return the vector that L1 has; empty for none."""
        entry = self._l1.get("embedding", "", text, time.monotonic())
        if entry is None:
            return b""
        assert isinstance(entry.value, bytes)
        return entry.value

    def look_up(self, text: str) -> Sequence[Argument]:
        """Return the command whose reply `taken` reads."""
        return ("GET", self._key(text))

    def taken(self, text: str, raw: bytes | None) -> bytes:
        """Return a vector that Redis had, and keep it in L1; empty for none, or none of this embedder."""
        if not raw or len(raw) != 2 * self._embedder.dim:
            return b""
        self._keep(text, raw)
        return raw

    async def made(self, texts: list[str]) -> list[bytes]:
        """Return the vectors of texts, embedded together, and keep them in L1.

        Raises:
            EmbedderUnavailable: the embedder cannot answer now.
        """
        started_s = time.monotonic()
        try:
            rows = await self._embedder.embed(texts, urgent=True)
        except asyncio.CancelledError:  # the caller gave up
            self._too_short_ms = max(self._too_short_ms, 1000 * (time.monotonic() - started_s))
            self._refusing_until_s = time.monotonic() + _REFUSING_S
            self._given_up += 1
            raise
        self._too_short_ms, self._given_up = 0.0, 0
        vectors = [vector_bytes(row) for row in rows]
        for text, vector in zip(texts, vectors, strict=True):
            self._keep(text, vector)
        return vectors

    def has_time(self, left_ms: float) -> bool:
        """Return whether an embedding may be made in time: unless as much was just too short, twice running.

        One that is given up takes the cores from those that are not.
        """
        is_refusing = self._given_up > 1 and time.monotonic() < self._refusing_until_s
        return not is_refusing or left_ms > self._too_short_ms

    def store(self, text: str, vector: bytes) -> Sequence[Argument]:
        """Return the command that keeps a vector in Redis."""
        return ("SET", self._key(text), vector, "PX", int(self._ttl_s * 1000))

    def _key(self, text: str) -> str:
        return embedding_key(self._embedder.name, text_digest(text))

    def _keep(self, text: str, vector: bytes) -> None:
        size_bytes, now_s = len(vector) + len(text), time.monotonic()
        self._l1.put("embedding", text, vector, size_bytes=size_bytes, ttl_s=self._ttl_s, now_s=now_s)
