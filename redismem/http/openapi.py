"""The only place that describes the HTTP interface: OpenAPI 3.1 from the route table and the types.

msgspec turns the types into JSON Schema. What `__post_init__` checks beyond them is said a second time
in `_STRINGS` and `_RULES`, as far as JSON Schema can; the run of schemathesis against a live service
fails when the two part. JSON Schema cannot say: lengths in bytes, `recency_weight` + `importance_weight`
<= 1 (the rule here is narrower), `memory.id` not among `ids`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from inspect import cleandoc, getdoc
from typing import Any, get_args

import msgspec

from redismem import errors
from redismem.fields import MAX_TEXT_BYTES
from redismem.http.conversations import EVENTS
from redismem.http.once import KEY_HEADER
from redismem.http.operation import Operation
from redismem.http.operator import Health
from redismem.http.routes import Queued
from redismem.rendering import TEMPLATE
from redismem.types import MAX_BATCH_MEMORIES, BatchReply, Memory
from redismem.views import SummaryKind

Schema = dict[str, Any]

_REF = "#/components/schemas/{name}"
_JSON, _NDJSON = "application/json", "application/x-ndjson"

_TITLE = "redismem"
_ABOUT = """\
Memory for AI assistants in the Redis you already run.

Times are RFC 3339. A user id may hold any character but NUL: percent-encode it in the path, `/` and `%`
included. Bodies are UTF-8 JSON and need a `Content-Type`. Errors are
`{"error": {"code", "message", "field"?, "request_id"}}`. Every reply carries `X-Request-ID`, yours or a new
one; the service's log has it."""

# what `str.strip` takes away, NUL excluded; regular expressions disagree on \s, so it is spelled out
_CONTROL = r"\u0000-\u001f\u007f"
_SPACE = r"\u0020\u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_BLANK = rf"\u0009-\u000d\u001c-\u001f{_SPACE}"

#: strings that `types.checked_name` and `checked_text` check, told by their (minLength, maxLength)
_STRINGS: dict[tuple[int, int], Schema] = {
    (1, 256): {
        "pattern": rf"^[{_SPACE}]*[^{_CONTROL}{_SPACE}][^{_CONTROL}]*$",
        "description": "not blank, no control characters",
    },
    (1, MAX_TEXT_BYTES): {
        "pattern": rf"^[{_BLANK}]*[^\u0000{_BLANK}][^\u0000]*$",
        "description": f"not blank, no NUL, at most {MAX_TEXT_BYTES:,} bytes of UTF-8",
    },
}

#: string properties that are times
_TIMES = {
    *("at", "event_date", "created_at", "updated_at", "gt", "gte", "lt", "lte"),
    *("compiled_at", "valid_until", "generated_at", "time"),
    *("opened_at", "last_at", "expires_at", "closed_at", "last_active"),
}


def _given(*names: str) -> Schema:
    return {"required": list(names), "properties": {name: {"not": {"type": "null"}} for name in names}}


def _at_most(**bounds: float) -> Schema:
    return {"properties": {name: {"maximum": bound} for name, bound in bounds.items()}}


#: narrower than the sum, which JSON Schema cannot form
_ONE_WEIGHT = [_at_most(recency_weight=0), _at_most(importance_weight=0)]

_RANGE: Schema = {
    "anyOf": [_given(name) for name in ("gt", "gte", "lt", "lte")],
    "allOf": [{"not": _given("gt", "gte")}, {"not": _given("lt", "lte")}],
}

