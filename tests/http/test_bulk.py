from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from redismem.http.app import create_app
from redismem.service import Service
from tests.http.conftest import JSON, add, error_of, found, of_user

MEMORIES, ONE = of_user("alice", "memories"), of_user("alice", "memories", "m-1")
SEARCH, CORRECT = of_user("alice", "search"), of_user("alice", "corrections")
EXPORT, IMPORT = "export", "import"
NDJSON = {"Content-Type": "application/x-ndjson"}
MIB = 1024 * 1024

USERS = [
    *("a", "A", "a1", "a/", "/a", "/", "//", "a/memories", "a/b", "a%2Fb", "a%252Fb", "a b", "a+b", "a%20b"),
    *(".", "..", "../a", "a?b", "?", "#", "a#b", "a&b=c", "a;b", "a:b", "a@b", "a,b", "a|b", "a||b", "{a}"),
    *("{", "}", "{}", "[a]", "a*", "'a'", '"a"', "\\", "a\\", "$a", "`a`", "^", "~", "<a>", " ", " a", "a "),
    *("3f2c9a0e-1b7d-4e6f-8a90-0c1d2e3f4a5b", "a-b", "%", "%00", "%zz", "%E2%82", "é", "e\u0301", "😀"),
    *("שלום", "\u202eabc", "\u2028", "\n", "\r\n", "\t", "\x7f", "\x01", "\ufeff", "ß", "İ", "0"),
    *("x" * 256, "😀" * 256),
]

#: each with something that only itself may hold
FULL: dict[str, object] = {
    "text": "Straße 😀 \\ | % שלום \x01",
    "memory_type": "episodic",
    "topics": ["a|b", "50%", "c,d", "{e}", "😀"],
    "entities": ["O'Neil \\ Söhne"],
    "session_id": "s/1 é",
    "event_date": "1969-07-20T20:17:40.123456Z",
    "importance": 0.123456789,
    "confidence": 0.0,
    "pinned": True,
    "metadata": {"k k": "v/v", "n": -1.5, "deep": [{"a": None}], "big": 10**20},
}


async def export(http: httpx.AsyncClient, user: str) -> list[dict[str, object]]:
    reply = await http.get(of_user(user, EXPORT))
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in reply.text.split("\n") if line]


async def test_users_of_any_characters_share_nothing(http: httpx.AsyncClient) -> None:
    for i, user in enumerate(USERS):
        assert len(await add(http, user, {"id": "m", "text": f"same text, number {i}"})) == 1
    for i, user in enumerate(USERS):
        memory = await http.get(of_user(user, "memories", "m"))
        assert memory.json()["text"] == f"same text, number {i}", user
        listed = (await http.get(of_user(user, "memories"))).json()
        assert [m["text"] for m in listed["memories"]] == [f"same text, number {i}"], user
        for mode in ("hybrid", "semantic", "keyword"):
            reply = await http.post(of_user(user, "search"), json={"text": "same text", "search_mode": mode})
            assert [hit["text"] for hit in reply.json()["memories"]] == [f"same text, number {i}"], user
        assert len(await export(http, user)) == 1
    for i, user in enumerate(USERS):
        assert (await http.delete(of_user(user))).json()["memories"] == 1, user
        if i + 1 < len(USERS):
            assert (await http.get(of_user(USERS[-1], "memories", "m"))).status_code == 200


#: ids are stripped and hold no control characters
IDS = [user for user in USERS if user == user.strip() and not re.search(r"[\0-\x1f\x7f]", user)]


@pytest.mark.parametrize("memory_id", IDS)
async def test_a_memory_id_may_hold_any_character(http: httpx.AsyncClient, memory_id: str) -> None:
    await add(http, "alice", {"id": memory_id, "text": "it", "session_id": memory_id}, {"text": "other"})
    url = of_user("alice", "memories", memory_id)
    assert (await http.get(url)).json()["id"] == memory_id
    assert (await http.patch(url, json={"text": "marzipan"})).json()["id"] == memory_id
    assert await found(http, "alice", "marzipan", search_mode="keyword") == [memory_id]
    assert await found(http, "alice", "marzipan", filters={"session_id": memory_id}) == [memory_id]
    assert (await http.get(url + "/history")).json()["id"] == memory_id
    assert (await http.delete(url)).json()["id"] == memory_id
    assert memory_id not in await found(http, "alice", "marzipan")


