from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from redismem.embedded import EmbeddedRedis
from redismem.http.app import create_app
from redismem.service import open_service
from redismem.settings import Settings
from tests.conftest import until
from tests.http.conftest import JSON, add, error_of, of_user

MEMORIES, ONE = of_user("alice", "memories"), of_user("alice", "memories", "m-1")
SEARCH, CORRECT = of_user("alice", "search"), of_user("alice", "corrections")
IMPORT = of_user("alice", "import")

#: every route that takes a JSON body
BODIES = [("PATCH", ONE), *(("POST", path) for path in (MEMORIES, CORRECT, SEARCH, SEARCH + "/batch"))]

#: the same, with a document that is right up to the place of a text
DOCUMENTS = {
    MEMORIES: b'{"text": %s}',
    ONE: b'{"text": %s}',
    SEARCH: b'{"text": %s}',
    SEARCH + "/batch": b'{"queries": [{"text": %s}]}',
    CORRECT: b'{"ids": ["a"], "memory": {"text": %s}}',
}
MALFORMED = {
    "cut off": b'"a',
    "a comma too many": b'"a",',
    "single quotes": b"'a'",
    "NaN": b"NaN",
    "Infinity": b"-Infinity",
    "a bare surrogate": b'"\\ud800"',
    "a surrogate and a letter": b'"\\udc00b"',
    "a raw control character": b'"a\x01"',
    "latin-1": '"é"'.encode("latin-1"),
    "surrogates in utf-8": b'"\xed\xa0\x80"',
}
DEEP = b'{"a":' * 50_000 + b"1" + b"}" * 50_000


@pytest.mark.parametrize("name", MALFORMED)
@pytest.mark.parametrize(("method", "path"), BODIES)
async def test_what_is_not_json_is_refused_with_400(
    http: httpx.AsyncClient, method: str, path: str, name: str
) -> None:
    reply = await http.request(method, path, content=DOCUMENTS[path] % MALFORMED[name], headers=JSON)
    assert error_of(reply, 400)["code"] == "malformed"


@pytest.mark.parametrize("body", [b"", b"hello", b'{"', b"\xef\xbb\xbf{}", "{}".encode("utf-16"), b'"a" x'])
@pytest.mark.parametrize(("method", "path"), BODIES)
async def test_what_does_not_start_or_end_as_json_is_refused(
    http: httpx.AsyncClient, method: str, path: str, body: bytes
) -> None:
    error_of(await http.request(method, path, content=body, headers=JSON), 422 if body == b'"a" x' else 400)
    trailing = await http.request(method, path, content=DOCUMENTS[path] % b'"a"' + b"x", headers=JSON)
    assert error_of(trailing, 400)["code"] == "malformed"


@pytest.mark.parametrize(("method", "path"), BODIES[:3])
async def test_bottomless_nesting_is_refused(http: httpx.AsyncClient, method: str, path: str) -> None:
    body = DOCUMENTS[path] % (b'"a", "metadata": ' + DEEP)
    assert error_of(await http.request(method, path, content=body, headers=JSON), 400)["code"] == "malformed"


async def test_of_duplicate_keys_the_last_counts(http: httpx.AsyncClient) -> None:
    reply = await http.post(MEMORIES, content=b'{"id": "m-1", "text": "a", "text": "b"}', headers=JSON)
    assert reply.status_code == 201
    assert (await http.get(ONE)).json()["text"] == "b"


@pytest.mark.parametrize(
    ("number", "status"),
    [(b"1e999", 422), (b"-1e9", 422), (b"1" * 5000, 422), (b"1e308", 422), (b"1e-999", 201)],
)
async def test_a_number_out_of_range_is_refused(http: httpx.AsyncClient, number: bytes, status: int) -> None:
    reply = await http.post(MEMORIES, content=b'{"text": "a", "importance": %s}' % number, headers=JSON)
    assert reply.status_code == status
    huge = b'{"id": "m-1", "text": "a", "metadata": {"n": %s}}' % number
    if (await http.post(MEMORIES, content=huge, headers=JSON)).status_code == 201:
        assert (await http.get(ONE)).status_code == 200


@pytest.mark.parametrize("body", [b"[]", b"null", b"1", b'"text"', b"true", b"{}", b'{"": 1}'])
@pytest.mark.parametrize(("method", "path"), BODIES)
async def test_json_of_another_shape_is_refused_with_422(
    http: httpx.AsyncClient, method: str, path: str, body: bytes
) -> None:
    assert error_of(await http.request(method, path, content=body, headers=JSON), 422)["code"] == "invalid"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/jsonx", ""])
