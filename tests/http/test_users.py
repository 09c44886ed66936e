from __future__ import annotations

from typing import Any

import httpx
import pytest

from redismem import store
from redismem.keys import Owner
from redismem.service import Service
from tests.http.conftest import add, error_of

ODD = ["a/b", "a%2Fb", "Ärger", "*", "[x]", "~", "{y}", "e\u0301", " ", "name with spaces", "1", "x" * 256]
LAST = 1_767_225_600.25


async def remember(service: Service, *users: str, namespace: str = "") -> None:
    """Let users be known as a first memory does, for less."""
    await service.client.pipeline(
        [("HSET", Owner(user, namespace).meta, "last_activity", LAST) for user in users]
    )


async def page(
    http: httpx.AsyncClient, headers: dict[str, str] | None = None, **query: object
) -> httpx.Response:
    given = {name: str(value) for name, value in query.items() if value is not None}
    return await http.get("/v1/users", params=given, headers=headers)


async def listed(
    http: httpx.AsyncClient, headers: dict[str, str] | None = None, **query: object
) -> list[str]:
    """Return the users of all pages; no page may exceed the limit."""
    found: list[str] = []
    for _ in range(5_000):
        reply = await page(http, headers, **query)
        assert reply.status_code == 200, reply.text
        body = reply.json()
        assert set(body) == {"users", "cursor"}
        assert len(body["users"]) <= int(str(query.get("limit", 50)))
        found += [item["user"] for item in body["users"]]
        query["cursor"] = body["cursor"]
        if body["cursor"] is None:
            return found
    raise AssertionError("the pages do not end")


@pytest.mark.parametrize("limit", [1, 7, 500])
async def test_each_user_is_in_one_page(http: httpx.AsyncClient, service: Service, limit: int) -> None:
    users = [*ODD, *(f"user {number}" for number in range(40))]
    await remember(service, *users)
    assert sorted(await listed(http, limit=limit)) == sorted(users)


async def test_pages_go_on_where_a_scan_stopped(
    http: httpx.AsyncClient, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_SCAN_KEYS", 10)
    monkeypatch.setattr(store, "_MAX_SCANS", 1)
    users = [f"user {number}" for number in range(300)]
    await remember(service, *users)
    # Redis may still move keys to a larger table, and then shows some twice
    assert set(await listed(http, limit=4)) == set(users)
    assert set(await listed(http, limit=4, contains="user 299")) == {"user 299"}


@pytest.mark.parametrize("scan_keys", [10, 1000])
async def test_who_is_there_all_the_time_is_listed_while_others_come_and_go(
    http: httpx.AsyncClient, service: Service, monkeypatch: pytest.MonkeyPatch, scan_keys: int
) -> None:
    monkeypatch.setattr(store, "_SCAN_KEYS", scan_keys)
    stay, others = [f"stays {i}" for i in range(150)], [f"goes {i}" for i in range(3000)]
    await remember(service, *stay)
    found, cursor, turn = set[str](), None, 0
    while turn == 0 or cursor is not None:
        body = (await page(http, limit=13, cursor=cursor)).json()
        found |= {item["user"] for item in body["users"]}
        cursor, turn = body["cursor"], turn + 1
        assert turn < 3000
        if turn == 3:
            await remember(service, *others)  # the table grows
        elif turn == 6:
            await service.client.execute("DEL", *(Owner(user).meta for user in others))  # and shrinks
    assert found >= set(stay)


async def test_an_item_tells_memories_and_the_last_activity(
    http: httpx.AsyncClient, service: Service
) -> None:
    await add(http, "ada", {"text": "one"}, {"text": "two"})
    await remember(service, "bo")
    await service.client.execute("HSET", Owner("bo").meta, "last_read", LAST + 60)
    await service.client.execute("HSET", Owner("never").meta, "index", "x")
    items = {item["user"]: item for item in (await page(http)).json()["users"]}
    assert items["ada"]["memories"] == 2
    assert items["bo"] == {
        "user": "bo",
        "namespace": "",
        "memories": 0,
        "last_active": "2026-01-01T00:01:00.250000Z",
    }
    assert items["never"]["last_active"] is None


@pytest.mark.parametrize(
    ("contains", "users"),
    [
        ("", ["Ada", "adam", "b/ÄD"]),
        ("AD", ["Ada", "adam"]),
        ("äd", ["b/ÄD"]),
        ("/", ["b/ÄD"]),
        ("%2F", []),
        ("*", []),
    ],
)
async def test_contains_is_a_part_of_the_id_in_either_case(
    http: httpx.AsyncClient, service: Service, contains: str, users: list[str]
) -> None:
    await remember(service, "Ada", "adam", "b/ÄD")
    assert sorted(await listed(http, contains=contains)) == users


async def test_other_namespaces_stay_unseen(http: httpx.AsyncClient, service: Service) -> None:
    await remember(service, "ada")
    await remember(service, "bo", namespace="shop")
    assert await listed(http) == ["ada"]


async def test_a_key_shows_its_namespace_and_its_users_only(
    http: httpx.AsyncClient, service: Service
) -> None:
    await remember(service, "ada", "bo")
    await remember(service, "ada", "cy", namespace="shop")
    _, wide = await service.keyring.create(name="wide", scopes=("read",), namespace="shop")
    _, bound = await service.keyring.create(name="bound", scopes=("read",), users=("bo", "cy"))
    assert sorted(await listed(http, {"Authorization": f"Bearer {wide}"})) == ["ada", "cy"]
    assert await listed(http, {"Authorization": f"Bearer {bound}"}) == ["bo"]
    error_of(await page(http), 401)


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"cursor": "0"}, "cursor"),
        ({"cursor": "0~x~"}, "cursor"),
        ({"cursor": f"{2**64}~0~"}, "cursor"),
        ({"cursor": "0~0~*"}, "cursor"),
        ({"limit": 0}, "limit"),
        ({"limit": 501}, "limit"),
        ({"contains": "x" * 257}, "contains"),
        ({"name": "ada"}, "name"),
    ],
)
async def test_a_wrong_parameter_is_refused_by_name(
    http: httpx.AsyncClient, query: dict[str, Any], field: str
) -> None:
    assert error_of(await page(http, **query), 422)["field"] == field
