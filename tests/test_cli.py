"""The command line, in process on the test server, and `serve` as the process that it is."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import msgspec
import pytest
from click.testing import CliRunner, Result

from redismem.cli import main
from redismem.jobs import MOST_TRIES, Job
from redismem.service import Service
from redismem.types import Memory, MemoryInput, SearchReply
from redismem.views import ProfilePatch, Summary, TopicsReply
from tests.conftest import lasting_keys

Run = Callable[..., Result]
Start = Callable[..., subprocess.Popen[str]]

_WAIT_S = 60


@pytest.fixture
def run(service: Service, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Runs a command on the test server, which is emptied afterwards."""
    monkeypatch.setenv("REDISMEM_REDIS_URL", redis_url)
    monkeypatch.setenv("REDISMEM_EMBEDDER", "deterministic")
    monkeypatch.setenv("REDISMEM_TESTING", "1")

    def run(*args: str, stdin: str | None = None) -> Result:
        return CliRunner().invoke(main, args, input=stdin)

    handler = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, handler)  # `serve` sets its own


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("REDISMEM_")}
    own = {"REDISMEM_EMBEDDER": "deterministic", "REDISMEM_TESTING": "1", "XDG_DATA_HOME": str(tmp_path)}
    return {**kept, **own}


@pytest.fixture
def start(environment: dict[str, str]) -> Iterator[Start]:
    """Starts `python -m redismem …`; what still runs after the test is ended."""
    started = []

    def start(*args: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", "redismem", *args]
        started.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def address(process: subprocess.Popen[str]) -> str:
    """Wait for the first line of `serve`; it holds the address."""
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], _WAIT_S)[0], "serve says nothing"
    first = process.stdout.readline()
    assert first.startswith("redismem serves http://"), first + str(process.communicate())
    return first.split()[2].rstrip(",")


def assert_one_line(result: Result, *words: str) -> None:
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def added_id(result: Result) -> str:
    assert result.exit_code == 0, result.output
    outcome, memory_id = result.stdout.split()
    assert outcome == "created"
    return memory_id


def test_what_is_added_is_found_shown_and_deleted(run: Run) -> None:
    memory_id = added_id(run("add", "Ada keeps bees [in Kent]", "-u", "ada", "--topic", "garden"))
    assert "Ada keeps bees [in Kent]" in run("search", "bees", "-u", "ada").stdout
    assert memory_id in run("get", memory_id, "-u", "ada").stdout
    assert run("delete", memory_id, "-u", "ada").stdout == f"deleted {memory_id}\n"
    assert_one_line(run("get", memory_id, "-u", "ada"), memory_id)
    assert "Ada keeps" not in run("search", "bees", "-u", "ada").stdout


def test_every_option_of_add_reaches_the_memory(run: Run) -> None:
    options = (
        "--type preference --topic a --topic b --entity Kent --session s1 --event-date 2026-03-01".split()
    )
    options += "--importance 0.25 --pinned --metadata n=3 --metadata who=Ada".split()
    memory_id = added_id(run("add", "Bees", "-u", "ada", *options))
    memory = msgspec.json.decode(run("get", memory_id, "-u", "ada", "--json").stdout, type=Memory)
    assert (memory.memory_type, memory.topics, memory.entities) == ("preference", ["a", "b"], ["Kent"])
    assert (memory.session_id, memory.importance, memory.pinned) == ("s1", 0.25, True)
    assert memory.event_date is not None
    assert memory.event_date.isoformat() == "2026-03-01T00:00:00+00:00"
    assert memory.metadata == {"n": 3, "who": "Ada"}


def test_search_prints_json_that_is_a_search_reply(run: Run) -> None:
    for topic in ("garden", "work"):
        added_id(run("add", f"Bees at {topic}", "-u", "ada", "--topic", topic))
    options = ("--json", "--explain", "--topic", "work", "--limit", "5", "--mode", "keyword")
    result = run("search", "bees", "-u", "ada", *options)
    reply = msgspec.json.decode(result.stdout, type=SearchReply)
    assert [hit.topics for hit in reply.memories] == [["work"]]
    assert reply.memories[0].explain is not None


def test_explain_shows_the_parts_of_a_score(run: Run) -> None:
    added_id(run("add", "Bees", "-u", "ada"))
    assert "similarity" not in run("search", "bees", "-u", "ada").stdout
    assert "similarity" in run("search", "bees", "-u", "ada", "--explain").stdout


