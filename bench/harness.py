"""What every bench needs: a server of its own, percentiles, and a result that says where it was measured."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import platform
import random
import re
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
from urllib.parse import urlsplit

import httpx
from redis import Redis

#: words of the sample life that ships with the package, the frequent ones often: natural to a tokenizer
_LIFE = Path(__file__).parent.parent / "redismem" / "data" / "sample_life.jsonl"
VOCABULARY = re.findall(r"[a-z]+", " ".join(json.loads(line)["text"] for line in _LIFE.open()).lower())

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Server:
    """A running `redismem serve` with an embedded Redis in a temporary directory."""

    url: str
    redis_url: str
    #: redis_version, search_version and used_memory of INFO when it was ready
    redis_info: dict[str, Any]


@contextmanager
def running_server(**environment: str) -> Iterator[Server]:
    """Start `redismem serve` as a user would, on a free port; stop it by its process id."""
    with tempfile.TemporaryDirectory(prefix="redismem-bench-") as folder:
        data_dir = Path(folder) / "data"
        port = free_port()
        command = [
            sys.executable,
            "-m",
            "redismem",
            "serve",
            "--port",
            str(port),
            "--data-dir",
            str(data_dir),
        ]
        log = (Path(folder) / "serve.log").open("w+")
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log)
        url = f"http://127.0.0.1:{port}"
        try:
            _wait_ready(url, process, Path(log.name))
            redis_url = f"unix://{data_dir / 'redis.sock'}"
            with Redis.from_url(redis_url) as redis:
                info = redis.info("everything")
            told = {name: info.get(name) for name in ("redis_version", "search_version", "used_memory")}
            yield Server(url, redis_url, told)
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


class Connection:
    """A keep-alive HTTP/1.1 connection; a full client costs as much as what it measures."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = str(parts.hostname), int(parts.port or 80)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def request(self, method: str, path: str, body: object = None) -> tuple[int, bytes]:
        """Return status and body of one request."""
        if self._streams is None or self._streams[0].at_eof():  # idle ones are closed by the server
            self._streams = await asyncio.open_connection(self._host, self._port)
        reader, writer = self._streams
        content = json.dumps(body).encode() if body is not None else b""
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Length: {len(content)}\r\n"
        writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
        raw = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.partition(b":")[2])
            for line in raw.split(b"\r\n")
            if line.lower().startswith(b"content-length")
        )
        return int(raw.split(b" ", 2)[1]), await reader.readexactly(length)

    def close(self) -> None:
        """Close the connection."""
        if self._streams is not None:
            self._streams[1].close()


def sentences(count: int, seed: int, words: tuple[int, int] = (8, 20)) -> list[str]:
    """Return texts of that many words, made distinct by a number."""
    chooser = random.Random(seed)
    return [
        f"{' '.join(chooser.choices(VOCABULARY, k=chooser.randint(*words)))} {number}"
        for number in range(count)
    ]


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
        "packages": {
            package: version(package) for package in ("redis", "starlette", "uvicorn", "onnxruntime")
        },
        "data_sha256": hashlib.sha256(data).hexdigest() if data else None,
        **figures,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
