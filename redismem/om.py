"""redis-om's view of one user's memories: reads and finds our hashes, writes through our Functions.

redis-om would write fields one by one, invent ids, and make indexes of its own. Here a save or a
delete is the same Function call the service makes, so the index, the list of ids, versions, history and
sessions stay right. A saved memory is found by words at once, by meaning when `redismem reembed` has
seen it. Reading raises redis-py's and redis-om's errors, writing ours. Works around redis-om 1.2.
"""

from __future__ import annotations

import time
from abc import ABC
from collections.abc import Sequence
from datetime import datetime
from typing import Any, ClassVar, NamedTuple, Self

import msgspec
from aredis_om import Field, FindQuery, HashModel, NotFoundError, QueryNotSupportedError, get_redis_connection
from aredis_om.model.model import Operators, RediSearchFieldTypes
from aredis_om.search_reply import search_document_keys, search_documents
from pydantic import PrivateAttr
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from redismem.client import Argument, FunctionMissing, translated
from redismem.codec import READ_FIELDS, memory_fields, memory_values
from redismem.embedded import EmbeddedRedis
from redismem.errors import InvalidInput, Misconfigured, StoreError, VersionMismatch
from redismem.keys import STORE, VECTOR_FIELDS, Owner
from redismem.query import epoch, escaped_tag, index_schema, packed_tags, words_query
from redismem.settings import Settings
from redismem.types import MemoryInput
from redismem.words import query_words
from redismem.write import record_arguments

_START_SERVICE = "start the service once on this Redis (`redismem serve`, or `redismem doctor`)"

#: MAXLEN of the history here: whatever the service keeps, it trims with its own next write
_LOG_LENGTH = 2**53

_TAG_QUERIES = {
    Operators.EQ: "@{}:{{{}}}",
    Operators.IN: "@{}:{{{}}}",
    Operators.NE: "-@{}:{{{}}}",
    Operators.NOT_IN: "-@{}:{{{}}}",
    Operators.STARTSWITH: "@{}:{{{}*}}",
    Operators.ENDSWITH: "@{}:{{*{}}}",
    Operators.CONTAINS: "@{}:{{*{}*}}",
}


