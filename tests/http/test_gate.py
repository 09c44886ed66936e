"""Who may ask what: keys, scopes, namespaces and users, on every route and whichever tier answers."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings
from starlette.routing import Match
from starlette.types import ASGIApp

from redismem.http.app import create_app
from redismem.http.table import OPERATIONS
from redismem.service import Service
from redismem.settings import Settings
from tests.conftest import until
from tests.http.operating import BY_NAME, IN_ORDER, Reply, raw, request_of

PAGES = ("/docs", "/openapi.json", "/dashboard", "/explorer", "/assets/chart.js")
OPEN = ("/health/live", "/health/ready", *PAGES)
ADMIN = ("/metrics", "/v1/stats", "/v1/slo", "/v1/dashboard")

MATCHING: Any = create_app(settings=Settings(embedder="deterministic", testing=True))
NAMES = {(item.method, item.path): item.name for item in OPERATIONS}

#: segments that are also names of ours, and what a user id may be
SEGMENTS = st.one_of(
    st.sampled_from(sorted({part for item in OPERATIONS for part in item.path.split("/") if part})),
    st.sampled_from(["a%2Fb", "%2e%2e", "..", "%25", "%00", "%FF", "{user}", "Search", "m%C3%BCller", "a b"]),
    st.text(st.characters(codec="latin-1", exclude_characters="/?#", exclude_categories=["Cc"]), min_size=1),
)
#: a path of the table with other segments in the places of its parameters
LIKE_OURS = st.sampled_from(OPERATIONS).flatmap(
    lambda item: st.tuples(
        *(SEGMENTS if part.startswith("{") else st.just(part) for part in item.path.split("/")[1:])
    )
)


def routed(method: str, path: str) -> str:
    """Return the name of what Starlette's own routing finds."""
    scope = {"type": "http", "method": method, "path": path, "headers": [], "root_path": ""}
    for route in MATCHING._app.routes:
        if route.matches(scope)[0] is Match.FULL:
            name = NAMES.get(("GET" if method == "HEAD" else method, route.path))
            return name or ("metrics" if route.path == "/metrics" else "page")
    return "other"


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(["GET", "HEAD", "POST", "PATCH", "DELETE", "PUT", "OPTIONS"]),
    st.one_of(LIKE_OURS, st.lists(SEGMENTS, min_size=1, max_size=7)),
)
@example("POST", ("v1", "users", "search", "search", "batch"))
@example("GET", ("v1", "users", "users", "memories", "batch"))
@example("GET", ("v1", "users", "memories", "memories", "history", "history"))
@example("HEAD", ("metrics",))
def test_an_operation_is_told_before_routing_as_routing_will_find_it(
    method: str, parts: tuple[str, ...]
) -> None:
    path = "/" + "/".join(parts)
    told = MATCHING._matcher.told(method, path.encode("latin-1"))
    assert told.name == routed(method, path)
    if told.name in BY_NAME:
        assert told.access == BY_NAME[told.name].access


PATHS = sorted({route.path for route in MATCHING._app.routes})
#: a path of ours behind something, or before it
AROUND = st.tuples(
    st.sampled_from(["", "/", "/v1/users/ada", "/v1/users/ada/", "/v1/users//", "/v1", "/docs/..", "/%2e"]),
    st.sampled_from(PATHS),
    st.sampled_from(["", "/", "//", "%00", ";a", "/.", "/..", "/x"]),
)


@settings(deadline=None, max_examples=500)
@given(st.sampled_from(["GET", "HEAD", "POST", "DELETE"]), AROUND)
@example("GET", ("/v1/users/ada/", "/health/live", ""))
def test_nothing_is_open_or_named_after_an_operation_that_routing_would_not_find(
    method: str, parts: tuple[str, str, str]
) -> None:
    path = "".join(parts)
    told = MATCHING._matcher.told(method, path.encode())
    if told.access == "open":
        assert routed(method, path) in ("page", "live", "ready")
    if told.name in ("stats", "slo", "dashboard", "metrics", "page", "live", "ready"):
        assert told.name == routed(method, path)


@pytest.mark.parametrize("path", ["/v1/users/ada/memories/", "/v1/users//search", "/v1/users/"])
def test_a_path_with_an_empty_segment_is_no_operation(path: str) -> None:
    for method in ("GET", "POST", "DELETE"):
        assert MATCHING._matcher.told(method, path.encode()).name == routed(method, path) == "other"


