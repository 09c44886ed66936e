"""redis-om's view of one user's memories: reads and finds our hashes, writes through our Functions.

redis-om would write fields with HSET, delete with DEL and make indexes of its own. Here a save or a
delete is the Function call that the service makes: index, list of ids, versions, history, sessions and
vectors stay right. A saved memory is found by words at once, by meaning after `redismem reembed`.
Reading raises the errors of redis-om and redis-py; writing raises ours. Works around redis-om 1.2.
"""
# mypy: disable-error-code="no-untyped-call"
# redis-om says it is typed, but most of its methods are not

from __future__ import annotations

import time
from abc import ABC
from collections.abc import Sequence
from datetime import datetime
from typing import Any, ClassVar, Self

import aredis_om as redis_om
import msgspec
from aredis_om.model.model import Operators, RediSearchFieldTypes
from aredis_om.search_reply import search_document_keys, search_documents
from pydantic import PrivateAttr
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from redismem.client import FunctionMissing, translated
from redismem.codec import READ_FIELDS, memory_fields, memory_values
from redismem.embedded import EmbeddedRedis
from redismem.errors import InvalidInput, Misconfigured, VersionMismatch
from redismem.keys import STORE, VECTOR_FIELDS, Owner
from redismem.query import epoch, escaped_tag, index_schema, packed_tags, words_query
from redismem.settings import Settings
from redismem.types import MemoryInput
from redismem.words import query_words
from redismem.write import record_arguments

_NO_SERVICE = "no redismem was ever opened on this Redis: start `redismem serve` once"

#: length of the history as far as this module cares: the service trims it with its next write
_LOG_LENGTH = 2**53

#: embedder and dimension for a write that brings no vector
_NO_EMBEDDER = ("", 1)

_TAG_QUERIES = {
    Operators.EQ: "@{}:{{{}}}",
    Operators.IN: "@{}:{{{}}}",
    Operators.NE: "-@{}:{{{}}}",
    Operators.NOT_IN: "-@{}:{{{}}}",
    Operators.STARTSWITH: "@{}:{{{}*}}",
    Operators.ENDSWITH: "@{}:{{*{}}}",
    Operators.CONTAINS: "@{}:{{*{}*}}",
}


