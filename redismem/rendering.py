"""The only place that says what a context looks like as text. Pure.

Markdown, a block a heading:

    ## Relevant memories
    - 8 May 2023: I moved to Oslo.
    - 2 June 2023: My cat hates it.

What is shown was written by others and must not pass for structure. A memory is one line, whatever it holds;
a derived text keeps its lines, but one that Markdown would read as a heading or as the fence of a code block
is escaped. A template is filled in one pass, so no text that is put in is read as a template.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import UTC
from itertools import chain

from redismem.conversation import STAGE_OF, Block, ContextMemory, Part, Stage
from redismem.errors import InvalidInput
from redismem.words import day_words

#: the parts that each placeholder of a template stands for
PLACEHOLDERS: dict[str, frozenset[Part]] = {
    "profile": frozenset({"profile"}),
    "session": frozenset({"session"}),
    "memories": frozenset(
        {"pinned", "matches", "prefetched", "more", "recent", "deep", "history", "related"}
    ),
    "topics": frozenset({"topics"}),
    "entities": frozenset({"entities"}),
    "context": frozenset(STAGE_OF),
}

#: what `check_template` takes, as a regular expression
TEMPLATE = rf"^([^{{}}]|\{{\{{|\}}\}}|\{{({'|'.join(PLACEHOLDERS)})\}})*$"

#: what parts two blocks
_GAP = "\n\n"
#: characters of an unknown placeholder that an error repeats
_SHOWN_CHARS = 40

_MARKUP = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
# Before a heading or a fence, also inside a list or quotation; before what makes a heading of the line above.
_STRUCTURE = re.compile(r"[\s>*+-]*(?=#|```|~~~)|\s*(?=(?:=+|-+)\s*$)")
_BLANK = re.compile(r"\s")


def heading(block_title: str) -> str:
    """Return the line that opens a block."""
    return f"## {_one_line(block_title)}"


def memory_line(memory: ContextMemory) -> str:
    """Return a memory with its day in UTC, as one line. Cost: 3 us for 100 characters."""
    day = day_words(memory.at.astimezone(UTC)).rpartition(" ")[0]
    return f"- {day}: {_one_line(memory.text)}"


def text_lines(text: str) -> list[str]:
    """Return the lines of a derived text, none of which opens a heading or a fence."""
    return [_escaped(line) for line in text.splitlines()]


def _escaped(line: str) -> str:
    match = _STRUCTURE.match(line)
    return f"{match[0]}\\{line[match.end() :]}" if match else line


def rendered(blocks: Sequence[Block]) -> str:
    """Return the blocks as Markdown, parted by empty lines; empty without blocks."""
    return _GAP.join(
        "\n".join(
            [
                heading(block.title),
                *(text_lines(block.text) if block.text is not None else map(memory_line, block.memories)),
            ]
        )
        for block in blocks
    )


def templated(template: str, stages: Sequence[Stage]) -> str:
    """Return the template with the blocks of the stages in it; a placeholder with nothing to show is empty.

    Raises:
        InvalidInput: as `check_template`.
    """
    literals, names = _pieces(template)
    blocks = [block for stage in stages for block in stage.blocks]
    texts = {
        name: rendered([block for block in blocks if block.part in PLACEHOLDERS[name]]) for name in set(names)
    }
    shown = (texts[name] for name in names)
    return literals[0] + "".join(chain.from_iterable(zip(shown, literals[1:], strict=True)))


def check_template(template: str) -> None:
    """Check that a template holds nothing but text, known placeholders, and braces that are doubled.

    Raises:
        InvalidInput: it does not; the first place is named.
    """
    _pieces(template)


def times_shown(template: str) -> dict[Part, int]:
    """Return how often a template shows each part; 0 for one that nobody need fetch.

    Raises:
        InvalidInput: as `check_template`.
    """
    _, names = _pieces(template)
    return {part: sum(part in PLACEHOLDERS[name] for name in names) for part in STAGE_OF}


def own_tokens(template: str, count_tokens: Callable[[Sequence[str]], list[int]]) -> int:
    """Return the tokens that a template has at most beyond those of the lines put into it.

    What follows a placeholder without a blank may become one word with the end of what is put in, of more
    tokens than both have apart: it is counted by bytes, of which every token has one at least. Before a
    placeholder nothing of that kind happens: a block opens with a mark.

    Raises:
        InvalidInput: as `check_template`.
    """
    literals, _ = _pieces(template)
    glued = ["", *(_BLANK.split(literal, maxsplit=1)[0] for literal in literals[1:])]
    apart = [literal[len(start) :] for start, literal in zip(glued, literals, strict=True)]
    return sum(len(start.encode()) for start in glued) + sum(count_tokens(apart))


def _pieces(template: str) -> tuple[list[str], list[str]]:
    """Return the n + 1 literal texts of a template and the n placeholders between them."""
    literals, names = [""], list[str]()
    end = 0
    for match in _MARKUP.finditer(template):
        literals[-1] += template[end : match.start()]
        end = match.end()
        if match[0] in ("{{", "}}"):
            literals[-1] += match[0][0]
        elif match[1] in PLACEHOLDERS:
            names.append(match[1])
            literals.append("")
        else:
            known = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
            found = match[0] if len(match[0]) <= _SHOWN_CHARS else match[0][:_SHOWN_CHARS] + "\u2026"
            raise InvalidInput(
                f"`template` holds {found}, which is none of {known}; write {{{{ and }}}} for braces",
                field="template",
            )
    literals[-1] += template[end:]
    return literals, names


def _one_line(text: str) -> str:
    return " ".join(text.split())
