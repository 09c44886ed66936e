"""What every handler of a job works with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from redismem.client import Argument, Client
from redismem.embed import Embedder
from redismem.index import Indexes
from redismem.jobs import Jobs
from redismem.lualib import Functions
from redismem.material import Material
from redismem.reembed import Reembedder
from redismem.settings import Settings
from redismem.worker.llm import LanguageModel
from redismem.worker.materials import Library
from redismem.worker.pool import Pool

#: a handler reads again when what it made something from changed meanwhile, so many times; then its job fails
#: and is tried later
MOST_READS = 5


class Overtaken(Exception):
    """What a job made something from kept changing: it is tried again later."""


def sourced(
    sources: Sequence[str], read: Iterable[Material], fields: Mapping[str, Argument]
) -> list[Argument]:
    """Return what lua/derive.lua stores: a count, ids and digests of the sources, then the fields."""
    digests = {item.id: item.digest for item in read}
    flat: list[Argument] = [len(sources)]
    for one in sources:
        flat += [one, digests[one]]
    for name, value in fields.items():
        flat += [name, value]
    told = " ".join(digests[one] for one in sources)
    return [*flat, "sources", msgspec.json.encode(sources), "digests", told]


@dataclass(frozen=True, kw_only=True)
class Tools:
    """The parts of a store, for handlers."""

    client: Client
    functions: Functions
    embedder: Embedder
    indexes: Indexes
    reembedder: Reembedder
    jobs: Jobs
    library: Library
    pool: Pool
    settings: Settings
    language_model: LanguageModel | None = None
    clock: Callable[[], float] = time.time

    def now_ms(self) -> int:
        """Return epoch milliseconds, as our Functions take them."""
        return int(self.clock() * 1000)
