"""Contexts as server-sent events, with the sending in the test's hands: what changes between two stages."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import warnings
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import pytest
from starlette.types import ASGIApp, Message

from redismem.conversation import ContextRequest
from redismem.embedded import EmbeddedRedis
from redismem.http.app import create_app
from redismem.service import Service, open_service
from redismem.settings import Settings
from redismem.types import MemoryInput
from tests.conftest import until
from tests.http.conftest import Gate, add, error_of, of_user
from tests.http.contexts import CONTEXT, either, http, remove, rich
from tests.http.test_derived import BEES

assert either  # fixtures
assert http
assert rich

STREAM = {"Accept": "text/event-stream"}
QUESTION = "Does Ana like what bees make?"
EVENTS = ["stage", "stage", "stage", "stage", "done"]


class Line:
    """A connection: what the application sends waits until the test takes more; the client may leave."""

    def __init__(
        self, app: ASGIApp, request: dict[str, object], *, accept: str = "text/event-stream"
    ) -> None:
        self.status = 0
        self.sent = ""
        self._app = app
        self._body = json.dumps(request).encode()
        self._accept = accept
        self._offered: asyncio.Queue[Message] = asyncio.Queue()
        self._go = asyncio.Semaphore(0)
        self._is_read = False
        self._resumed = 0
        self._left = asyncio.Event()

    async def __aenter__(self) -> Self:
        headers = [(b"content-type", b"application/json"), (b"accept", self._accept.encode())]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},  # as uvicorn says
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": CONTEXT,
            "raw_path": CONTEXT.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": headers,
            "client": ("test", 1),
            "server": ("test", 80),
        }
        self.task = asyncio.create_task(self._run(scope))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.leave()

    async def _run(self, scope: dict[str, Any]) -> None:
        await self._app(scope, self._receive, self._send)

    async def _receive(self) -> Message:
        if self._is_read:
            await self._left.wait()
            return {"type": "http.disconnect"}
        self._is_read = True
        return {"type": "http.request", "body": self._body, "more_body": False}

    async def _send(self, message: Message) -> None:
        await self._offered.put(message)
        if not self._left.is_set():  # else it is sent to nobody, at once
            await self._go.acquire()
        self._resumed += 1

    async def event(self) -> tuple[str, Any]:
        """Return name and data of the next event, whose sending is not over until `go_on`."""
        while True:
            offered = asyncio.create_task(self._offered.get())
            await asyncio.wait((offered, self.task), return_when=asyncio.FIRST_COMPLETED, timeout=10)
            assert offered.done(), "the application sends nothing more"
            message = offered.result()
            if message["type"] == "http.response.start":
                self.status = message["status"]
                self.go_on()
            else:
                name, data, *end = message["body"].decode().split("\n")
                assert end == ["", ""]
                self.sent += data
                return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))

    def offered(self) -> Message:
        """Return the next message that was to be sent."""
        return self._offered.get_nowait()

    def go_on(self) -> None:
        """Let the application send on."""
        self._go.release()

    async def begun(self) -> None:
        """Let the application begin the next stage; return when it waits for something in it."""
        before = self._resumed
        self.go_on()
        await until("the next stage has begun", lambda: asyncio.sleep(0, self._resumed > before))

    def open_up(self) -> None:
        """Take whatever is sent from now on."""
        self._go = asyncio.Semaphore(99)

    async def rest(self) -> list[tuple[str, Any]]:
        """Go on to the end; return the events."""
        self.sent, found = "", list[tuple[str, Any]]()
        while not found or found[-1][0] == "stage":
            self.go_on()
            found.append(await self.event())
        self.go_on()
        self.go_on()
        await asyncio.wait_for(self.task, 10)
        return found

    async def leave(self) -> None:
        """Let the client go away; return when the application has done with it."""
        self._left.set()
        await asyncio.wait((self.task,), timeout=10)
        assert self.task.done(), "the application goes on for nobody"


def fetches() -> set[str]:
    """Return the names of what is being fetched for contexts."""
    found = set()
    for task in asyncio.all_tasks():
        frame = getattr(task.get_coro(), "cr_frame", None)
        if frame is not None and frame.f_code.co_qualname == "Gathering._timed":
            found.add(frame.f_locals["name"])
    return found


async def only_fetched(*names: str) -> None:
    """Return when everything has been fetched but this."""
    await until(f"all but {names} is there", lambda: asyncio.sleep(0, fetches() == set(names)))


async def nothing_is_left(service: Service, gate: Gate) -> None:
    await until("no fetch is left", lambda: asyncio.sleep(0, not fetches()), 2)
    await until("nobody waits for the embedder", lambda: asyncio.sleep(0, not gate.waiting), 2)
    await until("no ticket is open", lambda: asyncio.sleep(0, not service.l1._tickets), 2)


@pytest.fixture
async def app(either: Service) -> ASGIApp:
    return create_app(either)


# what is sent ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("rich")
async def test_a_stream_says_stage_by_stage_what_json_says_at_once(
    http: httpx.AsyncClient, either: Service
) -> None:
    request = {"session_id": "s", "stages": 4}
    whole = (await http.post(CONTEXT, json=request)).json()
    await either.contexts.drained()
    reply = await http.post(CONTEXT, json=request, headers=STREAM)
    assert reply.status_code == 200
    assert reply.headers["content-type"].partition(";")[0] == "text/event-stream"
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-request-id"]
    *pieces, end = reply.text.split("\n\n")
    assert end == ""
    events = [[line.partition(": ") for line in piece.split("\n")] for piece in pieces]
    assert [[name for name, _, _ in event] for event in events] == [["event", "data"]] * 5
    assert [event[0][2] for event in events] == EVENTS
    *stages, done = [json.loads(event[1][2]) for event in events]
    assert [stage["text"] for stage in stages] == [stage["text"] for stage in whole["stages"]]
    assert "stages" not in done
    assert (done["text"], done["tokens"]) == (whole["text"], whole["tokens"])
    assert done["generation"] == whole["generation"]


async def test_what_is_wrong_with_a_request_is_told_by_its_status(http: httpx.AsyncClient) -> None:
    reply = await http.post(CONTEXT, json={"session_id": "none"}, headers=STREAM)
    assert error_of(reply, 404)["code"] == "not_found"


@pytest.mark.parametrize("accept", ["text/event-stream", "text/event-stream, */*;q=0.1"])
async def test_events_are_sent_to_whom_accepts_them(http: httpx.AsyncClient, accept: str) -> None:
    reply = await http.post(CONTEXT, json={"text": "a"}, headers={"Accept": accept})
    assert reply.text.startswith("event: stage\n")
    plain = await http.post(CONTEXT, json={"text": "a"}, headers={"Accept": "*/*"})
    assert plain.headers["content-type"] == "application/json"


async def test_the_first_stage_waits_for_no_embedding(app: ASGIApp, gate: Gate) -> None:
    gate.open.clear()
    async with Line(app, {"text": "hello", "stages": 4}) as line:
        name, first = await line.event()
        assert (name, first["stage"], line.status) == ("stage", 1, 200)
        gate.open.set()
        assert [event[0] for event in await line.rest()] == EVENTS[1:]


# what changes meanwhile ------------------------------------------------------------------------------

HOWS = ["nothing", "delete", "correct", "change", "by hand"]


@pytest.mark.usefixtures("rich")
@pytest.mark.parametrize("how", HOWS)
async def test_what_was_read_before_it_changed_is_in_no_later_stage(
    app: ASGIApp, http: httpx.AsyncClient, either: Service, how: str
) -> None:
    """Everything has been read when the first stage is sent; `nothing` shows that it would be shown."""
    await http.patch(of_user("ada", "sessions", "s"), json={"pins": [], "active_topics": ["1"]})
    request = {"text": QUESTION, "session_id": "s", "stages": 4, "parts": {"pinned": False, "profile": False}}
    before = either.contexts.counts["contexts"]
    async with Line(app, request) as line:
        await line.event()
        assert "honey cake" not in line.sent
        await only_fetched()
        if how != "nothing":
            await remove(http, either, how, "a2")
        events = await line.rest()
        assert [name for name, _ in events] == EVENTS[1:]
        assert ("honey cake" in line.sent) == (how == "nothing")
        assert either.contexts.counts["contexts"] == before + 1


@pytest.mark.parametrize("how", HOWS[1:])
async def test_what_changed_after_it_was_shown_is_not_shown_again(
    app: ASGIApp, http: httpx.AsyncClient, either: Service, how: str
) -> None:
    await add(http, "ada", *BEES, {"id": "p", "text": "allergic to peanuts", "pinned": True})
    async with Line(app, {"text": QUESTION, "stages": 4}) as line:
        await line.event()
        assert "peanuts" in line.sent
        await remove(http, either, how, "p")
        events = await line.rest()
        assert "peanuts" not in "".join(str(event) for event in events[:-1])
        assert "peanuts" not in line.sent


@pytest.mark.usefixtures("rich")
@pytest.mark.parametrize("how", HOWS)
async def test_what_changes_while_the_embedder_holds_is_not_shown(
    app: ASGIApp, http: httpx.AsyncClient, either: Service, gate: Gate, how: str
) -> None:
    """The second stage has begun; of its texts one was made from what changes."""
    await http.patch(of_user("ada", "sessions", "s"), json={"pins": []})
    sources = (await http.get(of_user("ada", "summaries", "topic", "2"))).json()["sources"]
    summary = (await http.get(of_user("ada", "summaries", "topic", "2"))).json()["text"]
    gate.open.clear()
    wanted = {
        "text": "unheard of",
        "session_id": "s",
        "stages": 4,
        "parts": {"pinned": False, "profile": False},
    }
    async with Line(app, wanted) as line:
        await line.event()
        assert summary not in line.sent
        await line.begun()
        await only_fetched("matches", "topics", "entities", "deep", "around")
        if how in ("correct", "change"):  # they embed
            changing = asyncio.create_task(remove(http, either, how, sources[0]))
            await until("the change waits", lambda: asyncio.sleep(0, gate.waiting > 1))
            gate.open.set()
            await changing
        elif how != "nothing":
            await remove(http, either, how, sources[0])
        gate.open.set()
        line.open_up()
        line.sent = ""
        events = [await line.event() for _ in range(4)]
        assert [name for name, _ in events] == EVENTS[1:]
        assert (summary in line.sent) == (how == "nothing")


async def test_what_came_back_is_shown_as_it_is_now(
    app: ASGIApp, http: httpx.AsyncClient, either: Service
) -> None:
    await add(http, "ada", {"id": "m", "text": "the canoe is green"})
    async with Line(app, {"text": "canoe"}) as line:
        await line.event()
        await only_fetched()
        await remove(http, either, "delete", "m")
        await add(http, "ada", {"id": "m", "text": "the canoe is blue"})
        await line.rest()
        assert "green" not in line.sent
        assert "blue" in line.sent


# who goes away ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [1, 2, 3, 4])
async def test_a_client_that_goes_away_between_stages_ends_the_work(
    app: ASGIApp, http: httpx.AsyncClient, either: Service, gate: Gate, after: int
) -> None:
    await add(http, "ada", *BEES)
    before = either.contexts.counts["contexts"]
    async with Line(app, {"text": QUESTION, "stages": 4}) as line:
        await line.event()
        for _ in range(after - 1):
            line.go_on()
            await line.event()
        await line.leave()
        assert line.task.exception() is None
        await nothing_is_left(either, gate)
        assert either.contexts.counts["contexts"] == before


@pytest.mark.parametrize("entities", [[], ["Ana"]])
async def test_a_client_that_goes_away_while_the_embedder_holds_ends_the_work(
    app: ASGIApp, http: httpx.AsyncClient, either: Service, gate: Gate, entities: list[str]
) -> None:
    await add(http, "ada", {"id": "a", "text": "Ana sails", "entities": ["Ana"]})
    gate.open.clear()
    async with Line(app, {"text": "unheard of", "stages": 4, "entities": entities}) as line:
        await line.event()
        await line.begun()
        await until("it is embedded", lambda: asyncio.sleep(0, gate.waiting))
        await line.leave()
        await nothing_is_left(either, gate)
        assert either.contexts.counts["contexts"] == 0


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
async def test_a_client_that_goes_away_before_anything_was_sent_ends_the_work(
    app: ASGIApp, either: Service, gate: Gate, accept: str
) -> None:
    gate.open.clear()
    async with Line(app, {"text": "unheard of", "stages": 4}, accept=accept) as line:
        if accept == "application/json":
            await until("it is embedded", lambda: asyncio.sleep(0, gate.waiting))
        else:
            await until("it has begun", lambda: asyncio.sleep(0, fetches()))
        await line.leave()
        await nothing_is_left(either, gate)


async def test_a_client_that_goes_away_is_no_error(app: ASGIApp, gate: Gate) -> None:
    """A server logs whatever leaves the application as a failure of it."""
    gate.open.clear()
    async with Line(app, {"text": "unheard of", "stages": 4}, accept="application/json") as line:
        await until("it is embedded", lambda: asyncio.sleep(0, gate.waiting))
        await line.leave()
        assert not line.task.cancelled()
        assert line.task.exception() is None
        assert line.offered()["status"] == 499


async def test_who_goes_away_takes_nothing_from_who_asks_the_same(app: ASGIApp, gate: Gate) -> None:
    gate.open.clear()
    async with Line(app, {"text": "the same"}) as first, Line(app, {"text": "the same"}) as second:
        await first.event()
        await second.event()
        first.go_on()
        second.go_on()
        await until("it is embedded", lambda: asyncio.sleep(0, gate.waiting))
        await first.leave()
        gate.open.set()
        second.open_up()
        assert [(await second.event())[0] for _ in range(3)] == ["stage", "stage", "done"]


async def test_work_that_ends_before_it_began_leaves_no_warning(either: Service) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        stages = either.contexts.stages(either.owner("ada"), ContextRequest(text="a", stages=4))
        first = asyncio.ensure_future(anext(stages))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait((first,))
        await stages.aclose()
        del stages, first  # a cancelled task holds what it was cancelled in
        await until("nothing is left", lambda: asyncio.sleep(0, not fetches()))
        gc.collect()
    assert [str(one.message) for one in told] == []


# what fails in mid-stream ----------------------------------------------------------------------------


@pytest.fixture
async def dying(tmp_path: Path) -> AsyncIterator[tuple[Service, int]]:
    """A service whose Redis may be killed, and the pid of that Redis."""
    async with EmbeddedRedis(tmp_path, persist=False) as redis:
        chosen = Settings(redis_url=redis.url, embedder="deterministic", testing=True, redis_timeout_s=0.1)
        async with open_service(chosen) as service:
            assert redis.pid is not None
            yield service, redis.pid


async def test_a_failure_in_mid_stream_is_told_in_the_stream(dying: tuple[Service, int]) -> None:
    service, pid = dying
    # something to be compared, if it was found before
    await service.writer.put(service.owner("ada"), [MemoryInput(text="hello")])
    async with Line(create_app(service), {"text": "hello", "stages": 4}) as line:
        await line.event()
        os.kill(pid, signal.SIGKILL)
        await only_fetched()
        await until("the lease is lost", lambda: asyncio.sleep(0, not service.coherence.is_live()))
        events = await line.rest()
    assert events[-1][0] == "error"
    error = events[-1][1]["error"]
    assert error["code"] == "redis_unavailable"
    assert set(error) == {"code", "message", "request_id"}
