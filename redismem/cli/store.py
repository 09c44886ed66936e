"""Commands on a whole store."""

from __future__ import annotations

import asyncio

import click

from redismem.cli.shell import json_option, main, print_json, run, settled
from redismem.doctor import examine
from redismem.progress import console, findings_table, steps
from redismem.reembed import Reembedder
from redismem.service import Service
from redismem.settings import Settings
from redismem.store import owners


@main.command()
@settled
def reembed(settings: Settings) -> None:
    """Move all users to the configured embedder, and give vectors to what has none; run again to go on."""

    async def work(service: Service) -> tuple[int, int]:
        total = sum([1 async for _ in owners(service.client)])
        with steps("embedding", total) as advance:
            mover = Reembedder(service.client, service.functions, service.embedder)
            return total, await mover.run(lambda *_: advance())

    users, made = run(settings, work, any_embedder=True)
    click.echo(f"vectors made: {made:,}; users: {users:,}")


@main.command()
@json_option
@click.option("--repair", is_flag=True, help="Rebuild indexes that are missing or incomplete.")
@settled
def doctor(settings: Settings, as_json: bool, repair: bool) -> None:
    """Examine Redis, Functions, indexes and embedder, and say what to do."""
    findings = asyncio.run(examine(settings, repair=repair))
    failed = any(finding.status == "fail" for finding in findings)
    if as_json:
        print_json({"ok": not failed, "findings": findings})
    else:
        rows = [(item.status, item.name, item.seen, item.remedy or "") for item in findings]
        console().print(findings_table(rows))
    if failed:
        raise click.exceptions.Exit(1)
