"""Claims on requests and the replies to them, on a real server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from redismem.errors import InProgress, InvalidInput, RedisUnavailable, StoreError
from redismem.idempotency import Claim, named
from redismem.keys import Owner
from redismem.lualib import Functions
from redismem.service import Service
from tests.conftest import until

NAME, PRINT, TOKEN, OTHER = named("a key"), "f1", "70c3", "0123"


async def call(service: Service, owner: Owner, function: str, *args: Any) -> Any:
    return await service.functions.call(function, [owner.replies], *args)


async def test_one_of_many_has_the_claim(service: Service, owner: Owner) -> None:
    claims = await asyncio.gather(
        *(service.idempotency.claim(owner, "key", b"request") for _ in range(20)), return_exceptions=True
    )
    assert sum(isinstance(claim, Claim) for claim in claims) == 1
    assert sum(isinstance(claim, InProgress) for claim in claims) == 19


async def test_a_reply_is_kept_byte_by_byte(service: Service, owner: Owner) -> None:
    reply = bytes(range(256)) + b"= \n"
    claim = await service.idempotency.claim(owner, "key", b"request")
    assert isinstance(claim, Claim)
    await service.idempotency.answered(claim, reply)
    assert await service.idempotency.claim(owner, "key", b"request") == reply
    with pytest.raises(InvalidInput):
        await service.idempotency.claim(owner, "key", b"another")


async def test_a_claim_that_expired_is_void(service: Service, owner: Owner) -> None:
    """Whoever was given up must not answer for whoever came after."""
    assert await call(service, owner, "rm_claim_v1", NAME, PRINT, TOKEN, 20) == [b"CLAIMED"]

    async def claimed() -> bool:
        return bool(await call(service, owner, "rm_claim_v1", NAME, PRINT, OTHER, 60_000) == [b"CLAIMED"])

    await until("the claim expires", claimed)
    assert await call(service, owner, "rm_answered_v1", NAME, TOKEN, b"late", 60_000) == b"GONE"
    assert await call(service, owner, "rm_released_v1", NAME, TOKEN) == b"GONE"
    assert await call(service, owner, "rm_answered_v1", NAME, OTHER, b"in time", 60_000) == b"OK"
    assert await call(service, owner, "rm_claim_v1", NAME, PRINT, TOKEN, 20) == [b"DONE", b"in time"]
    assert await call(service, owner, "rm_released_v1", NAME, OTHER) == b"GONE", "the reply stays"


async def test_a_released_claim_may_be_had_again(service: Service, owner: Owner) -> None:
    for _ in range(2):
        claim = await service.idempotency.claim(owner, "key", b"request")
        assert isinstance(claim, Claim)
        await service.idempotency.released(claim)
    assert await service.client.execute("EXISTS", owner.replies) == 0


async def test_a_claim_whose_answer_is_lost_holds_nobody_up(
    service: Service, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    call_it = Functions.call

    async def lost(self: Functions, name: str, *rest: Any) -> Any:
        reply = await call_it(self, name, *rest)
        if name == "rm_claim_v1":
            raise RedisUnavailable("no answer")
        return reply

    with monkeypatch.context() as patch:
        patch.setattr(Functions, "call", lost)
        with pytest.raises(RedisUnavailable):
            await service.idempotency.claim(owner, "key", b"request")
    assert isinstance(await service.idempotency.claim(owner, "key", b"request"), Claim)


async def test_a_reply_is_kept_for_its_time(service: Service, owner: Owner) -> None:
    await call(service, owner, "rm_claim_v1", NAME, PRINT, TOKEN, 60_000)
    await call(service, owner, "rm_answered_v1", NAME, TOKEN, b"reply", 5_000_000)
    (left_ms,) = await service.client.execute("HPTTL", owner.replies, "FIELDS", 1, NAME)
    assert 4_900_000 < left_ms <= 5_000_000


@pytest.mark.parametrize(
    ("function", "args"),
    [
        ("rm_claim_v1", (NAME, PRINT, TOKEN)),
        ("rm_claim_v1", (NAME, PRINT, TOKEN, 0)),
        ("rm_claim_v1", ("no hex", PRINT, TOKEN, 1)),
        ("rm_claim_v1", (NAME, "a b", TOKEN, 1)),
        ("rm_claim_v1", (NAME, PRINT, "", 1)),
        ("rm_answered_v1", (NAME, TOKEN, "reply")),
        ("rm_answered_v1", (NAME, "=", "reply", 1)),
        ("rm_released_v1", (NAME,)),
        ("rm_released_v1", ()),
    ],
)
async def test_misuse_is_told_and_writes_nothing(
    service: Service, owner: Owner, function: str, args: tuple[Any, ...]
) -> None:
    with pytest.raises(StoreError, match="RMEM_USAGE"):
        await call(service, owner, function, *args)
    assert await service.client.execute("EXISTS", owner.replies) == 0


@pytest.mark.parametrize("function", ["rm_claim_v1", "rm_answered_v1", "rm_released_v1"])
async def test_a_key_of_another_type_is_left_alone(service: Service, owner: Owner, function: str) -> None:
    await service.client.execute("SADD", owner.replies, "a")
    args = {"rm_claim_v1": (PRINT, TOKEN, 1), "rm_answered_v1": (TOKEN, "r", 1), "rm_released_v1": (TOKEN,)}
    with pytest.raises(StoreError, match="RMEM_TYPE"):
        await call(service, owner, function, NAME, *args[function])
    await service.client.execute("DEL", owner.replies)
