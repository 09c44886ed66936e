"""Commands on API keys. They need Redis only: no embedder, and no lease that others would wait for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from datetime import datetime
from typing import TypeVar

import click
from rich.text import Text

from redismem.apikeys import SCOPES, KeyFacts
from redismem.cli.shell import json_option, main, print_json, settled
from redismem.coherence import Coherence
from redismem.keyring import KeyRing
from redismem.l1 import L1
from redismem.progress import console, table
from redismem.service import open_client
from redismem.settings import MAX_LEASE_S, Settings
from redismem.store import check_server

T = TypeVar("T")


@main.group()
def keys() -> None:
    """Create, list and revoke the API keys of the service."""


@keys.command()
@click.option("--name", required=True, help="Who or what it is for.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    required=True,
    type=click.Choice(SCOPES),
    help="What it allows; may be repeated. admin: everything.",
)
@click.option("--user", "users", multiple=True, help="Whom it is bound to; all users unless given.")
@click.option("--rate", type=float, help="Requests a second in the long run; no limit unless given.")
@click.option("--burst", type=int, help="Requests at once; as many as come in a second unless given.")
@settled
def create(
    settings: Settings,
    name: str,
    scopes: tuple[str, ...],
    users: tuple[str, ...],
    rate: float | None,
    burst: int | None,
) -> None:
    """Create a key and print its token; from the first one on the service is closed to who has none."""
    key, token = _run(
        settings,
        lambda ring: ring.create(
            name=name,
            scopes=scopes,
            namespace=settings.namespace,
            users=users,
            rate_per_s=rate,
            burst=burst,
        ),
    )
    click.echo(token)
    click.echo(f"Keep it, it cannot be shown again. `redismem keys revoke {key.id}` ends it.", err=True)


@keys.command("list")
@json_option
@settled
def list_(settings: Settings, as_json: bool) -> None:
    """Show all keys, the revoked ones too, of all namespaces."""
    found = _run(settings, lambda ring: ring.listed())
    if as_json:
        print_json({"keys": found})
        return
    rows = table("id", "name", "scopes", "namespace", "users", "limit", "created", "revoked")
    for key in found:
        rows.add_row(
            key.id,
            Text(key.name),
            ", ".join(key.scopes),
            Text(key.namespace),
            Text(", ".join(key.users) or "all"),
            _limit(key),
            _moment(key.created_at),
            "" if key.revoked_at is None else _moment(key.revoked_at),
        )
    console().print(rows)


@keys.command()
@click.argument("key_id", metavar="ID")
@settled
def revoke(settings: Settings, key_id: str) -> None:
    """Revoke the key of ID; when this returns no process accepts it any more."""
    key = _run(settings, lambda ring: ring.revoke(key_id))
    click.echo(f"revoked {key.id}")


def _run(settings: Settings, work: Callable[[KeyRing], Awaitable[T]]) -> T:
    async def opened() -> T:
        async with AsyncExitStack() as stack:
            client = await stack.enter_async_context(open_client(settings))
            await check_server(client)
            l1 = L1(max_entries=0, max_bytes=0)
            coherence = Coherence(client, l1, lease_s=settings.lease_s, answers=False)
            coherence.start()
            stack.push_async_callback(coherence.close)
            # a barrier needs the connection on which acknowledgements come; without it leases run out
            with suppress(TimeoutError):
                async with asyncio.timeout(MAX_LEASE_S):
                    await coherence.lived()
            return await work(KeyRing(client, l1, coherence, settings))

    return asyncio.run(opened())


def _limit(key: KeyFacts) -> str:
    return "none" if key.rate_per_s is None else f"{key.rate_per_s:g}/s, {key.capacity:,} at once"


def _moment(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S} UTC"
