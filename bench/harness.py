"""What every bench needs: a server of its own, percentiles, and a result that says where it was measured."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Server:
    """A running `redismem serve` with an embedded Redis in a temporary directory."""

    url: str
    redis_url: str
    data_dir: Path


@contextmanager
def running_server(**environment: str) -> Iterator[Server]:
    """Start `redismem serve` as a user would, on a free port; stop it by its process id."""
    with tempfile.TemporaryDirectory(prefix="redismem-bench-") as folder:
        data_dir = Path(folder) / "data"
        port = free_port()
        command = [sys.executable, "-m", "redismem", "serve", "--port", str(port), "--data-dir", str(data_dir)]
        log = (Path(folder) / "serve.log").open("w+")
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log)
        url = f"http://127.0.0.1:{port}"
        try:
            _wait_ready(url, process, Path(log.name))
            yield Server(url, f"unix://{data_dir / 'redis.sock'}", data_dir)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            log.close()


def _wait_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"redismem serve ended:\n{log.read_text()}")
        try:
            if httpx.get(url + "/health/ready", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.05)
    raise SystemExit(f"redismem serve did not get ready:\n{log.read_text()}")


def free_port() -> int:
    """Return a TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def percentiles(milliseconds: Sequence[float]) -> dict[str, float]:
    """Return p50, p95, p99 and n; nearest rank."""
    ordered = sorted(milliseconds)
    ranks = {f"p{p}": ordered[min(len(ordered) - 1, int(len(ordered) * p / 100))] for p in (50, 95, 99)}
    return {**{name: round(value, 3) for name, value in ranks.items()}, "n": len(ordered)}


def write_result(name: str, figures: dict[str, Any], data: bytes = b"") -> Path:
    """Write bench/results/<name>.json with the figures and the circumstances; return its path."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    result = {
        "bench": name,
        "commit": commit,
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": cpu.partition(":")[2].strip(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {package: version(package) for package in ("redis", "starlette", "uvicorn", "onnxruntime")},
        "data_sha256": hashlib.sha256(data).hexdigest() if data else None,
        **figures,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