@pytest.mark.parametrize("user", ["%00", "a%00b", "%FF", "%C3", "%ED%A0%80", "x" * 257, "%F0%9F%98%80" * 257])
async def test_a_user_that_cannot_be_is_refused(http: httpx.AsyncClient, user: str) -> None:
    for method, path in (("GET", "memories"), ("POST", "search"), ("GET", "export"), ("POST", "import")):
        reply = await http.request(method, f"/v1/users/{user}/{path}", content=b'{"text": "a"}', headers=JSON)
        assert error_of(reply, 422)["field"] == "user"
    assert error_of(await http.delete(f"/v1/users/{user}"), 422)["field"] == "user"


@pytest.mark.parametrize("memory_id", ["%00", "%0A", "%FF", "%20", "x" * 257])
async def test_an_id_that_cannot_be_is_refused(http: httpx.AsyncClient, memory_id: str) -> None:
    for method in ("GET", "DELETE", "PATCH"):
        reply = await http.request(method, f"{MEMORIES}/{memory_id}", content=b'{"pinned": 1}', headers=JSON)
        assert error_of(reply, 422)["field"] == "id"


async def sent_raw(service: Service, raw_path: bytes) -> int:
    """Return the status of a GET whose path no client library has touched."""
    statuses: list[int] = []

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, object]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(int(str(message["status"])))

    scope = {"type": "http", "method": "GET", "path": "/", "raw_path": raw_path, "query_string": b""}
    scope |= {"headers": [], "scheme": "http", "server": ("test", 80), "http_version": "1.1", "root_path": ""}
    await create_app(service)(scope, receive, send)  # type: ignore[arg-type]  # the smallest ASGI
    return statuses[0]


async def test_a_path_that_is_not_encoded_names_the_same_user_or_nobody(
    http: httpx.AsyncClient, service: Service
) -> None:
    await add(http, "é", {"id": "m", "text": "it"})
    assert await sent_raw(service, b"/v1/users/%C3%A9/memories/m") == 200
    assert await sent_raw(service, "/v1/users/é/memories/m".encode()) in (200, 400, 422)
    assert await sent_raw(service, b"/v1/users/\xff/memories") in (400, 422)


@pytest.mark.parametrize(
    ("memory", "status"),
    [
        ({"text": "x" * 32_768}, 201),
        ({"text": "x" * 32_769}, 422),
        ({"text": "é" * 16_384}, 201),
        ({"text": "é" * 16_384 + "x"}, 422),
        ({"text": "😀" * 8192}, 201),
        ({"text": "a", "topics": [f"{i:03}" for i in range(100)]}, 201),
        ({"text": "a", "topics": [f"{i:03}" for i in range(101)]}, 422),
        ({"text": "a", "topics": ["😀" * 255 + chr(0x4E00 + i) for i in range(100)]}, 201),
        ({"text": "a", "entities": [f"{i:03}" for i in range(100)]}, 201),
        ({"text": "a", "entities": [f"{i:03}" for i in range(101)]}, 422),
        ({"text": "a", "session_id": "|" * 256}, 201),
        ({"text": "a", "session_id": "|" * 257}, 422),
    ],
)
async def test_a_memory_is_bounded(http: httpx.AsyncClient, memory: dict[str, object], status: int) -> None:
    reply = await http.post(MEMORIES, json={"id": "m-1", **memory})
    assert reply.status_code == status
    if status == 201:
        stored = (await http.get(ONE)).json()
        assert {name: stored[name] for name in memory} == memory
        for name in set(memory) - {"text"}:
            for value in [memory[name]] if name == "session_id" else list(memory[name]):  # type: ignore[call-overload]
                assert await found(http, "alice", "a", filters={name: value}) == ["m-1"]