def test_piped_output_has_no_colours_and_fits_100_columns(run: Run) -> None:
    added_id(run("add", "Bees " * 100, "-u", "ada"))
    output = run("search", "bees", "-u", "ada", "--explain").stdout
    assert "\x1b" not in output
    assert max(map(len, output.splitlines())) <= 100


def test_an_export_can_be_imported_for_another_user(run: Run, tmp_path: Path) -> None:
    for text in ("Bees", "Wasps", "Hornets ✓ \U0001f41d"):
        added_id(run("add", text, "-u", "ada", "--metadata", "k=v"))
    file = tmp_path / "ada.ndjson"
    exported = run("export", "-u", "ada", "-o", str(file))
    assert (exported.stdout, exported.stderr) == ("", "3 memories exported\n")
    assert file.stat().st_mode & 0o077 == 0
    assert run("export", "-u", "ada").stdout == file.read_text()
    assert run("import", str(file), "-u", "eve").stdout == "3 created, 0 updated, 0 unchanged, 0 invalid\n"
    again = run("import", "-", "-u", "eve", stdin=file.read_text())
    assert again.stdout == "0 created, 0 updated, 3 unchanged, 0 invalid\n"
    texts = [json.loads(line)["text"] for line in run("export", "-u", "eve").stdout.splitlines()]
    assert texts == [json.loads(line)["text"] for line in file.read_text().splitlines()]


def test_import_stores_the_good_lines_and_names_the_others(run: Run) -> None:
    lines = [
        '{"text": "Bees"}',
        "",
        "no json",
        '{"text": " "}',
        '{"text": "Ants", "colour": 1}',
        '{"text": "W"}',
    ]
    result = run("import", "-", "-u", "ada", stdin="\n".join(lines))
    assert result.exit_code == 1
    assert result.stdout == "2 created, 0 updated, 0 unchanged, 3 invalid\n"
    assert [line.partition(":")[0] for line in result.stderr.splitlines()] == ["line 3", "line 4", "line 5"]
    assert "colour" in result.stderr


def test_import_keeps_the_order_of_lines_beyond_one_slice(run: Run) -> None:
    texts = [f"turn {number}" for number in range(250)]
    lines = "\n".join(json.dumps({"text": text, "session_id": "s"}) for text in texts)
    assert run("import", "-", "-u", "ada", stdin=lines).stdout.startswith("250 created")
    exported = run("export", "-u", "ada").stdout.splitlines()
    assert [json.loads(line)["text"] for line in exported] == texts


def test_forget_asks_first_and_spares_other_users(run: Run) -> None:
    for user in ("ada", "eve"):
        added_id(run("add", "Bees", "-u", user))
    asked = run("forget", "-u", "ada", stdin="n\n")
    assert asked.exit_code == 1
    assert "all 1 memories of 'ada'" in asked.output
    assert run("export", "-u", "ada").stdout
    assert run("forget", "-u", "ada", "--yes").stdout.startswith("forgot 1 memories")
    assert not run("export", "-u", "ada").stdout
    assert run("export", "-u", "eve").stdout


def test_namespaces_keep_equal_users_apart(run: Run) -> None:
    added_id(run("add", "Bees", "-u", "ada", "--namespace", "one"))
    assert not run("export", "-u", "ada", "--namespace", "two").stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("get", "nope", "-u", "ada"), ("nope",)),
        (("delete", "nope", "-u", "ada"), ("nope",)),
        (("add", "Bees", "-u", "ada", "--importance", "3"), ("importance",)),
        (("add", "Bees", "-u", "ada", "--session", "a\x01"), ("session_id",)),
        (("add", " ", "-u", "ada"), ("blank",)),
        (("add", "Bees", "-u", ""), ("user",)),
        (("search", "bees", "-u", "ada", "--limit", "1000"), ("limit",)),
        (("search", "bees", "-u", "ada", "--redis-url", "http://x"), ("REDISMEM_REDIS_URL",)),
        (("search", "bees", "-u", "ada", "--redis-url", "redis://127.0.0.1:1"), ("Start the server",)),
        (("export", "-u", "ada", "-o", "/nowhere/file"), ("/nowhere/file",)),
        (("serve", "--host", "0.0.0.0"), ("0.0.0.0", "--insecure")),
        (("serve", "--host", "example.com"), ("--insecure",)),
        (("serve", "--port", "99999"), ("REDISMEM_PORT",)),
        (("serve", "--redis-url", "redis://127.0.0.1:1"), ("Start the server",)),
    ],
)
def test_what_goes_wrong_is_one_line(run: Run, args: tuple[str, ...], words: tuple[str, ...]) -> None:
    assert_one_line(run(*args), *words)


