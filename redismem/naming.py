"""The only place that keeps the names that a user's memories have, and asks which of them a text mentions.

Names are looked up in the index and kept for a minute, so a new one is known a minute later at worst. A name
is only what is looked for: a memory that is gone is not found by it.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable

from redismem.client import Client
from redismem.entities import Entity, KnownNames, entities_of
from redismem.errors import StoreError
from redismem.keys import Owner
from redismem.query import unpacked_tags
from redismem.spacynames import SpacyNames

#: seconds names are kept, and users whose names are
KEPT_S, MOST_USERS = 60.0, 1_000

#: names of one user that are looked for
MOST_NAMES = 10_000

#: entities of a text
MOST_ENTITIES = 3

#: characters of a text that are looked at
_CHARS = 4_000


class NameBook:
    """The names of the users that this process talked about lately.

    Args:
        spacy: finds further names, in a thread of its own.
    """

    def __init__(
        self, client: Client, spacy: SpacyNames | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._client = client
        self._spacy = spacy
        self._clock = clock
        self._books: OrderedDict[str, tuple[float, KnownNames]] = OrderedDict()

    async def entities(self, owner: Owner, text: str) -> list[Entity]:
        """Return whom and what a text is about, known names first.

        Cost: none where the names are kept; else one round trip and 5 us a name. With spaCy milliseconds.
        """
        text = text[:_CHARS]
        names = await self._names(owner)
        also = await asyncio.to_thread(self._spacy.names, text) if self._spacy else ()
        return entities_of(text, names, also, MOST_ENTITIES)

    async def _names(self, owner: Owner) -> KnownNames:
        now_s = self._clock()
        kept_until_s, names = self._books.get(owner.tag, (0.0, None))
        if names is None or kept_until_s <= now_s:
            names = KnownNames(await self._read(owner))
            self._books[owner.tag] = now_s + KEPT_S, names
            if len(self._books) > MOST_USERS:
                self._books.popitem(last=False)
        self._books.move_to_end(owner.tag)
        return names

    async def _read(self, owner: Owner) -> list[str]:
        try:
            values = await self._client.execute("FT.TAGVALS", owner.index, "entities")
        except StoreError:  # no index: no memories, or none that can be found now
            return []
        return [name for raw in values[:MOST_NAMES] for name in unpacked_tags(raw.decode("utf-8", "replace"))]
