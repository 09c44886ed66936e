from __future__ import annotations

import re
from html.parser import HTMLParser
from types import ModuleType
from typing import Any, get_args

import httpx
import jsonschema_rs
import msgspec
import pytest
from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR

from redismem import filters, types, views
from redismem.http.app import create_app
from redismem.http.docs import docs_page
from redismem.http.openapi import openapi_document
from redismem.http.table import OPERATIONS
from redismem.service import Service
from tests.http.conftest import JSON, of_user

DOCUMENT = openapi_document(OPERATIONS)
PAGE = docs_page(DOCUMENT)
SCHEMAS = DOCUMENT["components"]["schemas"]
DOCUMENTED = [
    (method, path, operation)
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
]

RANGES = [
    ({"gte": 0}, True),
    ({"gt": 0, "lte": 1}, True),
    ({"gt": 0, "gte": None}, True),
    ({}, False),
    ({"gt": None}, False),
    ({"gt": 0, "gte": 0}, False),
    ({"lt": 1, "lte": 1}, False),
    ({"gt": "x"}, False),
]
TAGS = [({"any": ["a"]}, True), ({"none": ["a"], "all": []}, True), ({}, False), ({"any": []}, False)]
PATCHES = [({"pinned": True}, True), ({"session_id": None}, True), ({}, False), ({"text": None}, False)]
PROFILES = [
    ({"display_name": "Ada"}, True),
    ({"display_name": None, "known_expertise": []}, True),
    ({}, False),
    ({"display_name": " "}, False),
    ({"communication_style": "a\x00b"}, False),
    ({"relationship_context": "x" * 257}, False),
    ({"topics_of_interest": ["a"] * 101}, False),
    ({"current_projects": ["a", "\u3000"]}, False),
    ({"known_expertise": "a"}, False),
    ({"preferred_formats": {"code": "python"}}, True),
    ({"preferred_formats": {"": "python"}}, False),
    ({"preferred_formats": {"code": "x" * 257}}, False),
    ({"preferred_formats": {"code": None}}, False),
    ({"preferred_formats": {"code": " "}}, False),
    ({"preferred_formats": {" ": "python"}}, False),
    ({"context_summary": "a"}, False),
    ({"display_name": "Ada", "user_id": "ada"}, False),
]
MEMORIES = [
    ({"text": "a"}, True),
    ({"text": "\n a \u3000\x01"}, True),
    ({"text": " \n\x1f\x85\u2028"}, False),
    ({"text": "a\0"}, False),
    ({"text": ""}, False),
    ({"text": "x" * types.MAX_TEXT_BYTES}, True),
    ({"text": "x" * (types.MAX_TEXT_BYTES + 1)}, False),
    ({"text": "a", "id": "\xa0é/|%\u202f"}, True),
    ({"text": "a", "id": "\u2003 "}, False),
    ({"text": "a", "id": "a\x7fb"}, False),
    ({"text": "a", "topics": ["a"] * 101}, False),
    ({"text": "a", "topics": ["a\tb"]}, False),
    ({"text": "a", "memory_type": "a_1-b"}, True),
    ({"text": "a", "memory_type": "a\n"}, False),
    ({"text": "a", "importance": 1.5}, False),
    ({"text": "a", "event_date": "2026-01-02T03:04:05Z"}, True),
    ({"text": "a", "event_date": "yesterday"}, False),
    ({"text": "a", "unknown": 1}, False),
]
SEARCHES = [
    ({"text": "a"}, True),
    ({"text": "a", "search_mode": "keyword", "vector": None}, True),
    ({"vector": [1, 0], "search_mode": "semantic"}, True),
    ({"vector": [1, 0]}, False),
    ({"vector": [1, 0], "text": None, "search_mode": "keyword"}, False),
    ({"vector": [0, 0], "search_mode": "semantic"}, False),
    ({"text": None}, False),
    ({"text": "a", "search_mode": "keyword", "min_similarity": None}, True),
    ({"text": "a", "search_mode": "keyword", "min_similarity": 0.5}, False),
    ({"text": "a", "search_mode": "keyword", "min_results": 2}, False),
    ({"text": "a", "search_mode": "hybrid", "min_results": 2}, True),
    ({}, False),
    ({"text": "a", "recency_weight": 0.5, "importance_weight": 0.5}, True),
    ({"text": "a", "recency_weight": 1}, True),
    ({"text": "a", "recency_weight": 1, "importance_weight": 0.1}, False),
    ({"text": "a", "filters": {"topics": "a", "entities": ["b"], "session_id": "c"}}, True),
    ({"text": "a", "filters": {"topics": []}}, False),
    ({"text": "a", "filters": {"superseded": "maybe"}}, False),
]
CASES = [
    *(("NumberRange", value, good) for value, good in RANGES),
    *(("TagMatch", value, good) for value, good in TAGS),
    *(("MemoryPatch", value, good) for value, good in PATCHES),
    *(("ProfilePatch", value, good) for value, good in PROFILES),
    *(("MemoryInput", value, good) for value, good in MEMORIES),
    *(("ImportRecord", value, good) for value, good in MEMORIES),
    *(("SearchRequest", value, good) for value, good in SEARCHES),
]


