"""Commands on the archive of old quarters (REDISMEM_ARCHIVE_URL)."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable

import click
from rich.text import Text

from redismem.archivelines import Manifest
from redismem.cli.shell import json_option, main, print_json, run, settled
from redismem.errors import ArchiveDamaged, Conflict
from redismem.keys import Owner
from redismem.progress import console, steps, table
from redismem.service import Service
from redismem.settings import Settings
from redismem.store import owners

_user_option = click.option("-u", "--user", help="Only this user's; else of all users of the store.")
_quarter_option = click.option("--quarter", metavar="QUARTER", help="Only this one, such as 2024-Q1.")

Work = Callable[[Service, Owner], Awaitable[dict[str, int]]]


@main.group()
def archive() -> None:
    """Keep old quarters in compressed files instead of Redis."""


@archive.command("list")
@_user_option
@_quarter_option
@json_option
@settled
def list_(settings: Settings, user: str | None, quarter: str | None, as_json: bool) -> None:
    """Show the files; until the next purge they also hold what was deleted or restored."""

    async def work(service: Service) -> list[tuple[Owner, Manifest]]:
        kept = service.archive
        await kept.check()
        found = [
            (owner, item) async for owner in _chosen(service, user) for item in await kept.quarters(owner)
        ]
        return [(owner, item) for owner, item in found if quarter in (None, item.quarter)]

    rows = run(settings, work)
    if as_json:
        print_json([item for _, item in rows])
        return
    shown = table("user", "quarter", "memories", "bytes", "archived", "file")
    for owner, item in rows:
        facts = f"{item.count:,}", f"{item.bytes:,}", f"{item.created:%Y-%m-%d %H:%M}", item.file
        shown.add_row(Text(_name(owner)), item.quarter, *facts)
    console().print(shown)


@archive.command("run")
@_user_option
@_quarter_option
@settled
def run_(settings: Settings, user: str | None, quarter: str | None) -> None:
    """Move what is older than REDISMEM_ARCHIVE_AFTER_QUARTERS to files; run again to go on.

    A quarter that was restored in the last 30 days stays unless --quarter names it.
    """
    now_s = time.time()
    _each(
        settings, user, "archived", lambda service, owner: service.archive.archive_old(owner, now_s, quarter)
    )


@archive.command()
@_user_option
@_quarter_option
@settled
def restore(settings: Settings, user: str | None, quarter: str | None) -> None:
    """Bring archived memories back; what was deleted stays deleted. Run again to go on."""

    async def restored(service: Service, owner: Owner) -> dict[str, int]:
        counts = await service.archive.restore(owner, quarter)
        if counts:
            await service.warmer.warm(owner)
        return counts

    _each(settings, user, "restored", restored)


@archive.command()
@_user_option
@_quarter_option
@settled
def purge(settings: Settings, user: str | None, quarter: str | None) -> None:
    """Take what was deleted or restored out of the files."""

    async def purged(service: Service, owner: Owner) -> dict[str, int]:
        return {"": await service.archive.purge(owner, quarter)}

    _each(settings, user, "purged", purged)


def _each(settings: Settings, user: str | None, done: str, work: Work) -> None:
    """Do the work for the user, or for all, and tell how many memories it was; failing for one stops none."""

    async def all_of_them(service: Service) -> tuple[dict[str, int], list[str]]:
        counts, failed = dict[str, int](), []
        await service.archive.check()
        chosen = [owner async for owner in _chosen(service, user)]
        with steps(done, len(chosen)) as advance:
            for owner in chosen:
                try:
                    found = await work(service, owner)
                except (ArchiveDamaged, Conflict) as exc:
                    found = {}
                    failed.append(f"{_name(owner)}: {exc.message}")
                for name, count in found.items():
                    counts[name] = counts.get(name, 0) + count
                advance()
        return counts, failed

    counts, failed = run(settings, all_of_them)
    for name in sorted(filter(None, counts)):
        click.echo(f"{name}: {counts[name]:,} memories {done}")
    click.echo(f"{done}: {sum(counts.values()):,} memories")
    if failed:
        raise click.ClickException("\n".join(failed))


async def _chosen(service: Service, user: str | None) -> AsyncIterator[Owner]:
    if user is not None:
        yield service.owner(user)
        return
    async for owner in owners(service.client):
        yield owner


def _name(owner: Owner) -> str:
    return f"{owner.namespace}/{owner.user}" if owner.namespace else owner.user
