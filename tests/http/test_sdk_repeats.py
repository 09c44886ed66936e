"""What the Python client does when a request fails on its way, or its stream breaks off."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from redismem.conversation import MessageInput
from redismem.errors import DeadlineExceeded, NotFound, RedisMemError, RedisUnavailable, Unavailable
from redismem.http.app import create_app
from redismem.http.wire import error_body
from redismem.sdk import Client, UserMemory
from redismem.service import Service
from redismem.types import MemoryInput

Call = Callable[[UserMemory], Any]

JSON = (b"content-type", b"application/json")

REFUSAL = error_body(RedisUnavailable("Redis is away"), "r1")


class Refusing:
    """Answers the first requests that change or ask something itself, then passes on to the application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.left = 0
        self.status, self.body, self.headers = 503, REFUSAL, [JSON]
        self.requests: list[Scope] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.requests.append(scope)
        if self.left <= 0:
            await self._app(scope, receive, send)
            return
        self.left -= 1
        await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
        await send({"type": "http.response.body", "body": self.body})


class Failing(httpx.AsyncBaseTransport):
    """Loses the first requests on their way there (`unsent`), or the replies on their way back (`lost`)."""

    def __init__(self, app: ASGIApp) -> None:
        self._inner = httpx.ASGITransport(app=app)
        self.unsent = self.lost = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self.unsent:
            self.unsent -= 1
            raise httpx.ConnectError("nobody listens", request=request)
        response = await self._inner.handle_async_request(request)
        if self.lost:
            self.lost -= 1
            raise httpx.ReadError("reset by peer", request=request)
        return response


@pytest.fixture
def refusing(service: Service) -> Refusing:
    return Refusing(create_app(service))


@pytest.fixture
def failing(refusing: Refusing) -> Failing:
    return Failing(refusing)


@pytest.fixture
async def ada(failing: Failing) -> AsyncIterator[UserMemory]:
    async with Client("http://test", transport=failing) as client:
        ada = client.user("ada")
        await ada.add("Ada keeps bees", id="a")
        yield ada


REPEATED: list[Call] = [
    lambda ada: ada.add("bee"),
    lambda ada: ada.add_many([MemoryInput(text="bee")]),
    lambda ada: ada.get("a"),
    lambda ada: anext(ada.list()),
    lambda ada: ada.delete("a"),
    lambda ada: ada.history("a"),
    lambda ada: ada.search("bees"),
    lambda ada: ada.correct(["a"], "Ada keeps wasps"),
    lambda ada: ada.profile(),
    lambda ada: ada.topics(),
    lambda ada: anext(ada.export()),
    lambda ada: ada.forget(),
    lambda ada: ada.open_session(),
    lambda ada: ada.context("bees"),
    lambda ada: ada.stream_context("bees").whole(),
]

ONCE: list[Call] = [
    lambda ada: ada.update("a", pinned=True),
    lambda ada: ada.change_profile(display_name="Ada"),
]


@pytest.mark.parametrize("call", REPEATED)
async def test_what_does_no_harm_is_repeated_until_it_succeeds(
    refusing: Refusing, ada: UserMemory, call: Call
) -> None:
    refusing.left, refusing.requests = 2, []
    assert await call(ada)
    assert len(refusing.requests) == 3


@pytest.mark.parametrize("call", ONCE)
async def test_what_could_undo_others_is_sent_once(refusing: Refusing, ada: UserMemory, call: Call) -> None:
    refusing.left, refusing.requests = 1, []
    with pytest.raises(RedisUnavailable, match="away") as caught:
        await call(ada)
    assert len(refusing.requests) == 1
    assert vars(caught.value)["request_id"] == "r1"


@pytest.mark.parametrize("call", ONCE)
async def test_what_was_never_received_is_repeated_in_any_case(
    refusing: Refusing, failing: Failing, ada: UserMemory, call: Call
) -> None:
    failing.unsent = 2
    assert await call(ada)
    refusing.left, refusing.status, refusing.body = 1, 429, b"slow down"
    assert await call(ada), "429 is told before anything is done"