@pytest.mark.parametrize(("method", "path"), BODIES)
async def test_a_body_must_say_that_it_is_json(
    http: httpx.AsyncClient, method: str, path: str, kind: str
) -> None:
    reply = await http.request(method, path, content=b'{"text": "a"}', headers={"Content-Type": kind})
    assert error_of(reply, 400)["code"] == "malformed"


async def test_an_import_must_say_that_it_is_ndjson(http: httpx.AsyncClient) -> None:
    """A web page of another origin can post text/plain without being asked."""
    reply = await http.post(IMPORT, content=b'{"text": "a"}', headers={"Content-Type": "text/plain"})
    error_of(reply, 400)


async def test_metadata_is_refused_or_readable_however_deep(http: httpx.AsyncClient) -> None:
    for depth in [*range(10, 880, 30), *range(880, 1000)]:  # the recursion limit is 1,000 frames
        body = b'{"id": "m-1", "text": "deep", "metadata": {"a": ' + b"[" * depth + b"]" * depth + b"}}"
        reply = await http.post(MEMORIES, content=body, headers=JSON)
        if reply.status_code != 201:
            assert reply.status_code in (400, 422)
            continue
        for path in (ONE, MEMORIES, of_user("alice", "export")):
            assert (await http.get(path)).status_code == 200, f"GET {path} at depth {depth}"
        search = await http.post(SEARCH + "/batch", json={"queries": [{"text": "deep"}]})
        assert search.status_code == 200, f"search at depth {depth}"
        assert (await http.patch(ONE, json={"pinned": True})).status_code == 200, f"PATCH at depth {depth}"


@pytest.mark.parametrize(
    ("method", "path", "body", "field"),
    [
        ("POST", MEMORIES, {"text": "a", "foo": 1}, "foo"),
        ("POST", MEMORIES, {}, "text"),
        ("POST", MEMORIES, {"text": 5}, "text"),
        ("POST", MEMORIES, {"text": "a\0b"}, "text"),
        ("POST", MEMORIES, {"text": "a", "topics": ["x", 5]}, "topics[1]"),
        ("POST", MEMORIES, {"text": "a", "topics": [" "]}, "topics"),
        ("POST", MEMORIES, {"text": "a", "importance": 1.01}, "importance"),
        ("POST", MEMORIES, {"text": "a", "importance": True}, "importance"),
        ("POST", MEMORIES, {"text": "a", "memory_type": "No"}, "memory_type"),
        ("POST", MEMORIES, {"text": "a", "id": "x" * 257}, "id"),
        ("POST", MEMORIES, {"text": "a", "id": "a\nb"}, "id"),
        ("POST", MEMORIES, {"text": "a", "event_date": "9999-12-31T23:59:59-14:00"}, "event_date"),
        ("POST", MEMORIES, {"text": "a", "metadata": [1]}, "metadata"),
        ("POST", MEMORIES, {"text": "a", "metadata": {"a": "x" * 17_000}}, "metadata"),
        ("POST", MEMORIES, {"memories": [{"text": "a"}], "text": "b"}, "text"),
        ("POST", MEMORIES, {"memories": 5}, "memories"),
        ("POST", MEMORIES, {"memories": []}, "memories"),
        ("POST", MEMORIES, {"memories": [{"text": "a", "foo": 1}]}, "memories[0].foo"),
        ("POST", MEMORIES, {"memories": [5]}, "memories[0]"),
        ("PATCH", ONE, {"text": "b", "foo": 1}, "foo"),
        ("PATCH", ONE, {"id": "m-2"}, "id"),
        ("PATCH", ONE, {"text": None}, "text"),
        ("PATCH", ONE, {"text": "a\0"}, "text"),
        ("PATCH", ONE, {"topics": [" "]}, "topics"),
        ("PATCH", ONE, {"session_id": "\x1f"}, "session_id"),
        ("PATCH", ONE, {"event_date": "9999-12-31T23:59:59-14:00"}, "event_date"),
        ("POST", CORRECT, {"ids": ["m-1"]}, "memory"),
        ("POST", CORRECT, {"ids": [], "memory": {"text": "a"}}, "ids"),
        ("POST", CORRECT, {"ids": ["m-1"], "memory": {"text": "a", "foo": 1}}, "memory.foo"),
        ("POST", CORRECT, {"ids": ["m-1"], "memory": {"text": "a\0"}}, "memory.text"),
        ("POST", SEARCH + "/batch", {"queries": [{"text": "a"}, {"text": "b", "foo": 1}]}, "queries[1].foo"),
    ],
)
async def test_an_invalid_field_is_named_by_its_path(
    http: httpx.AsyncClient, method: str, path: str, body: object, field: str
) -> None:
    await add(http, "alice", {"id": "m-1", "text": "stays"})
    assert error_of(await http.request(method, path, json=body), 422).get("field") == field
    assert (await http.get(ONE)).json()["text"] == "stays"


