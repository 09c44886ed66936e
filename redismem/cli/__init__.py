"""The command line. Commands on memories open the store in their own process; `serve` runs the service."""

from redismem.cli import index, memories, service, store
from redismem.cli.shell import main

__all__ = ["index", "main", "memories", "service", "store"]