@pytest.mark.parametrize(("count", "status"), [(1, 201), (500, 201), (501, 422)])
@pytest.mark.parametrize("wait", ["true", "false"])
async def test_a_request_takes_500_memories(
    http: httpx.AsyncClient, service: Service, count: int, status: int, wait: str
) -> None:
    memories = [{"text": f"memory {i}", "session_id": f"s{i % 3}"} for i in range(count)]
    reply = await http.post(f"{MEMORIES}?wait={wait}", json={"memories": memories})
    assert reply.status_code == (202 if wait == "false" and status == 201 else status)
    if status == 422:
        assert error_of(reply, 422)["field"] == "memories"
        return
    items = reply.json()["memories"]
    assert [item["outcome"] for item in items] == ["CREATED"] * count
    assert await service.backfill.drained(5)
    listed = (await http.get(MEMORIES + "?limit=500")).json()
    assert [memory["id"] for memory in listed["memories"]] == [item["id"] for item in items[::-1]]
    assert all(memory["embedded"] for memory in listed["memories"])


async def body_of(size: int, chunk: int) -> AsyncIterator[bytes]:
    head = b'{"text": "a"'
    yield head
    left = size - len(head) - 1
    while left > 0:
        yield b" " * min(chunk, left)
        left -= chunk
    yield b"}"


@pytest.mark.parametrize(("size", "status"), [(MIB, 201), (MIB + 1, 413), (3 * MIB, 413)])
async def test_a_body_is_bounded_whether_or_not_it_says_its_length(
    http: httpx.AsyncClient, size: int, status: int
) -> None:
    whole = b"".join([part async for part in body_of(size, MIB)])
    assert len(whole) == size
    for content in (whole, body_of(size, 65_536)):
        reply = await http.post(MEMORIES, content=content, headers=JSON)
        assert reply.status_code == status
        if status == 413:
            assert error_of(reply, 413)["code"] == "too_large"
    for path in (SEARCH, SEARCH + "/batch", CORRECT):
        if status == 413:
            error_of(await http.post(path, content=whole, headers=JSON), 413)


async def test_an_export_is_imported_as_it_was(http: httpx.AsyncClient) -> None:
    await add(http, "alice", {**FULL, "id": "full"}, {"id": "old", "text": "Ana lives in Rome"})
    await add(http, "alice", *({"text": f"Ana: turn {i}", "session_id": "talk"} for i in range(230)))
    new = {"ids": ["old"], "memory": {"id": "new", "text": "Ana lives in Lisbon", "session_id": "talk"}}
    assert (await http.post(of_user("alice", "corrections"), json=new)).status_code == 201
    before = await export(http, "alice")
    assert len(before) == 233

    lines = (await http.get(of_user("alice", EXPORT))).content
    reply = await http.post(of_user("bob", IMPORT), content=lines, headers=NDJSON)
    assert reply.status_code == 200
    counts = reply.json()
    assert (counts["created"], counts["invalid"], counts["errors"]) == (233, 0, [])
    after = await export(http, "bob")

    def lasting(memory: dict[str, object]) -> dict[str, object]:
        return {name: value for name, value in memory.items() if name not in ("version", "updated_at")}

    assert [lasting(memory) for memory in after] == [lasting(memory) for memory in before]
    for text in ("Ana lives where", "turn 7", "Straße"):
        assert await found(http, "bob", text) == await found(http, "alice", text)
    again = (await http.post(of_user("bob", IMPORT), content=lines, headers=NDJSON)).json()
    assert (again["unchanged"], again["created"], again["updated"]) == (233, 0, 0)


