"""The only place that remembers the vectors of queries: in L1, and in Redis for other processes.

A vector depends on its text and the embedder alone, so it never goes stale; it is forgotten to save space.
Memories' vectors are not kept here: they go with their memories.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from redismem.client import Argument
from redismem.codec import text_digest, vector_bytes
from redismem.embed import Embedder
from redismem.flight import Abandoned, Flight
from redismem.keys import embedding_key
from redismem.l1 import L1
from redismem.trace import waiting

#: seconds for which a time that was too short for an embedding is not tried again
_REFUSING_S = 1.0


class _Embedding(Flight[bytes]):
    """A text that is being embedded."""

    __slots__ = ("urgent",)

    def __init__(self, *, urgent: bool) -> None:
        super().__init__()
        self.urgent = urgent


class QueryVectors:
    """Makes and keeps FLOAT16 vectors of texts."""

    def __init__(self, embedder: Embedder, l1: L1, *, ttl_s: float) -> None:
        self._embedder = embedder
        self._l1 = l1
        self._ttl_s = ttl_s
        self._too_short_ms = 0.0
        self._refusing_until_s = 0.0
        self._given_up = 0
        self._flights: dict[str, _Embedding] = {}

    @property
    def under_way(self) -> int:
        """How many texts are being embedded now."""
        return len(self._flights)

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

    async def made(self, texts: list[str], *, urgent: bool = True) -> list[bytes]:
        """Return the vectors of texts, and keep them in L1.

        Those that nobody embeds yet are embedded together, each once; the others are waited for, unless
        whoever embeds them has less hurry.

        Args:
            urgent: see `Embedder.embed`.

        Raises:
            EmbedderUnavailable: the embedder cannot answer now.
        """
        found: dict[str, bytes] = {}
        while missing := [text for text in dict.fromkeys(texts) if text not in found]:
            under_way = ((text, self._flights.get(text)) for text in missing)
            joined = {text: flight for text, flight in under_way if flight and flight.urgent >= urgent}
            if new := [text for text in missing if text not in joined]:
                found.update(zip(new, await self._embedded(new, urgent=urgent), strict=True))
            for text, flight in joined.items():
                with suppress(Abandoned):
                    found[text] = await flight.join()
        return [found[text] for text in texts]

    async def _embedded(self, texts: list[str], *, urgent: bool) -> list[bytes]:
        flights = {text: _Embedding(urgent=urgent) for text in texts}
        self._flights |= flights
        try:
            vectors = await self._embedded_now(texts, urgent=urgent)
        except BaseException as exc:
            for flight in flights.values():
                flight.fail(exc)
            raise
        else:
            for text, vector in zip(texts, vectors, strict=True):
                flights[text].land(vector)
            return vectors
        finally:
            for text, flight in flights.items():
                if self._flights.get(text) is flight:
                    del self._flights[text]

    async def _embedded_now(self, texts: list[str], *, urgent: bool) -> list[bytes]:
        started_s = time.monotonic()
        try:
            with waiting("embed"):
                rows = await self._embedder.embed(texts, urgent=urgent)
        except asyncio.CancelledError:  # the caller gave up
            if not urgent:
                raise
            self._too_short_ms = max(self._too_short_ms, 1000 * (time.monotonic() - started_s))
            self._refusing_until_s = time.monotonic() + _REFUSING_S
            self._given_up += 1
            raise
        self._too_short_ms, self._given_up = 0.0, 0
        vectors = [vector_bytes(row) for row in rows]
        for text, vector in zip(texts, vectors, strict=True):
            self._keep(text, vector)
        return vectors

    def keep(self, text: str, vector: NDArray[np.float32]) -> None:
        """Keep the vector of a text that was embedded for something else; shape (dim,)."""
        self._keep(text, vector_bytes(vector))

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
