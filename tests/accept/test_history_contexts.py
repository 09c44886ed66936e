"""How contexts are read: what is a memory, what is quoted, when each stage came and was compared."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from tests.accept.history import Item
from tests.accept.history_actor import IDS, MESSAGES, USERS, Actor, Ground, Offers
from tests.accept.history_client import HttpClient
from tests.accept.history_contexts import TEXT, of_json, of_opened, of_stream

M1, M2 = "common amber fern of u m1 n1", "common basil cedar Nora of u1/a m2 n22"


def stage(number: int, at_ms: float, text: str, *blocks: dict[str, Any]) -> dict[str, Any]:
    return {"stage": number, "at_ms": at_ms, "text": text, "blocks": list(blocks), "tokens": 1}


def memories(part: str, **texts: str) -> dict[str, Any]:
    return {"part": part, "memories": [{"id": name, "text": text} for name, text in texts.items()]}


SHOWING = stage(2, 1.5, f"- {M1}", memories("matches", m1=M1))
QUOTING = stage(1, 0.5, f"## About the user\n- 3 May: {M2}", {"part": "profile", "text": f"- 3 May: {M2}"})


def event(name: str, content: object) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(content))


def test_a_text_of_any_client_is_met_wherever_it_stands() -> None:
    actor = Actor(Ground([0], Offers()), 0)
    for user in USERS:
        for memory_id in IDS + MESSAGES:
            text = actor._text(user, memory_id)
            (match,) = TEXT.finditer(f'- On 3 May, said "{text}", and more of it')
            assert (match[0], match["id"]) == (text, memory_id)


def test_a_memory_is_no_quotation_and_a_quotation_no_memory() -> None:
    body = msgspec.json.encode({"stages": [QUOTING, SHOWING]})
    for stages in (of_json(body, 10, 12), of_opened(b'{"context":%b}' % body, 10, 12)):
        assert [shown.items for shown in stages] == [(Item("m2", M2, quoted=True),), (Item("m1", M1),)]
        assert [shown.parts for shown in stages] == [("quotes of profile",), ("matches",)]


def test_what_only_the_rendering_holds_is_quoted() -> None:
    (shown,) = of_json(
        msgspec.json.encode({"stages": [stage(3, 1, f"{M1} {M2}", memories("more", m1=M1))]}), 1, 2
    )
    assert shown.items == (Item("m1", M1), Item("m2", M2, quoted=True))


def test_stages_of_one_piece_all_arrived_at_its_end_and_were_compared_before() -> None:
    stages = of_json(msgspec.json.encode({"stages": [QUOTING, SHOWING]}), 10, 12)
    assert [(shown.number, shown.ended) for shown in stages] == [(1, 12), (2, 12)]
    assert [shown.compared for shown in stages] == pytest.approx([10.0005, 10.0015], abs=1e-5)


def test_a_stream_that_broke_off_showed_what_had_arrived() -> None:
    chunks = [(10.1, event("stage", QUOTING)), (10.2, event("stage", SHOWING))]
    stages, last = of_stream(chunks, 10)
    assert ([shown.ended for shown in stages], last) == ([10.1, 10.2], "stage")
    assert of_stream([*chunks, (10.3, event("done", {}))], 10) == (stages, "done")
    assert of_stream([], 10) == ([], "")


async def test_each_chunk_has_the_moment_of_its_arrival() -> None:
    go_on = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\na: 1")
        await go_on.wait()
        writer.write(b"\n\r\n3\r\nb\n\n\r\n0\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")  # the connection is used again
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nc\r\n")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        http, port = HttpClient(), server.sockets[0].getsockname()[1]
        asyncio.get_running_loop().call_later(0.05, go_on.set)
        reply = await http.request(port, "GET", "/")
        broken = await http.request(port, "GET", "/")
        http.close()
    assert [content for _, content in reply.chunks] == [b"a: 1\n", b"b\n\n"]
    assert (reply.status, reply.body) == (200, b"a: 1\nb\n\n")
    assert reply.began < reply.chunks[0][0] <= reply.chunks[1][0] <= reply.ended
    assert (broken.status, [content for _, content in broken.chunks]) == (0, [b"c"])