@pytest.mark.parametrize("user", ["ada", "a%2Fb", "m%C3%BCller", "search", "memories", "%2e%2e", "{user}"])
def test_every_operation_is_told_by_its_own_path(user: str) -> None:
    for item in OPERATIONS:
        path = item.path.replace("{user}", user).replace("{id}", "batch").replace("{session}", "messages")
        assert MATCHING._matcher.told(item.method, path.encode()).name == item.name


def test_only_health_and_pages_are_open_and_only_admins_see_the_operators_side() -> None:
    by_access = {
        access: {item.name for item in OPERATIONS if item.access == access} for access in ("open", "admin")
    }
    assert by_access == {"open": {"live", "ready"}, "admin": {"stats", "slo", "dashboard"}}
    for item in OPERATIONS:
        if item.method != "GET" and not item.name.startswith(("search", "context")):
            assert item.access == "write", item.name


@pytest.fixture(params=["service", "tiered"])
def asked(request: pytest.FixtureRequest) -> Service:
    """The service that is asked: each request reads the keys, or L1 has them."""
    service: Service = request.getfixturevalue(request.param)
    return service


@pytest.fixture
def app(asked: Service) -> ASGIApp:
    return create_app(asked)


Key = Callable[..., Awaitable[dict[str, str]]]


@pytest.fixture
def key(asked: Service) -> Key:
    """Make a key and return the headers that show it."""

    async def make(*scopes: str, **wanted: Any) -> dict[str, str]:
        _, token = await asked.keyring.create(name="test", scopes=scopes, **wanted)
        return {"Authorization": f"Bearer {token}"}

    return make


async def ask(app: ASGIApp, name: str, headers: dict[str, str], **who: str) -> Reply:
    """Ask for an operation by its name."""
    method, path, own, body = request_of(BY_NAME[name], **{"user": "ada", **who})
    return await raw(app, method, path, headers={**own, **headers}, body=body)


async def known_keys(service: Service) -> None:
    """Let L1 have the keys, if it may."""
    if service.settings.l1_entries:
        await until("L1 has the keys", lambda: _known(service))


async def _known(service: Service) -> bool:
    await service.keyring.table()
    return service.keyring.known() is not None


async def test_without_keys_everything_is_open_on_loopback(app: ASGIApp) -> None:
    for name in IN_ORDER:
        reply = await ask(app, name, {})
        assert reply.status not in (401, 403), name
    assert (await raw(app, "GET", "/metrics")).status == 200


async def test_the_first_key_closes_everything_but_health_and_pages(app: ASGIApp, key: Key) -> None:
    assert (await ask(app, "put", {})).status == 201
    await key("read")
    for name in IN_ORDER:
        reply = await ask(app, name, {})
        if BY_NAME[name].access == "open":
            assert reply.status == 200
            continue
        error = reply.error(401)
        assert error == {**error, "code": "unauthorized", "message": "a valid API key is required"}
        assert set(error) == {"code", "message", "request_id"}
        assert reply.headers["www-authenticate"] == "Bearer"
    for path in OPEN:
        assert (await raw(app, "GET", path)).status == 200, path
    for path in (*ADMIN, "/nowhere", "/v1/users/", "//docs", "/health/live/", "/docs/..%2fv1"):
        assert (await raw(app, "GET", path)).status == 401, path
    for method in ("OPTIONS", "PUT", "TRACE"):
        assert (await raw(app, method, "/v1/users/ada/memories")).status == 401


async def test_where_others_can_connect_a_store_without_keys_is_closed(service: Service, key: Key) -> None:
    for host, insecure, status in (("0.0.0.0", False, 401), ("0.0.0.0", True, 200), ("::1", False, 200)):
        told = replace(service.settings, host=host, insecure=insecure)
        app = create_app(replace(service, settings=told))
        assert (await ask(app, "search", {})).status == status
        for path in OPEN:
            assert (await raw(app, "GET", path)).status == 200, path
        for path in ADMIN:
            assert (await raw(app, "GET", path)).status == status, path


def tokens_like(token: str) -> list[str]:
    """Return what is nearly a token."""
    head, key_id, secret = token.split("_", 2)
    other = "A" if secret[-1] != "A" else "B"
    return [
        "",
        token[:-1],
        token + "A",
        token[:-1] + other,
        token.upper(),
        token.lower(),
        f"{head}_{key_id}_",
        f"{head}_{'0' * 12}_{secret}",
        secret,
        key_id,
        f'"{token}"',
        f"{token},{token}",
        "\u00e9" + token,
    ]


