"""Commands on the indexes of users: `redismem index …`."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import get_args

import click

from redismem.cli.shell import json_option, main, print_json, run, settled
from redismem.errors import Conflict, NotFound
from redismem.graph import PROFILES, Graph
from redismem.maintain import Round
from redismem.progress import console, table
from redismem.service import Service
from redismem.settings import HnswProfile, Settings

_user_argument = click.argument("user")

_FIELDS = (
    *("index", "algorithm", "index_state", "embedder", "dim", "graph", "graph_next", "graph_profile"),
    *("archived", "last_activity", "last_read"),
)
_SERVES = {"FLAT": "exact (flat)", "HNSW": "graph (hnsw), exact where there are filters"}


@main.group()
def index() -> None:
    """Show, rebuild and maintain the indexes of users."""


@index.command()
@_user_argument
@json_option
@settled
def show(settings: Settings, user: str, as_json: bool) -> None:
    """Tell how the memories of USER are indexed."""
    told = run(settings, lambda service: _described(service, user))
    if as_json:
        print_json(told)
        return
    rows = table("", "")
    for name, value in told.items():
        rows.add_row(name.replace("_", " "), str(value))
    console().print(rows)


async def _described(service: Service, user: str) -> dict[str, object]:
    owner, client = service.owner(user), service.client
    raw = await client.execute("HMGET", owner.meta, *_FIELDS)
    if raw[0] is None:
        raise NotFound(f"there are no memories of {user!r}")
    meta = dict(zip(_FIELDS, raw, strict=True))
    text = {name: value.decode() for name, value in meta.items() if value is not None}
    told: dict[str, object] = {
        "user": user,
        "memories": await client.execute("ZCARD", owner.ids),
        "serves": _SERVES[text["algorithm"]],
        "state": text.get("index_state", "complete"),
        "embedder": f"{text['embedder']}, {text['dim']} dimensions",
    }
    for name, label in (("graph", "graph"), ("graph_next", "being_built")):
        if graph := Graph.parsed(meta[name]):
            size, used = await client.pipeline(
                [("VCARD", owner.graphs[graph.number]), ("MEMORY", "USAGE", owner.graphs[graph.number])]
            )
            told[label] = (
                f"{graph.profile}: M {graph.links}, efConstruction {graph.width}, EF {graph.ef}; "
                f"{size:,} vectors, {(used or 0) / 2**20:.1f} MB"
            )
    told["profile"] = text.get("graph_profile", f"{service.settings.hnsw_profile} (of the store)")
    told["archived"] = text.get("archived", "nothing")
    used_s = max(float(text.get(name, 0)) for name in ("last_activity", "last_read"))
    told["last_used"] = f"{datetime.fromtimestamp(used_s, UTC):%Y-%m-%d %H:%M:%S} UTC"
    return told


@index.command()
@click.option("--every", type=click.FloatRange(min=1), help="Seconds between rounds; one round unless given.")
@settled
def maintain(settings: Settings, every: float | None) -> None:
    """Give every user the index that fits; archive what is old. `redismem serve` does it by itself."""

    async def work(service: Service) -> None:
        while True:
            report = await service.maintenance.round()
            click.echo(_shown(report))
            if every is None:
                return
            await asyncio.sleep(every)

    run(settings, work)


def _shown(report: Round | None) -> str:
    if report is None:
        return "another process maintains this store"
    done = (
        ", ".join(f"{action} {count:,}" for action, count in sorted(report.done.items())) or "nothing to do"
    )
    parts = [f"{report.users:,} users in {report.took_s:.1f} s", done]
    parts += [f"{report.archived:,} memories archived"] if report.archived else []
    parts += [f"{report.errors:,} go on later, see above"] if report.errors else []
    return "; ".join(parts)


@index.command()
@_user_argument
@click.option(
    "--profile",
    type=click.Choice([*get_args(HnswProfile), "store"]),
    help="The user's own from now on, whatever the number of memories; store: that of the store again.",
)
@settled
def rebuild(settings: Settings, user: str, profile: str | None) -> None:
    """Build the graph of USER anew, beside the one that serves."""

    async def work(service: Service) -> HnswProfile:
        owner = service.owner(user)
        if await service.client.execute("HGET", owner.meta, "index") is None:
            raise NotFound(f"there are no memories of {user!r}")
        await service.indexes.complete(owner, None)
        if profile == "store":
            await service.client.execute("HDEL", owner.meta, "graph_profile")
        elif profile is not None:
            await service.client.execute("HSET", owner.meta, "graph_profile", profile)
        wanted = await service.maintenance.profile(owner)
        if not await service.graphs.build(owner, wanted, restart=True):
            raise Conflict("no graph was built: this Redis has no vector sets (8 has), or the user is going")
        return wanted

    built = run(settings, work)
    parameters = PROFILES[built]
    click.echo(f"built: {built}, M {parameters.links}, efConstruction {parameters.width}, EF {parameters.ef}")
