"""Puts a worker together."""

from __future__ import annotations

from redismem.coherence import Coherence
from redismem.embed import Embedder
from redismem.index import Indexes
from redismem.jobs import Jobs
from redismem.lualib import Functions
from redismem.reembed import Reembedder
from redismem.settings import Settings
from redismem.worker.foreign import ForeignWrites
from redismem.worker.llm import LanguageModel
from redismem.worker.materials import Library
from redismem.worker.pool import Pool
from redismem.worker.tools import Tools
from redismem.worker.worker import Worker


def assembled_worker(
    settings: Settings,
    functions: Functions,
    embedder: Embedder,
    indexes: Indexes,
    jobs: Jobs,
    coherence: Coherence,
) -> Worker:
    """Return a worker of a store; it does nothing until it is run."""
    model = None
    if settings.llm_url:
        model = LanguageModel(settings.llm_url, settings.llm_model, settings.llm_key, settings.llm_timeout_s)
    tools = Tools(
        client=functions.client,
        functions=functions,
        embedder=embedder,
        indexes=indexes,
        reembedder=Reembedder(functions.client, functions, embedder),
        jobs=jobs,
        library=Library(functions.client),
        pool=Pool(),
        settings=settings,
        language_model=model,
    )
    return Worker(tools, ForeignWrites(functions, indexes, jobs, coherence))
