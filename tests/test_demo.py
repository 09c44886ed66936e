"""`redismem demo`, as the process that a newcomer starts."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import httpx
import pytest
from redis import Redis
from redis.exceptions import RedisError

from redismem.service import Service
from redismem.types import MemoryInput
from tests.conftest import lasting_keys

Start = Callable[..., subprocess.Popen[str]]

_WAIT_S = 120
#: settings of every demo
OWN = {"REDISMEM_EMBEDDER": "deterministic", "REDISMEM_TESTING": "1"}


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder with a short name: the path of a socket may have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="rm-") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def plain_run() -> tuple[str, str]:
    """What `redismem demo` prints, piped; it is the same for all who only read it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("REDISMEM_")}
    with tempfile.TemporaryDirectory(prefix="rm-") as folder:
        folders = {"XDG_DATA_HOME": f"{folder}/data", "TMPDIR": folder}
        command = [sys.executable, "-m", "redismem", "demo"]
        pipe = subprocess.PIPE
        printed = finished(
            subprocess.Popen(command, env={**kept, **folders, **OWN}, stdout=pipe, stderr=pipe, text=True)
        )
        assert list(Path(folder).iterdir()) == [], "everything is removed"
    return printed


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("REDISMEM_")}
    folders = {"XDG_DATA_HOME": str(tmp_path / "data"), "TMPDIR": str(tmp_path)}
    return {**kept, **folders, **OWN}


