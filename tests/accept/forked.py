"""Service processes that are forked from one that has imported everything: the only place that makes them.

A start then costs 0.2 s of a core, of which an interpreter that imports the service takes 1.4.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

#: what a process does with its arguments; it tells its port before it serves
Main = Callable[[Sequence[str], Callable[[int], None]], None]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["__main__", "tests.accept.serve_child", "tests.accept.history_child"])


class Forked:
    """A process that does `main`, with no REDISMEM_* but those of `settings`; what it prints is in `log`."""

    def __init__(self, main: Main, arguments: Sequence[str], settings: Mapping[str, str], log: Path) -> None:
        self.log = log
        self._told, tells = _context.Pipe(duplex=False)
        environ = {name: value for name, value in os.environ.items() if not name.startswith("REDISMEM_")}
        # no daemon: those may have no children, and a service has a pool
        self._process = _context.Process(
            target=_run, args=(main, list(arguments), environ | settings, log, tells), daemon=False
        )
        self._process.start()
        tells.close()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def port(self) -> int:
        """Wait until it has told its port. Raises: AssertionError when it ends before."""
        try:
            port: int = self._told.recv()
        except EOFError:
            raise AssertionError(self.log.read_text()) from None
        finally:
            self._told.close()
        return port

    def poll(self) -> int | None:
        """Return its status, as subprocess does; None while it runs."""
        return self._process.exitcode

    def send_signal(self, how: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, how)

    def kill(self) -> None:
        """Kill it and wait until it has ended."""
        self._process.kill()
        self._process.join()


def _run(
    main: Main, arguments: Sequence[str], environ: Mapping[str, str], log: Path, tells: Connection
) -> None:
    os.environ.clear()
    os.environ.update(environ)
    # what the test allows itself, which the process that this one was forked from does not know
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with log.open("w") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)

    def tell(port: int) -> None:
        tells.send(port)
        tells.close()

    main(arguments, tell)
