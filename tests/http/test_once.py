"""Idempotency-Key: a repetition changes nothing and gets the same reply."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import httpx
import pytest

from redismem.http.app import create_app
from redismem.idempotency import Claim
from redismem.keys import Owner
from redismem.service import Service, assembled
from tests.conftest import until
from tests.http.conftest import Gate, error_of, of_user

MEMORIES = of_user("alice", "memories")
MESSAGES = of_user("alice", "sessions", "talk", "messages")
TEA = {"text": "Alice drinks tea"}
KEY = {"Idempotency-Key": "c0ffee-1"}


async def ids_of(http: httpx.AsyncClient) -> list[str]:
    reply = await http.get(MEMORIES)
    return [memory["id"] for memory in reply.json()["memories"]]


async def test_a_repetition_gets_the_first_reply(http: httpx.AsyncClient) -> None:
    first = await http.post(MEMORIES, json=TEA, headers=KEY)
    again = await http.post(MEMORIES, json=TEA, headers=KEY)
    assert first.status_code == again.status_code == 201
    assert first.content == again.content
    assert first.json()["memories"][0]["outcome"] == "CREATED"
    assert first.headers["redismem-generation"] == again.headers["redismem-generation"]
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    assert first.headers["x-request-id"] != again.headers["x-request-id"]


async def test_what_was_deleted_does_not_come_back_by_a_repetition(http: httpx.AsyncClient) -> None:
    first = await http.post(MEMORIES, json=TEA, headers=KEY)
    await http.delete(of_user("alice", "memories", first.json()["memories"][0]["id"]))
    assert (await http.post(MEMORIES, json=TEA, headers=KEY)).content == first.content
    assert await ids_of(http) == []
    assert (await http.post(MEMORIES, json=TEA)).json()["memories"][0]["outcome"] == "CREATED"


async def test_a_message_without_an_id_is_stored_once(http: httpx.AsyncClient) -> None:
    await http.post(of_user("alice", "sessions"), json={"id": "talk"})
    yes = {"messages": [{"text": "yes"}, {"text": "yes"}]}
    first = await http.post(MESSAGES, json=yes, headers=KEY)
    again = await http.post(MESSAGES, json=yes, headers=KEY)
    assert first.content == again.content
    assert len(await ids_of(http)) == first.json()["messages"] == 2
    await http.post(MESSAGES, json=yes)
    assert len(await ids_of(http)) == 4


async def test_a_message_is_stored_once_although_its_reply_was_never_kept(
    http: httpx.AsyncClient, service: Service, owner: Owner
) -> None:
    await http.post(of_user("alice", "sessions"), json={"id": "talk"})
    first = await http.post(MESSAGES, json={"text": "yes"}, headers=KEY)
    await service.client.execute("DEL", owner.replies)  # as when the process dies and its claim expires
    again = await http.post(MESSAGES, json={"text": "yes"}, headers=KEY)
    assert again.json()["items"][0]["id"] == first.json()["items"][0]["id"]
    assert again.json()["items"][0]["outcome"] == "UNCHANGED"
    assert again.json()["messages"] == 1


async def test_a_key_that_is_used_again_after_its_time_overwrites_no_message(
    http: httpx.AsyncClient, service: Service, owner: Owner
) -> None:
    await http.post(of_user("alice", "sessions"), json={"id": "talk"})
    await http.post(MESSAGES, json={"text": "yes"}, headers=KEY)
    await service.client.execute("DEL", owner.replies)
    reply = await http.post(MESSAGES, json={"text": "no"}, headers=KEY)
    assert reply.json()["items"][0]["outcome"] == "CREATED"
    assert reply.json()["messages"] == 2


async def test_a_correction_is_made_once(http: httpx.AsyncClient) -> None:
    await http.post(MEMORIES, json={"id": "tea", **TEA})
    body = {"ids": ["tea"], "memory": {"text": "Alice drinks coffee"}}
    first = await http.post(of_user("alice", "corrections"), json=body, headers=KEY)
    assert first.status_code == 201
    await http.delete(of_user("alice", "memories", first.json()["id"]))
    again = await http.post(of_user("alice", "corrections"), json=body, headers=KEY)
    assert (again.status_code, again.content) == (201, first.content)


async def test_a_session_without_an_id_is_joined_by_a_repetition(http: httpx.AsyncClient) -> None:
    replies = [await http.post(of_user("alice", "sessions"), json={}, headers=KEY) for _ in range(2)]
    assert [reply.json()["outcome"] for reply in replies] == ["OPENED", "JOINED"]
    assert len({reply.json()["session"]["id"] for reply in replies}) == 1


@pytest.mark.parametrize("path", [MEMORIES, of_user("alice", "corrections"), f"{MEMORIES}?wait=false"])
async def test_a_key_stands_for_one_request(http: httpx.AsyncClient, path: str) -> None:
    await http.post(MEMORIES, json=TEA, headers=KEY)
    body = {"text": "Alice drinks coffee"} if path == MEMORIES else TEA
    error = error_of(await http.post(path, json=body, headers=KEY), 422)
    assert error["field"] == "Idempotency-Key"
    assert len(await ids_of(http)) == 1


async def test_users_do_not_share_keys(http: httpx.AsyncClient) -> None:
    for user in ("alice", "bob"):
        reply = await http.post(of_user(user, "memories"), json=TEA, headers=KEY)
        assert "idempotency-replayed" not in reply.headers


async def test_whoever_repeats_it_meanwhile_is_told_to_wait(
    gated_http: httpx.AsyncClient, gate: Gate
) -> None:
    gate.open.clear()
    first = asyncio.create_task(gated_http.post(MEMORIES, json=TEA, headers=KEY))
    await until("the first is being embedded", lambda: asyncio.sleep(0, gate.waiting))
    meanwhile = await gated_http.post(MEMORIES, json=TEA, headers=KEY)
    assert error_of(meanwhile, 409)["code"] == "in_progress"
    assert int(meanwhile.headers["retry-after"]) >= 1
    gate.open.set()
    told = await first
    again = await gated_http.post(MEMORIES, json=TEA, headers=KEY)
    assert (told.status_code, again.content) == (201, told.content)


async def test_an_error_is_not_kept(http: httpx.AsyncClient) -> None:
    error_of(await http.post(MESSAGES, json={"text": "yes"}, headers=KEY), 404)
    await http.post(of_user("alice", "sessions"), json={"id": "talk"})
    reply = await http.post(MESSAGES, json={"text": "yes"}, headers=KEY)
    assert reply.status_code == 201
    assert "idempotency-replayed" not in reply.headers


async def test_a_request_that_took_too_long_may_be_tried_again(service: Service, gate: Gate) -> None:
    hurried = replace(service.settings, request_timeout_s=0.1)
    gate.open.clear()
    async with assembled(hurried, service.client, gate) as opened:
        transport = httpx.ASGITransport(app=create_app(opened), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            error_of(await client.post(MEMORIES, json=TEA, headers=KEY), 504)
            gate.open.set()
            # how long it takes now is the machine's affair
            replies = [await client.post(MEMORIES, json=TEA, headers=KEY) for _ in range(20)]
            assert {reply.status_code for reply in replies} <= {201, 504}
            assert any("idempotency-replayed" in reply.headers for reply in replies)
        assert await opened.backfill.drained(10)


@pytest.mark.parametrize("key", ["", " ", "two words", "a" * 256, "tè".encode(), b"\xff"])
async def test_what_is_no_key_is_refused_by_name(http: httpx.AsyncClient, key: str | bytes) -> None:
    error = error_of(await http.post(MEMORIES, json=TEA, headers={"Idempotency-Key": key}), 422)
    assert error["field"] == "Idempotency-Key"
    assert await ids_of(http) == []


async def test_where_the_id_is_given_the_key_must_still_be_one(http: httpx.AsyncClient) -> None:
    path = of_user("alice", "sessions")
    reply = await http.post(path, json={"id": "talk"}, headers={"Idempotency-Key": " "})
    assert error_of(reply, 422)["field"] == "Idempotency-Key"


async def test_two_keys_are_none(http: httpx.AsyncClient) -> None:
    headers = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    assert error_of(await http.post(MEMORIES, json=TEA, headers=headers), 422)["field"] == "Idempotency-Key"


async def test_forgetting_a_user_forgets_the_replies(
    http: httpx.AsyncClient, service: Service, owner: Owner
) -> None:
    await http.post(MEMORIES, json=TEA, headers=KEY)
    late = await service.idempotency.claim(owner, "late", b"a request")
    assert isinstance(late, Claim)
    await http.delete(of_user("alice"))
    await service.idempotency.answered(late, b"{}")
    assert await service.client.execute("EXISTS", owner.replies) == 0


async def test_no_text_is_kept(http: httpx.AsyncClient, service: Service, owner: Owner) -> None:
    await http.post(of_user("alice", "sessions"), json={"id": "talk"}, headers={"Idempotency-Key": "0"})
    await http.post(MEMORIES, json=TEA, headers={"Idempotency-Key": "1"})
    await http.post(MESSAGES, json=TEA, headers={"Idempotency-Key": "2"})
    kept = b"".join(await service.client.execute("HVALS", owner.replies))
    assert kept.count(b"CREATED") == 2
    assert b"tea" not in kept
