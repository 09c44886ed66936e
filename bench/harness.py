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
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import httpx
import uvloop
from redis import Redis
from redis.exceptions import RedisError

T = TypeVar("T")

#: words of the sample life that ships with the package, the frequent ones often: natural to a tokenizer
_LIFE = Path(__file__).parent.parent / "redismem" / "data" / "sample_life.jsonl"
VOCABULARY = re.findall(
    r"[a-z]+", " ".join(json.loads(line)["text"] for line in _LIFE.read_text().splitlines()).lower()
)

RESULTS = Path(__file__).parent / "results"

#: answers POST / with {}, POST /large with as many bytes as it is told; on uvicorn as `redismem serve` is
EMPTY_APP = """
import sys, uvicorn
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route
def answering(body):
    async def empty(request):
        return Response(body, media_type="application/json")
    return empty
bodies = {"/": b"{}", "/large": b" " * int(sys.argv[2])}
routes = [Route(path, answering(body), methods=["POST"]) for path, body in bodies.items()]
app = Starlette(routes=routes)
fast = {"loop": "uvloop", "http": "httptools", "access_log": False}
uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", **fast)
"""


@dataclass(frozen=True)
class Server:
    """A running `redismem serve`, with an embedded Redis in a temporary directory unless it was given one."""

    url: str
    redis_url: str
    #: of the process that was started; with one worker it is the one that serves
    pid: int
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
            redis_url = environment.get("REDISMEM_REDIS_URL") or f"unix://{data_dir / 'redis.sock'}"
            with Redis.from_url(redis_url) as redis:
                info = redis.info("everything")
            told = {name: info.get(name) for name in ("redis_version", "search_version", "used_memory")}
            yield Server(url, redis_url, process.pid, told)
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


@contextmanager
def empty_endpoint(large_bytes: int) -> Iterator[str]:
    """Run an empty endpoint, POST / and POST /large (a reply of so many bytes); yield its URL."""
    port = free_port()
    with subprocess.Popen([sys.executable, "-c", EMPTY_APP, str(port), str(large_bytes)]) as process:
        try:
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on uvloop: a generator on asyncio's own loop takes the cores from what it measures."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


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


def request_bytes(method: str, path: str, body: object = None) -> bytes:
    """Return a whole HTTP/1.1 request, for `closed_loop`."""
    content = json.dumps(body).encode() if body is not None else b""
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(content)}\r\n"
    return head.encode() + b"Content-Type: application/json\r\n\r\n" + content


#: name and bytes of a request
Request = tuple[str, bytes]
#: told the name of a request, its milliseconds, and the reply, head included
Seen = Callable[[str, float, bytes], None]


class _Client(asyncio.Protocol):
    """A client of `closed_loop`: reads just enough of a reply to see its end."""

    def __init__(self, next_request: Callable[[], Request | None], seen: Seen) -> None:
        self._next_request = next_request
        self._seen = seen
        self._name = ""
        self._sent_s = 0.0
        self._reply = b""
        self._length = 0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:  # uvloop's is no asyncio.Transport
        self._transport = transport
        self._send()

    def _send(self) -> None:
        request = self._next_request()
        if request is None:
            self.ended.set_result(None)
            self._transport.close()
            return
        self._name, content = request
        self._reply, self._length = b"", 0
        self._sent_s = time.perf_counter()
        self._transport.write(content)

    def data_received(self, data: bytes) -> None:
        reply = self._reply = self._reply + data if self._reply else data
        if not self._length:
            head = reply.find(b"\r\n\r\n")
            if head < 0:
                return
            at = reply.index(b"content-length: ", 0, head) + 16  # uvicorn's are lower case
            self._length = head + 4 + int(reply[at : reply.index(b"\r", at)])
        if len(reply) >= self._length:
            self._seen(self._name, (time.perf_counter() - self._sent_s) * 1000, reply)
            self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(exc or ConnectionError("the server closed the connection"))


async def closed_loop(
    url: str, requests: Iterator[Request], seen: Seen, *, clients: int = 1, seconds: float = float("inf")
) -> float:
    """Let clients send requests, each the next one as soon as its reply is whole; return the seconds it took.

    Args:
        requests: what all clients take from; ends the run, unless the time does.
    """
    ends_s = time.perf_counter() + seconds

    def next_request() -> Request | None:
        return None if time.perf_counter() >= ends_s else next(requests, None)

    loop, parts = asyncio.get_running_loop(), urlsplit(url)
    host, port = str(parts.hostname), int(parts.port or 80)
    started_s = time.perf_counter()
    made = [loop.create_connection(lambda: _Client(next_request, seen), host, port) for _ in range(clients)]
    await asyncio.gather(*(client.ended for _, client in await asyncio.gather(*made)))
    return time.perf_counter() - started_s


