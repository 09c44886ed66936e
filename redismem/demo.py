"""Shows the service at work: a process of its own, memories and questions over HTTP, and what it costs.

Everything is removed at the end: the embedded Redis lives in a temporary directory, and on a Redis of the
user's the demo has a namespace of its own.
"""

from __future__ import annotations

import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import httpx
import msgspec
from rich.console import Console
from rich.text import Text

from redismem.chat import run_chat
from redismem.embedded import EmbeddedRedis
from redismem.errors import InvalidInput, Misconfigured, RedisMemError, Unavailable
from redismem.keys import Owner
from redismem.progress import console, steps, table
from redismem.settings import Settings
from redismem.types import Memory, MemoryInput, SearchReply

DEMO_USER = "demo"
DEMO_NAMESPACE = "demo"
_USER = f"/v1/users/{DEMO_USER}"

#: port of `--serve`, where the pasted commands of the README find it
DEMO_PORT = 8000

_DATA = Path(__file__).parent / "data"

#: memories, and bytes of them, in one request; half of what the service takes
_BATCH = 100
_BATCH_BYTES = 512 * 1024

#: seconds for one answer; a batch of long memories embeds for a few
_TIMEOUT_S = 120

#: seconds that the service may take to stop: requests, then what is left to embed, then Redis
_STOP_S = 30

#: hits of a question that are shown, and letters of a memory
_SHOWN = 3
_LETTERS = 200

#: what is said where nobody types: about the wedding, what came of it, then something else
_SCRIPT = (
    "When are Noémie and Tiago getting married?",
    "And who is invited?",
    "Which food is Noémie allergic to?",
)

#: seconds between two of these lines; a person would take longer
_PAUSE_S = 0.2

#: seconds that a conversation waits for the first profile: of its own, and beside the questions
_PROFILE_S, _SHORT_S = 5.0, 0.4

#: refused lines that are named
_NAMED = 10

#: what an export holds and only the store may set
_STORE_FIELDS = set(Memory.__struct_fields__) - set(MemoryInput.__struct_fields__)


@dataclass(frozen=True, slots=True)
class _Question:
    text: str
    #: ids of memories that answer it
    expect: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class _Answer:
    question: _Question
    reply: SearchReply
    #: from the first byte sent to the last byte read
    http_ms: float

    @property
    def place(self) -> int | None:
        """Rank of the best expected memory, from 1; None when it is not there."""
        ids = [hit.id for hit in self.reply.memories]
        return min((ids.index(one) + 1 for one in self.question.expect if one in ids), default=None)


@dataclass(slots=True)
class _Loaded:
    """What became of a file."""

    stored: int = 0
    seconds: float = 0.0
    #: ids that a correction replaced
    replaced: set[str] = field(default_factory=set)
    refused: list[str] = field(default_factory=list)


