"""The only place that knows the terminal: how wide it is, what a table looks like, how long work shows.

What a user wrote goes into tables as `Text`: as a string, its square brackets would be read as markup.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import msgspec
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from redismem.types import Memory, SearchReply

#: columns of output that does not go to a terminal
PIPED_WIDTH = 100

_SIGNS = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "fail": ("✗", "red")}


class Advance(Protocol):
    """Tells that some more steps are done."""

    def __call__(self, steps: int = 1) -> None: ...


def console() -> Console:
    """Return the console of stdout; without colours and 100 columns wide when it is no terminal."""
    width = shutil.get_terminal_size((PIPED_WIDTH, 24)).columns if sys.stdout.isatty() else PIPED_WIDTH
    return Console(width=width, highlight=False)


@contextmanager
def steps(description: str, total: int | None) -> Iterator[Advance]:
    """Show a bar on stderr while the block runs; nothing when stderr is no terminal.

    Args:
        total: number of steps; None when nobody knows.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    screen = Console(stderr=True)
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task(description, total=total)

        def advance(steps: int = 1) -> None:
            bar.advance(task, steps)

        yield advance


def table(*headers: str) -> Table:
    """Return an empty table that reads well with and without colours."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in headers:
        made.add_column(header, overflow="fold")
    return made


def hits_caption(reply: SearchReply) -> str:
    """Return how many memories a search found, in how long."""
    timing = reply.timing
    shown = f"{len(reply.memories)} of {reply.total:,} memories in {timing.total:.1f} ms"
    shown += f" (embedding {timing.embed:.1f}, search {timing.search:.1f})"
    if reply.plan is not None:
        shown += f"; {reply.plan.index}" + (f" with EF {reply.plan.ef}" if reply.plan.ef else "")
    if reply.archived:
        shown += f"; archived and not searched: {', '.join(reply.archived)}"
    return f"{shown}; {reply.reason}" if reply.partial else shown


def hits_table(reply: SearchReply) -> Table:
    """Return the memories that a search found, with their scores."""
    made = table("score", "memory", "when", "id")
    for hit in reply.memories:
        text = Text(hit.text)
        if hit.explain is not None:
            parts = msgspec.structs.asdict(hit.explain)
            shown = ", ".join(f"{name} {part:.3f}" for name, part in parts.items() if part is not None)
            text.append(f"\n{shown}", style="dim")
        when = f"{hit.event_date or hit.created_at:%Y-%m-%d}"
        made.add_row(f"{hit.score:.3f}", text, when, Text(hit.id))
    return made


def memory_table(memory: Memory) -> Table:
    """Return the fields of a memory, a row each."""
    made = table("field", "value")
    for name, value in msgspec.to_builtins(memory).items():
        shown = ", ".join(value) if isinstance(value, list) else value
        made.add_row(name, Text(shown if isinstance(shown, str) else msgspec.json.encode(shown).decode()))
    return made


def findings_table(rows: Iterable[tuple[str, str, str, str]]) -> Table:
    """Return the doctor's findings: status, check, what was seen, remedy."""
    made = table("", "check", "seen", "remedy")
    for status, *cells in rows:
        sign, style = _SIGNS[status]
        made.add_row(Text(sign, style=style), *map(Text, cells))
    return made
