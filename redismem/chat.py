"""The demo's conversation: what is said becomes a message, and its context is shown stage by stage."""

from __future__ import annotations

import asyncio
import textwrap
import time
from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from redismem.conversation import Block, Stage
from redismem.sdk import Client, SessionHandle, UserMemory

#: up to which stage a context is asked for
_STAGES = 4

#: letters of a line that are shown; what stands before them has 24
_LETTERS = 76

#: what does not begin a line of a rendering that is worth showing
_MARKS = "#-*> "


#: seconds between two looks for the profile
_LOOK_S = 0.05


def run_chat(
    out: Console, url: str, user: str, lines: Iterable[str], *, wait_s: float, pause_s: float = 0.0
) -> None:
    """Say each line in one session, show its context, then close the session and tell what was loaded ahead.

    Args:
        wait_s: seconds that the first profile, which the worker makes, is waited for at most.
        pause_s: seconds between two turns, in which a person would read, and the service loads ahead.

    Raises:
        RedisMemError: the service refused, or does not answer any more.
    """
    with asyncio.Runner() as runner:  # it rests while a line is typed
        client = Client(url)
        try:
            session = runner.run(_opened(client.user(user), wait_s))
            for number, line in enumerate(lines):
                if number and pause_s:
                    runner.run(asyncio.sleep(pause_s))
                runner.run(_turn(out, session, line))
            runner.run(session.close())
            runner.run(_print_loaded_ahead(out, client))
        finally:
            runner.run(client.close())


async def _opened(memory: UserMemory, wait_s: float) -> SessionHandle:
    """Open the session when there is a profile; after a request that opens connections and wakes threads."""
    await memory.context("Is anybody there?", stages=_STAGES)
    for _ in range(int(wait_s / _LOOK_S)):
        if (await memory.profile()).compiled_at is not None:
            break
        await asyncio.sleep(_LOOK_S)
    return await memory.open_session(agent="demo")


async def _turn(out: Console, session: SessionHandle, line: str) -> None:
    out.print(Text(f"» {line}", style="bold"))
    began_s = time.perf_counter()
    await session.say(line)
    out.print(Text(f"  said     {_ms(began_s)} ms  stored and searchable", style="dim"))
    began_s = time.perf_counter()
    tokens = 0
    async with session.stream(stages=_STAGES) as stages:
        async for stage in stages:
            _print_stage(out, stage, _ms(began_s), stage.tokens - tokens)
            tokens = stage.tokens
        whole = await stages.whole()
    out.print(Text(f"  whole    {_ms(began_s)} ms  {whole.tokens} tokens, ready for a prompt", style="dim"))
    out.print()


def _ms(began_s: float) -> str:
    return f"{(time.perf_counter() - began_s) * 1000:6.1f}"


def _print_stage(out: Console, stage: Stage, ms: str, tokens: int) -> None:
    told = f"{tokens} tokens" if stage.blocks else "nothing to add"
    if stage.skipped:
        told += f"; without {', '.join(stage.skipped)}: {stage.reason}"
    out.print(Text(f"  stage {stage.stage}  {ms} ms  {told}"), soft_wrap=True)
    for block in stage.blocks:
        line = Text(f"    {block.part:<10} {block.tokens:>4}  ", style="dim")
        out.print(line + Text(textwrap.shorten(_first_line(block), _LETTERS, placeholder=" …")))


def _first_line(block: Block) -> str:
    """Return what a block begins with, and how many more memories it has."""
    lines = [line.strip(_MARKS) for line in (block.text or "").splitlines()]
    lines += [memory.text for memory in block.memories]
    first = next((line for line in lines if line and not line.endswith(":")), "")
    if block.part == "entities":
        first = f"{block.title}: {first}"
    more = len(block.memories) - 1
    return f"{textwrap.shorten(first, _LETTERS - 12, placeholder=' …')} (+ {more})" if more > 0 else first


async def _print_loaded_ahead(out: Console, client: Client) -> None:
    counts = (await client.stats()).prefetch
    issued = {signal: told["issued"] for signal, told in counts.items() if told.get("issued")}
    used = sum(told.get("used", 0) for told in counts.values())
    by_signal = ", ".join(f"{signal} {count}" for signal, count in issued.items())
    out.print(
        f"Memories loaded ahead, before they were asked for: {sum(issued.values())}"
        + f" ({by_signal}); {used} of them were used." * bool(issued)
    )
    out.print(
        "Measured: by the client, from sending the request until the whole stage was read, after one "
        "warm-up request; the message is stored first.",
        style="dim",
    )
