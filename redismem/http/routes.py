"""What each route does with a request."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from redismem.errors import InvalidInput, RedisMemError
from redismem.fields import checked_name
from redismem.filters import Filters
from redismem.http.wire import (
    answer_response,
    converted,
    decoded,
    json_response,
    namespace_of,
    path_part,
    read_body,
    read_lines,
)
from redismem.keys import Owner
from redismem.service import Service
from redismem.tiers import Answer
from redismem.types import (
    MAX_BATCH_MEMORIES,
    BatchRequest,
    Consistency,
    CorrectionRequest,
    ImportRecord,
    ImportReply,
    Memory,
    MemoryInput,
    MemoryPatch,
    PutItem,
    SearchRequest,
    min_generation,
)
from redismem.views import ProfilePatch, SummaryKind

MOMENTS = ("created_at", "updated_at", "event_date")

#: memories of an import that are written together
_IMPORT_SLICE = 100
_MAX_IMPORT_ERRORS = 100


class MemoryBatch(Struct, forbid_unknown_fields=True, kw_only=True):
    """Several memories; each is stored or refused by itself."""

    memories: list[MemoryInput]


class Queued(Struct, kw_only=True):
    """It is not there yet, and will be: ask again."""

    status: Literal["queued"] = "queued"


class _SummaryPath(Struct, kw_only=True):
    kind: SummaryKind


class _SimilarQuery(Struct, kw_only=True):
    limit: Annotated[int, Meta(ge=1, le=100)] = 10


class _ConflictsQuery(Struct, kw_only=True):
    limit: Annotated[int, Meta(ge=1, le=500)] = 100


class _RawBatch(Struct, forbid_unknown_fields=True, kw_only=True):
    memories: list[msgspec.Raw]


class _ReadQuery(Struct, kw_only=True):
    consistency: Consistency = "eventual"
    # not None: a text "null" would be taken for it
    min_version: Annotated[int, Meta(ge=0, le=2**53)] | UnsetType = UNSET


class _WriteQuery(Struct, kw_only=True):
    consistency: Literal["eventual", "strong"] = "eventual"


class _ListQuery(Struct, kw_only=True):
    limit: int = 50
    cursor: str | None = None


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def owner_of(request: Request) -> Owner:
    return service_of(request).owner(path_part(request, "user"), namespace_of(request.scope))


def _memory_id(request: Request) -> str:
    try:
        return checked_name(path_part(request, "id"), "id")
    except ValueError as exc:
        raise InvalidInput(str(exc), field="id") from exc


async def body_of(request: Request, kind: type[Any]) -> Any:
    return decoded(await read_body(request, service_of(request).settings.max_body_bytes), kind)


def flag_of(request: Request, name: str, *, default: bool) -> bool:
    raw = request.query_params.get(name)
    if raw is None:
        return default
    if raw.lower() not in ("true", "false", "1", "0"):
        raise InvalidInput(f"`{name}` must be true or false", field=name)
    return raw.lower() in ("true", "1")


def _is_strong(request: Request) -> bool:
    given = {name: value for name, value in request.query_params.items() if name == "consistency"}
    return converted(given, _WriteQuery).consistency == "strong"


async def add_memories(request: Request) -> Response:
    """Store one memory, or many with an outcome for each."""
    service, owner = service_of(request), owner_of(request)
    wait = flag_of(request, "wait", default=True)
    body = await read_body(request, service.settings.max_body_bytes)
    single = "memories" not in decoded(body, dict[str, msgspec.Raw])
    memories: list[MemoryInput] = []
    items: list[PutItem | None] = [None]
    if single:
        memories.append(decoded(body, MemoryInput))
    else:
        memories, items = _each_memory(decoded(body, _RawBatch).memories)
    reply = await service.writer.put(owner, memories, wait=wait, strong=_is_strong(request))
    stored = iter(reply.memories)
    reply.memories = [item or next(stored) for item in items]
    refused = [i for i, item in enumerate(reply.memories) if item.outcome == "INVALID"]
    if len(refused) == len(items):
        first = reply.memories[0]
        where = first.field if single else f"memories[0].{first.field or ''}".rstrip(".")
        raise InvalidInput(first.error or "", field=where)
    return json_response(reply, 201 if wait else 202, generation=reply.generation)


def _each_memory(raw_items: list[msgspec.Raw]) -> tuple[list[MemoryInput], list[PutItem | None]]:
    if not 1 <= len(raw_items) <= MAX_BATCH_MEMORIES:
        raise InvalidInput(f"`memories` takes 1 to {MAX_BATCH_MEMORIES} memories a request", field="memories")
    memories: list[MemoryInput] = []
    items: list[PutItem | None] = []
    for raw in raw_items:
        try:
            memories.append(decoded(raw, MemoryInput))
            items.append(None)
        except InvalidInput as exc:
            items.append(PutItem(outcome="INVALID", error=exc.message, field=exc.field))
    return memories, items


async def list_memories(request: Request) -> Response:
    """List memories newest first."""
    page, filters = _list_query(request)
    if not 1 <= page.limit <= 500:
        raise InvalidInput("`limit` must be 1 to 500", field="limit")
    reply = await service_of(request).tiers.page(owner_of(request), filters, page.limit, page.cursor)
    return json_response(reply, generation=reply.generation)


def _list_query(request: Request) -> tuple[_ListQuery, Filters]:
    page: dict[str, Any] = {}
    filters: dict[str, Any] = {}
    for name in request.query_params:
        values = request.query_params.getlist(name)
        head, _, rest = name.partition(".")
        if (rest and not isinstance(filters.setdefault(head, {}), dict)) or (not rest and name in filters):
            raise InvalidInput(f"`{head}` is given twice, as a value and by its parts", field=head)
        if name in _ListQuery.__struct_fields__:
            page[name] = values[-1]
        elif head == "metadata" and rest:
            filters[head][rest] = _scalar(values[-1])
        elif rest:
            filters[head][rest] = _moment(name, values[-1]) if head in MOMENTS else _number(name, values[-1])
        elif head in ("memory_type", "topics", "entities", "session_id", "cluster"):
            filters[name] = values
        elif head == "pinned":
            filters[name] = flag_of(request, name, default=False)
        else:
            filters[name] = values[-1]
    return converted(page, _ListQuery), converted(filters, Filters)


def _moment(name: str, text: str) -> datetime:
    try:
        return msgspec.convert(text, datetime)
    except msgspec.ValidationError as exc:
        raise InvalidInput(f"`{name}` takes a time such as 2026-03-01T18:30:00Z", field=name) from exc


def _number(name: str, text: str) -> float:
    try:
        return msgspec.convert(text, float, strict=False)
    except msgspec.ValidationError as exc:
        raise InvalidInput(f"`{name}` takes a number such as 0.5", field=name) from exc


def _scalar(text: str) -> object:
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return text
    return value if value is None or isinstance(value, str | int | float | bool) else text


async def get_memory(request: Request) -> Response:
    """Read one memory."""
    wanted = converted(dict(request.query_params), _ReadQuery)
    version = None if wanted.min_version is UNSET else wanted.min_version
    least = min_generation(wanted.consistency, version)
    memory_id, missed = _memory_id(request), "l1_missed" in request.scope
    answer = await service_of(request).tiers.memory(owner_of(request), memory_id, least, missed=missed)
    return _with_etag(answer)


async def change_memory(request: Request) -> Response:
    """Change fields of a memory; with If-Match only if nobody else did."""
    owner, memory_id = owner_of(request), _memory_id(request)
    patch = await body_of(request, MemoryPatch)
    expected = _expected_version(request.headers.get("if-match"))
    strong = _is_strong(request)
    memory = await service_of(request).writer.update(
        owner, memory_id, patch, expected_version=expected, strong=strong
    )
    return _with_etag(Answer(msgspec.json.encode(memory), memory.version))


def _expected_version(tag: str | None) -> int | None:
    if tag is None or tag.strip() == "*":
        return None
    bare = tag.strip().removeprefix("W/").strip('"')
    if not (bare.isascii() and bare.isdigit() and len(bare) <= 16):
        raise InvalidInput(
            '`If-Match` takes one ETag as GET returned it, such as "1763924700123"', field="If-Match"
        )
    return int(bare)


def _with_etag(answer: Answer) -> Response:
    return answer_response(answer, {"ETag": f'"{answer.generation}"'})


async def delete_memory(request: Request) -> Response:
    """Delete a memory and everything made from it."""
    reply = await service_of(request).writer.delete(owner_of(request), _memory_id(request))
    return json_response(reply, generation=reply.generation)


async def memory_history(request: Request) -> Response:
    """Tell what happened to a memory; also after its delete."""
    return json_response(await service_of(request).browser.history(owner_of(request), _memory_id(request)))


async def search(request: Request) -> Response:
    """Find the best memories."""
    owner = owner_of(request)
    body = await body_of(request, SearchRequest)
    return answer_response(await service_of(request).tiers.search(owner, body))


async def search_batch(request: Request) -> Response:
    """Answer up to 50 searches of one user in one round trip."""
    owner = owner_of(request)
    batch = await body_of(request, BatchRequest)
    answers = await service_of(request).tiers.search_batch(owner, batch.queries)
    body = b'{"results":[%s]}' % b",".join(answer.body for answer in answers)
    # what all of them show is what the oldest shows
    return answer_response(Answer(body, min(answer.generation for answer in answers)))


async def correct(request: Request) -> Response:
    """Replace memories that are no longer true."""
    owner = owner_of(request)
    body = await body_of(request, CorrectionRequest)
    reply = await service_of(request).writer.correct(owner, body)
    return json_response(reply, 201, generation=reply.generation)


async def export(request: Request) -> Response:
    """Stream all memories as NDJSON, oldest first."""
    pages = service_of(request).browser.export(owner_of(request))
    # the first page is read before the status is sent, so that an absent Redis is a 503
    first: list[Memory] = await anext(pages, [])

    async def lines() -> AsyncIterator[bytes]:
        yield b"".join(msgspec.json.encode(memory) + b"\n" for memory in first)
        async for page in pages:
            yield b"".join(msgspec.json.encode(memory) + b"\n" for memory in page)

    return StreamingResponse(lines(), media_type="application/x-ndjson")


async def import_memories(request: Request) -> Response:
    """Store an NDJSON stream of memories, such as an export; lines that are refused are reported."""
    service, owner = service_of(request), owner_of(request)
    counts = dict.fromkeys(("CREATED", "UPDATED", "UNCHANGED", "INVALID"), 0)
    errors: list[PutItem] = []
    waiting: list[tuple[int, ImportRecord]] = []
    generation = 0

    async def store() -> int:
        reply = await service.writer.put(owner, [record for _, record in waiting])
        for (line, _), item in zip(waiting, reply.memories, strict=True):
            counts[item.outcome] += 1
            if item.outcome == "INVALID" and len(errors) < _MAX_IMPORT_ERRORS:
                errors.append(PutItem(outcome="INVALID", error=item.error, field=f"line {line}"))
        waiting.clear()
        return reply.generation

    async for number, raw in read_lines(request, service.settings.max_body_bytes):
        try:
            waiting.append((number, decoded(raw, ImportRecord)))
        except RedisMemError as exc:
            counts["INVALID"] += 1
            if len(errors) < _MAX_IMPORT_ERRORS:
                where = f"line {number}" + (f": {exc.field}" if exc.field else "")
                errors.append(PutItem(outcome="INVALID", error=exc.message, field=where))
        if len(waiting) >= _IMPORT_SLICE:
            generation = await store()
    if waiting or not generation:
        generation = await store()
    lowered = {name.lower(): count for name, count in counts.items()}
    reply = ImportReply(**lowered, errors=errors, generation=generation)
    return json_response(reply, generation=generation)


async def forget_user(request: Request) -> Response:
    """Remove everything of a user."""
    return json_response(await service_of(request).writer.forget(owner_of(request)))


async def get_profile(request: Request) -> Response:
    """Read a profile."""
    missed = "l1_missed" in request.scope
    return answer_response(await service_of(request).tiers.profile(owner_of(request), missed=missed))


async def change_profile(request: Request) -> Response:
    """Set fields of a profile, or give them back to the compiler."""
    owner = owner_of(request)
    patch = await body_of(request, ProfilePatch)
    profile = await service_of(request).views.change_profile(owner, patch)
    return json_response(profile, generation=profile.generation)


async def list_topics(request: Request) -> Response:
    """List topics, largest first."""
    reply = await service_of(request).views.topics(owner_of(request))
    return json_response(reply, generation=reply.generation)


async def get_summary(request: Request) -> Response:
    """Read a summary; 202 when it is being made."""
    kind = converted({"kind": path_part(request, "kind")}, _SummaryPath).kind
    summary = await service_of(request).views.summary(owner_of(request), kind, path_part(request, "name"))
    if summary is None:
        return json_response(Queued(), 202, {"Retry-After": "1"})
    return json_response(summary)


async def similar_memories(request: Request) -> Response:
    """List the memories nearest to one."""
    limit = converted(dict(request.query_params), _SimilarQuery).limit
    views = service_of(request).views
    return json_response(await views.similar(owner_of(request), _memory_id(request), limit))


async def list_conflicts(request: Request) -> Response:
    """List what seems to be said twice, or to contradict itself."""
    limit = converted(dict(request.query_params), _ConflictsQuery).limit
    return json_response(await service_of(request).views.conflicts(owner_of(request), limit))