class _MemoryQuery(FindQuery):
    """redis-om's query in the terms of our index."""

    def copy(self, **changes: Any) -> _MemoryQuery:
        return _MemoryQuery(**{**self.dict(), **changes})

    @property
    def query(self) -> str:
        """The query string; it hides superseded memories unless it asks for them."""
        query: str = super().query
        if "@superseded_by" in query:
            return query
        return "ismissing(@superseded_by)" if query == "*" else f"({query}) ismissing(@superseded_by)"

    @classmethod
    def resolve_value(  # type: ignore[override]  # redis-om's types of arguments that are not used here
        cls, field_name: str, field_type: Any, field_info: Any, op: Operators, value: Any, *rest: Any
    ) -> str:
        if field_name == "text":
            words = words_query(query_words(str(value)), "*")
            if op is not Operators.LIKE or not words:
                raise QueryNotSupportedError("`text` is found by words: Memory.text % 'some words'")
            return words
        if value is None and field_name == "superseded_by" and op in (Operators.EQ, Operators.NE):
            return f"{'-' if op is Operators.NE else ''}ismissing(@superseded_by)"
        if field_type is RediSearchFieldTypes.NUMERIC:
            if isinstance(value, datetime):
                value = epoch(value)
            resolved: str = super().resolve_value(field_name, field_type, field_info, op, value, *rest)
            return resolved
        values = [value] if isinstance(value, str | bool) or value is None else list(value)
        shown = [str(int(one)) if isinstance(one, bool) else one for one in values]
        if op not in _TAG_QUERIES or not shown or not all(isinstance(one, str) and one for one in shown):
            raise QueryNotSupportedError(f"`{field_name}` cannot be compared with {value!r} by {op}")
        if field_name in ("topics", "entities"):
            shown = [packed_tags([one]) for one in shown]
        return _TAG_QUERIES[op].format(field_name, "|".join(map(escaped_tag, shown)))

    def resolve_redisearch_pagination(self) -> list[Any]:
        # the only hook into the arguments of FT.SEARCH; ismissing() and escapes need dialect 2
        return ["LIMIT", self.offset, self.limit, "DIALECT", 2]

    def _has_complex_projected_fields(self) -> bool:
        # projected here, from whole hashes: RETURN rounds the sortable `created_at` to 10 ms
        return True

    async def execute(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super().execute(*args, **kwargs)
        except ResponseError as exc:
            owner, db = self.model.owner, self.model.db()
            if "index" in str(exc).lower() and not await db.hexists(owner.meta, "index"):
                return []  # nobody has written anything for this user yet
            raise

    async def update(self, use_transaction: bool = False, **field_values: Any) -> None:  # noqa: FBT001, FBT002  # redis-om's signature
        """Save each memory found with these values, one by one."""
        await super().update(use_transaction=use_transaction, **field_values)

    async def delete(self) -> int:
        """Delete the memories found; return how many there were."""
        return await self.model.delete_many(await self.all())


class _Stored(NamedTuple):
    """What a save compares with."""

    version: int
    text: str
    session_id: str | None


class MemoryModel(HashModel, ABC):
    """A memory of one user. Make the user's own class with `memory_model`.

    `created_at` can be set on a new memory only; `updated_at`, `version`, `superseded_by` and
    `sources` are the store's: what is set there is not saved.
    """

    owner: ClassVar[Owner]

    text: str = Field(index=True, full_text_search=True)
    memory_type: str = Field(default="semantic", index=True)
    topics: list[str] = Field(default=[], index=True)
    entities: list[str] = Field(default=[], index=True)
    session_id: str | None = Field(default=None, index=True)
    event_date: datetime | None = Field(default=None, index=True)
    importance: float = Field(default=0.5, index=True)
    confidence: float = Field(default=1.0, index=True)
    pinned: bool = Field(default=False, index=True)
    metadata: dict[str, Any] = {}
    created_at: datetime | None = Field(default=None, index=True, sortable=True)
    updated_at: datetime | None = Field(default=None, index=True)
    version: int = 0
    superseded_by: str | None = Field(default=None, index=True)
    sources: list[str] = []

    _stored: _Stored | None = PrivateAttr(default=None)

    @classmethod
    def make_primary_key(cls, pk: str) -> str:
        return cls.owner.memory(pk)

    @classmethod
    def redisearch_schema(cls) -> str:
        raise NotImplementedError("the index belongs to redismem")  # redis-om's migrator skips it

    @classmethod
    def find(cls, *expressions: Any, knn: None = None) -> _MemoryQuery:
        """Return a query; it hides superseded memories unless it asks for `superseded_by`."""
        if knn is not None:
            raise QueryNotSupportedError("search by meaning is the service's")
        return _MemoryQuery(expressions=expressions, model=cls)

    @classmethod
    async def get(cls, pk: str) -> Self:
        """Return one memory. Cost: one round trip.

        Raises:
            NotFoundError: there is no such memory.
        """
        raw = await cls.db().hmget(cls.make_primary_key(pk), READ_FIELDS)
        if raw[READ_FIELDS.index("text")] is None:
            raise NotFoundError
        return cls(**_values(pk, raw))._read()

    @classmethod
    def from_redis(cls, res: Any, knn: None = None) -> list[Self]:
        keys, rows = search_document_keys(res), search_documents(res)
        if len(keys) == len(rows):  # Redis 8.8 also sends ids of what has just gone, without a row
            rows = [{**row, "pk": cls._id(key)} for key, row in zip(keys, rows, strict=True)]
        return [
            cls(**_values(row["pk"], [row.get(name) for name in READ_FIELDS]))._read()
            for row in rows
            if "pk" in row and "text" in row
        ]

    @classmethod
    def _id(cls, key: str) -> str:
        return key.removeprefix(cls.owner.memory_prefix)

    def _read(self) -> Self:
        self._stored = _Stored(self.version, self.text, self.session_id)
        return self