@pytest.fixture
def demo(environment: dict[str, str]) -> Iterator[Start]:
    """Starts `redismem demo …` in a session of its own; what still runs after the test is ended."""
    started = []

    def demo(*args: str, stdin: int = subprocess.DEVNULL, **variables: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", "redismem", "demo", *args]
        process = subprocess.Popen(
            command,
            env={**environment, **variables},
            stdin=stdin,
            stdout=pipe,
            stderr=pipe,
            text=True,
        )
        started.append(process)
        return process

    yield demo
    for process in started:
        if process.poll() is None:
            process.terminate()  # it ends its own service
        process.communicate(timeout=_WAIT_S)


def finished(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=_WAIT_S)
    assert process.returncode == code, out + err
    assert "Traceback" not in err
    return out, err


def output_until(process: subprocess.Popen[str], word: str) -> str:
    """Return what the process prints up to the line with `word`."""
    assert process.stdout is not None
    pipe, seen = process.stdout.fileno(), b""
    while word.encode() not in seen or not seen.endswith(b"\n"):
        assert select.select([pipe], [], [], _WAIT_S)[0], f"not printed: {word}; only: {seen!r}"
        part = os.read(pipe, 65536)  # past Python's buffer, which select() cannot see
        assert part, f"ended without {word}: {seen!r}"
        seen += part
    return seen.decode()


def ndjson(path: Path, *lines: Mapping[str, object] | str) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def test_the_sample_life_is_stored_asked_and_summed_up(plain_run: tuple[str, str], sample_life: Path) -> None:
    out, err = plain_run
    assert err == ""
    lines = [json.loads(line) for line in sample_life.read_text().splitlines()]
    assert out.startswith(f"{len(lines)} memories stored at http://127.0.0.1:")
    assert " http://127.0.0.1:8000 in " not in out, "it must not need the port of a service that runs"
    questions = json.loads((sample_life.parent / "sample_questions.json").read_text())
    assert f"of {len(questions)} questions" in out
    replaced = {one for line in lines for one in line.get("corrects", ())}
    assert f"Of the {len(replaced)} memories that were corrected, none came back" in out
    assert len(re.findall(r" l3 +\d+\.\d +\d+\.\d +\d+\.\d", out)) == len(questions)
    assert "Median milliseconds: HTTP" in out
    for command in ("redismem demo --serve", "redismem serve", "curl -s http", "redis-cli -s "):
        assert command in out


def test_piped_output_has_no_colours_and_a_table_of_100_columns(plain_run: tuple[str, str]) -> None:
    out, _ = plain_run
    assert "\x1b" not in out
    table, _, _ = out.partition("To go on:")
    assert max(map(len, table.splitlines())) <= 100


def test_own_data_is_asked_own_questions(demo: Start, tmp_path: Path) -> None:
    first: dict[str, object] = {"id": "a", "text": "Ada keeps bees in [Kent]"}
    second: dict[str, object] = {"id": "b", "text": "Ada keeps bees in Sussex now", "corrects": ["a"]}
    data = ndjson(tmp_path / "own.jsonl", first, {"text": "Eve keeps wasps"}, second)
    out, _ = finished(
        demo("--data", data, "--question", "Where are the bees?", "--question", "Who has wasps?")
    )
    assert out.startswith("3 memories stored")
    assert "Sussex" in out
    assert "Kent" not in out
    assert "Eve keeps wasps" in out
    assert "Of the 1 memories that were corrected, none came back" in out
    assert "right memory came first" not in out, "nobody knows which one is right"


#: what a turn of the conversation says of a stage or of all of it: which, and its milliseconds
_STEP = re.compile(r"^  (said|stage \d|whole) +(\d+\.\d) ms", re.MULTILINE)


def turns(out: str) -> dict[str, list[tuple[str, float]]]:
    """Return the steps of each turn of a conversation, by what was said."""
    parts = (part.partition("\n") for part in out.split("» ")[1:])
    return {said: [(step[1], float(step[2])) for step in _STEP.finditer(rest)] for said, _, rest in parts}


def assert_staged(steps: list[tuple[str, float]]) -> None:
    assert [name for name, _ in steps] == ["said", "stage 1", "stage 2", "stage 3", "stage 4", "whole"]
    times = [ms for _, ms in steps[1:]]
    assert times == sorted(times)
    assert times[0] > 0


def test_a_conversation_shows_its_stages_and_leaves_nothing(demo: Start, tmp_path: Path) -> None:
    out, err = finished(demo("--chat"))
    assert err == ""
    shown = turns(out)
    assert len(shown) == 3
    for steps in shown.values():
        assert_staged(steps)
    first = out.split("» ")[1]
    for part in ("profile", "pinned", "matches", "more", "deep"):
        assert re.search(rf"^    {part} +\d+  \S", first, re.MULTILINE), part
    assert re.search(r"asked for: \d+ \(.*(message|entity|topic) \d+.*\); \d+ of\s+them", out)
    assert "came first" not in out, "it is not asked, it talks"
    assert max(map(len, out.partition("To go on:")[0].splitlines())) <= 100
    assert [path.name for path in tmp_path.iterdir()] == []


def test_a_short_conversation_follows_the_questions(plain_run: tuple[str, str]) -> None:
    out, _ = plain_run
    shown = turns(out)
    assert len(shown) == 2
    for steps in shown.values():
        assert_staged(steps)


def test_a_conversation_is_of_own_data_and_what_is_typed(demo: Start, tmp_path: Path) -> None:
    data = ndjson(tmp_path / "own.jsonl", {"text": "Ada keeps bees in [Kent]"})
    master, terminal = pty.openpty()
    os.write(master, b"Where are my bees?\nAnd [b]who[/b] else?\n\n")
    try:
        out, _ = finished(demo("--chat", "--data", data, stdin=terminal))
    finally:
        os.close(master)
        os.close(terminal)
    assert list(turns(out)) == ["Where are my bees?", "And [b]who[/b] else?"]
    assert "Ada keeps bees in [Kent]" in out
    assert [path.name for path in tmp_path.iterdir()] == ["own.jsonl"]


def test_a_conversation_without_a_terminal_says_the_questions(demo: Start, tmp_path: Path) -> None:
    data = ndjson(tmp_path / "own.jsonl", {"text": "Ada keeps bees"})
    out, _ = finished(demo("--chat", "--data", data, "--question", "Where are the bees?"))
    assert list(turns(out)) == ["Where are the bees?"]


def test_own_data_without_questions_shows_the_newest(demo: Start, tmp_path: Path) -> None:
    data = ndjson(tmp_path / "own.jsonl", *({"text": f"bee {number}"} for number in range(250)))
    out, _ = finished(demo("--data", data))
    assert re.findall(r"bee \d+", out) == [f"bee {number}" for number in range(249, 244, -1)]
    assert "--question" in out


def test_an_export_is_own_data_too(demo: Start, tmp_path: Path) -> None:
    stored = {"version": 3, "embedded": True, "created_at": "2026-01-01T00:00:00Z", "sources": ["x"]}
    old = {"id": "a", "text": "old bee", **stored, "superseded_by": "b"}
    out, _ = finished(
        demo("--data", ndjson(tmp_path / "own.jsonl", old, {"id": "b", "text": "new bee", **stored}))
    )
    assert out.startswith("1 memories stored")
    assert "refused" not in out
    assert "new bee" in out
    assert "old bee" not in out


def test_refused_lines_are_named_and_the_others_stored(demo: Start, tmp_path: Path) -> None:
    lines: list[Mapping[str, object]] = [
        {"text": "bee"},
        {"text": "ant", "colour": 1},
        {"text": "wasp", "corrects": ["nobody"]},
    ]
    out, _ = finished(demo("--data", ndjson(tmp_path / "own.jsonl", *lines)))
    assert out.startswith("1 memories stored")
    assert re.search(r"refused: line 2: .*colour", out)
    assert re.search(r"refused: line 3: .*nobody", out)


def test_own_data_that_is_not_ndjson_is_one_line(demo: Start, tmp_path: Path) -> None:
    _, err = finished(demo("--data", ndjson(tmp_path / "own.jsonl", {"text": "bee"}, "bees!")), 1)
    assert err.count("\n") == 1
    assert "line 2 of " in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_serve_keeps_it_until_it_is_told_to_stop(demo: Start, tmp_path: Path, number: signal.Signals) -> None:
    process = demo("--serve", "--port", "0")
    out = output_until(process, "/docs")
    base = out.split()[4]
    assert not base.endswith(":8000"), "0 is any free port"
    assert f"curl -s {base}/v1/users/demo/search" in out
    reply = httpx.post(f"{base}/v1/users/demo/search", json={"text": "sesame"})
    assert reply.json()["memories"]
    process.send_signal(number)
    finished(process)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{base}/health/live")
    assert [path.name for path in tmp_path.iterdir()] == []


def stored_keys(folder: Path) -> int:
    """Return how many keys the demo's Redis holds; 0 before it answers."""
    for path in folder.glob("redismem-demo-*/redis.sock"):
        with contextlib.suppress(RedisError), Redis(unix_socket_path=str(path)) as redis:
            return int(str(redis.dbsize()))
    return 0


def test_an_interrupted_demo_leaves_nothing_behind(demo: Start, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    data = ndjson(folder / "own.jsonl", *({"text": f"bee {number}"} for number in range(20_000)))
    process = demo("--data", data)
    tick, deadline = threading.Event(), time.monotonic() + _WAIT_S
    while stored_keys(tmp_path) < 100:
        assert time.monotonic() < deadline, "the demo stores nothing"
        tick.wait(0.005)
    process.send_signal(signal.SIGINT)
    finished(process, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_a_service_that_cannot_start_is_two_lines(demo: Start) -> None:
    _, err = finished(demo(REDISMEM_REDIS_URL="redis://127.0.0.1:1"), 1)
    assert err.count("\n") == 2
    assert "Start the server" in err


async def test_an_existing_redis_is_left_as_it_was(demo: Start, service: Service, redis_url: str) -> None:
    namesake = service.owner("demo")
    await service.writer.put(namesake, [MemoryInput(text="mine", id="mine")])
    before = set(await lasting_keys(service.client))
    out, _ = finished(demo(REDISMEM_REDIS_URL=redis_url))
    assert "none came back" in out
    left = await lasting_keys(service.client)
    # vectors of queries and what was measured belong to nobody; the demo's worker does whatever is due
    names = (
        "embed:",
        "jobs",
        "fresh:",
        "similar:",
        "profile:",
        "made:",
        "topics:",
        "summar",
        "weights",
        "series:",
    )
    derived = tuple(f"redismem:{name}".encode() for name in names)
    assert {key for key in left if not key.startswith(derived)} == {
        key for key in before if not key.startswith(derived)
    }
    assert (await service.browser.get(namesake, "mine")).text == "mine"
