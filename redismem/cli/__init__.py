"""The command line. Commands on memories open the store in their own process; `serve` runs the service."""

from redismem.cli import archive, index, memories, service, store
from redismem.cli.shell import main

__all__ = ["archive", "index", "main", "memories", "service", "store"]
