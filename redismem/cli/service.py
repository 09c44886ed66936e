"""Commands that run the service."""

from __future__ import annotations

from pathlib import Path

import click

from redismem.cli.shell import main, settled
from redismem.demo import run_demo
from redismem.serve import run_service
from redismem.settings import Settings


@main.command()
@click.option("--host", help="Address to listen on; 127.0.0.1 unless given.")
@click.option("--port", type=int, help="8000 unless given; 0 takes a free one.")
@click.option("--workers", type=int, help="Processes; 1 unless given.")
@click.option(
    "--insecure", is_flag=True, default=None, help="Listen where other machines reach it, without API keys."
)
@settled
def serve(settings: Settings) -> None:
    """Run the HTTP service until SIGTERM or Ctrl-C."""
    if run_service(settings):
        raise click.exceptions.Exit(1)


@main.command()
@click.option("--serve", "keep", is_flag=True, help="Keep the service running afterwards, until Ctrl-C.")
@click.option("--chat", is_flag=True, help="Talk in a session, and see the stages of each context come.")
@click.option("--data", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Your own NDJSON.")
@click.option("--question", "questions", multiple=True, help="A question to your own data; may be repeated.")
@click.option("--port", type=int, help="8000 with --serve, else a free one.")
def demo(keep: bool, chat: bool, data: Path | None, questions: tuple[str, ...], port: int | None) -> None:
    """Load a sample life into a service of its own, ask questions and show how they are answered."""
    run_demo(keep=keep, chat=chat, data=data, questions=questions, port=port)
