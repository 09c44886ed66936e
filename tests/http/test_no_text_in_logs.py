"""No log line holds what people said, asked or are called, nor a key; whatever goes wrong."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import logging.config
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from starlette.types import ASGIApp

from redismem.errors import RedisUnavailable, StoreError
from redismem.http.app import create_app
from redismem.logs import log_config
from redismem.service import Service, assembled
from redismem.settings import Settings
from tests.conftest import until
from tests.http.conftest import Gate, of_user
from tests.http.operating import BY_NAME, IN_ORDER, raw, request_of

#: what stands for a text, a user and a key; no line may hold any of it
WORD, USER, TOKEN = "canarytext", "canaryuser", "rmk_0123456789ab_canarytoken"


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What a service writes to stderr, with every level on, ours and all others'."""
    root, loggers = logging.getLogger(), [logging.getLogger(name) for name in ("redismem", "uvicorn.error")]
    before = [(logger, logger.level) for logger in (root, *loggers)]
    handlers, written = root.handlers[:], io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    config = log_config(Settings(log_format="json"))
    config["root"]["level"] = "DEBUG"
    for told in config["loggers"].values():
        told["level"] = "DEBUG"
    logging.config.dictConfig(config)
    yield written
    root.handlers[:] = handlers
    for logger, level in before:
        logger.setLevel(level)


@pytest.fixture
async def logging_all(service: Service, gate: Gate, stream: io.StringIO) -> AsyncIterator[Service]:
    """A service that logs every request, each of them as slow."""
    settings = replace(
        service.settings, l1_entries=1000, l2_searches=10, slow_request_ms=0.001, access_log=True
    )
    async with assembled(settings, service.client, gate) as opened:
        yield opened
        gate.away = False
        assert await opened.backfill.drained(10)


@pytest.fixture
def app(logging_all: Service) -> ASGIApp:
    return create_app(logging_all)