def run_demo(
    *, keep: bool, chat: bool, data: Path | None, questions: Sequence[str], port: int | None
) -> None:
    """Load memories, ask, and print how it went.

    Args:
        keep: leave the service running until SIGINT or SIGTERM.
        chat: say the questions in a session, and show the stages of their contexts, in place of searching.
        data: NDJSON of the user's own; the sample life if None.
        questions: to `data`; without any they are asked for, if somebody sits there.
        port: of the service; None: `DEMO_PORT` with `keep`, else a free one.

    Raises:
        Misconfigured: the service did not start, and has said why on stderr.
        Unavailable: it does not answer any more.
        InvalidInput: `data` is not NDJSON.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):  # a closed window must not leave a service behind
        signal.signal(number, signal.default_int_handler)
    out = console()
    if port is None:
        port = DEMO_PORT if keep else 0
    with ExitStack() as stack:
        stack.enter_context(_answering())
        settings = Settings.from_environment()
        data_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="redismem-demo-")))
        base = stack.enter_context(_service(settings, data_dir, port))
        client = stack.enter_context(httpx.Client(base_url=base, timeout=_TIMEOUT_S))
        _checked(client.delete(_USER))
        stack.callback(lambda: _checked(client.delete(_USER)))
        loaded = _load(client, data or _DATA / "sample_life.jsonl")
        _print_loaded(out, loaded, base)
        chosen = _sample_questions() if data is None else [_Question(text) for text in questions]
        if chat:
            _chat(out, base, [*questions] if data or questions else _SCRIPT)
        elif chosen:
            _print_answers(out, _ask(client, chosen), loaded)
            if data is None:
                run_chat(out, base, DEMO_USER, _SCRIPT[:2], wait_s=_SHORT_S, pause_s=_PAUSE_S)
        elif sys.stdin.isatty():
            _converse(out, client, loaded)
        else:
            _print_newest(out, client)
        first = chosen[0].text if chosen else "What do you know about me?"
        _print_ways(out, settings, base if keep else None, data_dir, first)
        if keep:
            with suppress(KeyboardInterrupt):
                signal.pause()


def _sample_questions() -> list[_Question]:
    asked = msgspec.json.decode((_DATA / "sample_questions.json").read_bytes())
    return [_Question(item["question"], frozenset(item["expect"])) for item in asked]


@contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except httpx.HTTPError as exc:
        raise Unavailable(f"The demo's service does not answer any more: {exc!r}") from exc


@contextmanager
def _service(settings: Settings, data_dir: Path, port: int) -> Iterator[str]:
    """Yield the address of `redismem serve` in a process of its own."""
    command = [sys.executable, "-m", "redismem", "serve", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", str(port), "--data-dir", str(data_dir)]
    command += ["--namespace", DEMO_NAMESPACE if settings.redis_url else ""]
    # what is shown is for reading, and a slow machine would log into it
    environ = {"REDISMEM_SLOW_REQUEST_MS": "0", **os.environ}
    # in a session of its own, so that Ctrl-C ends it after the demo has tidied up
    with subprocess.Popen(  # noqa: S603  # ours
        command, env=environ, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            first = process.stdout.readline()  # it comes when the service answers, or ends without it
            address = next((word.rstrip(",") for word in first.split() if word.startswith("http://")), None)
            if address is None:
                raise Misconfigured("The demo's service did not start; the reason stands above.")
            yield address
        finally:
            process.terminate()
            process.wait(_STOP_S)


def _checked(response: httpx.Response) -> Any:
    reply = msgspec.json.decode(response.content)
    if response.is_error:
        raise RedisMemError(f"The service refused: {reply['error']['message']}")
    return reply


# loading -----------------------------------------------------------------------------------------


def _load(client: httpx.Client, path: Path) -> _Loaded:
    """Store the lines of a file, in their order; a line with `corrects` replaces what it names."""
    loaded = _Loaded()
    started = time.perf_counter()
    lines = [(number, line) for number, line in enumerate(path.read_bytes().splitlines(), 1) if line.strip()]
    batch: list[tuple[int, dict[str, Any]]] = []
    size = 0
    with steps(f"loading {len(lines):,} memories", len(lines)) as advance:
        for number, line in lines:
            memory = _parsed(path, number, line)
            corrects = memory.pop("corrects", None)
            if batch and (corrects or len(batch) == _BATCH or size + len(line) > _BATCH_BYTES):
                _store(client, batch, loaded)
                advance(len(batch))
                batch, size = [], 0
            if corrects:
                _correct(client, number, corrects, memory, loaded)
                advance()
            elif not memory.pop("superseded_by", None):  # of an export: its correction stands elsewhere
                batch.append((number, memory))
                size += len(line)
        if batch:
            _store(client, batch, loaded)
    loaded.seconds = time.perf_counter() - started
    return loaded


def _parsed(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        memory = msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise InvalidInput(f"line {number} of {path} is not a JSON object: {exc}") from exc
    kept = {"superseded_by", "corrects"}
    return {name: value for name, value in memory.items() if name in kept or name not in _STORE_FIELDS}


def _store(client: httpx.Client, batch: list[tuple[int, dict[str, Any]]], loaded: _Loaded) -> None:
    response = client.post(f"{_USER}/memories", json={"memories": [memory for _, memory in batch]})
    if response.status_code == httpx.codes.UNPROCESSABLE_ENTITY:  # all of them were refused
        error = msgspec.json.decode(response.content)["error"]["message"]
        loaded.refused += [f"line {batch[0][0]} and the {len(batch) - 1} after it: {error}"]
        return
    for (number, _), item in zip(batch, _checked(response)["memories"], strict=True):
        if item["outcome"] == "INVALID":
            loaded.refused.append(f"line {number}: {item['error']}")
        else:
            loaded.stored += 1


def _correct(
    client: httpx.Client, number: int, corrects: list[str], memory: dict[str, Any], loaded: _Loaded
) -> None:
    response = client.post(f"{_USER}/corrections", json={"ids": corrects, "memory": memory})
    if response.is_client_error:
        loaded.refused.append(f"line {number}: {msgspec.json.decode(response.content)['error']['message']}")
        return
    _checked(response)
    loaded.stored += 1
    loaded.replaced.update(corrects)


def _print_loaded(out: Console, loaded: _Loaded, base: str) -> None:
    out.print(
        f"{loaded.stored:,} memories stored at {base} in {loaded.seconds:.1f} s, embedding included; "
        f"{len(loaded.replaced)} of them were corrected later."
    )
    for line in loaded.refused[:_NAMED]:
        out.print(Text(f"refused: {line}", style="yellow"))
    if len(loaded.refused) > _NAMED:
        out.print(f"refused: {len(loaded.refused) - _NAMED:,} more")


# asking ------------------------------------------------------------------------------------------


def _ask(client: httpx.Client, questions: Sequence[_Question]) -> list[_Answer]:
    """Ask each question once, after another one that opens connections and wakes threads."""
    _checked(client.post(f"{_USER}/search", json={"text": "Is anybody there?"}))
    answers = []
    for question in questions:
        started = time.perf_counter()
        response = client.post(f"{_USER}/search", json={"text": question.text})
        http_ms = (time.perf_counter() - started) * 1000
        _checked(response)
        reply = msgspec.json.decode(response.content, type=SearchReply)
        answers.append(_Answer(question, reply, http_ms))
    return answers


def _print_answers(out: Console, answers: Sequence[_Answer], loaded: _Loaded) -> None:
    judged = any(answer.question.expect for answer in answers)
    shown = table("question", "", "best memories" + ", ✓ answers it" * judged)
    shown.expand, shown.padding = True, (0, 0)
    shown.columns[0].ratio, shown.columns[2].ratio = 4, 11
    for name in ("score", "by", "embed", "search", "HTTP"):
        shown.add_column(name, justify="right", no_wrap=True)
    for answer in answers:
        timing = answer.reply.timing
        times = [f"{number:.1f}" for number in (timing.embed, timing.search, answer.http_ms)]
        head: list[Text | str] = [Text(answer.question.text)]
        tail = [answer.reply.served_by, *times]
        for place, hit in enumerate(answer.reply.memories[:_SHOWN]):
            expected = hit.id in answer.question.expect
            text = Text(textwrap.shorten(hit.text, _LETTERS, placeholder=" …"))
            if place and not expected:  # a glance is enough
                text = Text(hit.text, style="dim", no_wrap=True, overflow="ellipsis")
            shown.add_row(*head or [""], "✓" * expected, text, f"{hit.score:.2f}", *tail)
            head, tail = [], []
        if not answer.reply.memories:
            shown.add_row(*head, "", "nothing", "", *tail)
        if answer is not answers[-1]:
            shown.add_row()
    out.print(shown)
    _print_summary(out, answers, loaded, judged=judged)


def _print_summary(out: Console, answers: Sequence[_Answer], loaded: _Loaded, *, judged: bool) -> None:
    if judged:
        places = [answer.place or sys.maxsize for answer in answers]
        first, near = places.count(1), sum(place <= _SHOWN for place in places)
        out.print(
            f"The right memory came first for {first} of {len(answers)} questions, in the top 3 for {near}."
        )
    if loaded.replaced:
        found = {hit.id for answer in answers for hit in answer.reply.memories} & loaded.replaced
        back = f"{len(found)} came back" if found else "none came back"
        out.print(
            f"Of the {len(loaded.replaced)} memories that were corrected, {back} (top 10 of every question)."
        )
    columns = {
        "HTTP": [answer.http_ms for answer in answers],
        "embedding": [answer.reply.timing.embed for answer in answers],
        "search": [answer.reply.timing.search for answer in answers],
    }
    for name, numbers in columns.items():
        columns[name] = [statistics.median(numbers), max(numbers)]
    parts = [f"{name} {median:.1f} (max {most:.1f})" for name, (median, most) in columns.items()]
    out.print(f"Median milliseconds: {', '.join(parts)}.")
    out.print(
        "Measured: each question asked once, one after another, by one client on this machine, after one "
        "warm-up request with another text; so its embedding and its search are computed, not remembered. "
        "embed: text to vector. search: the one Redis call. HTTP: all of it, as the client sees it.",
        style="dim",
    )


def _chat(out: Console, base: str, script: Sequence[str]) -> None:
    """Show a conversation: of what somebody types, if somebody sits there, else of the script."""
    if sys.stdin.isatty():
        out.print("Talk with your memories; an empty line ends it.")
        run_chat(out, base, DEMO_USER, iter(lambda: out.input("> ").strip(), ""), wait_s=_PROFILE_S)
    else:
        run_chat(out, base, DEMO_USER, script, wait_s=_PROFILE_S, pause_s=_PAUSE_S)


def _converse(out: Console, client: httpx.Client, loaded: _Loaded) -> None:
    out.print("Ask your memories; an empty line ends it.")
    while text := out.input("> ").strip():
        _print_answers(out, _ask(client, [_Question(text)]), loaded)


def _print_newest(out: Console, client: httpx.Client) -> None:
    shown = table("newest memories", "id")
    for memory in _checked(client.get(f"{_USER}/memories", params={"limit": 5}))["memories"]:
        shown.add_row(Text(memory["text"]), Text(memory["id"]))
    out.print(shown)
    out.print("Ask about them with --question 'What …?' (may be repeated), or in a terminal.")


def _print_ways(out: Console, settings: Settings, running: str | None, data_dir: Path, question: str) -> None:
    """Print how to go on, as lines to paste.

    Args:
        running: address of this service if it stays; None if it ends now.
    """
    base, user, namespace = running or f"http://127.0.0.1:{DEMO_PORT}", "me", settings.namespace
    if running:
        user, namespace = DEMO_USER, DEMO_NAMESPACE if settings.redis_url else ""
        lines = ["The service runs until Ctrl-C, which removes its memories. In another terminal:"]
    else:
        data_dir, question = settings.data_dir, "What must I not eat?"
        lines = [
            "To go on:",
            "  redismem demo --serve    # this one again, kept running until Ctrl-C",
            "  redismem serve           # an empty one that stays, for memories of your own; then elsewhere:",
            f"  redismem add 'I am allergic to sesame.' -u {user}",
        ]
    url = settings.redis_url or EmbeddedRedis(data_dir).url
    body = msgspec.json.encode({"text": question, "limit": 3}).decode()
    head = "-H 'Content-Type: application/json'"
    lines += [
        f"  curl -s {base}/v1/users/{user}/search {head} -d {shlex.quote(body)}",
        f"  {_redis_cli(url)} FT.SEARCH {shlex.quote(Owner(user, namespace).index)} allergic RETURN 1 text",
    ]
    lines.append(f"Every route: {base}/docs")
    out.print()
    for line in lines:
        out.print(line, soft_wrap=True, markup=False)


def _redis_cli(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return f"redis-cli -s {shlex.quote(unquote(parts.path))}"
    return f"redis-cli -h {parts.hostname} -p {parts.port or 6379}"
