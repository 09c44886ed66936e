"""The command line. Commands on memories open the store in their own process; `serve` runs the service."""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import IO, Any, TypeVar

import click
import msgspec

from redismem.demo import run_demo
from redismem.doctor import examine
from redismem.errors import InvalidInput, RedisMemError, RedisUnavailable
from redismem.keys import Owner
from redismem.progress import console, findings_table, hits_caption, hits_table, memory_table, steps
from redismem.reembed import Reembedder
from redismem.serve import run_service
from redismem.service import Service, open_service
from redismem.settings import Settings
from redismem.store import owners
from redismem.types import Filters, ImportRecord, MemoryInput, SearchRequest
from redismem.write import Writer

T = TypeVar("T")

_FIELDS = tuple(item.name for item in fields(Settings))

#: memories of an import that are written together
_IMPORT_SLICE = 100

#: refused lines that are named; the rest are counted
_NAMED_LINES = 100

_START_REDIS = "Start the server of REDISMEM_REDIS_URL, or unset it to use the embedded one."


class _Group(click.Group):
    """Shows what can go wrong as one message and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RedisMemError as exc:
            where = f"{exc.field}: " if isinstance(exc, InvalidInput) and exc.field else ""
            remedy = f" {_START_REDIS}" if isinstance(exc, RedisUnavailable) else ""
            raise click.ClickException(f"{where}{exc.message}{remedy}") from exc
        except OSError as exc:
            if exc.filename is None:
                raise
            raise click.ClickException(f"{exc.filename}: {exc.strerror}") from exc


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="redismem")
def main() -> None:
    """Memory for AI assistants in Redis: the right memories in milliseconds.

    Without REDISMEM_REDIS_URL, an embedded Redis keeps the data. Every setting can come from the
    environment as well (REDISMEM_...).
    """


def _settled(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of the store, and `settings` made from all options that are settings."""

    @click.option("--redis-url", help="A Redis to use instead of the embedded one.")
    @click.option("--data-dir", type=click.Path(path_type=Path), help="Home of the embedded Redis.")
    @click.option("--namespace", help="Namespace of the users.")
    @functools.wraps(command)
    def settled(**options: Any) -> None:
        chosen = {name: options.pop(name) for name in _FIELDS if name in options}
        command(settings=Settings.from_environment(**chosen), **options)

    return settled


_user_option = click.option("-u", "--user", required=True, help="Whose memories.")
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _run(settings: Settings, work: Callable[[Service], Awaitable[T]], *, any_embedder: bool = False) -> T:
    """Return what `work` makes of the open store."""

    async def opened() -> T:
        async with open_service(settings, any_embedder=any_embedder) as service:
            return await work(service)

    return asyncio.run(opened())


def _value(kind: type[T], **options: object) -> T:
    """Return a value of `types` from options; those that were not given are left out."""
    given = {name: value for name, value in options.items() if value not in (None, (), {})}
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as exc:
        raise InvalidInput(str(exc)) from exc


def _print_json(value: object) -> None:
    click.echo(msgspec.json.encode(value))


# memories ---------------------------------------------------------------------------------------


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
@_user_option
@click.option("--type", "memory_type", help="Such as semantic, episodic, preference.")
@click.option("--topic", "topics", multiple=True, help="May be repeated.")
@click.option("--entity", "entities", multiple=True, help="May be repeated.")
@click.option("--session", "session_id", help="The conversation it belongs to.")
@click.option("--event-date", callback=_moment, help="When it happened, such as 2026-03-01.")
@click.option("--importance", type=float, help="0 to 1.")
@click.option("--pinned", is_flag=True, default=None)
@click.option("--metadata", multiple=True, callback=_metadata, metavar="KEY=VALUE", help="May be repeated.")
@_settled
def add(settings: Settings, user: str, **content: object) -> None:
    """Store TEXT as a memory."""
    memory = _value(MemoryInput, **content)

    async def work(service: Service) -> None:
        item = (await service.writer.put(service.owner(user), [memory])).memories[0]
        if item.outcome == "INVALID":
            raise InvalidInput(item.error or "refused", field=item.field)
        click.echo(f"{item.outcome.lower()} {item.id}")

    _run(settings, work)


@main.command()
@click.argument("text")
@_user_option
@click.option("--limit", type=int, help="1 to 100; 10 unless given.")
@click.option("--mode", "search_mode", type=click.Choice(["hybrid", "semantic", "keyword"]))
@click.option("--topic", "topics", multiple=True, help="Any of these.")
@click.option("--type", "memory_type", multiple=True, help="Any of these.")
@click.option("--explain", is_flag=True, help="Show how each score came about.")
@_json_option
@_settled
def search(
    settings: Settings,
    user: str,
    topics: tuple[str, ...],
    memory_type: tuple[str, ...],
    as_json: bool,
    **request: object,
) -> None:
    """Find the best memories for TEXT."""
    filters = _value(Filters, topics=topics, memory_type=memory_type)
    wanted = _value(SearchRequest, filters=filters, **request)
    reply = _run(settings, lambda service: service.search(service.owner(user), wanted))
    if as_json:
        _print_json(reply)
    else:
        console().print(hits_table(reply), hits_caption(reply))