def lines_of(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def assert_silent(stream: io.StringIO, *, warming: bool = True) -> None:
    """Check that there are lines, that each is JSON, and that none holds a canary.

    Args:
        warming: look at the lines of the warmer too, which has a test of its own.
    """
    lines = lines_of(stream)
    assert lines
    for line in lines:
        if not warming and line["logger"] == "redismem.warm":
            continue
        assert "canary" not in json.dumps(line).lower(), line


async def ask(app: ASGIApp, name: str, **headers: str) -> int:
    method, path, own, body = request_of(BY_NAME[name], user=USER, memory=f"{WORD}-id", word=WORD)
    with suppress(ValueError):
        return (await raw(app, method, path, headers={**own, **headers}, body=body)).status
    return 500


async def test_no_operation_logs_text_user_or_key(app: ASGIApp, stream: io.StringIO) -> None:
    path = of_user(USER, "memories")
    body = json.dumps(
        {"text": f"{WORD} keeps bees", "id": f"{WORD}-id", "topics": [WORD], "entities": [WORD]}
    )
    assert (await raw(app, "POST", path, body=body.encode())).status == 201
    for name in (*IN_ORDER, *IN_ORDER):
        await ask(app, name, **{"X-API-Key": TOKEN})
    told = [line for line in lines_of(stream) if line["message"] == "slow request"]
    assert {line["operation"] for line in told} >= {"search", "context", "message", "put"}
    assert "forget" not in {line["operation"] for line in told}  # it is as long as what there is to forget
    assert_silent(stream, warming=False)


async def test_no_wrong_request_is_quoted(app: ASGIApp, stream: io.StringIO) -> None:
    for path in (of_user(USER, "search"), of_user(USER, "memories"), of_user(USER, "context")):
        for body in (f'{{"text": "{WORD}', f'{{"{WORD}": 1}}', f'"{WORD}"', f'{{"text": 1, "{WORD}": []}}'):
            assert (await raw(app, "POST", path, body=body.encode())).status in (400, 422)
    for tail in (f"/memories?{WORD}={WORD}", f"/{WORD}", f"/memories/{WORD}", f"/summaries/{WORD}/{WORD}"):
        assert (await raw(app, "GET", of_user(USER) + tail)).status >= 400
    reply = await raw(app, "PATCH", of_user(USER, "memories", WORD), headers={"If-Match": WORD}, body=b"{}")
    assert reply.status >= 400
    assert_silent(stream)


async def test_no_key_is_quoted_right_or_wrong(
    app: ASGIApp, logging_all: Service, stream: io.StringIO
) -> None:
    key, token = await logging_all.keyring.create(name="canary", scopes=["read"], users=[USER])
    for shown in (token, TOKEN, token[:-1], "canary"):
        for headers in ({"X-API-Key": shown}, {"Authorization": f"Bearer {shown}"}):
            for name in ("search", "put", "list"):
                await ask(app, name, **headers)
    assert_silent(stream)
    assert token.rpartition("_")[2] not in stream.getvalue()
    assert key.id not in stream.getvalue()


FAULTS = [
    RedisUnavailable("Redis cannot answer now (ConnectionError): refused"),
    StoreError("Redis: ERR a defect"),
    ValueError("a defect"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
async def test_no_failure_quotes_the_request(
    app: ASGIApp,
    logging_all: Service,
    stream: io.StringIO,
    monkeypatch: pytest.MonkeyPatch,
    fault: Exception,
) -> None:
    assert await ask(app, "put") == 201

    async def failing(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr(logging_all.client, "execute", failing)
    monkeypatch.setattr(logging_all.client, "pipeline", failing)
    statuses = {name: await ask(app, name, **{"X-API-Key": TOKEN}) for name in IN_ORDER}
    monkeypatch.undo()
    assert {500, 503} & set(statuses.values())
    assert_silent(stream)


async def test_an_embedder_that_is_away_is_told_without_what_it_was_asked(
    app: ASGIApp, gate: Gate, stream: io.StringIO
) -> None:
    gate.away = True
    for name in IN_ORDER:
        await ask(app, name)
    assert_silent(stream, warming=False)


async def test_a_key_of_a_foreign_type_is_told_without_whose_it_is(
    app: ASGIApp, logging_all: Service, stream: io.StringIO
) -> None:
    owner = logging_all.owner(USER)
    for key in (owner.meta, owner.ids, owner.profile, owner.hot, owner.memory(f"{WORD}-id")):
        await logging_all.client.execute("SET", key, "foreign")
    statuses = [await ask(app, name) for name in IN_ORDER]
    assert 500 in statuses
    await logging_all.client.execute("FLUSHALL")
    assert_silent(stream)


async def test_an_index_that_is_gone_is_told_without_whose_it_is(
    app: ASGIApp, logging_all: Service, stream: io.StringIO
) -> None:
    """RediSearch names the index, and with it the user."""
    assert await ask(app, "put") == 201
    await ask(app, "search")
    for index in await logging_all.client.execute("FT._LIST"):
        await logging_all.client.execute("FT.DROPINDEX", index)
    for name in IN_ORDER:
        await ask(app, name)
    assert_silent(stream, warming=False)


async def test_a_user_without_an_index_is_warmed_in_silence(
    app: ASGIApp, logging_all: Service, stream: io.StringIO
) -> None:
    """The first session of a user who has no memories yet."""
    assert await ask(app, "session_open") == 201
    await until("it was tried", lambda: asyncio.sleep(0, "redismem.warm" in stream.getvalue()))
    assert_silent(stream)


async def test_a_slow_request_is_told_with_its_id_and_where_the_time_went(
    app: ASGIApp, logging_all: Service, stream: io.StringIO
) -> None:
    assert await ask(app, "search", **{"X-Request-ID": "mine"}) == 200
    (line,) = [line for line in lines_of(stream) if line["message"] == "slow request"]
    assert line["request_id"] == "mine"
    assert (line["operation"], line["status"], line["level"]) == ("search", 200, "warning")
    assert line["cache_status"] == "l3"
    assert line["round_trips"] >= 1
    assert 0 < line["redis_ms"] <= line["total_ms"]
    assert "embed_ms" in line


async def test_a_failure_is_found_by_the_id_of_its_reply(
    app: ASGIApp, logging_all: Service, stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object, **__: object) -> None:
        raise ValueError("a defect")

    monkeypatch.setattr(logging_all.tiers, "search", broken)
    reply = await raw(app, "POST", of_user(USER, "search"), body=b'{"text": "x"}')
    told = [line for line in lines_of(stream) if "a defect" in line.get("exception", "")]
    assert {line["request_id"] for line in told} == {reply.headers["x-request-id"]}


async def test_what_is_fast_is_not_told_unless_asked_for(
    service: Service, stream: io.StringIO, gate: Gate
) -> None:
    settings = replace(service.settings, slow_request_ms=60_000)
    async with assembled(settings, service.client, gate) as quiet:
        await until("it is there", lambda: quiet.client.execute("PING"))
        stream.truncate(0)
        stream.seek(0)
        app = create_app(quiet)
        for name in ("search", "list", "profile"):
            assert await ask(app, name) == 200
        assert [line for line in lines_of(stream) if line["logger"] == "redismem.http.gate"] == []
