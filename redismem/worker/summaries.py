"""Makes summaries: of a topic, a day, week or month, a session, or of what is known of a person or thing."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta

import numpy as np

from redismem.client import Argument
from redismem.extract import Extract, Sentence, extracted, sentences, shortlist
from redismem.keys import Owner
from redismem.material import Material
from redismem.periods import bounds, names_of
from redismem.query import packed_tags, source_query, unpacked_tags
from redismem.views import BUDGETS
from redismem.worker.llm import NoSummary
from redismem.worker.materials import Materials
from redismem.worker.tools import MOST_READS, Overtaken, Tools, sourced

logger = logging.getLogger(__name__)

#: memories looked at for a summary: the newest
_MOST_MEMORIES = 2_000

#: memories whose sentences are compared, or that a language model is given
_SHORTLIST = 30

#: seconds a summary is kept when nobody makes it again
_KEPT_S = 30 * 86_400

EXTRACTIVE = "extractive"

_INSTRUCTIONS = {
    "topic": "Summarise what these notes about one topic of a user say.",
    "day": "Summarise what happened on that day.",
    "week": "Summarise what happened in that week.",
    "month": "Summarise what happened in that month.",
    "entity": "Summarise what is known about {name}.",
    "session": "Summarise what was said in this conversation, and what was left open.",
}


async def summary(tools: Tools, owner: Owner, kind: str, name: str) -> None:
    """Make one summary anew; without memories to make it from it goes.

    Args:
        name: a topic's number, a period as `periods` names it, an entity as a TAG field holds it, or the id
            of a session.
    """
    for _ in range(MOST_READS):
        read = await _sources(tools, owner, kind, name)
        made, method = await _made(tools, read, kind, name)
        if await _stored(tools, owner, f"{kind}:{name}", made, method, read):
            return
    raise Overtaken("the memories of this summary keep changing")


async def _sources(tools: Tools, owner: Owner, kind: str, name: str) -> Materials:
    ids = await tools.library.matching(owner, source_query(kind, name), _MOST_MEMORIES)
    read = await tools.library.read(owner, ids)
    return read.taken([i for i, item in enumerate(read.items) if _belongs(item, kind, name)])


def _belongs(item: Material, kind: str, name: str) -> bool:
    """Return whether a memory belongs to it as it was read: after it was found it may have changed."""
    if kind == "topic":
        return item.cluster == name
    if kind == "entity":
        return name in [packed_tags([one]) for one in item.entities]
    if kind == "session":
        return item.session_id == name
    first, end = bounds(kind, name)
    return first <= item.moment_s < end


async def _made(tools: Tools, read: Materials, kind: str, name: str) -> tuple[Extract, str]:
    if not read.items:
        return Extract("", (), 0), EXTRACTIVE
    # of many memories this takes half a second
    chosen = await tools.pool.run(shortlist, read.items, read.vectors, _SHORTLIST)
    listed = read.taken(chosen)
    budget, count = BUDGETS[kind], tools.embedder.count_tokens
    if tools.language_model is not None:
        order = sorted(listed.items, key=lambda item: item.moment_s)
        told = [f"{datetime.fromtimestamp(item.moment_s, UTC):%d %B %Y}: {item.text}" for item in order]
        what = _INSTRUCTIONS[kind].format(name=(unpacked_tags(name) or [name])[0])
        try:
            text = await tools.language_model.summary(what, told, budget, count)
        except NoSummary as exc:
            logger.info("a summary is extracted instead: %s", exc)
        else:
            ids = tuple(item.id for item in order)
            return Extract(text, ids, count([text])[0]), tools.language_model.name
    return await _extract(tools, listed, budget, dated=kind not in ("topic", "day")), EXTRACTIVE


async def _extract(tools: Tools, listed: Materials, budget: int, *, dated: bool) -> Extract:
    candidates: list[Sentence] = []
    rows, new = [], []
    for item, vector, digest in zip(listed.items, listed.vectors, listed.vector_digests, strict=True):
        parts = sentences(item)
        for part in parts:
            if len(parts) > 1 or not digest:  # a memory of one sentence has its vector
                new.append(len(candidates))
            candidates.append(part)
            rows.append(vector)
    if not candidates:
        return Extract("", (), 0)
    vectors = np.array(rows, np.float32)
    if new:
        vectors[new] = await tools.embedder.embed([candidates[i].text for i in new], urgent=False)
    return extracted(candidates, vectors, budget, tools.embedder.count_tokens, dated=dated)


async def _stored(tools: Tools, owner: Owner, name: str, made: Extract, method: str, read: Materials) -> bool:
    fields: dict[str, Argument] = {
        "text": made.text,
        "tokens": made.tokens,
        "method": method,
        "generated_at": repr(tools.clock()),
    }
    outcome = await tools.functions.call(
        "rm_summary_v1",
        [owner.meta, *owner.derived],
        *(owner.memory_prefix, tools.now_ms(), _KEPT_S * 1000, name),
        *sourced(made.sources, read.items, fields),
    )
    return bool(outcome == b"OK")


async def periods(tools: Tools, owner: Owner) -> None:
    """Queue the summaries of this and the last day, week and month, as far as there is anything."""
    now = datetime.fromtimestamp(tools.clock(), UTC)
    names = [*names_of(now)]
    for kind, before in (("day", 1), ("week", 7), ("month", now.day)):
        names += [name for name in names_of(now - timedelta(days=before)) if name[0] == kind]
    kinds = []
    for kind, name in names:
        if await tools.library.matching(owner, source_query(kind, name), 1):
            kinds.append(f"summary:{kind}:{name}")
    if kinds:
        await tools.jobs.queue(owner, *kinds)
