"""The only place that knows the terminal: how wide it is, and how long work shows that it goes on."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

#: columns of output that does not go to a terminal
PIPED_WIDTH = 100


class Advance(Protocol):
    """Tells that some more steps are done."""

    def __call__(self, steps: int = 1) -> None: ...


def console() -> Console:
    """Return the console of stdout; without colours and 100 columns wide when it is no terminal."""
    width = shutil.get_terminal_size((PIPED_WIDTH, 24)).columns if sys.stdout.isatty() else PIPED_WIDTH
    return Console(width=width, highlight=False)


@contextmanager
def steps(description: str, total: int) -> Iterator[Advance]:
    """Show a bar on stderr while the block runs; nothing when stderr is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    screen = Console(stderr=True)
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task(description, total=total)

        def advance(steps: int = 1) -> None:
            bar.advance(task, steps)

        yield advance
