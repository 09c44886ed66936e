"""The HTTP embedder against a real server on loopback that speaks the protocol, well and badly."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from redismem.embed import open_embedder
from redismem.embed.openai import OpenAIEmbedder, asked_delay_s
from redismem.errors import EmbedderUnavailable, Misconfigured
from redismem.settings import Settings

KEY = "sk-very-secret-0123456789"

Answer = tuple[int, dict[str, str], bytes]


def good(body: dict[str, Any]) -> Answer:
    """Answer [length of text, 1, 0] per input, last first: the order is told by `index` alone."""
    data = [{"index": i, "embedding": [len(text), 1.0, 0.0]} for i, text in enumerate(body["input"])]
    return 200, {}, json.dumps({"object": "list", "data": data[::-1]}).encode()


def status(code: int, **headers: str) -> Callable[[dict[str, Any]], Answer]:
    # A real service echoes part of the key in its 401: ours must not pass that on.
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda _: (code, named, json.dumps({"error": {"message": f"bad key {KEY}"}}).encode())


def rows(*embeddings: Any, indexes: list[Any] | None = None) -> Callable[[dict[str, Any]], Answer]:
    data = [{"index": i, "embedding": e} for i, e in zip(indexes or range(99), embeddings, strict=False)]
    return lambda _: (200, {}, json.dumps({"data": data}).encode())


def raw(content: bytes) -> Callable[[dict[str, Any]], Answer]:
    return lambda _: (200, {}, content)


class Endpoint:
    """Answers each request with the next of `answers`; the last one stays."""

    def __init__(self) -> None:
        self.answers: list[Callable[[dict[str, Any]], Answer]] = [good]
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.requests.append(body)
                endpoint.headers.append({name.lower(): value for name, value in self.headers.items()})
                endpoint.paths.append(self.path)
                answer = endpoint.answers.pop(0) if len(endpoint.answers) > 1 else endpoint.answers[0]
                code, headers, content = answer(body)
                self.send_response(code)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                """Say nothing: a client that hangs up at its deadline is what some tests want."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def settings(self, **changes: Any) -> Settings:
        values = {
            "embedder": "openai",
            "embedder_url": self.url,
            "embedder_model": "tiny-embed",
            "embedder_key": KEY,
            "embedder_deadline_s": 5.0,
        }
        return Settings(**{**values, **changes})


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("NO_PROXY", "*")
    served = Endpoint()
    thread = threading.Thread(target=served.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield served
    served.server.shutdown()
    served.server.server_close()
    thread.join()


async def opened(endpoint: Endpoint, **changes: Any) -> OpenAIEmbedder:
    """Open an embedder with a good probe, then forget the probe."""
    embedder = await OpenAIEmbedder.open(endpoint.settings(**changes))
    for seen in (endpoint.requests, endpoint.headers, endpoint.paths):
        seen.clear()
    return embedder


async def failure(embedder: OpenAIEmbedder, texts: list[str]) -> EmbedderUnavailable:
    with pytest.raises(EmbedderUnavailable) as caught:
        await embedder.embed(texts)
    await embedder.close()
    return caught.value


async def test_it_sends_key_model_and_texts_and_returns_unit_rows_by_index(endpoint: Endpoint) -> None:
    embedder = await opened(endpoint)
    assert (embedder.name, embedder.dim) == ("tiny-embed", 3)
    vectors = await embedder.embed(["a", "bb", "ccc"])
    await embedder.close()
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=1e-6)
    assert vectors[:, 0] / vectors[:, 1] == pytest.approx([1, 2, 3], rel=1e-5)
    assert endpoint.paths == ["/v1/embeddings"]
    assert endpoint.headers[0]["authorization"] == f"Bearer {KEY}"
    assert endpoint.requests == [
        {"model": "tiny-embed", "input": ["a", "bb", "ccc"], "encoding_format": "float"}
    ]


async def test_settings_open_it(endpoint: Endpoint) -> None:
    embedder = await open_embedder(endpoint.settings(embedder_url=endpoint.url + "/"))
    assert embedder.dim == 3
    assert endpoint.paths == ["/v1/embeddings"]
    await embedder.close()


async def test_without_a_key_no_authorization_is_sent(endpoint: Endpoint) -> None:
    embedder = await opened(endpoint, embedder_key="")
    await embedder.embed(["a"])
    await embedder.close()
    assert "authorization" not in endpoint.headers[0]