#: what `__post_init__` and handlers demand besides the types: schema, or schema.property -> keywords
_RULES: dict[str, Schema] = {
    "MemoryPatch": {"minProperties": 1},
    "ProfilePatch": {"minProperties": 1},
    "SessionPatch": {"minProperties": 1},
    "ContextRequest": {
        "allOf": [
            {
                "anyOf": [
                    _given("text"),
                    _given("session_id"),
                    {"required": ["stages"], "properties": {"stages": {"const": 1}}},
                ]
            },
            # narrower than its tokens, which JSON Schema cannot count
            {
                "anyOf": [
                    {"properties": {"template": {"type": "null"}}},
                    {"properties": {"template": {"maxLength": 500}, "max_tokens": {"minimum": 2001}}},
                ]
            },
        ]
    },
    "ContextRequest.template": {"pattern": TEMPLATE},
    "ProfilePatch.preferred_formats": {"propertyNames": _STRINGS[1, 256]},
    "TagMatch": {
        "anyOf": [
            {"required": [name], "properties": {name: {"minItems": 1}}} for name in ("any", "all", "none")
        ]
    },
    "NumberRange": _RANGE,
    "TimeRange": _RANGE,
    "SearchRequest": {
        "anyOf": [
            {"required": ["text"], "properties": {"text": {"type": "string"}}},
            {
                "required": ["vector", "search_mode"],
                "properties": {"vector": {"type": "array"}, "search_mode": {"const": "semantic"}},
            },
        ],
        "allOf": [
            {"anyOf": [_at_most(recency_weight=0.5, importance_weight=0.5), *_ONE_WEIGHT]},
            *(
                {
                    "not": {
                        "required": ["search_mode", name],
                        "properties": {"search_mode": {"const": "keyword"}, name: {"type": "number"}},
                    }
                }
                for name in ("min_similarity", "min_results")
            ),
        ],
    },
    "SearchRequest.vector": {
        "items": {"minimum": -1e6, "maximum": 1e6},
        "contains": {"anyOf": [{"minimum": 1e-6}, {"maximum": -1e-6}]},
    },
    # one item that is right is enough: the others are refused by themselves
    "MemoryBatch.memories": {
        "minItems": 1,
        "maxItems": MAX_BATCH_MEMORIES,
        "items": {},
        "contains": {"$ref": _REF.format(name="MemoryInput")},
    },
}

_PATH: dict[str, Schema] = {
    "user": {"type": "string", "minLength": 1, "maxLength": 256, "pattern": r"^[^\u0000]+$"},
    "id": {"type": "string", "minLength": 1, "maxLength": 256, "pattern": _STRINGS[1, 256]["pattern"]},
}
_PATH["kind"] = {"type": "string", "enum": list(get_args(SummaryKind))}
_PATH["name"] = _PATH["session"] = _PATH["id"]
_PATH_TEXT = {
    "kind": "what is summarised",
    "name": "a topic's number, a day (2026-11-26), a week (2026-W48), a month (2026-11), an entity, "
    "or a session's id",
    "user": "whose memories; any character but NUL, percent-encoded",
    "id": "the memory's id, percent-encoded",
    "session": "the session's id, percent-encoded",
}
_REQUEST_HEADERS: dict[str, Schema] = {
    "If-Match": {"type": "string", "pattern": r'^(\*|(W/)?"?[0-9]{1,16}"?)$'},
    KEY_HEADER: {"type": "string", "pattern": "^[!-~]{1,255}$"},
}
_REPLY_HEADERS: dict[str, Schema] = {
    "X-Request-ID": {
        "description": "The caller's, or a new one",
        "required": True,
        "schema": {"type": "string", "pattern": "^[!-~]{1,128}$"},
    },
    "ETag": {
        "description": "Version of the memory, for If-Match",
        "required": True,
        "schema": {"type": "string", "pattern": '^"[0-9]+"$'},
    },
    "Redismem-Generation": {
        "description": "The owner's generation that the reply shows or made, for `min_version`",
        "required": True,
        "schema": {"type": "integer", "minimum": 0},
    },
    "Retry-After": {
        "description": "Seconds to wait before trying again",
        "required": True,
        "schema": {"type": "integer", "minimum": 1},
    },
}

#: status -> the error whose docstring describes it
_ERRORS = {
    error.status: error
    for error in (
        *(errors.MalformedBody, errors.NotFound, errors.Conflict, errors.VersionMismatch),
        *(errors.PayloadTooLarge, errors.InvalidInput, errors.Unavailable, errors.DeadlineExceeded),
        *(errors.Unauthorized, errors.Forbidden, errors.RateLimited),
    )
}
#: the ways to show an API key
_KEYS: dict[str, Schema] = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
_ERROR: Schema = {
    "title": "Error",
    "description": "What went wrong: `code` for programs, `message` for people, `field` of the input.",
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {name: {"type": "string"} for name in ("code", "message", "field", "request_id")},
            "required": ["code", "message", "request_id"],
        }
    },
    "required": ["error"],
}