def redis_calls(redis: Redis) -> Counter[str]:
    """Return how often Redis ran each command, those inside Functions included, and `reads` from sockets."""
    calls = {name.removeprefix("cmdstat_"): row["calls"] for name, row in redis.info("commandstats").items()}
    calls.pop("info", None)
    return Counter({**calls, "reads": redis.info("stats")["total_reads_processed"]})


@dataclass
class Tally:
    """What clients saw: milliseconds by name, who served a search, how many embedded, errors by status."""

    times: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    served: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    embedded: int = 0
    seconds: float = 0.0

    def saw(self, name: str, took_ms: float, reply: bytes) -> None:
        """Count a reply of `closed_loop`."""
        self.times[name].append(took_ms)
        if not reply.startswith(b"HTTP/1.1 200"):
            self.errors[f"{name} {reply[9:12].decode()}"] += 1
        if (at := reply.rfind(b'"served_by":"')) > 0:
            self.served[reply[at + 13 : at + 15].decode()] += 1
            self.embedded += reply.find(b'"embed":0.0', at) < 0

    @property
    def n(self) -> int:
        return sum(map(len, self.times.values()))

    def figures(self) -> dict[str, Any]:
        """Return percentiles by name, and requests a second of all."""
        return {
            **{name: percentiles(times) for name, times in sorted(self.times.items())},
            "per_s": round(self.n / self.seconds, 1),
            "served_by": dict(self.served),
            "errors": dict(self.errors),
        }


def cpu_ms(server: Server) -> Counter[str]:
    """Return the CPU milliseconds that service, Redis and this process have used, and the `time` it is."""
    with Redis.from_url(server.redis_url) as redis:
        redis_s = _cpu_s(int(redis.info("server")["process_id"]))
    service_s = _cpu_s(server.pid) - redis_s  # it started Redis
    seconds = {"service": service_s, "redis": redis_s, "generator": time.process_time(), "time": time.time()}
    return Counter({name: round(1000 * value) for name, value in seconds.items()})


def _cpu_s(pid: int) -> float:
    return sum(_own_cpu_s(one) for one in processes(pid))


def _own_cpu_s(pid: int) -> float:
    with suppress(OSError):  # it ended meanwhile
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    return 0.0


def processes(pid: int) -> list[int]:
    """Return a process and all that it started, directly or not, and that still run."""
    found = [pid]
    for parent in found:  # grows meanwhile
        with suppress(OSError):
            for path in Path(f"/proc/{parent}/task").glob("*/children"):
                found += map(int, path.read_text().split())
    return found


def _rss_bytes(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


class Watch(threading.Thread):
    """Looks every few seconds at what the processes of a service and its Redis use; a context manager.

    Args:
        pid: of the service; None: not known.
        redis_url: of its Redis; None: not known.

    Cost: about 2 ms a look, beside the thread that sends.
    """

    def __init__(self, pid: int | None, redis_url: str | None, every_s: float) -> None:
        super().__init__(daemon=True)
        self._pid, self._every_s = pid, every_s
        self._redis = Redis.from_url(redis_url) if redis_url else None
        self._ending = threading.Event()
        #: at_s since the begin; RSS of the service (all its processes, shared pages in each) and of Redis,
        #: what Redis counts as used; CPU seconds so far of service, Redis and this process
        self.rows: list[dict[str, float | None]] = []

    def __enter__(self) -> Self:
        self._began_s = time.perf_counter()
        self._look()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self.join()
        self._look()
        if self._redis is not None:
            self._redis.close()

    def run(self) -> None:
        while not self._ending.wait(self._every_s):
            self._look()

    def _look(self) -> None:
        redis_pid, used = None, None
        if self._redis is not None:
            with suppress(RedisError):
                info = self._redis.info("everything")
                redis_pid, used = int(info["process_id"]), info["used_memory"]
        service = [pid for pid in processes(self._pid) if pid != redis_pid] if self._pid else []
        self.rows.append(
            {
                "at_s": round(time.perf_counter() - self._began_s, 2),
                "service_rss_bytes": sum(map(_rss_bytes, service)) if service else None,
                "redis_rss_bytes": _rss_bytes(redis_pid) if redis_pid else None,
                "redis_used_bytes": used,
                "service_cpu_s": round(sum(map(_own_cpu_s, service)), 2) if service else None,
                "redis_cpu_s": round(_own_cpu_s(redis_pid), 2) if redis_pid else None,
                "generator_cpu_s": round(time.process_time(), 2),
            }
        )


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


def write_result(name: str, figures: dict[str, Any], data: bytes = b"", path: Path | None = None) -> Path:
    """Write the figures and the circumstances; return the path, bench/results/<name>.json unless given."""
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
    if path is None:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