@pytest.mark.parametrize("call", ONCE)
async def test_what_may_have_been_received_is_not(
    refusing: Refusing, failing: Failing, ada: UserMemory, call: Call
) -> None:
    failing.lost, refusing.requests = 1, []
    with pytest.raises(Unavailable, match="reset by peer") as caught:
        await call(ada)
    assert isinstance(caught.value.__cause__, httpx.ReadError)
    assert len(refusing.requests) == 1


async def test_a_session_is_closed_and_changed_once(
    refusing: Refusing, failing: Failing, ada: UserMemory
) -> None:
    session = await ada.open_session()
    for call in (session.close, lambda: session.change(pins=["a"]), lambda: session.typing("Wh")):
        failing.lost, refusing.requests = 1, []
        with pytest.raises(Unavailable):
            await call()
        assert len(refusing.requests) == 1


async def test_writes_whose_replies_were_lost_are_stored_once(failing: Failing, ada: UserMemory) -> None:
    failing.lost = 1
    assert (await ada.add("Ada keeps wasps")).outcome == "UNCHANGED"
    failing.lost = 1
    session = await ada.open_session()
    assert session.opened.outcome == "JOINED"
    failing.lost = 1
    reply = await session.say("Where are they?")
    assert (reply.items[0].outcome, reply.messages) == ("UNCHANGED", 1)
    failing.lost = 1
    await session.say_many([MessageInput(text="And")] * 2)
    assert (await session.get()).messages == 3
    failing.lost = 1
    assert (await ada.correct(["a"], "Ada keeps ants")).outcome == "UNCHANGED"
    texts = [memory.text async for memory in ada.list()]
    assert sorted(texts) == ["Ada keeps ants", "Ada keeps wasps", "And", "And", "Where are they?"]


async def test_a_delete_whose_reply_was_lost_may_be_told_as_missing(
    failing: Failing, ada: UserMemory
) -> None:
    failing.lost = 1
    with pytest.raises(NotFound):
        await ada.delete("a")
    assert [memory.id async for memory in ada.list()] == []


async def test_all_tries_of_a_call_have_its_request_id(refusing: Refusing, ada: UserMemory) -> None:
    refusing.left, refusing.requests = 1, []
    await ada.tagged("call-7").search("bees")
    told = [dict(scope["headers"])[b"x-request-id"] for scope in refusing.requests]
    assert told == [b"call-7", b"call-7"]


async def test_retries_are_counted_and_can_be_turned_off(refusing: Refusing) -> None:
    for retries in (0, 2):
        refusing.left, refusing.requests = 9, []
        async with Client(
            "http://test", transport=httpx.ASGITransport(app=refusing), retries=retries
        ) as client:
            with pytest.raises(RedisUnavailable):
                await client.user("ada").search("bees")
        assert len(refusing.requests) == retries + 1


async def test_no_try_comes_before_retry_after(refusing: Refusing, ada: UserMemory) -> None:
    refusing.left, refusing.headers = 1, [JSON, (b"retry-after", b"1")]
    began = time.monotonic()
    await ada.search("bees")
    assert time.monotonic() - began >= 1


async def test_a_wait_that_would_take_too_long_is_not_begun(refusing: Refusing) -> None:
    refusing.left, refusing.headers = 1, [JSON, (b"retry-after", b"30")]
    began = time.monotonic()
    async with Client("http://test", transport=httpx.ASGITransport(app=refusing), timeout_s=5) as client:
        with pytest.raises(RedisUnavailable) as caught:
            await client.user("ada").search("bees")
    assert vars(caught.value)["retry_after_s"] == 30
    assert time.monotonic() - began < 5
    assert len(refusing.requests) == 1


