"""`redismem serve` as operators run it: what its processes count together, and whom it refuses to serve."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.accept.conftest import is_running, redis_pid
from tests.conftest import until
from tests.http.operating import Samples, samples
from tests.unit.test_spans import collecting

pytestmark = pytest.mark.accept

SEARCH, PUT = "/v1/users/ada/search", "/v1/users/ada/memories"
REQUESTS = 40


@dataclass
class Served:
    """A service, its process and where it listens. Each request has a connection of its own."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    async def ask(self, method: str, path: str, **more: object) -> httpx.Response:
        async with httpx.AsyncClient(base_url=self.url, timeout=20) as http:
            return await http.request(method, path, **more)  # type: ignore[arg-type]  # httpx's own

    async def metrics(self) -> Samples:
        reply = await self.ask("GET", "/metrics")
        assert reply.status_code == 200, reply.text
        return samples(reply.text)

    async def told(self, *name: str) -> float:
        with suppress(httpx.TransportError):  # a process that was killed may have had the connection
            return (await self.metrics()).get(name, 0)
        return -1

    async def tells(self, value: float, *name: str) -> bool:
        return await self.told(*name) == value

    def children(self, *, nice: bool) -> list[int]:
        """Return the pids of its processes: those that serve, or (nice) the worker."""
        found = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        pids = [int(pid) for path in found for pid in path.read_text().split()]
        return [
            pid
            for pid in pids
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
            and is_running(pid)
            and (os.getpriority(os.PRIO_PROCESS, pid) > 0) == nice
        ]

    def folder(self) -> Path:
        """Return where its processes share what they count."""
        environ = Path(f"/proc/{self.children(nice=False)[0]}/environ").read_bytes().split(b"\0")
        told = dict(item.decode().partition("=")[::2] for item in environ if item)
        return Path(told["PROMETHEUS_MULTIPROC_DIR"])

    async def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        await until("it has ended", lambda: asyncio.sleep(0, self.process.poll() is not None), 40)
        return self.process.returncode


Serve = Callable[..., Awaitable[Served]]


@pytest.fixture
def environment(data_dir: Path) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("REDISMEM_", "OTEL_", "PROMETHEUS_"))
    }
    kept |= {"REDISMEM_DATA_DIR": str(data_dir), "REDISMEM_TESTING": "1"}
    return kept | {"REDISMEM_EMBEDDER": "deterministic", "PYTHONUNBUFFERED": "1"}


@pytest.fixture
async def serve(environment: dict[str, str], data_dir: Path, tmp_path: Path) -> AsyncIterator[Serve]:
    """Start `redismem serve` with options and wait until it is ready."""
    started: list[Served] = []

    async def one(*options: str, **environ: str) -> Served:
        command, log = [sys.executable, "-m", "redismem", "serve", "--port", "0", *options], tmp_path / "log"
        with log.open("a") as written:
            process = subprocess.Popen(
                command, env={**environment, **environ}, stdout=subprocess.PIPE, stderr=written, text=True
            )
        assert process.stdout is not None
        with process.stdout as output:
            first = await asyncio.to_thread(output.readline)
        assert first.startswith("redismem serves"), log.read_text()
        served = Served(process, first.split()[2].rstrip(","), log)
        started.append(served)

        async def ready() -> bool:
            with suppress(httpx.TransportError):
                return (await served.ask("GET", "/health/ready")).status_code == 200
            return False

        await until("it is ready", ready, 40)
        return served

    yield one
    for served in started:
        if served.process.poll() is None:
            await served.end()
    if (data_dir / "server.lock").exists():
        pid = redis_pid(data_dir)
        await until("Redis has ended", lambda: asyncio.sleep(0, not is_running(pid)), 15)


def command(environment: dict[str, str], *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "redismem", *args],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


