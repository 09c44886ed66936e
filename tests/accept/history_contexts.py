"""Reads contexts as clients get them: the only place that knows where in one the text of a memory may stand.

What a prompt would hold counts: a text that stands in the rendering of a stage, but is no memory of it, is
quoted from a profile or a summary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from tests.accept.history import Item

#: a text of the load wherever it stands; it names the id that it was written under
TEXT = re.compile(r"common \w+ \w+(?: \w+)? of \S+ (?P<id>\w+) n\d+")
#: seconds by which a moment in a reply may be rounded up
_ROUNDED_S = 1e-6


class _Memory(msgspec.Struct):
    id: str
    text: str


class _Block(msgspec.Struct):
    part: str
    text: str | None = None
    memories: list[_Memory] = []


class _Stage(msgspec.Struct):
    stage: int
    blocks: list[_Block]
    text: str
    at_ms: float
    partial: bool = False


class _Context(msgspec.Struct):
    stages: list[_Stage]


class _Opened(msgspec.Struct):
    context: _Context


_stage = msgspec.json.Decoder(_Stage)
_context = msgspec.json.Decoder(_Context)
_opened = msgspec.json.Decoder(_Opened)


@dataclass(frozen=True, slots=True)
class Shown:
    """What one stage showed, and when: `ended` is its arrival, `compared` as in an Event.

    `parts` are those that showed memories, and those of the blocks that quote some.
    """

    number: int
    compared: float
    ended: float
    items: tuple[Item, ...]
    parts: tuple[str, ...]
    partial: bool


def of_json(body: bytes, began: float, ended: float) -> list[Shown]:
    """Return the stages of a context that came in one piece."""
    return [_shown(stage, began, ended) for stage in _context.decode(body).stages]


def of_opened(body: bytes, began: float, ended: float) -> list[Shown]:
    """Return the stages that came with an opened session."""
    return [_shown(stage, began, ended) for stage in _opened.decode(body).context.stages]


def of_stream(chunks: Sequence[tuple[float, bytes]], began: float) -> tuple[list[Shown], str]:
    """Return the stages of a stream, also of one that broke off, and the name of its last event.

    Args:
        chunks: moments of arrival, and one event each.
    """
    stages, last = [], ""
    for arrived, chunk in chunks:
        name, _, data = chunk.removesuffix(b"\n\n").partition(b"\ndata: ")
        last = name.removeprefix(b"event: ").decode()
        if last == "stage":
            stages.append(_shown(_stage.decode(data), began, arrived))
    return stages, last


def _shown(stage: _Stage, began: float, ended: float) -> Shown:
    items = [Item(one.id, one.text) for block in stage.blocks for one in block.memories]
    told = {item.text for item in items}
    texts = [stage.text, *(block.text for block in stage.blocks if block.text)]
    quoted = {
        match[0]: Item(match["id"], match[0], quoted=True)
        for text in texts
        for match in TEXT.finditer(text)
        if match[0] not in told
    }
    return Shown(
        number=stage.stage,
        compared=began + stage.at_ms / 1000 - _ROUNDED_S,
        ended=ended,
        items=(*items, *quoted.values()),
        parts=tuple(
            block.part if block.memories else f"quotes of {block.part}"
            for block in stage.blocks
            if block.memories or TEXT.search(block.text or "")
        ),
        partial=stage.partial,
    )