async def test_what_is_nearly_a_token_opens_nothing(asked: Service, app: ASGIApp) -> None:
    key, token = await asked.keyring.create(name="test", scopes=["admin"])
    shown = {"Authorization": f"Bearer {token}"}
    assert (await ask(app, "list", shown)).status == 200
    for wrong in tokens_like(token):
        if wrong == token:
            continue
        for header in ({"Authorization": f"Bearer {wrong}"}, {"X-API-Key": wrong}):
            assert (await ask(app, "list", header)).status == 401, wrong
    for header in ({"Authorization": token}, {"Authorization": f"Basic {token}"}, {"Cookie": token}):
        assert (await ask(app, "list", header)).status == 401
    assert (await raw(app, "GET", f"/v1/users/ada/memories?api_key={token}")).status == 401
    await asked.keyring.revoke(key.id)
    assert (await ask(app, "list", shown)).status == 401


async def test_a_key_may_be_shown_in_either_header(asked: Service, app: ASGIApp) -> None:
    _, token = await asked.keyring.create(name="test", scopes=["read"])
    for header in (
        {"Authorization": f"Bearer {token}"},
        {"authorization": f"bearer  {token} "},
        {"X-API-Key": token},
        {"Authorization": f"Bearer {token}", "X-API-Key": token},
        {"Authorization": "Basic YTpi", "X-API-Key": token},
    ):
        assert (await ask(app, "list", header)).status == 200, header


async def test_of_two_keys_the_order_of_the_headers_does_not_decide(asked: Service, app: ASGIApp) -> None:
    """Proxies reorder headers."""
    _, token = await asked.keyring.create(name="test", scopes=["read"])
    good, bad = {"Authorization": f"Bearer {token}"}, {"X-API-Key": "wrong"}
    replies = [await ask(app, "list", headers) for headers in ({**good, **bad}, {**bad, **good})]
    assert replies[0].status == replies[1].status


@pytest.mark.parametrize("scope", ["read", "write", "admin"])
async def test_a_scope_allows_its_operations_and_no_others(
    asked: Service, app: ASGIApp, key: Key, scope: str
) -> None:
    admin = await key("admin")
    headers = await key(scope)
    await known_keys(asked)
    for name in ("session_open", "put"):
        assert (await ask(app, name, admin)).status == 201
    for name in IN_ORDER:
        reply = await ask(app, name, headers)
        wanted = BY_NAME[name].access
        if wanted == "open" or scope in (wanted, "admin"):
            assert reply.status not in (401, 403), (name, reply.body)
        else:
            error = reply.error(403)
            assert (error["code"], error["message"]) == ("forbidden", "this API key does not allow that")
            assert "field" not in error
    assert (await raw(app, "GET", "/metrics", headers=headers)).status == (200 if scope == "admin" else 403)
    assert (await raw(app, "HEAD", "/v1/stats", headers=headers)).status == (200 if scope == "admin" else 403)


async def test_any_key_is_told_that_there_is_no_such_path(app: ASGIApp, key: Key) -> None:
    for scope in ("read", "write", "admin"):
        headers = await key(scope)
        assert (await raw(app, "GET", "/v1/nothing", headers=headers)).status == 404
        assert (await raw(app, "PUT", "/v1/users/ada/memories", headers=headers)).status == 405


@pytest.fixture
async def lives(asked: Service, app: ASGIApp, key: Key) -> dict[str, dict[str, str]]:
    """A life of a user of one id in each of two namespaces; return the headers of both."""
    headers = {name: await key("read", "write", namespace=name) for name in ("east", "west")}
    await known_keys(asked)
    for name, shown in headers.items():
        for text in (f"{name}-canary keeps bees", f"{name}-canary sails"):
            method, path, own, _ = request_of(BY_NAME["put"], user="ada")
            body = json.dumps(
                {"text": text, "id": f"m{int('sails' in text) + 1}", "topics": [f"{name}-canary"]}
            )
            reply = await raw(app, method, path, headers={**own, **shown}, body=body.encode())
            assert reply.status == 201
        assert (await ask(app, "session_open", shown)).status == 201
        assert (await ask(app, "message", shown, word=f"{name}-canary")).status == 201
        assert (await ask(app, "profile_patch", shown, word=f"{name}-canary")).status == 200
    await asked.coherence.barrier({})
    return headers