def validator(name: str) -> jsonschema_rs.Draft202012Validator:
    root = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": SCHEMAS}}
    return jsonschema_rs.Draft202012Validator(root, validate_formats=True)


def accepted(name: str, value: object) -> bool:
    try:
        msgspec.json.decode(msgspec.json.encode(value), type=kind_of(name))
    except msgspec.ValidationError:
        return False
    return True


def refs(node: object) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
        return own + [ref for value in node.values() for ref in refs(value)]
    return [ref for item in node for ref in refs(item)] if isinstance(node, list) else []


def time_fields(kind: type[Any]) -> set[str]:
    return {
        item.encode_name
        for item in msgspec.inspect.type_info(kind).fields  # type: ignore[attr-defined]  # it is a StructType
        if any(
            isinstance(one, msgspec.inspect.DateTimeType) for one in getattr(item.type, "types", (item.type,))
        )
    }


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def parsed(page: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = Page()
    parser.feed(page)
    return parser.tags


def test_the_document_is_openapi_3_1() -> None:
    OPENAPI_31_VALIDATOR.validate(DOCUMENT)


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_schema_is_json_schema_and_says_what_it_is(name: str) -> None:
    jsonschema_rs.meta.validate({"$schema": "https://json-schema.org/draft/2020-12/schema", **SCHEMAS[name]})
    assert SCHEMAS[name]["description"].strip()
    assert "\n    " not in SCHEMAS[name]["description"]


def test_every_route_is_documented_and_every_documented_route_exists(service: Service) -> None:
    app: Any = create_app(service)
    routes = app._app.routes
    served = {(method.lower(), route.path) for route in routes for method in route.methods} - {
        ("head", route.path) for route in routes
    }
    own = {("get", path) for path in ("/openapi.json", "/docs", "/metrics", "/dashboard", "/explorer")}
    served = {(method, path) for method, path in served if not path.startswith("/assets/")}
    assert served == {(method, path) for method, path, _ in DOCUMENTED} | own


def test_operation_ids_are_unique_and_every_tag_is_declared() -> None:
    ids = [operation["operationId"] for _, _, operation in DOCUMENTED]
    assert len(set(ids)) == len(ids)
    used = {tag for _, _, operation in DOCUMENTED for tag in operation["tags"]}
    assert used == {tag["name"] for tag in DOCUMENT["tags"]}


def test_every_reference_resolves() -> None:
    found = refs(DOCUMENT)
    assert found
    for ref in found:
        node: Any = DOCUMENT
        for part in ref.removeprefix("#/").split("/"):
            node = node[part]


def test_the_errors_that_any_operation_of_a_kind_may_give_are_documented() -> None:
    for _, path, operation in DOCUMENTED:
        statuses = set(operation["responses"])
        assert "422" in statuses, path
        assert "500" not in statuses, "a defect is no part of the contract"
        assert "503" in statuses or "{user}" not in path
        assert {"400", "413"} <= statuses or "requestBody" not in operation


def kind_of(name: str) -> Any:
    """Return the type that a schema was made from; None where it is not one of these modules."""
    return next((getattr(module, name) for module in (filters, types, views) if hasattr(module, name)), None)


@pytest.mark.parametrize(("name", "value", "good"), CASES)
def test_schema_and_type_agree(name: str, value: object, good: bool) -> None:
    assert accepted(name, value) is good
    assert validator(name).is_valid(value) is good


@pytest.mark.parametrize("module", [types, filters, views])
def test_every_time_has_its_format(module: ModuleType) -> None:
    names = [name for name in SCHEMAS if hasattr(module, name)]
    found = {(name, key) for name in names for key in time_fields(getattr(module, name))}
    told = {
        (name, key)
        for name in names
        for key, item in SCHEMAS[name]["properties"].items()
        if "date-time" in (item.get("format"), *(one.get("format") for one in item.get("anyOf", ())))
    }
    assert found
    assert found == told


def test_a_batch_needs_one_memory_that_is_right() -> None:
    batch = validator("MemoryBatch")
    assert batch.is_valid({"memories": [{"text": ""}, {"text": "a"}]})
    assert not batch.is_valid({"memories": [{"text": ""}]})
    assert not batch.is_valid({"memories": []})
    assert not batch.is_valid({"memories": [{"text": "a"}] * (types.MAX_BATCH_MEMORIES + 1)})


def test_every_body_has_examples_that_its_schema_accepts() -> None:
    for _, path, operation in DOCUMENTED:
        for content in operation.get("requestBody", {}).get("content", {}).values():
            assert content["examples"], path
            for name, example in content["examples"].items():
                validator(name).validate(example["value"])


def test_properties_with_defaults_are_not_required_in_replies() -> None:
    hit = SCHEMAS["Hit"]
    assert {"id", "text", "score"} <= set(hit["required"])
    assert not {"session_id", "explain", "sources"} & set(hit["required"])


async def test_the_service_serves_document_and_page(http: httpx.AsyncClient) -> None:
    served = (await http.get("/openapi.json")).json()
    vector = served["components"]["schemas"]["SearchRequest"]["properties"]["vector"]
    assert (vector["minItems"], vector["maxItems"]) == (384, 384)  # of this store's embedder
    assert served["paths"] == DOCUMENT["paths"]
    page = await http.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert page.text == PAGE


async def test_replies_have_the_documented_shape(http: httpx.AsyncClient) -> None:
    stored = await http.post(
        of_user("alice", "memories"), json={"text": "tea", "event_date": "2026-01-02T03:04:05Z"}
    )
    validator("PutReply").validate(stored.json())
    memory = await http.get(of_user("alice", "memories", stored.json()["memories"][0]["id"]))
    validator("Memory").validate(memory.json())
    search = await http.post(of_user("alice", "search"), json={"text": "tea", "explain": True})
    validator("SearchReply").validate(search.json())
    assert search.json()["memories"]
    refused = await http.post(of_user("alice", "search"), content=b"{", headers=JSON)
    validator("Error").validate(refused.json())
    for reply in (stored, memory, search, refused):
        for name, header in DOCUMENT["components"]["headers"].items():
            if name in reply.headers:
                assert re.search(header["schema"].get("pattern", ""), reply.headers[name])


def check_documented(path: str, reply: httpx.Response) -> None:
    """Check a reply to a GET against what the document says of its status: body and headers."""
    told = DOCUMENT["paths"][path]["get"]["responses"][str(reply.status_code)]
    (media,) = told["content"].values()
    validator(media["schema"]["$ref"].rpartition("/")[2]).validate(reply.json())
    for name in told["headers"]:
        header = DOCUMENT["components"]["headers"][name]["schema"]
        assert re.search(header.get("pattern", "^[0-9]+$"), reply.headers[name]), name
    untold = {"ETag", "Redismem-Generation", "Retry-After"} - set(told["headers"])
    assert not [name for name in untold if name in reply.headers]


async def test_derived_data_has_the_documented_shape(http: httpx.AsyncClient, service: Service) -> None:
    user, texts = "/v1/users/{user}", ("My name is Ada", "Ada keeps bees", "Ada keeps bees")
    memories = [{"id": f"m{i}", "text": text, "entities": ["bee"]} for i, text in enumerate(texts)]
    summary = of_user("ada", "summaries", "entity", "bee")
    paths = {
        f"{user}/profile": of_user("ada", "profile"),
        f"{user}/topics": of_user("ada", "topics"),
        f"{user}/memories/{{id}}/similar": of_user("ada", "memories", "m1", "similar"),
        f"{user}/conflicts": of_user("ada", "conflicts"),
        f"{user}/summaries/{{kind}}/{{name}}": summary,
        "/v1/stats": "/v1/stats",
    }
    await http.post(of_user("ada", "memories"), json={"memories": memories})
    statuses = []
    for _ in range(2):  # before and after the worker
        for path, url in paths.items():
            reply = await http.get(url)
            check_documented(path, reply)
            statuses.append(reply.status_code)
        await service.worker.settle(ahead_s=4000)
    assert statuses == [200, 200, 200, 200, 202, 200] + [200] * 6
    patched = await http.patch(of_user("ada", "profile"), json=PROFILES[0][0])
    validator("Profile").validate(patched.json())


def test_the_page_shows_every_operation_and_schema() -> None:
    ids = {attributes.get("id") for _, attributes in parsed(PAGE)}
    assert ids >= {f"op-{operation['operationId']}" for _, _, operation in DOCUMENTED}
    assert ids >= {f"schema-{name}" for name in SCHEMAS}
    for method, path, operation in DOCUMENTED:
        assert f'<b class="m {method}">{method.upper()}</b><code>{path}</code>' in PAGE
        assert operation["summary"] in PAGE
    assert PAGE.count("Content-Type: application/") >= sum("requestBody" in item for _, _, item in DOCUMENTED)


def test_the_page_needs_nothing_from_outside() -> None:
    tags = parsed(PAGE)
    assert {tag for tag, _ in tags}.isdisjoint({"script", "img", "iframe", "object", "embed"})
    ids = {f"#{attributes['id']}" for _, attributes in tags if "id" in attributes}
    links = {attributes["href"] for _, attributes in tags if "href" in attributes}
    assert links <= ids | {"/openapi.json", "data:,"}
    assert not any("src" in attributes or "style" in attributes for _, attributes in tags)
    assert "url(" not in PAGE
    assert "@import" not in PAGE


def test_the_page_escapes_what_the_document_says() -> None:
    evil = "<script>alert(1)</script>`<b>`"
    document = openapi_document(OPERATIONS)
    document["info"]["description"] = evil
    for name, schema in document["components"]["schemas"].items():
        document["components"]["schemas"][name] = {**schema, "description": evil, "properties": {evil: {}}}
    for methods in document["paths"].values():
        for operation in methods.values():
            operation.update(summary=evil, description=evil)
    tags = {tag for tag, _ in parsed(docs_page(document))}
    assert "script" not in tags
    assert all(set(attributes) == {"class"} for tag, attributes in parsed(docs_page(document)) if tag == "b")


def test_enumerations_are_those_of_the_types() -> None:
    modes = SCHEMAS["SearchRequest"]["properties"]["search_mode"]
    assert modes["type"] == "string"
    assert set(modes["enum"]) == set(get_args(types.SearchMode))