class MemoryQuery(redis_om.FindQuery):
    """redis-om's query in the terms of our index."""

    def copy(self, **changes: Any) -> MemoryQuery:
        return MemoryQuery(**{**self.dict(), **changes})

    @property
    def query(self) -> str:
        query: str = super().query
        if "@superseded_by" in query:
            return query
        return "ismissing(@superseded_by)" if query == "*" else f"({query}) ismissing(@superseded_by)"

    @classmethod
    def resolve_value(
        cls, field_name: str, field_type: Any, field_info: Any, op: Operators, value: Any, *rest: Any
    ) -> str:
        if field_name == "text":
            words = words_query(query_words(str(value)), "*")
            if op is not Operators.LIKE or not words:
                raise redis_om.QueryNotSupportedError("`text` is found by words: Memory.text % 'some words'")
            return words
        if field_name == "superseded_by" and value is None and op in (Operators.EQ, Operators.NE):
            return f"{'-' if op is Operators.NE else ''}ismissing(@superseded_by)"
        if field_type is RediSearchFieldTypes.NUMERIC:
            number = epoch(value) if isinstance(value, datetime) else value
            return super().resolve_value(field_name, field_type, field_info, op, number, *rest)
        values: list[Any] = list(value) if isinstance(value, list | tuple | set | frozenset) else [value]
        tags = [str(int(one)) if isinstance(one, bool) else one for one in values]
        if op not in _TAG_QUERIES or not tags or not all(isinstance(tag, str) and tag for tag in tags):
            raise redis_om.QueryNotSupportedError(f"`{field_name}` cannot be compared with {value!r} by {op}")
        if field_name in ("topics", "entities"):
            tags = [packed_tags([tag]) for tag in tags]
        return _TAG_QUERIES[op].format(field_name, "|".join(map(escaped_tag, tags)))

    def resolve_redisearch_pagination(self) -> list[Any]:
        # the only place where arguments can be added; ismissing() needs dialect 2
        return ["LIMIT", self.offset, self.limit, "DIALECT", 2]

    def _has_complex_projected_fields(self) -> bool:
        return True  # project from whole hashes: RETURN rounds the sortable `created_at` to 10 ms

    async def execute(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super().execute(*args, **kwargs)
        except ResponseError as exc:
            model: Any = self.model
            if "index" in str(exc).lower() and not await model.db().hexists(model.owner.meta, "index"):
                return []  # nobody has written a memory of this user yet
            raise

    async def delete(self) -> int:
        return await self.model.delete_many(await self.all())


class MemoryModel(redis_om.HashModel, ABC):
    """A memory of one user; `memory_model` makes the class of a user.

    `created_at` is taken from new memories only; `updated_at`, `version`, `superseded_by` and `sources`
    are the store's, what is set there is not saved.
    """

    owner: ClassVar[Owner]

    text: str = redis_om.Field(index=True, full_text_search=True)
    memory_type: str = redis_om.Field(default="semantic", index=True)
    topics: list[str] = redis_om.Field(default_factory=list, index=True)
    entities: list[str] = redis_om.Field(default_factory=list, index=True)
    session_id: str | None = redis_om.Field(default=None, index=True)
    event_date: datetime | None = redis_om.Field(default=None, index=True)
    importance: float = redis_om.Field(default=0.5, index=True)
    confidence: float = redis_om.Field(default=1.0, index=True)
    pinned: bool = redis_om.Field(default=False, index=True)
    metadata: dict[str, Any] = redis_om.Field(default_factory=dict)
    created_at: datetime | None = redis_om.Field(default=None, index=True, sortable=True)
    updated_at: datetime | None = redis_om.Field(default=None, index=True)
    version: int = 0
    superseded_by: str | None = redis_om.Field(default=None, index=True)
    sources: list[str] = redis_om.Field(default_factory=list)

    #: version, text and session as they were read; None: not read from Redis
    _as_read: tuple[int, str, str | None] | None = PrivateAttr(default=None)

    @classmethod
    def make_primary_key(cls, pk: str) -> str:
        return cls.owner.memory(pk)

    @classmethod
    def redisearch_schema(cls) -> str:
        raise NotImplementedError  # redis-om's migrator then leaves the index alone

    @classmethod
    def find(cls, *expressions: Any, knn: redis_om.KNNExpression | None = None) -> MemoryQuery:
        """Return a query; superseded memories are hidden from it unless it names `superseded_by`."""
        return MemoryQuery(expressions=expressions, knn=knn, model=cls)

    @classmethod
    async def get(cls, pk: str) -> Self:
        """Return one memory. Cost: one round trip.

        Raises:
            NotFoundError: there is no such memory.
        """
        raw = await cls.db().hmget(cls.make_primary_key(pk), READ_FIELDS)
        if raw[READ_FIELDS.index("text")] is None:
            raise redis_om.NotFoundError(f"there is no memory {pk!r}")
        return cls._read(pk, raw)

    @classmethod
    def from_redis(cls, res: Any, knn: redis_om.KNNExpression | None = None) -> list[Self]:  # noqa: ARG003  # redis-om's
        keys, rows = search_document_keys(res), search_documents(res)
        if len(keys) == len(rows):  # Redis 8.8 may send ids of what has just gone, without fields
            for key, row in zip(keys, rows, strict=True):
                row["pk"] = key.removeprefix(cls.owner.memory_prefix)
        return [
            cls._read(row["pk"], [row.get(name) for name in READ_FIELDS])
            for row in rows
            if "pk" in row and "text" in row
        ]

    @classmethod
    def _read(cls, memory_id: str, fields: Sequence[str | bytes | None]) -> Self:
        raw = [one.encode("utf-8", "surrogateescape") if isinstance(one, str) else one for one in fields]
        values = memory_values(raw)
        memory = cls(**{**values, "pk": memory_id})
        memory._as_read = (memory.version, memory.text, memory.session_id)
        return memory

    async def save(
        self, pipeline: Any = None, nx: bool = False, xx: bool = False, field_expirations: Any = None
    ) -> Self:
        """Store the memory as it is here; afterwards it is here as it is stored.

        A memory that was read is compared first: no save undoes what happened meanwhile. A new one
        replaces a memory of the same `pk`. Redis-om's options are refused.

        Raises:
            InvalidInput: a field has a value outside its contract.
            VersionMismatch: it changed since it was read.
            NotFoundError: it was deleted since it was read.
            Misconfigured: no service was ever opened on this Redis.

        Cost: two round trips; three more for the first memory of a user.
        """
        self._get_db(pipeline or nx or xx or field_expirations or None)
        fields = self._fields()
        pk, before = str(self.pk), self._as_read
        created = "" if self.created_at is None else format(epoch(self.created_at), ".6f")
        function, kind, argument = "rm_put_v1", "given", 1
        if before is not None:
            same = before[1:] == (self.text, self.session_id)  # then the vector still fits
            function, kind, argument = "rm_update_v1", "keep" if same else "given", before[0]
        record = record_arguments(pk, kind, fields, created_at=created)
        reply = await self._call(function, *_NO_EMBEDDER, _LOG_LENGTH, argument, *record)
        outcome = _text(reply[0])
        if outcome == "STALE":
            raise VersionMismatch(f"memory {pk!r} changed since it was read; read it again")
        if outcome == "MISSING":
            raise redis_om.NotFoundError(f"memory {pk!r} was deleted since it was read")
        self.__dict__.update((await self.get(pk)).__dict__)
        self._as_read = (self.version, self.text, self.session_id)
        return self

    def _fields(self) -> dict[str, str | bytes]:
        """Return the hash fields of the memory as the service would write them."""
        values = {name: getattr(self, name) for name in MemoryInput.__struct_fields__ if name != "id"}
        try:
            memory = msgspec.convert({"id": self.pk, **values}, MemoryInput)
            fields = memory_fields(memory, time.time())
        except (ValueError, OverflowError, TypeError) as exc:
            raise InvalidInput(str(exc)) from exc
        self.pk = memory.id
        return fields

    @classmethod
    async def _call(cls, function: str, *arguments: Any) -> Any:
        """Return the reply of a writing Function, after giving a new user an index."""
        owner, db, now_ms = cls.owner, cls.db(), int(time.time() * 1000)
        keys = owner.written
        command = ("FCALL", function, len(keys), *keys, owner.memory_prefix, now_ms, *arguments)
        try:
            with translated():
                while _text((reply := await db.execute_command(*command))[0]) == "NOINDEX":
                    await cls._open_index(db, now_ms)
        except FunctionMissing as exc:
            raise Misconfigured(_NO_SERVICE) from exc
        return reply

    @classmethod
    async def _open_index(cls, db: Any, now_ms: int) -> None:
        owner, field = cls.owner, VECTOR_FIELDS[0]
        embedder, dim = await db.hmget(STORE, "embedder", "dim")
        if embedder is None:
            raise Misconfigured(_NO_SERVICE)
        known = await db.hmget(owner.meta, "embedder", "dim", "vector_field")
        if all(known):  # its index was dropped because nobody asked for it
            embedder, dim, field = known[0], known[1], _text(known[2])
        keys = (owner.index, owner.physical_index(field), owner.meta, owner.ids)
        schema = index_schema(owner, field, int(dim))
        await db.execute_command("FCALL", "rm_open_v1", 4, *keys, now_ms, embedder, dim, field, *schema)

    @classmethod
    async def _delete(cls, db: Any, *pks: str) -> int:  # noqa: ARG003  # redis-om's
        ids = [key.removeprefix(cls.owner.memory_prefix) for key in pks]
        reply = await cls._call("rm_delete_v1", _LOG_LENGTH, *ids)
        return sum(_text(word) == "DELETED" for word in reply[3])

    @classmethod
    def _get_db(cls, pipeline: Any = None, bulk: bool = False) -> Any:
        if pipeline is not None or bulk:  # a pipeline would hide the outcomes of our Functions
            raise redis_om.QueryNotSupportedError("save one by one: no pipeline, transaction, nx or xx")
        return cls.db()


def memory_model(user: str, *, namespace: str = "", database: Redis | None = None) -> type[MemoryModel]:
    """Return the redis-om model of one user's memories.

    Args:
        namespace: the service's (`REDISMEM_NAMESPACE`).
        database: an asyncio connection with `encoding_errors="surrogateescape"`, or one that decodes
            nothing; by default a new one to the Redis of the environment. Share one among users.

    Raises:
        InvalidInput: this cannot be a user id.
        Misconfigured: the connection cannot read the vectors in our hashes.

    Cost: 3 ms, no round trip: keep the class.
    """
    if not 0 < len(user) <= 256 or "\0" in user:
        raise InvalidInput("a user id has 1 to 256 characters, none of them NUL", field="user")
    if database is None:
        settings = Settings.from_environment()
        url = settings.redis_url or EmbeddedRedis(settings.data_dir).url
        database = redis_om.get_redis_connection(url=url, encoding_errors="surrogateescape")
    options = database.connection_pool.connection_kwargs
    if options.get("decode_responses") and options.get("encoding_errors") != "surrogateescape":
        raise Misconfigured("open `database` with encoding_errors='surrogateescape'")
    whose, connection = Owner(user, namespace), database

    # ABC as a direct base keeps the class out of redis-om's registry, and so from its migrator
    class Memory(MemoryModel, ABC, index=True):
        owner = whose

        class Meta:
            global_key_prefix = "redismem"
            model_key_prefix = f"memory:{{{whose.tag}}}"
            index_name = whose.index
            database = connection

    return Memory


def _text(raw: str | bytes | None) -> str:
    return raw.decode() if isinstance(raw, bytes) else raw or ""