@pytest.fixture
async def other_embedder(service: Service) -> None:
    """The store's vectors come from an embedder that is not configured."""
    await service.client.execute("HSET", "redismem:store", "embedder", "other-model")


@pytest.mark.usefixtures("other_embedder")
def test_reembed_is_the_way_out_of_a_changed_embedder(run: Run) -> None:
    assert_one_line(run("add", "Bees", "-u", "ada"), "other-model", "redismem reembed")
    assert_one_line(run("serve", "--port", "0"), "other-model", "redismem reembed")
    assert run("reembed").exit_code == 0
    added_id(run("add", "Bees", "-u", "ada"))


@pytest.fixture
async def unembedded(service: Service) -> str:
    """A memory that is stored without a vector, as another service writes it."""
    owner = service.owner("ada")
    await service.writer.put(owner, [MemoryInput(text="Bees", id="b")])
    await service.client.execute("HDEL", owner.memory("b"), "embedding", "embedder")
    return "b"


def test_reembed_gives_a_vector_to_what_has_none(run: Run, unembedded: str) -> None:
    assert '"embedded":false' in run("get", unembedded, "-u", "ada", "--json").stdout
    assert run("reembed").stdout == "vectors made: 1; users: 1\n"
    assert '"embedded":true' in run("get", unembedded, "-u", "ada", "--json").stdout
    assert run("reembed").stdout == "vectors made: 0; users: 1\n"


def test_a_module_run_is_the_command(start: Start) -> None:
    output, _ = start("--help").communicate(timeout=_WAIT_S)
    for name in ("serve", "add", "search", "get", "delete", "import", "export", "forget", "doctor", "demo"):
        assert f"\n  {name} " in output


@pytest.mark.parametrize(
    ("workers", "number"), [("1", signal.SIGTERM), ("2", signal.SIGTERM), ("1", signal.SIGINT)]
)
def test_serve_answers_until_it_is_told_to_stop(
    start: Start, tmp_path: Path, workers: str, number: signal.Signals
) -> None:
    server = start("serve", "--port", "0", "--workers", workers)
    base = address(server)
    memory = {"text": "Ada keeps bees"}
    assert httpx.post(f"{base}/v1/users/ada/memories", json=memory).status_code == 201
    found, _ = start("search", "bees", "-u", "ada", "--json").communicate(timeout=_WAIT_S)
    assert [hit["text"] for hit in json.loads(found)["memories"]] == ["Ada keeps bees"]
    server.send_signal(number)
    _, errors = server.communicate(timeout=_WAIT_S)
    assert server.returncode == 0
    assert "Traceback" not in errors
    assert not (tmp_path / "redismem" / "redis.sock").exists()
    kept, _ = start("export", "-u", "ada").communicate(timeout=_WAIT_S)
    assert json.loads(kept)["text"] == "Ada keeps bees"