async def test_no_texts_need_no_request(endpoint: Endpoint) -> None:
    embedder = await opened(endpoint)
    assert (await embedder.embed([])).shape == (0, 3)
    await embedder.close()
    assert not endpoint.requests


async def test_tokens_are_estimated_without_a_request(endpoint: Endpoint) -> None:
    embedder = await opened(endpoint)
    assert embedder.count_tokens(["Anna plays chess.", ""]) == [4, 0]
    await embedder.close()
    assert not endpoint.requests


async def test_many_texts_go_in_batches_of_128_and_come_back_in_order(endpoint: Endpoint) -> None:
    embedder = await opened(endpoint)
    vectors = await embedder.embed(["x" * n for n in range(1, 301)], urgent=False)
    await embedder.close()
    assert [len(request["input"]) for request in endpoint.requests] == [128, 128, 44]
    assert vectors[:, 0] / vectors[:, 1] == pytest.approx(np.arange(1, 301), rel=1e-4)


async def test_empty_texts_and_lone_surrogates_are_made_acceptable(endpoint: Endpoint) -> None:
    embedder = await opened(endpoint)
    assert (await embedder.embed(["", "\ud800", "ü"])).shape == (3, 3)
    await embedder.close()
    assert endpoint.requests[0]["input"] == [" ", "?", "ü"]


@pytest.mark.parametrize("code", [408, 429, 500, 503])
async def test_a_passing_failure_is_retried(endpoint: Endpoint, code: int) -> None:
    embedder = await opened(endpoint)
    endpoint.answers = [status(code), status(code), good]
    assert (await embedder.embed(["a"])).shape == (1, 3)
    await embedder.close()
    assert len(endpoint.requests) == 3


async def test_retry_after_is_honoured(endpoint: Endpoint) -> None:
    embedder = await opened(endpoint)
    endpoint.answers = [status(429, Retry_After="0.7"), good]
    started = time.monotonic()
    await embedder.embed(["a"])
    await embedder.close()
    assert time.monotonic() - started >= 0.7


def test_retry_after_may_be_a_date_or_nonsense() -> None:
    assert asked_delay_s("Fri, 01 Jan 2100 00:00:00 GMT") > 1e9
    assert asked_delay_s("Sat, 01 Jan 2000 00:00:00 GMT") == 0
    assert [asked_delay_s(header) for header in ("", "soon", "-3", "nan", "2")] == [0, 0, 0, 0, 2]


async def test_a_retry_that_cannot_be_in_time_is_not_waited_for(endpoint: Endpoint) -> None:
    embedder = await opened(endpoint)
    endpoint.answers = [status(429, Retry_After="60")]
    started = time.monotonic()
    error = await failure(embedder, ["a"])
    assert "429" in error.message
    assert time.monotonic() - started < 20
    assert len(endpoint.requests) == 1


async def test_an_endless_failure_ends_at_the_deadline(endpoint: Endpoint) -> None:
    embedder = await opened(endpoint, embedder_deadline_s=0.8)
    endpoint.answers = [status(500)]
    started = time.monotonic()
    error = await failure(embedder, ["a"])
    assert time.monotonic() - started < 5
    assert "500" in error.message
    assert 2 <= len(endpoint.requests) <= 12


async def test_a_silent_endpoint_ends_at_the_deadline(endpoint: Endpoint) -> None:
    release = threading.Event()

    def silent(body: dict[str, Any]) -> Answer:
        release.wait(30)
        return good(body)

    embedder = await opened(endpoint, embedder_deadline_s=0.3)
    endpoint.answers = [silent]
    started = time.monotonic()
    try:
        error = await failure(embedder, ["a"])
    finally:
        release.set()
    assert time.monotonic() - started < 10
    assert "0.3 s" in error.message


async def test_an_absent_endpoint_is_unavailable(endpoint: Endpoint) -> None:
    embedder = await opened(endpoint, embedder_url=endpoint.url, embedder_deadline_s=0.5)
    embedder._url = embedder._url.copy_with(port=1)  # nobody listens there
    assert "ConnectError" in (await failure(embedder, ["a"])).message


