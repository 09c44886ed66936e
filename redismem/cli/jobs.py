"""Commands on jobs: the worker, what waits for it, and what failed."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import click
import msgspec
from rich.text import Text

from redismem.cli.shell import json_option, main, print_json, run, settled
from redismem.errors import NotFound
from redismem.jobs import DeadLetter, JobCounts
from redismem.progress import console, table
from redismem.service import Service
from redismem.settings import Settings


@main.command()
@click.option("--once", is_flag=True, help="Do what is due, then end.")
@settled
def worker(settings: Settings, once: bool) -> None:
    """Make profiles, topics, summaries and edges until stopped. `redismem serve` does it by itself."""

    async def work(service: Service) -> None:
        if once:
            click.echo(f"{await service.worker.settle():,} jobs done")
        else:
            click.echo(f"{service.worker.id} is at work; Ctrl-C ends it")
            await service.worker.run()

    try:
        # without L1 it takes no lease: a delete must not wait for a process that computes
        run(replace(settings, l1_entries=0), work)
    except KeyboardInterrupt:
        click.echo("what was not done is done by another worker, or the next")


@main.group(invoke_without_command=True)
@click.pass_context
def jobs(ctx: click.Context) -> None:
    """Show the jobs that wait, and those that failed too often; `list` unless told otherwise."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_)


@jobs.command("list")
@json_option
@settled
def list_(settings: Settings, as_json: bool = False) -> None:
    """Show the jobs that wait, and those that failed too often."""

    async def work(service: Service) -> tuple[JobCounts, list[DeadLetter]]:
        return await service.jobs.counts(), await service.jobs.dead()

    counts, dead = run(settings, work)
    if as_json:
        print_json({"jobs": counts, "dead": dead})
        return
    told = msgspec.structs.asdict(counts)
    console().print(", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in told.items()))
    rows = table("dead since", "job", "tries", "error")
    for letter in dead:
        since = f"{datetime.fromtimestamp(letter.at_ms / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC"
        rows.add_row(since, Text(letter.job), str(letter.tries), Text(letter.error))
    if dead:
        console().print(rows, "`redismem jobs retry` lets them wait again")


@jobs.command()
@click.argument("names", metavar="[JOB]…", nargs=-1)
@settled
def retry(settings: Settings, names: tuple[str, ...]) -> None:
    """Let dead letters wait again: all, or each JOB as `redismem jobs list --json` shows it."""
    count = run(settings, lambda service: service.jobs.retry(names))
    if names and not count:
        raise NotFound("no dead letter has such a name")
    click.echo(f"{count:,} jobs wait again")