#: first segment of a path (below the user) -> tag, where the segment itself is not the tag
_TAGS = {
    "": "users",
    "corrections": "memories",
    "export": "transfer",
    "import": "transfer",
    **dict.fromkeys(("profile", "topics", "summaries", "conflicts"), "derived"),
    **dict.fromkeys(("stats", "slo", "dashboard"), "operation"),
}

_EXAMPLES: dict[str, list[Schema]] = {
    "MemoryInput": [
        {
            "text": "The wedding of Anna is on 12 June in Porto.",
            "topics": ["family"],
            "entities": ["Anna"],
            "session_id": "chat-17",
            "event_date": "2026-01-15T18:30:00Z",
        }
    ],
    "MemoryBatch": [{"memories": [{"text": "Prefers tea to coffee.", "importance": 0.8}]}],
    "MemoryPatch": [{"importance": 0.9, "topics": ["family", "travel"]}],
    "SearchRequest": [{"text": "When is the wedding?", "limit": 5, "filters": {"topics": ["family"]}}],
    "BatchRequest": [{"queries": [{"text": "wedding"}, {"text": "tea or coffee?", "limit": 3}]}],
    "CorrectionRequest": [{"ids": ["wedding"], "memory": {"text": "The wedding moved to 19 June."}}],
    "SessionInput": [{"id": "chat-17", "agent": "planner"}],
    "SessionPatch": [{"pins": ["wedding"]}],
    "MessageInput": [{"text": "Is the hotel in Porto booked?"}],
    "MessageBatch": [{"messages": [{"text": "Thanks!"}, {"role": "assistant", "text": "You are welcome."}]}],
    "TypingInput": [{"partial": "is the hot"}],
    "ContextRequest": [
        {"text": "What is left to plan for the wedding?", "session_id": "chat-17", "stages": 3}
    ],
    "ContextBatch": [{"contexts": [{"text": "the wedding"}, {"text": "tea or coffee?", "stages": 2}]}],
    "ProfilePatch": [{"display_name": "Ada", "preferred_formats": {"code": "python"}}],
    "ImportRecord": [{"text": "Moved to Lisbon.", "created_at": "2025-03-01T09:00:00Z"}],
}


def openapi_document(operations: Sequence[Operation]) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of the operations."""
    kinds = {kind: None for operation in operations for kind in _kinds(operation)}
    _, components = msgspec.json.schema_components([*kinds, Health, Queued], ref_template=_REF)
    schemas = {name: _described(schema) for name, schema in sorted(components.items())}
    for place, keywords in _RULES.items():
        name, _, key = place.partition(".")
        if name in schemas:
            target = schemas[name]["properties"][key] if key else schemas[name]
            target.update(keywords)
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": _TITLE, "version": "1", "description": _ABOUT},
        "servers": [{"url": "/"}],
        "tags": [{"name": name} for name in dict.fromkeys(_tag(operation.path) for operation in operations)],
        "paths": paths,
        # nothing, where the store has never had a key
        "security": [{}, *({name: []} for name in _KEYS)],
        "components": {
            "securitySchemes": _KEYS,
            "schemas": {**schemas, "Error": _ERROR},
            "headers": _REPLY_HEADERS,
            "responses": {error.__name__: _error_reply(status) for status, error in _ERRORS.items()},
        },
    }


def _kinds(operation: Operation) -> Iterable[type[Any]]:
    return (*operation.request, *([operation.reply] if operation.reply else ()))


def _described(schema: Any, name: str = "") -> Any:
    """Return msgspec's schema of a property with what `_STRINGS` and `_TIMES` know."""
    if isinstance(schema, list):
        return [_described(item, name) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _described(value, name) for key, value in schema.items() if key != "properties"}
    if "properties" in schema:
        found["properties"] = {key: _described(value, key) for key, value in schema["properties"].items()}
    if isinstance(found.get("description"), str):
        found["description"] = cleandoc(found["description"])
    if "enum" in found:
        found["type"] = "string"
    if found.get("type") == "string" and "enum" not in found:
        if "pattern" in found:
            found["pattern"] = re.sub(r"\\Z$", "$", found["pattern"])  # JSON Schema knows no \Z
        elif rule := _STRINGS.get((found.get("minLength", 0), found.get("maxLength", 0))):
            found |= rule
        elif name in _TIMES:
            found["format"] = "date-time"
    return found