GARBAGE = {
    "not JSON": raw(b"<html>hello</html>"),
    "not UTF-8": raw(b'{"data": "\xff"}'),
    "another shape": raw(b'{"embeddings": [[1, 2, 3]]}'),
    "NaN": raw(b'{"data": [{"index": 0, "embedding": [NaN, 1, 2]}, {"index": 1, "embedding": [1, 2, 3]}]}'),
    "infinite": raw(
        b'{"data": [{"index": 0, "embedding": [1e999, 1, 2]}, {"index": 1, "embedding": [1, 2, 3]}]}'
    ),
    "too large to have a norm": rows([1e300, 1e300, 1], [1, 2, 3]),
    "strings": rows(["1", "2", "3"], ["1", "2", "3"]),
    "null": rows([None, 1, 2], [1, 2, 3]),
    "zero": rows([0, 0, 0], [1, 2, 3]),
    "too few": rows([1, 2, 3]),
    "too many": rows([1, 2, 3], [1, 2, 3], [1, 2, 3]),
    "none": raw(b'{"data": []}'),
    "repeated index": rows([1, 2, 3], [1, 2, 3], indexes=[0, 0]),
    "foreign index": rows([1, 2, 3], [1, 2, 3], indexes=[1, 2]),
    "short vector": rows([1, 2, 3], [1, 2]),
    "all vectors short": rows([1, 2], [1, 2]),
    "empty vector": rows([], [1, 2, 3]),
}


@pytest.mark.parametrize("answer", GARBAGE.values(), ids=GARBAGE)
async def test_garbage_is_refused_at_once(
    endpoint: Endpoint, answer: Callable[[dict[str, Any]], Answer]
) -> None:
    embedder = await opened(endpoint)
    endpoint.answers = [answer]
    await failure(embedder, ["a", "b"])
    assert len(endpoint.requests) == 1


async def test_a_probe_without_numbers_is_refused(endpoint: Endpoint) -> None:
    endpoint.answers = [rows([])]
    with pytest.raises(EmbedderUnavailable):
        await OpenAIEmbedder.open(endpoint.settings())


@pytest.mark.parametrize(
    ("code", "remedy"),
    [(400, "MODEL"), (401, "KEY"), (403, "KEY"), (404, "URL"), (422, "refuses"), (302, "refuses")],
)
async def test_a_refusal_is_not_retried_and_says_what_to_fix(
    endpoint: Endpoint, code: int, remedy: str
) -> None:
    embedder = await opened(endpoint)
    endpoint.answers = [status(code)]
    error = await failure(embedder, ["a"])
    assert str(code) in error.message
    assert remedy in error.message
    assert len(endpoint.requests) == 1


async def test_the_key_is_in_no_message_and_no_log(
    endpoint: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for answer in (status(401), status(500), raw(b"\xff"), rows([0])):
        embedder = await opened(endpoint, embedder_deadline_s=0.3)
        endpoint.answers = [answer]
        error: BaseException | None = await failure(embedder, ["a"])
        endpoint.answers = [good]
        while error is not None:
            assert KEY not in repr(error) + str(error)
            error = error.__cause__ or error.__context__
    assert KEY not in caplog.text
    assert KEY not in repr(endpoint.settings())


@pytest.mark.parametrize("key", [KEY + "\n", "ключ" + KEY, KEY + " x"], ids=["newline", "not ASCII", "space"])
async def test_an_impossible_key_is_refused_without_showing_it(endpoint: Endpoint, key: str) -> None:
    with pytest.raises(Misconfigured, match="REDISMEM_EMBEDDER_KEY") as caught:
        await OpenAIEmbedder.open(endpoint.settings(embedder_key=key))
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:80/v1", "ftp://host/v1", "http://", "http://host:port/v1", "http://me:secret@host/v1"]
)
async def test_an_impossible_url_is_refused(endpoint: Endpoint, url: str) -> None:
    with pytest.raises(Misconfigured, match="REDISMEM_EMBEDDER_URL") as caught:
        await OpenAIEmbedder.open(endpoint.settings(embedder_url=url))
    assert "secret" not in str(caught.value)


async def test_close_finishes_what_was_accepted_and_refuses_the_rest(endpoint: Endpoint) -> None:
    entered, release = threading.Event(), threading.Event()

    def slow(body: dict[str, Any]) -> Answer:
        entered.set()
        release.wait(30)
        return good(body)

    embedder = await opened(endpoint)
    endpoint.answers = [slow]
    running = asyncio.create_task(embedder.embed(["a"]))
    assert await asyncio.to_thread(entered.wait, 30), "the request never arrived"
    closing = asyncio.create_task(embedder.close())
    release.set()
    assert (await running).shape == (1, 3)
    await closing
    with pytest.raises(EmbedderUnavailable, match="closed"):
        await embedder.embed(["a"])
