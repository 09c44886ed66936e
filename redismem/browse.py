"""Reads by id, in order of time, and the history of a memory. Changes nothing."""

from __future__ import annotations

import math
import re
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from urllib.parse import quote, unquote

import msgspec

from redismem.codec import READ_FIELDS, memory_from_raw
from redismem.errors import IndexMissing, InvalidInput, NotFound
from redismem.filters import Filters, quarter_name
from redismem.keys import Owner
from redismem.lualib import Functions
from redismem.query import filter_query
from redismem.types import HistoryEvent, HistoryReply, ListReply, Memory

#: where a page ended: a moment, and the percent-encoded id of the last memory
CURSOR = r"^-?[0-9]{1,12}(\.[0-9]{1,24})?(e-[0-9]{2})?~[^~]+$"

_LOG_PAGE = 1000
_EXPORT_PAGE = 200


class Browser:
    """Reads memories other than by search."""

    def __init__(self, functions: Functions) -> None:
        self._functions = functions

    async def get(self, owner: Owner, memory_id: str) -> Memory:
        """Return one memory. Cost: one round trip, two where it is not there.

        Raises:
            NotFound: there is no such memory, or it is archived, which the message tells.
        """
        raw = await self._functions.client.execute("HMGET", owner.memory(memory_id), *READ_FIELDS)
        memory = memory_from_raw(raw)
        if memory is None:
            number = await self._functions.client.execute("ZSCORE", owner.archived, memory_id)
            if number is not None:
                quarter = quarter_name(int(number))
                raise NotFound(
                    f"memory {memory_id!r} is archived with {quarter}: run `redismem archive restore`"
                )
            raise NotFound(f"there is no memory {memory_id!r}")
        memory.id = memory_id
        return memory

    async def get_each(self, owner: Owner, ids: Sequence[str]) -> list[Memory]:
        """Return those of the memories that exist, in order. Cost: one round trip."""
        rows = await self._functions.client.pipeline(
            [("HMGET", owner.memory(memory_id), *READ_FIELDS) for memory_id in ids]
        )
        found = []
        for memory_id, raw in zip(ids, rows, strict=True):
            if (memory := memory_from_raw(raw)) is not None:
                memory.id = memory_id
                found.append(memory)
        return found

    async def page(
        self, owner: Owner, filters: Filters, *, limit: int = 50, cursor: str | None = None
    ) -> ListReply:
        """Return memories newest first; `cursor` of the reply continues where it ended.

        Raises:
            InvalidInput: the cursor is not one of ours.

        Cost: one round trip.
        """
        last_moment, last_id = _decoded_cursor(cursor)
        query = page = filter_query(filters)
        if cursor is not None:
            bound = f"@created_at:[-inf {last_moment}]"
            page = bound if query == "*" else f"{query} {bound}"
        raw = await self._functions.call(
            "rm_list_ro_v1",
            [owner.index, owner.meta, owner.ids],
            *(owner.memory_prefix, query, page, limit, last_moment, last_id, *READ_FIELDS),
            read=True,
        )
        if raw[0] == b"NOINDEX":
            raise IndexMissing("this user's index is missing; run `redismem doctor --repair`")
        _, generation, total, more, *rows = raw
        reply = ListReply(memories=[], total=int(total), generation=int(generation))
        for raw_id, fields in zip(rows[::2], rows[1::2], strict=True):
            memory = memory_from_raw(fields)
            if memory is not None:
                memory.id = raw_id.decode("utf-8", "replace")
                reply.memories.append(memory)
        if more:
            moment = rows[-1][READ_FIELDS.index("created_at")] or b"0"
            reply.cursor = _encoded_cursor(moment, rows[-2].decode("utf-8", "replace"))
        return reply

    async def history(self, owner: Owner, memory_id: str) -> HistoryReply:
        """Return what happened to a memory, oldest first; deleted ones keep their history.

        Raises:
            NotFound: the owner's log knows no such memory (any more).

        Cost: one round trip per 1,000 events of the owner.
        """
        events = []
        start = "-"
        while True:
            page = await self._functions.client.execute("XRANGE", owner.log, start, "+", "COUNT", _LOG_PAGE)
            for _, flat in page:
                entry = dict(zip(flat[::2], flat[1::2], strict=True))
                if entry[b"id"].decode() == memory_id:
                    events.append(_event(entry))
            if len(page) < _LOG_PAGE:
                break
            start = "(" + page[-1][0].decode()
        if not events:
            raise NotFound(f"nothing is known of memory {memory_id!r}")
        return HistoryReply(id=memory_id, events=events)

    async def export(self, owner: Owner) -> AsyncIterator[list[Memory]]:
        """Yield all memories in pages, oldest first; what is written meanwhile is not in it.

        Memories that another service wrote are in it once `redismem reembed` has seen them.
        Cost: a list of all ids (0.1 ms per 1,000), then one round trip per 200 memories.
        """
        ids = await self._functions.client.execute("ZRANGE", owner.ids, 0, -1)
        for first in range(0, len(ids), _EXPORT_PAGE):
            part = [raw_id.decode("utf-8", "replace") for raw_id in ids[first : first + _EXPORT_PAGE]]
            yield await self.get_each(owner, part)


def _event(entry: dict[bytes, bytes]) -> HistoryEvent:
    event, other = entry[b"event"].decode(), entry[b"other"].decode()
    others = [other] if other else []
    return HistoryEvent(
        at=datetime.fromtimestamp(int(entry[b"at_ms"]) / 1000, UTC),
        event=event,
        version=int(entry[b"version"]),
        other=msgspec.json.decode(other, type=list[str]) if event == "corrects" else others,
    )


def _encoded_cursor(moment: bytes, memory_id: str) -> str:
    return f"{_number17(moment)}~{quote(memory_id, safe='').replace('~', '%7E')}"


def _decoded_cursor(cursor: str | None) -> tuple[str, str]:
    if cursor is None:
        return "", ""
    if not re.search(CURSOR, cursor):
        raise InvalidInput("`cursor` is not one that this service gave", field="cursor")
    moment, _, memory_id = cursor.partition("~")
    return _number17(moment), unquote(memory_id)


def _number17(raw: str | bytes) -> str:
    number = float(raw)
    if not math.isfinite(number):
        raise ValueError(number)
    return format(number, ".17g")
