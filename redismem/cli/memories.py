"""Commands on the memories of a user."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO

import click
import msgspec

from redismem.cli.shell import json_option, main, print_json, run, settled, user_option, value_of
from redismem.errors import InvalidInput
from redismem.filters import Filters
from redismem.keys import Owner
from redismem.progress import console, hits_caption, hits_table, memory_table, steps
from redismem.service import Service
from redismem.settings import Settings
from redismem.types import ImportRecord, MemoryInput, SearchRequest
from redismem.write import Writer

#: memories of an import that are written together
_IMPORT_SLICE = 100

#: refused lines that are named; the rest are counted
_NAMED_LINES = 100


def _moment(ctx: click.Context, param: click.Parameter, text: str | None) -> datetime | None:
    try:
        return datetime.fromisoformat(text) if text else None
    except ValueError as exc:
        raise click.BadParameter("give a time such as 2026-03-01 or 2026-03-01T18:30:00Z") from exc


def _metadata(ctx: click.Context, param: click.Parameter, pairs: tuple[str, ...]) -> dict[str, object]:
    found: dict[str, object] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not (key and equals):
            raise click.BadParameter(f"give KEY=VALUE, not {pair!r}")
        try:
            found[key] = msgspec.json.decode(text)
        except msgspec.DecodeError:
            found[key] = text
    return found


@main.command()
@click.argument("text")
@user_option
@click.option("--type", "memory_type", help="Such as semantic, episodic, preference.")
@click.option("--topic", "topics", multiple=True, help="May be repeated.")
@click.option("--entity", "entities", multiple=True, help="May be repeated.")
@click.option("--session", "session_id", help="The conversation it belongs to.")
@click.option("--event-date", callback=_moment, help="When it happened, such as 2026-03-01.")
@click.option("--importance", type=float, help="0 to 1.")
@click.option("--pinned", is_flag=True, default=None)
@click.option("--metadata", multiple=True, callback=_metadata, metavar="KEY=VALUE", help="May be repeated.")
@settled
def add(settings: Settings, user: str, **content: object) -> None:
    """Store TEXT as a memory."""
    memory = value_of(MemoryInput, **content)

    async def work(service: Service) -> None:
        item = (await service.writer.put(service.owner(user), [memory])).memories[0]
        if item.outcome == "INVALID":
            raise InvalidInput(item.error or "refused", field=item.field)
        click.echo(f"{item.outcome.lower()} {item.id}")

    run(settings, work)


@main.command()
@click.argument("text")
@user_option
@click.option("--limit", type=int, help="1 to 100; 10 unless given.")
@click.option("--mode", "search_mode", type=click.Choice(["hybrid", "semantic", "keyword"]))
@click.option("--topic", "topics", multiple=True, help="Any of these.")
@click.option("--type", "memory_type", multiple=True, help="Any of these.")
@click.option("--explain", is_flag=True, help="Show how each score came about.")
@json_option
@settled
def search(
    settings: Settings,
    user: str,
    topics: tuple[str, ...],
    memory_type: tuple[str, ...],
    as_json: bool,
    **request: object,
) -> None:
    """Find the best memories for TEXT."""
    filters = value_of(Filters, topics=topics, memory_type=memory_type)
    wanted = value_of(SearchRequest, filters=filters, **request)
    reply = run(settings, lambda service: service.search(service.owner(user), wanted))
    if as_json:
        print_json(reply)
    else:
        console().print(hits_table(reply), hits_caption(reply))


@main.command()
@click.argument("memory_id", metavar="ID")
@user_option
@json_option
@settled
def get(settings: Settings, user: str, memory_id: str, as_json: bool) -> None:
    """Show a memory."""
    memory = run(settings, lambda service: service.browser.get(service.owner(user), memory_id))
    if as_json:
        print_json(memory)
    else:
        console().print(memory_table(memory))


@main.command()
@click.argument("memory_id", metavar="ID")
@user_option
@settled
def delete(settings: Settings, user: str, memory_id: str) -> None:
    """Remove a memory for good."""
    reply = run(settings, lambda service: service.writer.delete(service.owner(user), memory_id))
    click.echo(f"deleted {reply.id}")


@main.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@user_option
@settled
def import_(settings: Settings, user: str, file: str) -> None:
    """Store the memories of FILE (`-`: stdin), a JSON object a line, such as an export."""
    size = None if file == "-" else Path(file).stat().st_size

    async def work(service: Service) -> dict[str, int]:
        lines = _Lines(service.writer, service.owner(user))
        with click.open_file(file, "rb") as source, steps("importing", size) as advance:
            for line in source:
                advance(len(line))
                await lines.take(line)
            await lines.store()
        return lines.counts

    counts = run(settings, work)
    click.echo(", ".join(f"{count:,} {outcome.lower()}" for outcome, count in counts.items()))
    if counts["INVALID"]:
        raise click.exceptions.Exit(1)


class _Lines:
    """Stores the lines of a file in slices, and names those that are refused."""

    def __init__(self, writer: Writer, owner: Owner) -> None:
        self._writer = writer
        self._owner = owner
        self._number = 0
        self._waiting: dict[int, ImportRecord] = {}
        self.counts = dict.fromkeys(("CREATED", "UPDATED", "UNCHANGED", "INVALID"), 0)

    async def take(self, line: bytes) -> None:
        self._number += 1
        if not line.strip():
            return
        try:
            self._waiting[self._number] = msgspec.json.decode(line, type=ImportRecord)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            self._count(self._number, "INVALID", str(exc))
        if len(self._waiting) >= _IMPORT_SLICE:
            await self.store()

    async def store(self) -> None:
        reply = await self._writer.put(self._owner, list(self._waiting.values()))
        for number, item in zip(self._waiting, reply.memories, strict=True):
            self._count(number, item.outcome, item.error)
        self._waiting.clear()

    def _count(self, number: int, outcome: str, error: str | None) -> None:
        self.counts[outcome] += 1
        if outcome == "INVALID" and self.counts[outcome] <= _NAMED_LINES:
            click.echo(f"line {number}: {error}", err=True)


@main.command()
@user_option
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="A file, not stdout.")
@settled
def export(settings: Settings, user: str, output: Path | None) -> None:
    """Print all memories of a user, a JSON object a line, oldest first."""

    async def work(service: Service) -> int:
        count = 0
        with _written(output) as file:
            async for page in service.browser.export(service.owner(user)):
                file.write(b"".join(msgspec.json.encode(memory) + b"\n" for memory in page))
                count += len(page)
        return count

    count = run(settings, work)
    click.echo(f"{count:,} memories exported", err=True)


@contextmanager
def _written(path: Path | None) -> Iterator[IO[bytes]]:
    """Yield stdout, or a file that only this user may read and that takes its name when it is complete."""
    if path is None:
        yield sys.stdout.buffer
        return
    part = path.with_name(path.name + ".part")
    part.touch(mode=0o600)
    with part.open("wb") as file:
        yield file
    part.replace(path)


@main.command()
@user_option
@click.option("--yes", is_flag=True, help="Do not ask.")
@settled
def forget(settings: Settings, user: str, yes: bool) -> None:
    """Remove everything of a user for good."""

    async def work(service: Service) -> None:
        owner = service.owner(user)
        if not yes:
            page = await service.tiers.page(owner, Filters(superseded="include"), 1, None)
            click.confirm(f"Remove all {page.total:,} memories of {user!r} for good?", abort=True)
        reply = await service.writer.forget(owner)
        click.echo(f"forgot {reply.memories:,} memories, {reply.keys:,} keys in all")

    run(settings, work)
