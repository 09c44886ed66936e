"""What every handler of a job works with."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from redismem.client import Client
from redismem.embed import Embedder
from redismem.index import Indexes
from redismem.jobs import Jobs
from redismem.lualib import Functions
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