async def test_an_import_reports_each_line_it_refused_by_its_number(http: httpx.AsyncClient) -> None:
    lines = [
        b'{"text": "one"}',
        b"",
        b"not json",
        b'{"text": "a", "foo": 1}',
        b"\xff",
        b'{"text": "a", "created_at": "9999-12-31T23:59:59-14:00"}',
        b'{"text": "a", "superseded_by": "a\\u0000"}',
        b'{"text": "a", "metadata": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"text": "two"}',
    ]
    reply = await http.post(of_user("alice", IMPORT), content=b"\r\n".join(lines), headers=NDJSON)
    assert reply.status_code == 200
    counts = reply.json()
    assert (counts["created"], counts["invalid"]) == (2, 6)
    places = [re.match(r"line (\d+)", error["field"]) for error in counts["errors"]]
    assert sorted(int(place[1]) for place in places if place) == [3, 4, 5, 6, 7, 8]


async def test_an_import_is_bounded_by_line_and_not_by_length(http: httpx.AsyncClient) -> None:
    async def many() -> AsyncIterator[bytes]:
        for i in range(40):
            yield json.dumps({"text": f"{i} " + "x" * 30_000}).encode()[:-1]
            yield b"}\n"

    reply = await http.post(of_user("alice", IMPORT), content=many(), headers=NDJSON)
    assert reply.json()["created"] == 40
    long = b'{"text": "a"' + b" " * MIB + b"}"
    error_of(await http.post(of_user("alice", IMPORT), content=long, headers=NDJSON), 413)


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
finite = st.floats(allow_nan=False, allow_infinity=False)
names = st.sampled_from([*"ab|\\{*-$,", "😀", "a b", "x" * 256]) | st.sampled_from([" ", "", "\0", "\x1f"])
tags = names | st.lists(names, max_size=3) | st.fixed_dictionaries({"any": st.lists(names)})
moments = st.datetimes().map(lambda moment: moment.isoformat() + "Z") | st.just("0001-01-01T00:00:00+14:00")
memory_documents = st.fixed_dictionaries(
    {"text": st.text(min_size=1, max_size=20)},
    optional={
        "topics": st.lists(names, max_size=2),
        "session_id": names,
        "event_date": moments,
        "importance": st.floats(0, 1),
        "metadata": st.dictionaries(st.text(max_size=5), st.integers() | finite | st.text(), max_size=3),
    },
)
filter_documents = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("topics", "session_id"), tags),
        "importance": st.fixed_dictionaries({"gt": finite}, optional={"lte": finite}),
        "created_at": st.fixed_dictionaries({"gte": moments}, optional={"lt": moments}),
        "metadata": st.dictionaries(names, st.integers() | finite | names, max_size=2),
        "superseded": st.sampled_from(["include", "only", "x"]),
    },
)
queries = st.fixed_dictionaries(
    {"text": st.text(min_size=1, max_size=20)},
    optional={
        "filters": filter_documents,
        "limit": st.integers(1, 101),
        "search_mode": st.sampled_from(["hybrid", "semantic", "keyword"]),
        "min_similarity": st.floats(-1, 1),
        "recency_weight": st.floats(0, 1),
        "recency_half_life_days": st.floats(0, 1e5),
        "explain": st.booleans(),
    },
)
DOCUMENTS = {
    ("POST", MEMORIES): memory_documents | st.fixed_dictionaries({"memories": st.lists(memory_documents)}),
    ("PATCH", ONE): memory_documents,
    ("POST", SEARCH): queries,
    ("POST", SEARCH + "/batch"): st.fixed_dictionaries({"queries": st.lists(queries, max_size=2)}),
    ("POST", CORRECT): st.fixed_dictionaries({"ids": st.just(["m-1"]), "memory": memory_documents}),
}


@pytest.mark.parametrize(("method", "path"), DOCUMENTS)
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
async def test_no_json_makes_a_500(
    http: httpx.AsyncClient, method: str, path: str, data: st.DataObject
) -> None:
    body = json.dumps(data.draw(st.one_of(*[DOCUMENTS[method, path]] * 4, junk), label="body"))
    await http.post(MEMORIES, json={"id": "m-1", "text": "fuzz"})
    reply = await http.request(method, path, content=body.encode(), headers=JSON)
    if reply.status_code not in (200, 201):
        assert reply.status_code in (400, 404, 409, 422), reply.text
        error_of(reply, reply.status_code)
    assert (await http.get(MEMORIES + "?superseded=include")).status_code == 200
