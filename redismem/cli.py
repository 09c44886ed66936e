"""The command line. Commands on memories open the store in this process; `serve` and `demo` run the service."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import fields, replace
from datetime import datetime
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

import click
import msgspec
import uvicorn
from rich.table import Table
from rich.text import Text

from redismem.demo import DEMO_PORT, run_demo
from redismem.doctor import examine
from redismem.embedded import EmbeddedRedis
from redismem.errors import InvalidInput, Misconfigured, RedisMemError
from redismem.keys import Owner
from redismem.progress import console, steps
from redismem.reembed import Reembedder
from redismem.service import Service, open_service
from redismem.settings import Settings
from redismem.store import owners
from redismem.types import Filters, ImportRecord, MemoryInput, SearchReply, SearchRequest

F = TypeVar("F", bound=Callable[..., object])
T = TypeVar("T")

#: memories of an import that are written together
_IMPORT_SLICE = 100

#: refused lines that are named; the rest are counted
_NAMED_LINES = 100

#: seconds that running requests may still take after SIGTERM
_GRACE_S = 10

#: what the service's processes log, on stderr
_LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"handlers": ["stderr"], "level": "WARNING"},
    "loggers": {"redismem": {"level": "INFO"}},
}


class _Group(click.Group):
    """Shows what we know can go wrong as one message and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RedisMemError as exc:
            where = f"{exc.field}: " if isinstance(exc, InvalidInput) and exc.field else ""
            raise click.ClickException(where + exc.message) from exc


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="redismem")
def main() -> None:
    """Memory for AI assistants in Redis: the right memories in milliseconds.

    Without REDISMEM_REDIS_URL, an embedded Redis keeps the data. Every setting is read from the
    environment as well (REDISMEM_...).
    """


def _store_options(command: F) -> F:
    folder = click.Path(file_okay=False, path_type=Path)
    for option in (
        click.option("--namespace", help="Namespace of the users (REDISMEM_NAMESPACE)."),
        click.option("--data-dir", type=folder, help="Home of the embedded Redis (REDISMEM_DATA_DIR)."),
        click.option("--redis-url", help="A Redis to use instead of the embedded one (REDISMEM_REDIS_URL)."),
    ):
        command = option(command)
    return command


_user_option = click.option("-u", "--user", required=True, help="Whose memories.")
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _run(
    store: Mapping[str, Any], work: Callable[[Service], Any], *, any_embedder: bool = False
) -> Any:
    """Return what `work` makes of the opened store."""

    async def opened() -> Any:
        async with open_service(Settings.from_environment(**store), any_embedder=any_embedder) as service:
            return await work(service)

    return asyncio.run(opened())


def _value(kind: type[T], **values: object) -> T:
    """Return a value of `types` from options; those that were not given are left out."""
    given = {name: value for name, value in values.items() if value not in (None, (), {})}
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as exc:
        raise InvalidInput(str(exc)) from exc


def _print_json(value: object) -> None:
    click.echo(msgspec.json.encode(value))


# memories -------------------------------------------------------------------------------------------


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
            raise click.BadParameter(f"give key=value, not {pair!r}")
        try:
            found[key] = msgspec.json.decode(text)
        except msgspec.DecodeError:
            found[key] = text
    return found


@main.command()
@click.argument("text")
@_user_option
@click.option("--type", "memory_type", help="Such as semantic, episodic, preference.")
@click.option("--topic", "topics", multiple=True)
@click.option("--entity", "entities", multiple=True)
@click.option("--session", "session_id", help="Conversation it belongs to.")
@click.option("--event-date", callback=_moment, help="When it happened, as 2026-03-01 or with a time.")
@click.option("--importance", type=float, help="0 to 1.")
@click.option("--pinned", is_flag=True, default=None)
@click.option("--metadata", multiple=True, callback=_metadata, metavar="KEY=VALUE")
@_store_options
def add(user: str, redis_url: str | None, data_dir: Path | None, namespace: str | None, **given: Any) -> None:
    """Store TEXT as a memory."""
    memory = _value(MemoryInput, **given)

    async def work(service: Service) -> None:
        item = (await service.writer.put(service.owner(user), [memory])).memories[0]
        if item.outcome == "INVALID":
            raise InvalidInput(item.error or "refused", field=item.field)
        click.echo(f"{item.outcome.lower()} {item.id}")

    _run({"redis_url": redis_url, "data_dir": data_dir, "namespace": namespace}, work)