async def test_processes_count_together_whichever_is_asked_and_whichever_dies(serve: Serve) -> None:
    served = await serve("--workers", "2")
    await until("both serve", lambda: served.tells(2, "redismem_processes"), 30)
    assert (await served.ask("POST", PUT, json={"text": "likes tea"})).status_code == 201
    replies = [await served.ask("POST", SEARCH, json={"text": f"tea {i % 7}"}) for i in range(REQUESTS)]
    assert {reply.status_code for reply in replies} == {200}
    name = "redismem_requests_total", "search", "ok"
    await until("all are counted", lambda: served.tells(REQUESTS, *name))
    processes = set()
    for _ in range(20):
        found = await served.metrics()
        assert found[name] == REQUESTS
        reads = [value for key, value in found.items() if key[0] == "memory_retrieval_seconds_count"]
        assert sum(reads) == REQUESTS
        assert found["redismem_processes",] == 2
        assert found["redismem_lease_live",] == 2
        assert found["redismem_in_flight_limit",] == 2 * 256
        assert found["redismem_redis_up",] == 1
        processes.add((await served.ask("GET", "/v1/stats")).json()["process"])
    assert len(processes) == 2, "the same process answered always"

    async def history() -> bool:
        told = (await served.ask("GET", "/v1/dashboard")).json()
        return bool(told["latency"]["hour"]["count"] == REQUESTS and told["processes"] == 2)

    await until("the history has them", history, 30)
    # the worker gives way to everything else on the cores
    await until("jobs are counted", lambda: done_jobs(served), 120)

    before, folder = served.children(nice=False), served.folder()
    os.kill(before[0], signal.SIGKILL)
    await until("another serves in its place", lambda: replaced(served, before), 40)
    await until("the new one counts", lambda: served.tells(2, "redismem_processes"), 30)
    assert await served.told(*name) == REQUESTS
    assert await served.told("redismem_in_flight_limit") == 2 * 256
    assert not list(folder.glob(f"gauge_live*_{before[0]}.db"))
    assert list(folder.glob(f"counter_{before[0]}.db"))

    assert await served.end() == 0, served.log.read_text()
    assert not folder.exists()
    assert "Traceback" not in served.log.read_text()


async def done_jobs(served: Served) -> bool:
    found = await served.metrics()
    kinds = {key[1] for key, value in found.items() if key[0] == "redismem_jobs_done_total" and value}
    timed = {key[1] for key, value in found.items() if key[0] == "redismem_job_seconds_count" and value}
    return "link" in kinds and "link" in timed  # the only one that is due at once after a write


async def replaced(served: Served, before: list[int]) -> bool:
    now = served.children(nice=False)
    return before[0] not in now and len(now) == len(before)


async def test_where_others_can_connect_it_starts_with_a_key_or_when_told_to(
    serve: Serve, environment: dict[str, str]
) -> None:
    everywhere = ("--host", "0.0.0.0", "--port", "0")
    refused = await asyncio.to_thread(command, environment, "serve", *everywhere)
    assert refused.returncode == 1
    assert refused.stdout == ""
    (line,) = refused.stderr.splitlines()
    assert line.startswith("Error: 0.0.0.0 can be reached from other machines, and there are no API keys")
    assert "redismem keys create" in line
    assert "--insecure" in line

    told = await serve("--host", "0.0.0.0", "--insecure")
    assert (await told.ask("GET", PUT)).status_code == 200
    assert await told.end() == 0

    created = await asyncio.to_thread(
        command, environment, "keys", "create", "--name", "test", "--scope", "read"
    )
    assert created.returncode == 0, created.stderr
    closed = await serve("--host", "0.0.0.0")
    assert (await closed.ask("GET", PUT)).status_code == 401
    shown = {"X-API-Key": created.stdout.strip()}
    assert (await closed.ask("GET", PUT, headers=shown)).status_code == 200
    assert (await closed.ask("GET", "/metrics", headers=shown)).status_code == 403
    assert (await closed.ask("GET", "/docs")).status_code == 200


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_spans_of_real_requests_hold_no_text_and_the_last_ones_arrive_at_the_end(
    serve: Serve, workers: str
) -> None:
    """Those of a request just before SIGTERM too, from every process."""
    with collecting() as collector:
        otel = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "600000"}
        served = await serve("--workers", workers, **otel)
        trace_id = "0af7651916cd43dd8448eb211c80319c"
        parent = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}
        body = {"text": "the canary keeps bees"}
        assert (await served.ask("POST", "/v1/users/canary/memories", json=body, headers=parent)).is_success
        for i in range(10):
            wanted = {"text": f"canary bees {i}"}
            reply = await served.ask("POST", "/v1/users/canary/search", json=wanted, headers=parent)
            assert reply.status_code == 200
        assert await served.end() == 0
        ours = [span for span in collector.spans() if span.trace_id.hex() == trace_id]
    names = [span.name for span in ours]
    assert (names.count("put"), names.count("search")) == (1, 10)
    assert {"redis", "embed"} <= set(names)
    requests = {span.span_id for span in ours if span.parent_span_id.hex() == "b7ad6b7169203331"}
    assert len(requests) == 11
    assert {span.parent_span_id for span in ours if span.name in ("redis", "embed")} <= requests
    assert not any("canary" in str(span) for span in ours)