@pytest.mark.parametrize(
    "query",
    [
        "foo=1",
        "limit=0",
        "limit=501",
        "limit=x",
        "cursor=%C3%A9",
        "cursor=e30",
        "cursor=",
        "pinned=maybe",
        "superseded=some",
        "memory_type=X",
        "topics=",
        "topics=%00",
        "topics=%1F",
        "topics=%20",
        "session_id=%00",
        "topics=%FF",
        "importance.foo=1",
        "importance.gte=nan",
        "importance.gte=null",
        "importance.gte=null&importance.lt=0.5",
        "confidence.lt=NULL",
        "limit=null",
        "pinned=null",
        "importance=1",
        "created_at.gte=yesterday",
        "created_at.gte=2020",
        "created_at.gte=2020-01-01",
        "topics=a&topics.any=b",
        "created_at=5&created_at.gte=5",
        "metadata=x&metadata.a=1",
        ".a=1",
        "metadata.=1",
        "%FF=1",
        "limit.a=1",
    ],
)
async def test_a_wrong_query_parameter_is_refused(http: httpx.AsyncClient, query: str) -> None:
    await add(http, "alice", {"text": "a"})
    assert error_of(await http.get(f"{MEMORIES}?{query}"), 422)["code"] == "invalid"


@pytest.mark.parametrize("version", ["null", "-1", "x", ""])
async def test_a_wrong_version_to_read_is_refused(http: httpx.AsyncClient, version: str) -> None:
    await add(http, "alice", {"id": "m-1", "text": "a"})
    error = error_of(await http.get(f"{ONE}?consistency=session&min_version={version}"), 422)
    assert error.get("field") == "min_version"


@pytest.mark.parametrize(
    ("method", "path"),
    [*BODIES, ("GET", ONE), ("DELETE", ONE), ("DELETE", of_user("alice")), ("POST", IMPORT)],
)
async def test_an_unknown_query_parameter_is_refused(http: httpx.AsyncClient, method: str, path: str) -> None:
    """A mistyped `?wait=false` must not pass for the default, nor `DELETE …?dry_run=1` for a wish."""
    await add(http, "alice", {"id": "m-1", "text": "stays"})
    content = None if method in ("GET", "DELETE") else b'{"text": "b"}'
    reply = await http.request(method, f"{path}?waitt=false", content=content, headers=JSON)
    assert error_of(reply, 422).get("field") == "waitt"
    assert (await http.get(ONE)).status_code == 200


@pytest.mark.parametrize("query", ["wait=maybe", "wait=", "wait.x=false", "wait.=false", "Wait=false"])
async def test_wait_is_true_or_false_and_has_no_relatives(http: httpx.AsyncClient, query: str) -> None:
    error_of(await http.post(f"{MEMORIES}?{query}", json={"text": "a"}), 422)


