"""Runs the HTTP service: one Redis, checked before any worker starts, and uvicorn's workers on it."""

from __future__ import annotations

import asyncio
import logging
import logging.config
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import uvicorn
from threadpoolctl import threadpool_limits

from redismem.embed import Embedder, open_embedder
from redismem.embedded import EmbeddedRedis
from redismem.errors import Misconfigured, RedisUnavailable
from redismem.http.app import end_with_parent
from redismem.keys import API_KEYS
from redismem.logs import log_config
from redismem.lualib import load_libraries
from redismem.metrics import share
from redismem.service import open_client, open_service
from redismem.settings import Settings
from redismem.store import check_server, claim

#: seconds that running requests may still take after SIGTERM
_GRACE_S = 10

#: seconds between two looks at the worker, and until one that died is started again
_LOOK_S, _RESTART_S = 0.2, 2.0

#: priority of the worker's process where it cannot be lower than all others
_NICE = 10

logger = logging.getLogger(__name__)


def run_service(settings: Settings) -> bool:
    """Serve until SIGTERM or Ctrl-C; return whether it failed, which uvicorn has logged.

    Raises:
        Misconfigured, EmbedderMismatch, Unavailable: it cannot start like this.
    """
    if settings.workers > 1 and "REDISMEM_EMBEDDER_THREADS" not in os.environ:
        threads = max(1, (os.cpu_count() or 1) // settings.workers)
        settings = replace(settings, embedder_threads=min(settings.embedder_threads, threads))
    # uvicorn raises the signal that ended it once more; the rest of this function must still run then
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failed = False
    with suppress(KeyboardInterrupt), asyncio.Runner() as runner:
        # beside the loading of Redis, which may take longer
        trying = runner.get_loop().create_task(_tried_embedder(settings))
        failed = _serve_on(runner, trying, settings)
    return failed


def _serve_on(runner: asyncio.Runner, trying: asyncio.Task[Embedder], settings: Settings) -> bool:
    with (
        _redis_of(settings, runner) as (url, where),
        TemporaryDirectory(prefix="redismem-metrics-") as folder,
    ):
        settings = replace(settings, redis_url=url)
        runner.run(_check(settings, trying))
        share(Path(folder))
        settings = replace(settings, port=_free_port(settings.host, settings.port))
        os.environ.update(settings.to_environment())
        threading.Thread(target=_announce, args=(settings, where), daemon=True).start()
        with _working(settings):
            return _serve(settings)


@contextmanager
def _working(settings: Settings) -> Iterator[None]:
    """Run a worker beside the block, in a process of its own; one that dies is started again."""
    if not settings.worker:
        yield
        return
    ending = threading.Event()
    watch = threading.Thread(target=_kept_alive, args=(settings, ending), daemon=True)
    watch.start()
    try:
        yield
    finally:
        ending.set()
        watch.join()


def _kept_alive(settings: Settings, ending: threading.Event) -> None:
    context = multiprocessing.get_context("spawn")
    while not ending.is_set():
        process = context.Process(target=work, args=(settings,), name="redismem-worker", daemon=True)
        process.start()
        while process.is_alive() and not ending.wait(_LOOK_S):
            pass
        if ending.is_set():
            process.terminate()
            process.join(_GRACE_S)
            process.kill()
        else:
            logger.warning("the worker ended with code %s and is started again", process.exitcode)
            ending.wait(_RESTART_S)


def work(settings: Settings) -> None:
    """Do the store's jobs until this process or its parent ends; with low priority: reads come first."""
    os.nice(_NICE)
    with suppress(AttributeError, OSError):  # Linux has it
        # whatever wakes up takes the core at once, and not when a time slice ends, as with any nice value
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    logging.config.dictConfig(log_config(settings))
    end_with_parent()
    # it answers no reads; threads of BLAS and of the model wait for each other where the cores are busy
    settings = replace(settings, l1_entries=0, embedder_threads=1)
    try:
        with threadpool_limits(1):
            asyncio.run(_work(settings))
    except RedisUnavailable as exc:
        raise SystemExit(f"the worker needs Redis: {exc.message}") from exc


async def _work(settings: Settings) -> None:
    async with open_service(settings) as service, asyncio.TaskGroup() as tasks:
        service.telemetry.serves = False
        tasks.create_task(service.telemetry.run())
        tasks.create_task(service.worker.run())


def _serve(settings: Settings) -> bool:
    try:
        uvicorn.run(
            "redismem.http.app:worker_app",
            factory=True,
            host=settings.host,
            port=settings.port,
            workers=settings.workers,
            loop="uvloop",
            http="httptools",
            ws="none",
            access_log=False,
            proxy_headers=False,
            log_config=log_config(settings),
            timeout_graceful_shutdown=_GRACE_S,
        )
    except SystemExit:  # uvicorn has logged why
        return True
    return False


@contextmanager
def _redis_of(settings: Settings, runner: asyncio.Runner) -> Iterator[tuple[str, str]]:
    """Yield the URL of the Redis to use, started if none is named, and how to show it."""
    if settings.redis_url:
        url = urlsplit(settings.redis_url)
        port = f":{url.port}" if url.port else ""
        yield settings.redis_url, f"{url.scheme}://{url.hostname or ''}{port}{url.path}"
        return
    stack = AsyncExitStack()
    try:
        redis = runner.run(stack.enter_async_context(EmbeddedRedis(settings.data_dir)))
        if redis.pid is None:  # it would end with its owner, and the service would be without
            raise Misconfigured(
                f"Another redismem process runs the Redis of {settings.data_dir}: "
                "end it, or name another --data-dir."
            )
        yield redis.url, f"{settings.data_dir} (embedded Redis)"
    finally:
        runner.run(stack.aclose())


async def _tried_embedder(settings: Settings) -> Embedder:
    """Return an embedder that could be opened, and is closed again."""
    embedder = await open_embedder(settings)
    await embedder.close()
    return embedder


async def _check(settings: Settings, trying: asyncio.Task[Embedder]) -> None:
    """Raise what would keep the workers from starting, before there are any."""
    async with open_client(settings) as client:
        await check_server(client)
        await load_libraries(client)
        await claim(client, await trying)
        if not settings.may_be_open and not await client.execute("HLEN", API_KEYS):
            raise Misconfigured(
                f"{settings.host} can be reached from other machines, and there are no API keys: make one "
                "with `redismem keys create --name NAME --scope read --scope write`, or listen on 127.0.0.1, "
                "or add --insecure."
            )


def _free_port(host: str, port: int) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as exc:
            raise Misconfigured(
                f"Cannot listen on {host}, port {port} ({exc}): "
                "end what listens there, or choose another --port."
            ) from exc
        return int(probe.getsockname()[1])


def _announce(settings: Settings, where: str) -> None:
    """Print the address as soon as somebody listens there."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104  # compared only
    while True:
        with suppress(OSError), socket.create_connection((host, settings.port), timeout=1):
            break
        time.sleep(0.02)
    base = f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"
    print(f"redismem serves {base}, documentation at {base}/docs\nData: {where}\nCtrl-C stops.", flush=True)