def test_serve_names_a_port_that_is_taken(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        server = start("serve", "--port", port)
        _, errors = server.communicate(timeout=_WAIT_S)
    assert server.returncode == 1
    assert errors.count("\n") == 1
    assert port in errors


def test_serve_wants_the_data_dir_for_itself(start: Start) -> None:
    base = address(start("serve", "--port", "0"))
    second = start("serve", "--port", "0")
    _, errors = second.communicate(timeout=_WAIT_S)
    assert second.returncode == 1
    assert errors.count("\n") == 1
    assert "--data-dir" in errors
    assert httpx.get(f"{base}/health/ready").status_code == 200


def test_an_index_is_shown_rebuilt_and_maintained(run: Run) -> None:
    assert run("add", "Ada plays the viola", "--user", "ada").exit_code == 0
    shown = run("index", "show", "ada")
    assert "exact (flat)" in shown.output
    built = run("index", "rebuild", "ada", "--profile", "low_latency")
    assert "built: low_latency, M 16, efConstruction 100, EF 64" in built.output
    told = json.loads(run("index", "show", "ada", "--json").output)
    assert (told["memories"], told["profile"]) == (1, "low_latency")
    assert told["graph"].startswith("low_latency: M 16, efConstruction 100, EF 64; 1 vectors")
    assert "1 users in" in run("index", "maintain").output
    assert "graph" in json.loads(run("index", "show", "ada", "--json").output)  # it is the user's own wish
    run("index", "rebuild", "ada", "--profile", "store")
    assert "demote 1" in run("index", "maintain").output
    assert run("index", "show", "nobody").exit_code == 1


def test_the_archive_needs_a_place(run: Run) -> None:
    refused = run("archive", "list", "--user", "ada")
    assert refused.exit_code == 1
    assert "REDISMEM_ARCHIVE_URL" in refused.output


TURNS = [
    *(f"The bees of hive {word} give honey [and wax]" for word in ("one", "two", "three", "four", "five")),
    *(f"Sailing boat {word} needs wind and rope" for word in ("red", "blue", "green", "white", "black")),
]


@pytest.fixture
async def remembered(service: Service) -> Service:
    """What ada has told; nothing is derived of it yet."""
    memories = [MemoryInput(text=text, id=f"m{i}", entities=["a|b [c]"]) for i, text in enumerate(TURNS)]
    memories.append(MemoryInput(text="My name is Ada [bold]Byron[/bold]", id="n"))
    await service.writer.put(service.owner("ada"), memories)
    return service


@pytest.mark.usefixtures("remembered")
def test_a_profile_is_made_where_there_is_none_and_made_anew_when_asked(run: Run) -> None:
    made = json.loads(run("profile", "ada", "--json").stdout)
    assert made["compiled_at"]
    assert set(made["important_memory_ids"]) == {"n", *(f"m{i}" for i in range(10))}
    assert json.loads(run("profile", "ada", "--json").stdout) == made
    fresh = json.loads(run("profile", "ada", "--fresh", "--json").stdout)
    assert fresh.pop("compiled_at") > made.pop("compiled_at")
    assert fresh.pop("valid_until") > made.pop("valid_until")
    assert fresh == made


async def test_a_profile_shows_brackets_as_they_are(run: Run, remembered: Service) -> None:
    owner = remembered.owner("ada")
    patch = ProfilePatch(display_name="[red]Ada[/red]", preferred_formats={"[b]": "[/b]"}, known_expertise=[])
    await remembered.views.change_profile(owner, patch)
    await remembered.worker.make(owner, "profile")
    shown = (await asyncio.to_thread(run, "profile", "ada")).stdout
    for text in ("display name", "[red]Ada[/red]", "[b]: [/b]"):
        assert text in shown
    assert "\x1b" not in shown


@pytest.mark.usefixtures("remembered")
def test_topics_are_made_where_there_are_none(run: Run) -> None:
    reply = msgspec.json.decode(run("topics", "ada", "--json").stdout, type=TopicsReply)
    assert [topic.size for topic in reply.topics] == [5, 5]
    shown = run("topics", "ada").stdout
    for topic in reply.topics:
        assert topic.label in shown
    assert f"{reply.uncategorized} memories uncategorized" in shown
    ids = [topic.id for topic in reply.topics]
    told = run("summary", "ada", "topic", ids[0])
    assert told.exit_code == 0
    assert "extractive, from" in told.stdout
    again = msgspec.json.decode(run("topics", "ada", "--fresh", "--json").stdout, type=TopicsReply)
    assert [topic.id for topic in again.topics] == ids


@pytest.mark.usefixtures("remembered")
def test_a_summary_is_made_where_there_is_none(run: Run) -> None:
    shown = run("summary", "ada", "entity", "a|b [c]")
    assert shown.exit_code == 0, shown.output
    assert "[and wax]" in shown.stdout
    summary = msgspec.json.decode(run("summary", "ada", "entity", "a|b [c]", "--json").stdout, type=Summary)
    assert (summary.kind, summary.name) == ("entity", "a|b [c]")
    assert f"{summary.tokens} tokens, extractive, from {len(summary.sources)} memories" in shown.stdout
    fresh = run("summary", "ada", "entity", "a|b [c]", "--fresh", "--json").stdout
    assert msgspec.json.decode(fresh, type=Summary).generated_at > summary.generated_at
    today = f"{summary.generated_at:%Y-%m-%d}"
    assert json.loads(run("summary", "ada", "day", today, "--json").stdout)["name"] == today


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("summary", "ada", "entity", "Bob"), ("entity", "Bob")),
        (("summary", "nobody", "entity", "a|b [c]"), ("a|b [c]",)),
        (("summary", "ada", "topic", "99"), ("99",)),
        (("summary", "ada", "topic", "bees"), ("number",)),
        (("summary", "ada", "day", "2026-02-30"), ("2026-11-26",)),
        (("summary", "ada", "week", "48"), ("2026-W48",)),
        (("summary", "ada", "month", "1999-01"), ("1999-01",)),
        (("profile", ""), ("user",)),
        (("topics", "x" * 257), ("user",)),
        (("conflicts", "ada", "--redis-url", "redis://127.0.0.1:1"), ("Start the server",)),
    ],
)
@pytest.mark.usefixtures("remembered")
def test_what_cannot_be_told_is_one_line(run: Run, args: tuple[str, ...], words: tuple[str, ...]) -> None:
    assert_one_line(run(*args), *words)