@pytest.mark.parametrize("tag", ["abc", "", '"1", "2"', '"٣"', '"-1"', '"' + "9" * 17 + '"'])
async def test_a_wrong_if_match_is_refused(http: httpx.AsyncClient, tag: str) -> None:
    await add(http, "alice", {"id": "m-1", "text": "a"})
    reply = await http.patch(ONE, json={"pinned": True}, headers=[(b"If-Match", tag.encode())])
    assert error_of(reply, 422)["field"] == "If-Match"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nope", 404),
        ("GET", "/", 404),
        ("GET", of_user("a", "b", "c"), 404),
        ("GET", "/v1/users//memories", 404),
        ("GET", MEMORIES + "/", 404),
        ("PUT", MEMORIES, 405),
        ("DELETE", MEMORIES, 405),
        ("GET", SEARCH, 405),
        ("PATCH", "/health/live", 405),
    ],
)
async def test_what_does_not_exist_is_said_in_json(
    http: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    reply = await http.request(method, path, headers={"Host": "["})  # no header may turn it into a 500
    assert error_of(reply, status)["code"] == {404: "not_found", 405: "method_not_allowed"}[status]
    assert status == 404 or reply.headers["allow"]


async def test_a_request_id_is_returned_or_made(http: httpx.AsyncClient) -> None:
    reply = await http.get("/health/live", headers={"X-Request-ID": "abc-1"})
    assert reply.headers["x-request-id"] == "abc-1"
    assert error_of(await http.get("/nope", headers={"X-Request-ID": "abc-2"}), 404)["request_id"] == "abc-2"
    made = {(await http.get("/health/live")).headers["x-request-id"] for _ in range(20)}
    assert len(made) == 20


@pytest.mark.parametrize(
    "value", [b"", b"a b", b"a\r\nSet-Cookie: x=1", b"a\nb", b"\x00", b"\x7f", b"\xc3\xa9", b"x" * 129, b"\t"]
)
async def test_a_hostile_request_id_is_not_returned(http: httpx.AsyncClient, value: bytes) -> None:
    for path, status in (("/health/live", 200), ("/nope", 404)):
        reply = await http.get(path, headers=[(b"X-Request-ID", value)])
        assert reply.status_code == status
        assert reply.headers["x-request-id"].encode() != value
        assert reply.headers["x-request-id"].isalnum()
        assert "set-cookie" not in reply.headers


async def test_an_error_never_holds_the_text_of_a_memory(http: httpx.AsyncClient) -> None:
    secret = "marzipan"
    await add(http, "alice", {"id": "m-1", "text": secret}, {"id": "m-2", "text": secret})
    text = {"text": secret}
    replies = [
        await http.post(MEMORIES, json={**text, "foo": 1}),
        await http.post(MEMORIES, json={**text, "importance": 5}),
        await http.post(MEMORIES, json={**text, "metadata": {"a": "x" * 17_000}}),
        await http.post(MEMORIES, json={"text": secret + "\0"}),
        await http.post(MEMORIES, json={"text": [secret]}),
        await http.post(MEMORIES, content=f'{{"text": "{secret}" x'.encode(), headers=JSON),
        await http.post(CORRECT, json={"ids": ["m-1"], "memory": {"id": "m-2", "text": secret + "!"}}),
        await http.post(CORRECT, json={"ids": ["gone"], "memory": text}),
        await http.patch(ONE, json=text, headers={"If-Match": '"1"'}),
        await http.patch(ONE, json={"text": secret + "\0"}),
        await http.post(SEARCH, json={**text, "filters": {"topicz": secret}}),
        await http.post(SEARCH, json={**text, "search_mode": "x"}),
    ]
    for reply in replies:
        assert 400 <= reply.status_code < 500
        assert secret not in reply.text


@pytest.fixture
async def dying(tmp_path: Path) -> AsyncIterator[tuple[httpx.AsyncClient, int]]:
    """A client of a service whose Redis may be stopped or killed, and the pid of that Redis."""
    async with EmbeddedRedis(tmp_path, persist=False) as redis:
        chosen = Settings(redis_url=redis.url, embedder="deterministic", testing=True, redis_timeout_s=0.1)
        async with open_service(chosen) as opened:
            transport = httpx.ASGITransport(app=create_app(opened), raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                await add(client, "alice", {"id": "m-1", "text": "marzipan"})
                assert redis.pid is not None
                yield client, redis.pid
                with suppress(ProcessLookupError):
                    os.kill(redis.pid, signal.SIGCONT)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_while_redis_is_away_every_route_says_503(
    dying: tuple[httpx.AsyncClient, int], how: signal.Signals
) -> None:
    http, pid = dying
    assert (await http.get("/health/ready")).status_code == 200
    os.kill(pid, how)
    correction = {"ids": ["m-1"], "memory": {"text": "new"}}
    replies = await asyncio.gather(
        http.post(MEMORIES, json={"text": "a"}),
        http.post(MEMORIES + "?wait=false", json={"text": "a", "session_id": "s"}),
        http.get(MEMORIES),
        http.get(ONE),
        http.patch(ONE, json={"pinned": True}),
        http.delete(ONE),
        http.get(ONE + "/history"),
        *(http.post(SEARCH, json={"text": "a", "search_mode": m}) for m in ("hybrid", "semantic", "keyword")),
        http.post(SEARCH + "/batch", json={"queries": [{"text": "a"}, {"text": "b"}]}),
        http.post(CORRECT, json=correction),
        http.get(of_user("alice", "export")),
        http.post(IMPORT, content=b'{"text": "a"}', headers={"Content-Type": "application/x-ndjson"}),
        http.delete(of_user("alice")),
    )
    for reply in replies:
        assert error_of(reply, 503)["code"] == "redis_unavailable"
        assert int(reply.headers["retry-after"]) >= 1
        assert "marzipan" not in reply.text
    ready = await http.get("/health/ready")
    assert (ready.status_code, ready.json()["status"]) == (503, "unavailable")
    assert int(ready.headers["retry-after"]) >= 1
    assert (await http.get("/health/live")).status_code == 200
    if how == signal.SIGSTOP:
        os.kill(pid, signal.SIGCONT)

        async def is_ready() -> bool:
            return (await http.get("/health/ready")).status_code == 200

        await until("the service resumes", is_ready)
        await add(http, "bob", {"id": "m-1", "text": "nougat"})  # Redis may carry out the DELETEs above
        assert (await http.get(of_user("bob", "memories", "m-1"))).status_code == 200