@main.command()
@click.argument("memory_id", metavar="ID")
@_user_option
@_json_option
@_settled
def get(settings: Settings, user: str, memory_id: str, as_json: bool) -> None:
    """Show a memory."""
    memory = _run(settings, lambda service: service.browser.get(service.owner(user), memory_id))
    if as_json:
        _print_json(memory)
    else:
        console().print(memory_table(memory))


@main.command()
@click.argument("memory_id", metavar="ID")
@_user_option
@_settled
def delete(settings: Settings, user: str, memory_id: str) -> None:
    """Remove a memory for good."""
    reply = _run(settings, lambda service: service.writer.delete(service.owner(user), memory_id))
    click.echo(f"deleted {reply.id}")


@main.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@_user_option
@_settled
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

    counts = _run(settings, work)
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
@_user_option
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="A file, not stdout.")
@_settled
def export(settings: Settings, user: str, output: Path | None) -> None:
    """Print all memories of a user, a JSON object a line, oldest first."""

    async def work(service: Service) -> int:
        count = 0
        with _written(output) as file:
            async for page in service.browser.export(service.owner(user)):
                file.write(b"".join(msgspec.json.encode(memory) + b"\n" for memory in page))
                count += len(page)
        return count

    count = _run(settings, work)
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
@_user_option
@click.option("--yes", is_flag=True, help="Do not ask.")
@_settled
def forget(settings: Settings, user: str, yes: bool) -> None:
    """Remove everything of a user for good."""

    async def work(service: Service) -> None:
        owner = service.owner(user)
        if not yes:
            page = await service.tiers.page(owner, Filters(superseded="include"), 1, None)
            click.confirm(f"Remove all {page.total:,} memories of {user!r} for good?", abort=True)
        reply = await service.writer.forget(owner)
        click.echo(f"forgot {reply.memories:,} memories, {reply.keys:,} keys in all")

    _run(settings, work)


# the store ---------------------------------------------------------------------------------------


@main.command()
@_settled
def reembed(settings: Settings) -> None:
    """Move all users to the configured embedder, and give vectors to what has none; run again to go on."""

    async def work(service: Service) -> tuple[int, int]:
        total = sum([1 async for _ in owners(service.client)])
        with steps("embedding", total) as advance:
            mover = Reembedder(service.client, service.functions, service.embedder)
            return total, await mover.run(lambda *_: advance())

    users, made = _run(settings, work, any_embedder=True)
    click.echo(f"vectors made: {made:,}; users: {users:,}")


@main.command()
@_json_option
@click.option("--repair", is_flag=True, help="Rebuild indexes that are missing or incomplete.")
@_settled
def doctor(settings: Settings, as_json: bool, repair: bool) -> None:
    """Examine Redis, Functions, indexes and embedder, and say what to do."""
    findings = asyncio.run(examine(settings, repair=repair))
    failed = any(finding.status == "fail" for finding in findings)
    if as_json:
        _print_json({"ok": not failed, "findings": findings})
    else:
        rows = [(item.status, item.name, item.seen, item.remedy or "") for item in findings]
        console().print(findings_table(rows))
    if failed:
        raise click.exceptions.Exit(1)


# the service -------------------------------------------------------------------------------------


@main.command()
@click.option("--host", help="Address to listen on; 127.0.0.1 unless given.")
@click.option("--port", type=int, help="8000 unless given; 0 takes a free one.")
@click.option("--workers", type=int, help="Processes; 1 unless given.")
@click.option("--insecure", is_flag=True, help="Listen where other machines reach it, without API keys.")
@_settled
def serve(settings: Settings, insecure: bool) -> None:
    """Run the HTTP service until SIGTERM or Ctrl-C."""
    if run_service(settings, insecure=insecure):
        raise click.exceptions.Exit(1)


@main.command()
@click.option("--serve", "keep", is_flag=True, help="Keep the service running afterwards, until Ctrl-C.")
@click.option("--data", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Your own NDJSON.")
@click.option("--question", "questions", multiple=True, help="A question to your own data; may be repeated.")
@click.option("--port", type=int, help="8000 with --serve, else a free one.")
def demo(keep: bool, data: Path | None, questions: tuple[str, ...], port: int | None) -> None:
    """Load a sample life into a service of its own, ask questions and show how they are answered."""
    run_demo(keep=keep, data=data, questions=questions, port=port)