def _operation(operation: Operation) -> Schema:
    found: Schema = {
        **({"security": []} if operation.access == "open" else {}),
        "operationId": operation.handler.__name__,
        "summary": operation.summary,
        "description": getdoc(operation.handler) or operation.summary,
        "tags": [_tag(operation.path)],
    }
    if parameters := _parameters(operation):
        found["parameters"] = parameters
    if operation.request:
        found["requestBody"] = _body(operation)
    return found | {"responses": _replies(operation)}


def _tag(path: str) -> str:
    head = path.removeprefix("/v1").removeprefix("/users/{user}").strip("/").partition("/")[0]
    return _TAGS.get(head, head)


def _parameters(operation: Operation) -> list[Schema]:
    found: list[Schema] = [
        {"name": name, "in": "path", "required": True, "description": _PATH_TEXT[name], "schema": _PATH[name]}
        for name in re.findall(r"{(\w+)}", operation.path)
    ]
    for name, told in operation.query.items():
        parameter: Schema = {"name": name, "in": "query", "schema": _described(told)}
        if "description" in told:
            parameter["description"] = parameter["schema"].pop("description")
        if told["type"] == "array":
            parameter |= {"style": "form", "explode": True}
        found.append(parameter)
    for name, text in operation.headers.items():
        schema = _REQUEST_HEADERS.get(name, {"type": "string"})
        found.append({"name": name, "in": "header", "description": text, "schema": schema})
    return found


def _body(operation: Operation) -> Schema:
    names = [kind.__name__ for kind in operation.request]
    content: Schema = {"schema": _any_of(operation.request)}
    examples = {name: {"value": value} for name in names for value in _EXAMPLES.get(name, ())}
    if examples:
        content["examples"] = examples
    if not operation.ndjson:
        return {"required": True, "content": {_JSON: content}}
    return {"description": "One object per line", "required": True, "content": {_NDJSON: content}}


def _any_of(kinds: Sequence[type[Any]]) -> Schema:
    refs = [{"$ref": _REF.format(name=kind.__name__)} for kind in kinds]
    return refs[0] if len(refs) == 1 else {"anyOf": refs}


def _replies(operation: Operation) -> Schema:
    found: Schema = {}
    for status in operation.statuses:
        tagged = operation.reply is Memory and not operation.ndjson
        shown = operation.reply is not None and "generation" in operation.reply.__struct_fields__
        generation = ["Redismem-Generation"] if tagged or shown or operation.reply is BatchReply else []
        headers = _headers("X-Request-ID", *(["ETag"] if tagged else []), *generation)
        found[str(status)] = {"description": HTTPStatus(status).phrase, "headers": headers}
        if operation.reply:
            media = _NDJSON if operation.ndjson and not operation.request else _JSON
            is_pending = status == 202 and 200 in operation.statuses
            kind = Queued if is_pending else operation.reply
            found[str(status)]["content"] = {media: {"schema": _any_of([kind])}}
            if operation.events:
                found[str(status)]["content"][EVENTS] = {"schema": {"type": "string"}}
            if is_pending:
                found[str(status)]["headers"] = _headers("X-Request-ID", "Retry-After")
    statuses = {422, *operation.errors}  # every operation refuses query parameters that it does not know
    if operation.access != "open":
        statuses |= {401, 403, 429, 503, 504}
    if operation.request:
        statuses |= {400, 413}
    for status in sorted(statuses):
        known = _ERRORS.get(status)
        found[str(status)] = (
            {"$ref": f"#/components/responses/{known.__name__}"} if known else _error_reply(status)
        )
    if operation.path == "/health/ready":
        found["503"] = {**_error_reply(503), "content": {_JSON: {"schema": _any_of([Health])}}}
    return found


def _error_reply(status: int) -> Schema:
    known = _ERRORS.get(status)
    return {
        "description": (getdoc(known) if known else None) or HTTPStatus(status).phrase,
        "headers": _headers("X-Request-ID", *(["Retry-After"] if status in (429, 503) else [])),
        "content": {_JSON: {"schema": {"$ref": _REF.format(name="Error")}}},
    }


def _headers(*names: str) -> Schema:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}