async def test_a_call_without_an_answer_ends_in_time() -> None:
    ended = []

    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            while True:
                await receive()
        finally:
            ended.append(scope["path"])

    transport = httpx.ASGITransport(app=silent)
    async with Client("http://test", transport=transport, timeout_s=0.1) as client:
        with pytest.raises(DeadlineExceeded, match=r"0\.1 s"):
            await client.user("ada").search("bees")
    assert ended == ["/v1/users/ada/search"]


async def test_nobody_there_is_unavailable() -> None:
    async with Client("http://127.0.0.1:1", retries=1) as client:
        with pytest.raises(Unavailable, match="does not answer") as caught:
            await client.user("ada").search("bees")
    assert isinstance(caught.value.__cause__, httpx.ConnectError)


@pytest.mark.parametrize(
    ("status", "kind"), [(502, Unavailable), (504, Unavailable), (401, RedisMemError), (500, RedisMemError)]
)
async def test_what_a_proxy_answers_has_its_status(
    refusing: Refusing, ada: UserMemory, status: int, kind: type[RedisMemError]
) -> None:
    refusing.left, refusing.status, refusing.body = 99, status, b"<html>no</html>"
    with pytest.raises(RedisMemError, match=str(status)) as caught:
        await ada.search("bees")
    assert (type(caught.value), caught.value.status) == (kind, status)


async def test_an_answer_of_something_else_is_told(refusing: Refusing, ada: UserMemory) -> None:
    refusing.left, refusing.status, refusing.body = 1, 200, b'{"hello": "world"}'
    with pytest.raises(RedisMemError, match="none of redismem's"):
        await ada.search("bees")


# streams ------------------------------------------------------------------------------------------

STAGE = b'event: stage\ndata: {"stage":1,"blocks":[],"text":"bees","tokens":1,"at_ms":1}\n\n'
DONE = b'event: done\ndata: {"text":"bees","tokens":1,"generation":7,"partial":false,"total_ms":1}\n\n'


@pytest.fixture
def told(refusing: Refusing) -> Callable[[bytes], None]:
    """Lets the service answer the next request with a stream."""

    def answer(body: bytes) -> None:
        refusing.left, refusing.status, refusing.requests = 1, 200, []
        refusing.body, refusing.headers = body, [(b"content-type", b"text/event-stream")]

    return answer


async def test_an_error_in_a_stream_comes_after_its_stages(
    told: Callable[[bytes], None], refusing: Refusing, ada: UserMemory
) -> None:
    told(STAGE + b"event: error\ndata: %b\n\n" % REFUSAL)
    stream = ada.stream_context("bees")
    assert (await anext(stream)).text == "bees"
    with pytest.raises(RedisUnavailable, match="away"):
        await anext(stream)
    with pytest.raises(Unavailable, match="not whole"):
        await stream.whole()
    assert len(refusing.requests) == 1, "a stage was there: it is not repeated"


async def test_a_stream_that_breaks_off_is_no_whole_context(
    told: Callable[[bytes], None], ada: UserMemory
) -> None:
    told(STAGE)
    with pytest.raises(Unavailable, match="before the context was whole"):
        await ada.stream_context("bees").whole()


async def test_events_and_fields_of_a_newer_service_are_ignored(
    told: Callable[[bytes], None], ada: UserMemory
) -> None:
    told(b": hello\n\nevent: news\ndata: {}\n\n" + STAGE + DONE.replace(b'"tokens"', b'"new":1,"tokens"'))
    reply = await ada.stream_context("bees").whole()
    assert isinstance(reply.stages, list)
    assert [stage.text for stage in reply.stages] == ["bees"]


async def test_a_stream_that_is_none_is_an_error(
    told: Callable[[bytes], None], refusing: Refusing, ada: UserMemory
) -> None:
    told(b"{}")
    refusing.headers = [JSON]
    with pytest.raises(RedisMemError, match="text/event-stream"):
        await ada.stream_context("bees").whole()
