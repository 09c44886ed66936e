"""What the tests of the operator's side share: raw requests, each operation once, what metrics tell."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from prometheus_client.parser import text_string_to_metric_families
from starlette.types import ASGIApp, Message, Scope

from redismem.http.operation import Operation
from redismem.http.table import OPERATIONS
from tests.http.conftest import encoded

#: what each operation with a body is sent; `{id}` is a memory of the user
BODIES: dict[str, Any] = {
    "put": {"text": "{word} is new"},
    "patch": {"importance": 0.7},
    "search": {"text": "{word}"},
    "search_batch": {"queries": [{"text": "{word}"}]},
    "correct": {"ids": ["{id}"], "memory": {"text": "{word} no more"}},
    "import": {"text": "{word} came along"},
    "profile_patch": {"display_name": "{word}"},
    "session_open": {"id": "s1"},
    "session_patch": {"pins": ["{id}"]},
    "message": {"text": "what of {word}"},
    "typing": {"partial": "what of {word}"},
    "context": {"text": "{word}", "stages": 4},
    "context_batch": {"contexts": [{"text": "{word}"}]},
}

BY_NAME = {operation.name: operation for operation in OPERATIONS}

#: operations in an order in which each finds what it needs: a session before what is said in it
IN_ORDER = sorted(
    BY_NAME, key=lambda name: (name == "forget", name in ("delete", "session_close"), name != "session_open")
)


@dataclass(frozen=True)
class Reply:
    """What an application sent."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def error(self, status: int) -> dict[str, str]:
        """Return its error, which must have this status and the documented shape."""
        assert self.status == status, (self.status, self.body)
        error: dict[str, str] = self.json["error"]
        assert error["request_id"] == self.headers["x-request-id"]
        return error


def scope_of(method: str, path: str, headers: dict[str, str]) -> Scope:
    """Return a request as a server of ASGI hands it over."""
    raw_path, _, query = path.encode().partition(b"?")
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": unquote(raw_path.decode()),
        "raw_path": raw_path,
        "query_string": query,
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 1),
        "server": ("test", 80),
    }


async def raw(
    app: ASGIApp,
    method: str,
    path: str,
    *,
    headers: dict[str, str] | None = None,
    body: bytes = b"",
    receive: Callable[[], Awaitable[Message]] | None = None,
) -> Reply:
    """Send a request whose path nobody tidies up, as httptools hands it over; return the whole reply."""
    scope = scope_of(
        method, path, {**({"Content-Type": "application/json"} if body else {}), **(headers or {})}
    )
    messages: list[Message] = []
    unread = [{"type": "http.request", "body": body, "more_body": False}]

    async def read() -> Message:
        if not unread:
            await asyncio.Event().wait()  # the client stays
        return unread.pop()

    async def keep(message: Message) -> None:
        messages.append(message)

    await app(scope, receive or read, keep)
    begin, *rest = messages
    told = {name.decode().lower(): value.decode() for name, value in begin["headers"]}
    return Reply(begin["status"], told, b"".join(message.get("body", b"") for message in rest))


def request_of(
    operation: Operation, *, user: str, memory: str = "m1", word: str = "bees"
) -> tuple[str, str, dict[str, str], bytes]:
    """Return method, path, headers and body of a request for an operation that can be answered."""
    names = {"user": user, "id": memory, "session": "s1", "kind": "day", "name": "2026-01-01"}
    path = operation.path.format_map({name: encoded(value) for name, value in names.items()})
    told = BODIES.get(operation.name)
    if told is None:
        return operation.method, path, {}, b""
    text = json.dumps(told).replace("{word}", word).replace("{id}", memory)
    kind = "application/x-ndjson" if operation.name == "import" else "application/json"
    return operation.method, path, {"Content-Type": kind}, text.encode()


Samples = dict[tuple[str, ...], float]


def samples(text: str) -> Samples:
    """Return what an exposition tells: (name, values of the labels in order of their names) -> value."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
