"""The profile as an HTTP client sees it: what it tells, what a caller sets, and how long L1 keeps it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest

from redismem.client import Argument, Client
from redismem.http.app import create_app
from redismem.keys import LEASES
from redismem.service import Service
from redismem.views import PATCHABLE
from tests.conftest import lasting_keys
from tests.http.conftest import JSON, add, error_of, of_user

GENERATION = "redismem-generation"
PROFILE = of_user("ada", "profile")

ODD = ["ada", "a/b c", "100%", "%2F", "ü%20{x}", "profile", "x/profile", "名 前", "..", " ", "a|b*\"'"]


@pytest.fixture
async def cached(tiered: Service) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a process with its caches on, on the store of `http`, which is another process's."""
    transport = httpx.ASGITransport(app=create_app(tiered), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def body_of(http: httpx.AsyncClient, path: str, **query: str | list[str]) -> Any:
    reply = await http.get(path, params=query)
    assert reply.status_code == 200, reply.text
    return told(reply)


def told(reply: httpx.Response) -> dict[str, Any]:
    """Return the fields that say something."""
    return {name: value for name, value in reply.json().items() if value not in (None, [], {}, "", 0)}


async def make(service: Service, user: str, *kinds: str) -> None:
    """Do jobs as the worker does."""
    for kind in kinds:
        await service.worker.make(service.owner(user), kind)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Count what is sent to Redis, but for the beat of the lease."""
    sent: list[str] = []
    execute, pipeline = Client.execute, Client.pipeline

    async def counting(self: Client, *command: Argument) -> Any:
        if LEASES not in command:
            sent.append(str(command[:2]))
        return await execute(self, *command)

    async def piped(self: Client, commands: Sequence[Sequence[Argument]]) -> list[Any]:
        sent.append("pipeline")
        return await pipeline(self, commands)

    with monkeypatch.context() as patch:
        patch.setattr(Client, "execute", counting)
        patch.setattr(Client, "pipeline", piped)
        yield sent


async def test_reading_the_profile_of_nobody_leaves_nothing_behind(
    http: httpx.AsyncClient, service: Service
) -> None:
    reply = await http.get(PROFILE)
    assert (reply.status_code, told(reply), reply.headers[GENERATION]) == (200, {"user_id": "ada"}, "0")
    assert await lasting_keys(service.client) == [b"redismem:store"]


async def test_a_profile_that_is_missing_is_queued_and_then_there(
    http: httpx.AsyncClient, service: Service
) -> None:
    await add(http, "ada", {"id": "n", "text": "My name is Ada Byron. I work as a gardener."})
    await service.client.execute("DEL", "redismem:jobs:later")
    early = await body_of(http, PROFILE)
    assert set(early) == {"user_id", "generation"}
    assert await service.client.execute("ZCARD", "redismem:jobs:later") == 1
    await service.worker.settle(ahead_s=4000)
    profile = await body_of(http, PROFILE)
    assert (profile["display_name"], profile["known_expertise"]) == ("Ada Byron", ["gardener"])
    assert profile["important_memory_ids"] == ["n"]
    assert "Ada Byron" in profile["context_summary"]
    compiled, valid = (datetime.fromisoformat(profile[name]) for name in ("compiled_at", "valid_until"))
    assert valid - compiled == timedelta(hours=1)
    assert "patched" not in profile
    assert (await http.get(PROFILE)).headers[GENERATION] == str(profile["generation"])


async def test_patched_fields_win_survive_and_are_given_back(
    http: httpx.AsyncClient, service: Service
) -> None:
    await add(http, "ada", {"text": "My name is Ada Byron. I work as a gardener."})
    await make(service, "ada", "profile")
    reply = await http.patch(PROFILE, json={"display_name": " Countess ", "known_expertise": []})
    assert reply.status_code == 200
    assert reply.headers[GENERATION] == str(reply.json()["generation"])
    assert told(reply) == await body_of(http, PROFILE)
    await make(service, "ada", "profile")
    for profile in (told(reply), await body_of(http, PROFILE)):
        assert profile["display_name"] == "Countess"
        assert "known_expertise" not in profile
        assert profile["patched"] == ["display_name", "known_expertise"]
    assert "Countess" in (await body_of(http, PROFILE))["context_summary"]

    given_back = told(await http.patch(PROFILE, json={"display_name": None}))
    assert given_back["patched"] == ["known_expertise"]
    assert "display_name" not in given_back
    await service.worker.settle(ahead_s=4000)
    profile = await body_of(http, PROFILE)
    assert (profile["display_name"], profile["patched"]) == ("Ada Byron", ["known_expertise"])
    assert "Countess" not in profile["context_summary"]


async def test_every_field_that_may_be_set_comes_back_as_it_was_set(http: httpx.AsyncClient) -> None:
    values = {
        "display_name": "Ada [x] 名",
        "communication_style": "like a pirate",
        "topics_of_interest": ["bees", 'a/b \\ "c"'],
        "known_expertise": ["ü" * 256],
        "preferred_formats": {"code": "python", "notes {}": "%"},
        "current_projects": [str(i) for i in range(100)],
        "relationship_context": "old friend",
    }
    assert set(values) == set(PATCHABLE)
    for name, value in values.items():
        assert (await http.patch(PROFILE, json={name: value})).json()[name] == value
    profile = await body_of(http, PROFILE)
    assert {name: profile[name] for name in values} == values
    assert profile["patched"] == sorted(values)
    assert told(await http.patch(PROFILE, json=dict.fromkeys(values))) == {"user_id": "ada"}


async def test_a_patch_keeps_the_fields_it_does_not_name(http: httpx.AsyncClient) -> None:
    await http.patch(PROFILE, json={"display_name": "Ada", "preferred_formats": {"code": "c"}})
    profile = (await http.patch(PROFILE, json={"preferred_formats": {"notes": "short"}})).json()
    assert (profile["display_name"], profile["preferred_formats"]) == ("Ada", {"notes": "short"})
    again = (await http.patch(PROFILE, json={"topics_of_interest": ["a", " a ", "b", "a"]})).json()
    assert again["topics_of_interest"] == ["a", "b"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, None),
        ({"nickname": "x"}, "nickname"),
        ({"display_name": "Eve", "context_summary": "x"}, "context_summary"),
        ({"display_name": " "}, "display_name"),
        ({"display_name": ""}, "display_name"),
        ({"display_name": "a\nb"}, "display_name"),
        ({"display_name": "x" * 257}, "display_name"),
        ({"display_name": 1}, "display_name"),
        ({"relationship_context": "\u3000"}, "relationship_context"),
        ({"known_expertise": "bees"}, "known_expertise"),
        ({"known_expertise": ["a", " "]}, "known_expertise"),
        ({"current_projects": ["a"] * 101}, "current_projects"),
        ({"preferred_formats": {"code": ""}}, None),
        ({"preferred_formats": {"": "python"}}, None),
        ({"preferred_formats": {"code": None}}, None),
        ({"preferred_formats": {str(i): "x" for i in range(101)}}, "preferred_formats"),
        ([], None),
    ],
)
async def test_what_is_no_patch_changes_nothing(
    http: httpx.AsyncClient, body: object, field: str | None
) -> None:
    await http.patch(PROFILE, json={"display_name": "Ada"})
    error = error_of(await http.patch(PROFILE, json=body), 422)
    assert field is None or error["field"] == field
    assert await body_of(http, PROFILE) == {
        "user_id": "ada",
        "display_name": "Ada",
        "patched": ["display_name"],
    }


@pytest.mark.parametrize("formats", [{" ": "x"}, {"code": " "}, {"a\x01": "x"}, {"code": "a\nb: c"}])
async def test_formats_are_not_blank_and_hold_no_control_characters(
    http: httpx.AsyncClient, formats: dict[str, str]
) -> None:
    error_of(await http.patch(PROFILE, json={"preferred_formats": formats}), 422)


async def test_a_patch_that_is_no_json_or_too_long_is_refused(
    http: httpx.AsyncClient, service: Service
) -> None:
    assert error_of(await http.patch(PROFILE, content=b"{", headers=JSON), 400)["code"] == "malformed"
    error_of(await http.patch(PROFILE, content=b'{"display_name": "Ada"}'), 400)
    error_of(await http.patch(PROFILE, content=b"null", headers=JSON), 422)
    long = b'{"display_name":"' + b"x" * service.settings.max_body_bytes + b'"}'
    error_of(await http.patch(PROFILE, content=long, headers=JSON), 413)
    assert error_of(await http.patch(PROFILE + "?x=1", json={"display_name": "A"}), 422)["field"] == "x"
    error_of(await http.put(PROFILE, json={"display_name": "A"}), 405)


@pytest.mark.parametrize("user", ODD)
async def test_any_user_has_a_profile_of_their_own(
    http: httpx.AsyncClient, cached: httpx.AsyncClient, service: Service, tiered: Service, user: str
) -> None:
    path = of_user(user, "profile")
    await add(http, user, {"id": "profile", "text": "My name is Ada Byron"})
    await make(service, user, "profile")
    await tiered.coherence.barrier({})
    patched = told(await cached.patch(path, json={"known_expertise": ["bees"]}))
    await tiered.coherence.barrier({})
    first, second = await body_of(cached, path), await body_of(cached, path)
    assert first == second == patched
    assert (first["user_id"], first["display_name"]) == (user, "Ada Byron")
    for other in ODD:
        if other != user:
            assert await body_of(cached, of_user(other, "profile")) == {"user_id": other}


@pytest.mark.parametrize("user", ["%FF", "a%00", "x" * 257])
async def test_what_is_no_user_id_has_no_profile(cached: httpx.AsyncClient, user: str) -> None:
    for path in ("profile", "topics", "conflicts", "summaries/topic/1", "memories/m/similar"):
        assert error_of(await cached.get(f"/v1/users/{user}/{path}"), 422)["field"] == "user"


async def test_a_memory_called_profile_is_a_memory(
    cached: httpx.AsyncClient, service: Service, tiered: Service
) -> None:
    await add(cached, "ada", {"id": "profile", "text": "Bees"})
    other = "ada/memories"  # whose profile L1 has
    await add(cached, other, {"text": "My name is Eve"})
    await make(service, other, "profile")
    await tiered.coherence.barrier({})
    for _ in range(2):
        assert (await body_of(cached, of_user(other, "profile")))["display_name"] == "Eve"
        assert (await body_of(cached, of_user("ada", "memories", "profile")))["text"] == "Bees"
    for path in ("/v1/users/ada/memories/x/profile", "/v1/users//profile", "/v1/users/ada/profile/"):
        error_of(await cached.get(path), 404)


@pytest.fixture
async def kept(
    cached: httpx.AsyncClient, service: Service, tiered: Service, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """The profile of ada as L1 of `cached` has it."""
    memories = {"n": "My name is Ada Byron", "g": "I work as a gardener"}
    await add(cached, "ada", *({"id": name, "text": text} for name, text in memories.items()))
    await make(service, "ada", "profile")
    await tiered.coherence.barrier({})
    before = await cached.get(PROFILE)
    with counted(monkeypatch) as sent:
        after = await cached.get(PROFILE, headers={"X-Request-ID": "mine"})
    assert not sent
    assert after.json() == before.json()
    assert set(after.headers) == set(before.headers)
    assert after.headers[GENERATION] == before.headers[GENERATION]
    assert after.headers["x-request-id"] == "mine"
    profile: dict[str, Any] = told(after)
    assert profile["important_memory_ids"]
    return profile


async def test_a_profile_in_l1_costs_no_command_and_refuses_what_it_does_not_know(
    kept: dict[str, Any], cached: httpx.AsyncClient
) -> None:
    assert kept["display_name"] == "Ada Byron"
    assert error_of(await cached.get(PROFILE + "?x=1"), 422)["field"] == "x"
    error_of(await cached.post(PROFILE, json={}), 405)


@pytest.mark.parametrize("how", ["here", "elsewhere"])
async def test_an_acknowledged_delete_is_in_no_profile(
    kept: dict[str, Any], cached: httpx.AsyncClient, http: httpx.AsyncClient, service: Service, how: str
) -> None:
    assert kept["known_expertise"] == ["gardener"]
    await cached.patch(PROFILE, json={"communication_style": "dry"})
    deleting = cached if how == "here" else http
    assert (await deleting.delete(of_user("ada", "memories", "g"))).status_code == 200
    left = await body_of(cached, PROFILE)
    assert set(left) == {"user_id", "communication_style", "patched", "generation"}
    await make(service, "ada", "profile")
    profile = await body_of(cached, PROFILE)
    assert (profile["display_name"], profile["important_memory_ids"]) == ("Ada Byron", ["n"])


async def test_a_correction_drops_a_profile_that_rests_on_the_old_words(
    kept: dict[str, Any], cached: httpx.AsyncClient, http: httpx.AsyncClient
) -> None:
    assert "gardener" in kept["known_expertise"]
    correction = {"ids": ["g"], "memory": {"text": "I work as a beekeeper"}}
    assert (await http.post(of_user("ada", "corrections"), json=correction)).status_code == 201
    assert "gardener" not in (await cached.get(PROFILE)).text


@pytest.mark.usefixtures("kept")
async def test_a_patch_holds_here_at_once(cached: httpx.AsyncClient) -> None:
    for name in ("Countess", "Lady"):
        await cached.patch(PROFILE, json={"display_name": name})
        assert (await body_of(cached, PROFILE))["display_name"] == name


@pytest.mark.usefixtures("kept")
async def test_another_process_patches_and_compiles_and_l1_hears_of_it(
    cached: httpx.AsyncClient, http: httpx.AsyncClient, service: Service, tiered: Service
) -> None:
    await http.patch(PROFILE, json={"display_name": "Countess"})
    await tiered.coherence.barrier({})
    patched = await body_of(cached, PROFILE)
    assert (patched["display_name"], patched["patched"]) == ("Countess", ["display_name"])
    await add(http, "ada", {"text": "I work as a beekeeper"})
    await make(service, "ada", "profile")
    await tiered.coherence.barrier({})
    assert "beekeeper" in (await body_of(cached, PROFILE))["known_expertise"]


@pytest.mark.usefixtures("kept")
async def test_a_source_that_another_service_removes_takes_the_profile_along(
    cached: httpx.AsyncClient, tiered: Service
) -> None:
    await tiered.client.execute("DEL", tiered.owner("ada").memory("g"))
    await tiered.coherence.barrier({})
    assert "gardener" not in (await cached.get(PROFILE)).text


@pytest.mark.usefixtures("kept")
async def test_forgetting_takes_what_was_derived_and_what_was_set(
    cached: httpx.AsyncClient, http: httpx.AsyncClient, service: Service, tiered: Service
) -> None:
    await cached.patch(PROFILE, json={"display_name": "Countess"})
    await http.patch(of_user("eve", "profile"), json={"display_name": "Eve"})  # who has no memory
    for user in ("ada", "eve"):
        assert (await http.delete(of_user(user))).status_code == 200
        assert await body_of(cached, of_user(user, "profile")) == {"user_id": user}
    await service.worker.settle(ahead_s=4000)
    assert not [key for key in await lasting_keys(service.client) if b"{ada}" in key or b"{eve}" in key]