@pytest.mark.parametrize("order", [("east", "west"), ("west", "east")])
async def test_keys_of_two_namespaces_see_two_users_of_one_id_whichever_tier_answers(
    app: ASGIApp, lives: dict[str, dict[str, str]], order: tuple[str, str]
) -> None:
    """Twice each, so that L1 and L2 answer what they hold."""
    shown = 0
    for name in IN_ORDER:
        if BY_NAME[name].access != "read":
            continue
        for namespace in order * 2:
            reply = await ask(app, name, lives[namespace])
            assert reply.status in (200, 202, 404), (name, reply.body)
            other = "west" if namespace == "east" else "east"
            assert f"{other}-canary".encode() not in reply.body, name
            shown += f"{namespace}-canary".encode() in reply.body
    assert shown >= 4 * len(("search", "search_batch", "get", "list", "profile", "context", "export"))


async def test_a_key_of_a_namespace_changes_nothing_in_another(
    app: ASGIApp, lives: dict[str, dict[str, str]]
) -> None:
    async def state() -> list[bytes]:
        return [(await ask(app, name, lives["west"])).body for name in ("export", "profile", "similar")]

    before = await state()
    for name in IN_ORDER:
        if BY_NAME[name].access == "write":
            assert (await ask(app, name, lives["east"])).status in (200, 201, 202), name
    assert (await ask(app, "get", lives["east"])).status == 404
    assert await state() == before
    assert (await ask(app, "session_get", lives["west"])).json["messages"] == 1
    users = (await ask(app, "users", lives["east"])).json["users"]
    assert users == []


TRICKS = [
    "bob",
    "b%6Fb",
    "%62%6f%62",
    "ada/../bob",
    "ada%2F..%2Fbob",
    "%2e%2e/bob",
    "ada/%2e%2e/bob",
    "ada%2f%2e%2e%2fbob",
    "/bob",
    "ada//bob",
    "bob%00",
    "ada%00/../bob",
    "ada%FF",
    "Ada",
    "ada%20",
    "%61%64%61%2Fbob",
    "%2561da",
    "a%2564a",
    "ada;bob",
    "ada%23bob",
    "",
]


@pytest.mark.parametrize("user", TRICKS)
async def test_a_key_of_one_user_reaches_no_other_whatever_the_path(
    asked: Service, app: ASGIApp, key: Key, user: str
) -> None:
    owner, bound = await key("admin"), await key("read", "write", users=["ada"])
    for known in ("bob", "ada/bob", "ada ", "Ada", "%61da", "..", "ada;bob", "ada#bob"):
        path = request_of(BY_NAME["put"], user=known)[1]
        body = json.dumps({"text": "the secret of bees", "id": "m1"}).encode()
        assert (await raw(app, "POST", path, headers=owner, body=body)).status == 201
    for method, tail, body in (
        ("POST", "/search", b'{"text": "secret"}'),
        ("POST", "/search", b'{"text": "secret"}'),
        ("GET", "/memories/m1", b""),
        ("GET", "/memories", b""),
        ("GET", "/export", b""),
        ("POST", "/context", b'{"text": "secret"}'),
        ("DELETE", "/memories/m1", b""),
        ("DELETE", "", b""),
    ):
        path = f"/v1/users/{user}{tail}"
        assert (await raw(app, method, path, headers=owner, body=body)).status != 403 or method == "DELETE"
        reply = await raw(app, method, path, headers=bound, body=body)
        assert reply.status in (403, 404, 422), (path, reply.body)
        assert b"secret of" not in reply.body


@pytest.mark.parametrize("user", ["ada", "a/b", "müller ö", "search", "%2e", "..", "a+b", "ada;x=1"])
async def test_a_key_of_one_user_reaches_that_user_however_the_path_is_spelt(
    app: ASGIApp, key: Key, user: str
) -> None:
    bound = await key("read", "write", users=["somebody", user])
    for spelt in (quote(user, safe=""), "".join(f"%{byte:02X}" for byte in user.encode())):
        for name in ("put", "search", "search", "list", "get", "get", "profile", "context"):
            method, path, own, body = request_of(BY_NAME[name], user="USER")
            headers = {**own, **bound}
            reply = await raw(app, method, path.replace("USER", spelt), headers=headers, body=body)
            assert reply.status in (200, 201, 404), (name, reply.body)
    users = (await ask(app, "users", bound)).json["users"]
    assert [one["user"] for one in users] == [user]
