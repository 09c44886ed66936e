"""Counts tokens, and remembers the counts: the lines of one context come again in the next."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

from redismem.embed import Embedder

#: counts that are remembered, about 0.15 KB each
MOST_COUNTS = 50_000


class TokenCounts:
    """Counts tokens of texts. Holds digests, no texts."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self._known: OrderedDict[bytes, int] = OrderedDict()

    def __call__(self, texts: Sequence[str]) -> list[int]:
        """Return the tokens of each text. Cost: 1 us for a known one, 0.1 ms for 100 new characters."""
        keys = [blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).digest() for text in texts]
        known = self._known
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
        counts = {key: known[key] for key in keys if key in known}
        if new:
            counts.update(zip(new, self._embedder.count_tokens(list(new.values())), strict=True))
            for key in new:
                known[key] = counts[key]
            while len(known) > MOST_COUNTS:
                known.popitem(last=False)
        return [counts[key] for key in keys]
