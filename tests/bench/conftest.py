"""Benches as the tests run them: in processes of their own, on a service that the bench starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"
#: a load as short as one that says something; the same for all, so that results may be compared
SHORT = ("--pattern steady --time-scale 0.01 --people 5 --memories 10 --env REDISMEM_WORKER=0").split()
#: seconds that a short load may take, several times what it takes on an idle machine; and until it is ended
BUDGET_S, LIMIT_S = 90.0, 120.0


@dataclass(frozen=True)
class Loaded:
    """What one real load left: its result, its report, and the seconds it took."""

    path: Path
    html: Path
    took_s: float

    @property
    def result(self) -> dict[str, Any]:
        result: dict[str, Any] = json.loads(self.path.read_text())
        return result

    @property
    def steady(self) -> dict[str, Any]:
        steady: dict[str, Any] = self.result["figures"]["patterns"]["steady"]
        return steady


Load = Callable[..., Loaded]


def bench(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a bench; return what it printed and how it ended. One that is too slow still ends its service."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("REDISMEM_")}
    command = [sys.executable, str(BENCH / name), *map(str, arguments)]
    with subprocess.Popen(
        command, env=environ, cwd=BENCH.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            out, err = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
            pytest.fail(f"{name} took more than {LIMIT_S} s:\n{err}")
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Run the short load on a service with these variables."""

    def one(**environment: str) -> Loaded:
        folder = tmp_path_factory.mktemp("load")
        path, html = folder / "load.json", folder / "load.html"
        chosen = [part for item in environment.items() for part in ("--env", "=".join(item))]
        started = time.perf_counter()
        ended = bench("load.py", *SHORT, *chosen, "--out", path, "--html", html)
        assert ended.returncode == 0, ended.stderr
        return Loaded(path, html, time.perf_counter() - started)

    return one


@pytest.fixture(scope="session")
def loaded(load: Load) -> Loaded:
    """One short load of this build as it is served."""
    return load()
