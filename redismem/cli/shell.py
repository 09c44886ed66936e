"""What all commands share: the group, settings from options, an open store, JSON."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from redismem.errors import InvalidInput, RedisMemError, RedisUnavailable
from redismem.service import Service, open_service
from redismem.settings import Settings

T = TypeVar("T")

_FIELDS = tuple(item.name for item in fields(Settings))

_START_REDIS = "Start the server of REDISMEM_REDIS_URL, or unset it to use the embedded one."


class _Group(click.Group):
    """Shows what can go wrong as one message and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RedisMemError as exc:
            where = f"{exc.field}: " if isinstance(exc, InvalidInput) and exc.field else ""
            remedy = f" {_START_REDIS}" if isinstance(exc, RedisUnavailable) else ""
            detail = f" ({exc.detail})." if exc.detail else ""
            raise click.ClickException(f"{where}{exc.message}{detail}{remedy}") from exc
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


def settled(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of the store, and `settings` made from all options that are settings."""

    @click.option("--redis-url", help="A Redis to use instead of the embedded one.")
    @click.option("--data-dir", type=click.Path(path_type=Path), help="Home of the embedded Redis.")
    @click.option("--namespace", help="Namespace of the users.")
    @functools.wraps(command)
    def with_settings(**options: Any) -> None:
        chosen = {name: options.pop(name) for name in _FIELDS if name in options}
        command(settings=Settings.from_environment(**chosen), **options)

    return with_settings


user_option = click.option("-u", "--user", required=True, help="Whose memories.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def run(settings: Settings, work: Callable[[Service], Awaitable[T]], *, any_embedder: bool = False) -> T:
    """Return what `work` makes of the open store."""

    async def opened() -> T:
        async with open_service(settings, any_embedder=any_embedder) as service:
            return await work(service)

    return asyncio.run(opened())


def value_of(kind: type[T], **options: object) -> T:
    """Return a value of `types` from options; those that were not given are left out."""
    given = {name: value for name, value in options.items() if value not in (None, (), {})}
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as exc:
        raise InvalidInput(str(exc)) from exc


def print_json(value: object) -> None:
    click.echo(msgspec.json.encode(value))
