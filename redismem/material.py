"""What derived data is made from and consists of. Pure: no I/O, no clock.

Everything derived names its sources: ids of memories whose words it shows, or that a statement of it rests
on. When one of them is deleted or changes, what names it goes in the same step; so whoever derives
something must name at least one source for each thing it says.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha1

import numpy as np
from numpy.typing import NDArray

#: words of a topic's label that are shown
LABEL_WORDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """A memory, as far as anything is derived from it. Superseded memories are none."""

    id: str
    text: str
    #: of what it was read as: see `digest`
    digest: str = ""
    memory_type: str = "semantic"
    topics: tuple[str, ...] = ()
    entities: tuple[str, ...] = ()
    session_id: str | None = None
    importance: float = 0.5
    pinned: bool = False
    #: epoch s: when it happened, or was written where that is not known
    moment_s: float = 0.0
    #: epoch s: when it was written
    created_s: float = 0.0
    #: number of its topic; empty: uncategorized, or not looked at yet
    cluster: str = ""


@dataclass(frozen=True, slots=True)
class LabelWord:
    """A word that tells a topic from others, and up to three members that have it."""

    word: str
    witnesses: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Topic:
    """Memories that belong together."""

    #: stays with the topic from one clustering to the next
    number: int
    #: best first
    words: tuple[LabelWord, ...]
    #: unit mean of the members' vectors; shape (dim,)
    centroid: NDArray[np.float32]
    #: cosine with the centroid from which a new memory belongs
    reach: float
    #: ids
    members: tuple[str, ...]

    @property
    def label(self) -> str:
        """The first words, as they are shown."""
        return ", ".join(entry.word for entry in self.words[:LABEL_WORDS])


def digest(text: bytes, topics: bytes = b"", entities: bytes = b"", event_date: bytes = b"") -> str:
    """Return 16 characters that change with what a memory says; lua/parts/derived.lua makes the same.

    Args:
        topics, entities, event_date: as the hash stores them.
    """
    said = b"\x1f".join((text, topics, entities, event_date))
    return sha1(said, usedforsecurity=False).hexdigest()[:16]
