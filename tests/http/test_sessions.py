"""Sessions as an HTTP client sees them: every route, its statuses, and names of any characters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from datetime import datetime
from typing import Any

import httpx
import pytest

from redismem.keys import Owner
from redismem.service import Service
from tests.conftest import lasting_keys
from tests.http.conftest import JSON, add, error_of, found, of_user
from tests.http.test_bulk import IDS, MIB, USERS

GENERATION = "redismem-generation"
SESSIONS = of_user("alice", "sessions")
SESSION = of_user("alice", "sessions", "s")
MESSAGES, TYPING = SESSION + "/messages", SESSION + "/typing"


@pytest.fixture(autouse=True)
async def settled(service: Service) -> AsyncIterator[None]:
    """What a message sets off in the background ends within its test."""
    yield
    await service.contexts.drained()
    await service.prefetcher.settled()


async def opened(http: httpx.AsyncClient, user: str = "alice", **session: object) -> Any:
    reply = await http.post(of_user(user, "sessions"), json={"id": "s", **session})
    assert reply.status_code == 201, reply.text
    return reply.json()


async def said(http: httpx.AsyncClient, *messages: Mapping[str, object], wait: bool = True) -> Any:
    query = {"wait": str(wait).lower()}
    reply = await http.post(MESSAGES, json={"messages": messages}, params=query)
    assert reply.status_code == (201 if wait else 202), reply.text
    assert reply.headers[GENERATION] == str(reply.json()["generation"])
    return reply.json()


async def read(http: httpx.AsyncClient, path: str = SESSION, **query: str) -> Any:
    reply = await http.get(path, params=query)
    assert reply.status_code == 200, reply.text
    return reply.json()


# opening ---------------------------------------------------------------------------------------------


async def test_an_opened_session_comes_with_its_first_stage(http: httpx.AsyncClient) -> None:
    await add(http, "alice", {"id": "m", "text": "allergic to peanuts", "pinned": True})
    reply = await http.post(SESSIONS, json={"agent": "coach", "pins": ["m"], "active_topics": ["food"]})
    assert reply.status_code == 201
    body = reply.json()
    assert set(body) == {"session", "outcome", "context"}
    assert body["outcome"] == "OPENED"
    session, context = body["session"], body["context"]
    assert (session["agents"], session["active_topics"], session["pins"]) == (["coach"], ["food"], ["m"])
    assert session["messages"] == 0
    assert "closed_at" not in session
    for name in ("opened_at", "last_at", "expires_at"):
        assert datetime.fromisoformat(session[name]).tzinfo is not None
    assert [stage["stage"] for stage in context["stages"]] == [1]
    assert "allergic to peanuts" in context["text"]
    assert reply.headers[GENERATION] == str(context["generation"])
    assert session["id"] == (await read(http, of_user("alice", "sessions", session["id"])))["id"]


async def test_two_agents_are_in_one_session(http: httpx.AsyncClient) -> None:
    first = await opened(http, agent="a", pins=["p"])
    second = await opened(http, agent="b", active_topics=["t"])
    assert (first["outcome"], second["outcome"]) == ("OPENED", "JOINED")
    assert second["session"]["opened_at"] == first["session"]["opened_at"]
    await said(http, {"text": "from a", "agent": "a"}, {"text": "from c", "agent": "c", "role": "assistant"})
    session = await read(http)
    assert (session["agents"], session["pins"], session["active_topics"]) == (["b", "a", "c"], ["p"], ["t"])
    assert [(one["text"], one["agent"]) for one in session["recent"]] == [("from a", "a"), ("from c", "c")]


async def test_agents_that_open_a_session_at_once_are_in_one(http: httpx.AsyncClient) -> None:
    replies = await asyncio.gather(*(opened(http, agent=f"a{i}") for i in range(8)))
    assert sorted(reply["outcome"] for reply in replies) == ["JOINED"] * 7 + ["OPENED"]
    assert set((await read(http))["agents"]) == {f"a{i}" for i in range(8)}


async def test_a_session_lives_as_long_as_it_was_asked_to(http: httpx.AsyncClient) -> None:
    session = (await opened(http, ttl_s=90))["session"]
    lives = datetime.fromisoformat(session["expires_at"]) - datetime.fromisoformat(session["last_at"])
    assert lives.total_seconds() == pytest.approx(90, abs=1)


# messages --------------------------------------------------------------------------------------------


async def test_a_message_is_found_by_the_search_right_after_it(http: httpx.AsyncClient) -> None:
    await opened(http)
    reply = await http.post(MESSAGES, json={"text": "the marzipan is in the attic", "role": "user"})
    assert reply.status_code == 201
    body = reply.json()
    (item,) = body["items"]
    assert item == {"id": item["id"], "outcome": "CREATED", "version": item["version"], "embedded": True}
    assert (body["messages"], reply.headers[GENERATION]) == (1, str(item["version"]))
    for mode in ("hybrid", "semantic", "keyword"):
        assert await found(http, "alice", "marzipan attic", search_mode=mode) == [item["id"]]
    memory = await read(http, of_user("alice", "memories", item["id"]))
    assert (memory["memory_type"], memory["session_id"]) == ("message", "s")
    assert memory["metadata"] == {"role": "user"}


async def test_a_question_and_its_answer_are_stored_in_their_order(http: httpx.AsyncClient) -> None:
    await opened(http)
    pair = {"text": "where is it?"}, {"text": "in the attic", "role": "assistant"}
    body = await said(http, *pair)
    assert [item["outcome"] for item in body["items"]] == ["CREATED", "CREATED"]
    recent = (await read(http))["recent"]
    assert [one["id"] for one in recent] == [item["id"] for item in body["items"]]
    assert [(one["text"], one["role"]) for one in recent] == [
        ("where is it?", "user"),
        ("in the attic", "assistant"),
    ]
    assert recent[0]["at"] < recent[1]["at"]


async def test_without_waiting_a_message_is_found_by_its_words_at_once(http: httpx.AsyncClient) -> None:
    await opened(http)
    body = await said(http, {"text": "quinces ripen late"}, wait=False)
    (item,) = body["items"]
    assert not item["embedded"]
    assert await found(http, "alice", "quinces", search_mode="keyword") == [item["id"]]


async def test_a_repeated_request_stores_its_messages_once(http: httpx.AsyncClient) -> None:
    await opened(http)
    messages = {"id": "q", "text": "where is it?"}, {"id": "a", "text": "here", "role": "assistant"}
    first = await said(http, *messages)
    second = await said(http, *messages)
    assert [item["outcome"] for item in second["items"]] == ["UNCHANGED", "UNCHANGED"]
    assert (second["messages"], second["generation"]) == (2, first["generation"])
    assert [one["id"] for one in (await read(http))["recent"]] == ["q", "a"]


async def test_what_a_message_may_carry_comes_back_with_its_memory(http: httpx.AsyncClient) -> None:
    await opened(http)
    full = {
        "id": "m/1 %",
        "text": "Straße 😀 \\ | % שלום \x01 \u2028",
        "role": "tool",
        "time": "1969-07-20T20:17:40.123456Z",
        "agent": "c|d",
        "topics": ["a|b", "50%"],
        "entities": ["O'Neil"],
        "metadata": {"n": 1, "deep": [None]},
    }
    await said(http, full)
    (shown,) = (await read(http))["recent"]
    assert shown == {
        "id": full["id"],
        "text": full["text"],
        "role": "tool",
        "at": full["time"],
        "agent": "c|d",
    }
    memory = await read(http, of_user("alice", "memories", "m/1 %"))
    assert (memory["topics"], memory["entities"]) == (full["topics"], full["entities"])
    assert memory["metadata"] == {"n": 1, "deep": [None], "role": "tool", "agent": "c|d"}


@pytest.mark.parametrize(("query", "shown"), [({}, 20), ({"limit": "0"}, 0), ({"limit": "3"}, 3)])
async def test_a_session_is_read_with_its_newest_messages(
    http: httpx.AsyncClient, query: dict[str, str], shown: int
) -> None:
    await opened(http)
    await said(http, *({"text": f"number {i}"} for i in range(25)), wait=False)
    session = await read(http, **query)
    assert session["messages"] == 25
    assert [one["text"] for one in session["recent"]] == [f"number {i}" for i in range(25 - shown, 25)]


async def test_a_corrected_or_deleted_message_is_no_longer_shown(http: httpx.AsyncClient) -> None:
    await opened(http)
    await said(http, *({"id": f"m{i}", "text": f"number {i}"} for i in range(3)))
    assert (await http.delete(of_user("alice", "memories", "m1"))).status_code == 200
    correction = {"ids": ["m0"], "memory": {"text": "number zero"}}
    assert (await http.post(of_user("alice", "corrections"), json=correction)).status_code == 201
    assert [one["id"] for one in (await read(http))["recent"]] == ["m2"]


# changing, typing, closing ---------------------------------------------------------------------------


async def test_topics_and_pins_are_replaced_and_what_is_not_given_stays(http: httpx.AsyncClient) -> None:
    await opened(http, pins=["p"], active_topics=["t"])
    reply = await http.patch(SESSION, json={"active_topics": ["u", "v"]})
    assert (reply.status_code, reply.json()["active_topics"], reply.json()["pins"]) == (
        200,
        ["u", "v"],
        ["p"],
    )
    reply = await http.patch(SESSION, json={"pins": [], "active_topics": ["w"]})
    for session in (reply.json(), await read(http)):
        assert session["active_topics"] == ["w"]
        assert "pins" not in session


async def test_what_is_typed_is_stored_nowhere(http: httpx.AsyncClient, service: Service) -> None:
    await opened(http)
    await add(http, "alice", {"id": "m", "text": "the canoe is green"})
    for path in (TYPING, of_user("alice", "sessions", "none", "typing")):
        reply = await http.post(path, json={"partial": "what colour is the marzipan"})
        assert (reply.status_code, reply.json()) == (202, {"status": "accepted"})
    await service.prefetcher.settled()
    assert (await read(http))["messages"] == 0
    assert await found(http, "alice", "marzipan", search_mode="keyword") == []
    for key in await lasting_keys(service.client):
        kind = await service.client.execute("TYPE", key)
        if kind == b"hash":
            assert b"marzipan" not in b" ".join(await service.client.execute("HVALS", key)), key


async def test_a_closed_session_is_read_takes_no_message_and_is_opened_again(http: httpx.AsyncClient) -> None:
    await opened(http, pins=["p"])
    await said(http, {"id": "m", "text": "bye"})
    closed = await http.delete(SESSION)
    assert closed.status_code == 200
    assert set(closed.json()) == {"session"}
    assert "closed_at" in closed.json()["session"]
    assert (await http.delete(SESSION)).json()["session"]["closed_at"] == closed.json()["session"][
        "closed_at"
    ]
    assert [one["text"] for one in (await read(http))["recent"]] == ["bye"]
    assert error_of(await http.post(MESSAGES, json={"text": "too late"}), 409)["code"] == "conflict"
    assert await found(http, "alice", "late", search_mode="keyword") == []
    again = await opened(http)
    assert (again["outcome"], again["session"]["pins"], again["session"]["messages"]) == ("JOINED", ["p"], 1)
    assert (await said(http, {"text": "back"}))["messages"] == 2


async def test_the_summary_of_a_closed_session_follows(http: httpx.AsyncClient, service: Service) -> None:
    path = of_user("alice", "summaries", "session", "s")
    assert error_of(await http.get(path), 404)
    await opened(http)
    texts = ["I bought a green canoe in Bergen", "It is four metres long", "Ann wants to paddle it"]
    await said(http, *({"id": f"m{i}", "text": text} for i, text in enumerate(texts)))
    await http.delete(SESSION)
    await service.worker.settle(ahead_s=2)
    summary = await read(http, path)
    assert (summary["kind"], summary["name"]) == ("session", "s")
    assert set(summary["sources"]) <= {"m0", "m1", "m2"}
    assert "canoe" in summary["text"]
    opened_next = await http.post(SESSIONS, json={"id": "next"})
    (block,) = [
        one for one in opened_next.json()["context"]["stages"][0]["blocks"] if one["part"] == "session"
    ]
    assert "canoe" in block["text"]
    assert block["source"] == "derived"


async def test_forgetting_a_user_ends_his_sessions(http: httpx.AsyncClient, service: Service) -> None:
    await opened(http, pins=["p"])
    await opened(http, user="bob")
    await said(http, {"id": "m", "text": "the marzipan is in the attic"})
    await service.prefetcher.settled()
    assert (await http.delete(of_user("alice"))).status_code == 200
    error_of(await http.get(SESSION), 404)
    error_of(await http.post(MESSAGES, json={"text": "x"}), 404)
    assert await service.client.execute("KEYS", f"*{{{Owner('alice').tag}}}*") == []
    assert (await read(http, of_user("bob", "sessions", "s")))["id"] == "s"
    again = await opened(http)
    assert (again["outcome"], again["session"]["messages"]) == ("OPENED", 0)
    assert "pins" not in again["session"]
    assert "marzipan" not in str(again["context"])


# names of any characters -----------------------------------------------------------------------------


async def test_a_session_id_may_hold_any_character(http: httpx.AsyncClient) -> None:
    for name in IDS:
        opening = await http.post(SESSIONS, json={"id": name, "pins": [name]})
        assert (opening.status_code, opening.json()["outcome"]) == (201, "OPENED"), name
        path = of_user("alice", "sessions", name)
        reply = await http.post(path + "/messages", params={"wait": "false"}, json={"text": f"of {name}"})
        assert reply.status_code == 202, name
        assert (await http.post(path + "/typing", json={"partial": "a"})).status_code == 202
    for name in IDS:
        path = of_user("alice", "sessions", name)
        session = await read(http, path)
        assert (session["id"], session["pins"], session["messages"]) == (name, [name], 1)
        assert [one["text"] for one in session["recent"]] == [f"of {name}"]
        assert (await http.patch(path, json={"pins": ["p"]})).json()["pins"] == ["p"]
        context = await http.post(of_user("alice", "context"), json={"session_id": name, "stages": 1})
        assert context.status_code == 200, name
        assert (await http.delete(path)).json()["session"]["id"] == name


async def test_sessions_of_users_of_any_characters_are_their_own(http: httpx.AsyncClient) -> None:
    for i, user in enumerate(USERS):
        assert (await opened(http, user))["outcome"] == "OPENED", user
        reply = await http.post(of_user(user, "sessions", "s", "messages"), json={"text": f"number {i}"})
        assert reply.status_code == 201, user
    for i, user in enumerate(USERS):
        session = await read(http, of_user(user, "sessions", "s"))
        assert [one["text"] for one in session["recent"]] == [f"number {i}"], user
        context = await http.post(of_user(user, "context"), json={"text": "number", "stages": 4})
        assert f"number {i}" in context.json()["text"]
        assert context.json()["text"].count("number") == 1, user
        assert (await http.delete(of_user(user, "sessions", "s"))).status_code == 200


ROUTES = [
    ("GET", "", None),
    ("PATCH", "", {"pins": ["a"]}),
    ("DELETE", "", None),
    ("POST", "/messages", {"text": "a"}),
]


@pytest.mark.parametrize("session_id", ["%00", "%0A", "%FF", "%20", "%C3", "x" * 257])
async def test_a_session_id_that_cannot_be_is_refused(http: httpx.AsyncClient, session_id: str) -> None:
    for method, rest, body in [*ROUTES, ("POST", "/typing", {"partial": "a"})]:
        reply = await http.request(method, f"{SESSIONS}/{session_id}{rest}", json=body)
        assert error_of(reply, 422)["field"] == "session", (method, rest)


async def test_blanks_around_a_session_id_do_not_make_another(http: httpx.AsyncClient) -> None:
    await opened(http, id=" s ")
    assert (await read(http, SESSIONS + "/%20s%20"))["id"] == "s"


@pytest.mark.parametrize("user", ["%00", "%FF", "x" * 257])
async def test_a_user_that_cannot_be_has_no_sessions(http: httpx.AsyncClient, user: str) -> None:
    base = f"/v1/users/{user}/sessions"
    assert error_of(await http.post(base, json={}), 422)["field"] == "user"
    for method, rest, body in [*ROUTES, ("POST", "/typing", {"partial": "a"})]:
        assert error_of(await http.request(method, f"{base}/s{rest}", json=body), 422)["field"] == "user"


# refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "rest", "body"), ROUTES)
async def test_a_session_that_is_not_there_is_said_so(
    http: httpx.AsyncClient, method: str, rest: str, body: object
) -> None:
    await opened(http, user="bob")
    error = error_of(await http.request(method, SESSION + rest, json=body), 404)
    assert error["code"] == "not_found"
    assert "POST …/sessions" in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "body", "field"),
    [
        ("POST", SESSIONS, {"foo": 1}, "foo"),
        ("POST", SESSIONS, {"id": ""}, "id"),
        ("POST", SESSIONS, {"id": "a\nb"}, "id"),
        ("POST", SESSIONS, {"id": "x" * 257}, "id"),
        ("POST", SESSIONS, {"agent": " "}, "agent"),
        ("POST", SESSIONS, {"ttl_s": 59}, "ttl_s"),
        ("POST", SESSIONS, {"ttl_s": 30 * 86_400 + 1}, "ttl_s"),
        ("POST", SESSIONS, {"pins": "a"}, "pins"),
        ("POST", SESSIONS, {"active_topics": ["a", "\x1f"]}, "active_topics"),
        ("POST", SESSIONS, {"pins": ["x"] * 101}, "pins"),
        ("PATCH", SESSION, {"pins": [" "]}, "pins"),
        ("PATCH", SESSION, {"active_topics": None}, "active_topics"),
        ("PATCH", SESSION, {"ttl_s": 90}, "ttl_s"),
        ("POST", MESSAGES, {"text": ""}, "text"),
        ("POST", MESSAGES, {"text": "a\0"}, "text"),
        ("POST", MESSAGES, {"text": "a", "role": "boss"}, "role"),
        ("POST", MESSAGES, {"text": "a", "time": "2020-01-01"}, "time"),
        ("POST", MESSAGES, {"text": "a", "importance": 1}, "importance"),
        ("POST", MESSAGES, {"role": "user"}, "text"),
        ("POST", MESSAGES, {"messages": []}, "messages"),
        ("POST", MESSAGES, {"messages": [{"text": "a"}] * 101}, "messages"),
        ("POST", MESSAGES, {"messages": [{"text": "a"}, {"text": "b", "foo": 1}]}, "messages[1].foo"),
        ("POST", MESSAGES, {"messages": [{"text": "a"}], "text": "b"}, "text"),
        (
            "POST",
            MESSAGES,
            {"messages": [{"id": "m", "text": "a"}, {"id": "m", "text": "b"}]},
            "messages[1].id",
        ),
        (
            "POST",
            MESSAGES,
            {"messages": [{"text": "a"}, {"text": "b", "metadata": {"a": "x" * 16_380}}]},
            "messages[1].metadata",
        ),
        ("POST", TYPING, {"partial": " "}, "partial"),
        ("POST", TYPING, {"partial": "a", "text": "b"}, "text"),
        ("POST", TYPING, {}, "partial"),
    ],
)
async def test_a_wrong_field_is_named_and_nothing_is_stored(
    http: httpx.AsyncClient, method: str, path: str, body: object, field: str
) -> None:
    await opened(http)
    before = await read(http)
    assert error_of(await http.request(method, path, json=body), 422).get("field") == field
    after = await read(http)
    assert {**after, "expires_at": ""} == {**before, "expires_at": ""}
    assert (await read(http, of_user("alice", "memories")))["total"] == 0


async def test_a_patch_of_nothing_is_refused(http: httpx.AsyncClient) -> None:
    await opened(http)
    assert "nothing to change" in error_of(await http.patch(SESSION, json={}), 422)["message"]


@pytest.mark.parametrize(
    ("method", "path"), [("POST", SESSIONS), ("PATCH", SESSION), ("POST", MESSAGES), ("POST", TYPING)]
)
async def test_a_body_that_is_no_json_object_is_refused(
    http: httpx.AsyncClient, method: str, path: str
) -> None:
    await opened(http)
    for content in (b"", b"{", b'{"id"', b"nul"):
        error_of(await http.request(method, path, content=content, headers=JSON), 400)
    for content in (b"[]", b"null", b'"text"', b"1"):
        error_of(await http.request(method, path, content=content, headers=JSON), 422)
    error_of(await http.request(method, path, content=b'{"text": "a"}'), 400)
    wrong = {"Content-Type": "text/plain"}
    error_of(await http.request(method, path, content=b'{"text": "a"}', headers=wrong), 400)
    long = b'{"text": "' + b"x" * (8 * MIB) + b'"}'
    assert error_of(await http.request(method, path, content=long, headers=JSON), 413)["code"] == "too_large"
    assert (await read(http))["messages"] == 0


@pytest.mark.parametrize(
    ("method", "path", "query"),
    [
        ("GET", SESSION, "limit=201"),
        ("GET", SESSION, "limit=-1"),
        ("GET", SESSION, "limit=x"),
        ("GET", SESSION, "limit=1&limit=2"),
        ("GET", SESSION, "messages=1"),
        ("POST", MESSAGES, "wait=maybe"),
        ("POST", MESSAGES, "wait="),
        ("POST", MESSAGES, "consistency=strong"),
        ("POST", SESSIONS, "wait=false"),
        ("PATCH", SESSION, "wait=false"),
        ("DELETE", SESSION, "wait=false"),
        ("POST", TYPING, "wait=false"),
    ],
)
async def test_a_wrong_query_parameter_is_refused(
    http: httpx.AsyncClient, method: str, path: str, query: str
) -> None:
    await opened(http)
    content = None if method in ("GET", "DELETE") else b'{"text": "b"}'
    reply = await http.request(method, f"{path}?{query}", content=content, headers=JSON)
    assert error_of(reply, 422)["field"] == query.partition("=")[0]
    session = await read(http)
    assert session["messages"] == 0
    assert "closed_at" not in session


@pytest.mark.parametrize(
    ("method", "path"),
    [("PUT", SESSIONS), ("GET", SESSIONS), ("POST", SESSION), ("GET", MESSAGES), ("PUT", TYPING)],
)
async def test_a_method_that_a_path_has_not_is_refused(
    http: httpx.AsyncClient, method: str, path: str
) -> None:
    assert error_of(await http.request(method, path), 405)["code"] == "method_not_allowed"
