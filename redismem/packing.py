"""The only place that decides what of a context fits into its budgets; no memory stands in it twice. Pure.

Tokens are counted line by line and added up. For WordPiece that is exact: its pre-tokenizer splits at white
space, a line break is white space, so no token reaches over it, and empty lines have none. For tokenizers
that merge bytes it is about the truth: a break costs them a token, often one with what is beside it. The
same lines come again from one context to the next, so whoever hands in `count_tokens` may cache the counts.

A part that a template shows twice is paid for twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from msgspec.structs import replace

from redismem.conversation import STAGE_OF, STAGE_TOKENS, Block, ContextMemory, Part, Stage
from redismem.errors import InvalidInput
from redismem.rendering import heading, memory_line, own_tokens, rendered, text_lines, times_shown
from redismem.types import Hit, Memory

Source = Literal["l1", "l2", "l3", "derived"]

#: memories that are passed over, because they do not fit, before a block is taken for full
PASSED_OVER = 20
#: a memory of more than this part of a stage's bound is cut, unless it has less than so many tokens
LONG_PART, LEAST_LONG = 3, 64

#: characters of a text that are looked at for each token there is room for: English has about 4.5
_CHARS_A_TOKEN = 6
#: taken off a beginning that is too long, beyond what its tokens tell
_TRIM = 0.98
_MORE = " \u2026"

# After an end mark and closing quotes, not after "1." or "Dr."; CJK need no blank. Or after a line that is no
# mere opening ("Known:").
_END = re.compile(
    "(?=[.!?\u2026])(?<!^\\d)(?<!\\s\\d)(?<!\\b[A-Z])(?<!\\b[DMS][rst])(?<!\\bMrs)(?<!\\b[ei]\\.[ge])"
    ".[\"')\\]\u201d\u2019]*(?=\\s)|[\u3002\uff01\uff1f]|(?<![:\\n])(?=\\n)"
)

_Count = Callable[[Sequence[str]], list[int]]


@dataclass(slots=True)
class _Packed:
    """A block of the open stage: tokens of its heading (and text), and of each of its memories."""

    block: Block
    head: int
    counts: list[int]

    @property
    def tokens(self) -> int:
        return self.head + sum(self.counts)


class Packer:
    """Puts blocks into one context, stage by stage; what comes first has the room.

    Args:
        count_tokens: tokens of each text.
        max_tokens: of all of it, the template included. Below the bound of the last stage those of all stages
            shrink in proportion.
        stages: the last one that is wanted.
        template: what the context is put into. A stage whose bound it exceeds alone stays empty.

    Raises:
        InvalidInput: the template is none (see `rendering.check_template`), or leaves no room.
    """

    def __init__(
        self, count_tokens: _Count, *, max_tokens: int, stages: int = 4, template: str | None = None
    ) -> None:
        self._count = count_tokens
        self._max_tokens = max_tokens
        #: how much of the usual budgets there is
        self.scale = min(1.0, max_tokens / STAGE_TOKENS[stages])
        self._times = dict.fromkeys(STAGE_OF, 1)
        self._ended_tokens = 0
        if template is not None:
            # once at least: a stage is also handed over without the template
            self._times = {part: max(1, times) for part, times in times_shown(template).items()}
            self._ended_tokens = own_tokens(template, count_tokens)
            if self._ended_tokens >= max_tokens:
                raise InvalidInput(
                    f"`template` alone has {self._ended_tokens} tokens, `max_tokens` are {max_tokens}",
                    field="template",
                )
        self._stage = self._bound = 0
        self._open: list[_Packed] = []
        self._ids = set[str]()
        self._dropped = set[str]()

    @property
    def tokens_used(self) -> int:
        """Tokens of the template, the ended stages and the open one."""
        return self._ended_tokens + sum(
            self._times[packed.block.part] * packed.tokens for packed in self._open
        )

    @property
    def room(self) -> int:
        """Tokens left in the open stage; 0 when none is open."""
        return max(0, self._bound - self.tokens_used)

    def begin(self, stage: int) -> None:
        """Open a stage. What earlier ones left of their budgets it may use."""
        self._stage = stage
        self._bound = min(int(STAGE_TOKENS[stage] * self.scale), self._max_tokens)

    def add_text(
        self,
        part: Part,
        title: str,
        text: str,
        memory_ids: Sequence[str],
        source: Source,
        *,
        most: int | None = None,
    ) -> bool:
        """Add a derived text as a block, cut at the end of a line or sentence to what fits.

        Args:
            memory_ids: what it was made from; these memories may still be shown themselves.
            most: tokens of the block at most, its heading included.

        Returns:
            False when not even one sentence fits, or one of `memory_ids` was dropped; then nothing is added.

        Cost: one call of `count_tokens`; two or three for a text that is cut.
        """
        room = self._room(part) if most is None else min(most, self._room(part))
        if not self._dropped.isdisjoint(memory_ids):
            return False
        head = heading(title)
        begun, size = _beginning(
            "\n".join(text.splitlines()).strip(),
            room,
            lambda begun: sum(self._count([head, *text_lines(begun)])),
            _end,
        )
        if begun:
            block = Block(part=part, title=title, text=begun, memory_ids=[*memory_ids], source=source)
            self._open.append(_Packed(block, size, []))
        return bool(begun)

    def add_memories(
        self,
        part: Part,
        title: str,
        memories: Sequence[Memory],
        source: Source,
        *,
        most: int | None = None,
        tokens: int | None = None,
        why: Mapping[str, str] | None = None,
    ) -> int:
        """Add those memories that are not in yet and fit, in the order given; return how many.

        One that does not fit is passed over for smaller ones after it. One that has more than a third of the
        stage's bound, or half of `tokens`, is cut at the end of a sentence or word. What is added to a part
        under the same title again, in the same stage, extends its block.

        Args:
            most: memories added at most.
            tokens: of the block at most, its heading and what it held before included.
            why: id -> reason that is shown with it.

        Cost: one call of `count_tokens`; two or three more for each memory that is cut.
        """
        missing = {one.id: one for one in memories if one.id not in self._ids and one.id not in self._dropped}
        if not missing or not self.room:
            return 0
        told = [_told(one, (why or {}).get(one.id)) for one in missing.values()]
        if most is not None:
            told = told[: most + PASSED_OVER]
        longest = self._longest(tokens)
        head, *counts = self._count([heading(title), *(_counted_line(one, longest) for one in told)])
        packed = self._extendible(part, title)
        is_new = packed is None
        if packed is None:
            packed = _Packed(Block(part=part, title=title, source=source), head, [])
        held = packed.tokens
        room = self._room(part) - (held if is_new else 0)
        if tokens is not None:
            room = min(room, tokens - held)
        added = passed = 0
        for memory, count in zip(told, counts, strict=True):
            if added == most or passed > PASSED_OVER:
                break
            fitted, size = self._fitted(memory, count, room, longest)
            if size > room:
                passed += 1
                continue
            packed.block.memories.append(fitted)
            packed.counts.append(size)
            self._ids.add(memory.id)
            room -= size
            added += 1
        if is_new and added:
            self._open.append(packed)
        return added

    def ids(self) -> set[str]:
        """Return the ids of all memories shown so far."""
        return set(self._ids)

    def memory_ids(self) -> set[str]:
        """Return the ids of the open stage's memories."""
        return {memory.id for packed in self._open for memory in packed.block.memories}

    def text_ids(self) -> set[str]:
        """Return the ids of what the open stage's texts were made from."""
        return set[str]().union(*(packed.block.memory_ids for packed in self._open))

    def stage_ids(self) -> set[str]:
        """Return the ids of the open stage's memories, and of what its texts were made from."""
        return self.memory_ids() | self.text_ids()

    def drop(self, ids: set[str]) -> None:
        """Take memories out of the open stage, and texts made from them; they will not be added again."""
        self._dropped |= ids
        self._take_out(ids, ids)

    def drop_texts(self, ids: set[str]) -> None:
        """Take texts that were made from one of these memories out of the open stage."""
        self._take_out(set(), ids)

    def replace(self, memories: Mapping[str, Memory], *, keep_texts: bool = False) -> None:
        """Show what memories of the open stage say now; one that no longer fits goes.

        Args:
            memories: id -> what it says now; ids that are not shown matter to texts only.
            keep_texts: else a text that was made from one of them goes too: it may still say what the memory
                said before.

        Cost: as `add_memories`.
        """
        places = [
            (packed, place, _renewed(old, memories[old.id]))
            for packed in self._open
            for place, old in enumerate(packed.block.memories)
            if old.id in memories
        ]
        longest = self._longest()
        counts = self._count([_counted_line(told, longest) for _, _, told in places]) if places else []
        self._take_out(set(), set() if keep_texts else set(memories))
        for packed, place, _ in places:
            packed.counts[place] = 0
        gone = set[str]()
        for (packed, place, told), count in zip(places, counts, strict=True):
            room = self._room(packed.block.part)
            fitted, size = self._fitted(told, count, room, longest)
            if size > room:
                gone.add(told.id)
            else:
                packed.block.memories[place], packed.counts[place] = fitted, size
        self._take_out(gone, set())

    def end(self, at_ms: float, *, skipped: Sequence[str] = (), reason: str | None = None) -> Stage:
        """Close the stage and return it; it is partial when there is a `reason`."""
        for packed in self._open:
            packed.block.tokens = packed.tokens
        blocks = [packed.block for packed in self._open]
        self._ended_tokens, self._open, self._bound = self.tokens_used, [], 0
        return Stage(
            stage=self._stage,
            blocks=blocks,
            text=rendered(blocks),
            tokens=self._ended_tokens,
            at_ms=at_ms,
            partial=bool(reason),
            skipped=[*skipped],
            reason=reason,
        )

    def _room(self, part: Part) -> int:
        return self.room // self._times[part]

    def _extendible(self, part: Part, title: str) -> _Packed | None:
        for packed in self._open:
            if packed.block.text is None and (packed.block.part, packed.block.title) == (part, title):
                return packed
        return None

    def _take_out(self, shown: set[str], sources: set[str]) -> None:
        """Take out the memories `shown`, texts made from `sources`, and blocks that are empty then."""
        kept = []
        for packed in self._open:
            block = packed.block
            if block.text is not None:
                if sources.isdisjoint(block.memory_ids):
                    kept.append(packed)
                continue
            left = [
                (memory, count)
                for memory, count in zip(block.memories, packed.counts, strict=True)
                if memory.id not in shown
            ]
            self._ids.difference_update(shown.intersection(memory.id for memory in block.memories))
            block.memories, packed.counts = [memory for memory, _ in left], [count for _, count in left]
            if left:
                kept.append(packed)
        self._open = kept

    def _longest(self, tokens: int | None = None) -> int:
        """Return the tokens of a memory at most, in the open stage and a block of `tokens`."""
        longest = self._bound // LONG_PART
        return max(LEAST_LONG, longest if tokens is None else min(longest, tokens // 2))

    def _fitted(
        self, memory: ContextMemory, count: int, room: int, longest: int
    ) -> tuple[ContextMemory, int]:
        """Return a memory, cut when it is long, and its tokens; more than `room` when it does not fit."""
        if count <= longest and len(memory.text) <= _CHARS_A_TOKEN * longest:
            return memory, count
        if longest > room:
            return memory, longest

        def cut(begun: str) -> ContextMemory:
            return replace(memory, text=begun + _MORE)

        begun, size = _beginning(
            memory.text.strip(),
            longest,
            lambda begun: self._count([memory_line(cut(begun))])[0],
            _end_in_text,
        )
        return cut(begun), size if begun else room + 1


def _counted_line(memory: ContextMemory, longest: int) -> str:
    """Return its line; of a text that will be cut as much as tells that it is too long."""
    chars = _CHARS_A_TOKEN * longest
    return memory_line(memory if len(memory.text) <= chars else replace(memory, text=memory.text[:chars]))


def _told(memory: Memory, why: str | None) -> ContextMemory:
    return ContextMemory(
        id=memory.id,
        text=memory.text,
        at=memory.event_date or memory.created_at,
        score=memory.score if isinstance(memory, Hit) else None,
        memory_type=memory.memory_type,
        session_id=memory.session_id,
        why=why,
    )


def _renewed(old: ContextMemory, memory: Memory) -> ContextMemory:
    """Return what a memory says now, with why it is there and the score that it was found by."""
    told = _told(memory, old.why)
    told.score = old.score
    return told


def _beginning(
    text: str, tokens: int, counted: Callable[[str], int], end_before: Callable[[str, int], int]
) -> tuple[str, int]:
    """Return a beginning of `text` that has at most `tokens`, all of it if that fits, and its tokens.

    It is found from above, each time by the share that was too much, so it may be a little shorter than what
    would just fit. Empty when nothing does.

    Args:
        counted: tokens of a beginning as it will be shown.
        end_before: where the text may end at or before a place; 0 for nowhere.
    """
    chars = min(len(text), _CHARS_A_TOKEN * tokens)
    while chars > 0:
        begun = text[: len(text) if chars == len(text) else end_before(text, chars)].rstrip()
        if not begun:
            break
        if (count := counted(begun)) <= tokens:
            return begun, count
        chars = min(len(begun) - 1, int(len(begun) * tokens / count * _TRIM))
    return "", 0


def _end(text: str, chars: int) -> int:
    """Return the last end of a sentence or line in the first `chars` characters; 0 without one."""
    return max((match.end() for match in _END.finditer(text, 0, chars)), default=0)


def _end_in_text(text: str, chars: int) -> int:
    """Return the last end of a sentence, else of a word, else `chars`: the first that keeps half of them.

    The last is for scripts that are written without blanks.
    """
    word = len(text[:chars].rsplit(None, 1)[0])
    return next((end for end in (_end(text, chars), word) if 2 * end >= chars), chars)
