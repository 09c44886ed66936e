"""Names that a user's memories have, from the index of a real Redis."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from redismem import naming
from redismem.client import Client
from redismem.entities import Entity
from redismem.errors import RedisUnavailable
from redismem.keys import Owner
from redismem.naming import KEPT_S, MOST_ENTITIES, NameBook
from redismem.service import Service
from redismem.settings import Settings
from redismem.types import MemoryInput
from tests.redis.test_context_assembly import sent

assert sent  # a fixture


@dataclass
class Clock:
    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def book(service: Service, clock: Clock) -> NameBook:
    return NameBook(service.client, clock=clock)


async def name(service: Service, owner: Owner, *entities: str) -> None:
    await service.writer.put(owner, [MemoryInput(text=f"of {entities}", entities=list(entities))])


async def test_names_are_found_as_they_were_given_and_known_ones_first(
    service: Service, owner: Owner, book: NameBook
) -> None:
    await name(service, owner, "New York", "a|b c", "%7C", "\u00c9milie", "C++")
    found = await book.entities(owner, "Zora met \u00c9milie in New York")
    assert found == [Entity("\u00c9milie", True), Entity("New York", True), Entity("Zora", False)]  # noqa: FBT003
    for odd in ("a|b c", "%7C", "C++"):
        assert Entity(odd, is_known=True) in await book.entities(owner, f"we spoke of {odd} today")


async def test_names_are_those_of_the_user_alone(service: Service, owner: Owner, book: NameBook) -> None:
    await name(service, Owner("bob"), "harbour")
    await name(service, owner, "kettle")
    text = "the harbour and the kettle"
    assert await book.entities(owner, text) == [Entity("kettle", is_known=True)]
    assert await book.entities(Owner("bob"), text) == [Entity("harbour", is_known=True)]
    assert await book.entities(Owner("nobody"), text) == []


async def test_names_are_read_once_a_minute(
    service: Service, owner: Owner, book: NameBook, clock: Clock, sent: list[str]
) -> None:
    await name(service, owner, "kettle")
    sent.clear()
    for _ in range(3):
        assert len(await book.entities(owner, "the kettle")) == 1
    assert sent == ["FT.TAGVALS"]
    await name(service, owner, "harbour")
    clock.now_s += KEPT_S - 1
    assert await book.entities(owner, "the harbour") == []
    clock.now_s += 1
    assert await book.entities(owner, "the harbour") == [Entity("harbour", is_known=True)]


async def test_the_users_who_were_talked_about_last_are_kept(
    service: Service, owner: Owner, book: NameBook, sent: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(naming, "MOST_USERS", 2)
    others = Owner("bob"), Owner("cleo")
    for one in (owner, *others):
        await name(service, one, "kettle")
    for one in (owner, others[0], owner, others[1]):
        await book.entities(one, "the kettle")
    sent.clear()
    await book.entities(owner, "the kettle")
    await book.entities(others[0], "the kettle")
    assert sent == ["FT.TAGVALS"]


async def test_a_text_names_three_at_most_and_only_its_beginning_is_read(
    service: Service, owner: Owner, book: NameBook
) -> None:
    names = ["kettle", "harbour", "violin", "garden"]
    await name(service, owner, *names)
    found = await book.entities(owner, "garden violin harbour kettle")
    assert [one.name for one in found] == ["garden", "violin", "harbour"]
    assert len(found) == MOST_ENTITIES
    assert await book.entities(owner, "x" * 4_000 + " kettle") == []


async def test_a_redis_that_is_away_is_an_error(owner: Owner) -> None:
    nowhere = Client(Settings(), "redis://127.0.0.1:1")
    with pytest.raises(RedisUnavailable):
        await NameBook(nowhere).entities(owner, "the kettle")
    await nowhere.close()
