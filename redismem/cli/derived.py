"""Commands on what is derived of a user's memories; what is missing, or asked for anew, is made at once."""

from __future__ import annotations

from typing import get_args

import click
import msgspec
from rich.text import Text

from redismem.cli.shell import json_option, main, print_json, run, settled
from redismem.errors import NotFound
from redismem.progress import console, table
from redismem.query import packed_tags
from redismem.service import Service
from redismem.settings import Settings
from redismem.views import Profile, Summary, SummaryKind, TopicsReply

_user_argument = click.argument("user")
_fresh_option = click.option("--fresh", is_flag=True, help="Make it anew first.")


@main.command()
@_user_argument
@_fresh_option
@json_option
@settled
def profile(settings: Settings, user: str, fresh: bool, as_json: bool) -> None:
    """Show the profile of USER."""

    async def work(service: Service) -> Profile:
        owner = service.owner(user)
        found = (await service.views.profile(owner)).profile
        if fresh or found.compiled_at is None:
            await service.worker.make(owner, "profile")
            found = (await service.views.profile(owner)).profile
        return found

    found = run(settings, work)
    if as_json:
        print_json(found)
        return
    rows = table("", "")
    for name, value in msgspec.to_builtins(found).items():
        rows.add_row(name.replace("_", " "), Text(_shown(value)))
    console().print(rows)


def _shown(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {one}" for key, one in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


@main.command()
@_user_argument
@_fresh_option
@json_option
@settled
def topics(settings: Settings, user: str, fresh: bool, as_json: bool) -> None:
    """Show the topics of USER's memories."""

    async def work(service: Service) -> TopicsReply:
        owner = service.owner(user)
        found = await service.views.topics(owner)
        if fresh or not found.topics:
            await service.worker.make(owner, "topics")
            found = await service.views.topics(owner)
        return found

    found = run(settings, work)
    if as_json:
        print_json(found)
        return
    rows = table("id", "size", "topic", "summary")
    for topic in found.topics:
        rows.add_row(topic.id, f"{topic.size:,}", Text(topic.label), Text(topic.summary or ""))
    console().print(rows, f"{found.uncategorized:,} memories uncategorized")


@main.command()
@_user_argument
@click.argument("kind", type=click.Choice(get_args(SummaryKind)))
@click.argument("name")
@_fresh_option
@json_option
@settled
def summary(settings: Settings, user: str, kind: SummaryKind, name: str, fresh: bool, as_json: bool) -> None:
    """Show the summary of KIND and NAME.

    Such as: topic 3, day 2026-11-26, week 2026-W48, month 2026-11, entity Anna.
    """

    async def work(service: Service) -> Summary:
        owner = service.owner(user)
        found = await service.views.summary(owner, kind, name)
        if fresh or found is None:
            packed = packed_tags([name.strip()]) if kind == "entity" else name.strip()
            await service.worker.make(owner, f"summary:{kind}:{packed}")
            found = await service.views.summary(owner, kind, name)
        if found is None:
            raise NotFound(f"there is nothing to tell of {kind} {name!r}")
        return found

    found = run(settings, work)
    if as_json:
        print_json(found)
        return
    console().print(Text(found.text))
    console().print(
        f"\n{found.tokens} tokens, {found.method}, from {len(found.sources)} memories, "
        f"{found.generated_at:%Y-%m-%d %H:%M} UTC"
    )


@main.command()
@_user_argument
@json_option
@settled
def conflicts(settings: Settings, user: str, as_json: bool) -> None:
    """Show what USER's memories seem to say twice, or to contradict."""
    found = run(settings, lambda service: service.views.conflicts(service.owner(user)))
    if as_json:
        print_json(found)
        return
    rows = table("", "older", "newer", "why")
    for one in found.conflicts:
        rows.add_row(one.kind, Text(one.older_text), Text(one.newer_text), one.why or "")
    console().print(rows, f"{found.total:,} in all")
