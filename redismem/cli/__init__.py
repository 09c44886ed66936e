"""The command line. Commands on memories open the store in their own process; `serve` runs the service."""

from redismem.cli import archive, derived, index, jobs, keys, memories, service, store
from redismem.cli.shell import main

__all__ = ["archive", "derived", "index", "jobs", "keys", "main", "memories", "service", "store"]