@pytest.mark.usefixtures("remembered")
def test_a_summary_of_no_name_is_refused(run: Run) -> None:
    assert_one_line(run("summary", "ada", "entity", ""), "name")


def test_a_kind_of_summary_that_there_is_not_is_a_usage_error(run: Run) -> None:
    refused = run("summary", "ada", "year", "2026")
    assert refused.exit_code == 2
    assert "'topic', 'day', 'week', 'month', 'entity'" in refused.stderr


async def test_of_nobody_there_is_nothing_to_tell_and_nothing_is_stored(run: Run, service: Service) -> None:
    def told(*args: str) -> str:
        result = run(*args)
        assert result.exit_code == 0, result.output
        return result.stdout

    asked = await asyncio.to_thread(
        lambda: [told(name, "nobody") for name in ("profile", "topics", "conflicts")]
    )
    assert "nobody" in asked[0]
    assert "0 memories uncategorized" in asked[1]
    assert "0 in all" in asked[2]
    assert await lasting_keys(service.client) == [b"redismem:store"]


async def test_conflicts_show_both_texts(run: Run, service: Service) -> None:
    owner = service.owner("ada")
    texts = {day: f"Anna's wedding [red] is on {day} June in Porto at the old town hall" for day in (12, 19)}
    memories = [
        MemoryInput(text=text, id=str(day), event_date=datetime(2026, 1, day, tzinfo=UTC))
        for day, text in texts.items()
    ]
    await service.writer.put(owner, memories)
    await service.worker.make(owner, "link")
    shown = (await asyncio.to_thread(run, "conflicts", "ada")).stdout
    assert "1 in all" in shown
    assert shown.count("[red]") == 2
    reply = json.loads((await asyncio.to_thread(run, "conflicts", "ada", "--json")).stdout)
    assert [(one["older"], one["newer"], one["why"]) for one in reply["conflicts"]] == [
        ("12", "19", "number")
    ]


async def dead_letters(service: Service, *jobs: str) -> None:
    """Let jobs fail until they are given up."""
    for job in jobs:
        for _ in range(MOST_TRIES):
            await service.jobs.failed(Job("0-1", job), "Boom: [red]it[/red]")


async def test_dead_letters_are_shown_and_wait_again_when_asked(run: Run, service: Service) -> None:
    names = "ada summary:entity:a|b [c]", "ada profile", "eve topics"
    await dead_letters(service, *names)

    def session() -> list[str]:
        shown = [run("jobs").stdout, run("jobs", "list", "--json").stdout]
        retried = [run("jobs", "retry", "nope"), run("jobs", "retry", names[0]), run("jobs", "retry")]
        return shown + [one.stdout for one in retried] + [run("jobs").stdout]

    shown, told, *retried, left = await asyncio.to_thread(session)
    for text in (*names, "Boom: [red]it[/red]", "redismem jobs retry", "dead 3", UTC.tzname(None)):
        assert text in shown
    letters = json.loads(told)
    assert letters["jobs"]["dead"] == 3
    assert {letter["job"] for letter in letters["dead"]} == set(names)
    assert retried == ["", "1 jobs wait again\n", "2 jobs wait again\n"]
    assert "dead 0" in left
    assert "Boom" not in left
    assert "waiting 3" in left


async def test_a_worker_told_once_makes_what_waits(run: Run, remembered: Service) -> None:
    owner = remembered.owner("ada")
    await remembered.client.execute("DEL", "redismem:jobs:later")
    await remembered.jobs.queue(owner, "summary:entity:a%7Cb [c]", "link")
    assert (await asyncio.to_thread(run, "worker", "--once")).stdout == "2 jobs done\n"
    assert await remembered.views.summary(owner, "entity", "a|b [c]") is not None
    assert (await remembered.views.similar(owner, "m0")).precomputed
    assert (await asyncio.to_thread(run, "worker", "--once")).stdout == "0 jobs done\n"


def test_the_store_that_jobs_is_given_is_the_one_it_retries_in(run: Run) -> None:
    assert run("jobs", "retry", "--redis-url", "redis://127.0.0.1:1").exit_code != 0
