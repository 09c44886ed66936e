"""The one object behind HTTP and CLI: opens a store, and repairs an index that was dropped by hand."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

from redismem.backfill import Backfill
from redismem.browse import Browser
from redismem.client import Client
from redismem.embed import Embedder, open_embedder
from redismem.embedded import EmbeddedRedis
from redismem.errors import EmbedderMismatch, IndexMissing, InvalidInput
from redismem.keys import Owner
from redismem.lualib import Functions, load_libraries
from redismem.read import Reader
from redismem.reembed import rebuild_index
from redismem.settings import Settings
from redismem.store import check_server, claim
from redismem.types import Filters, ListReply, SearchReply, SearchRequest
from redismem.write import Writer

T = TypeVar("T")


@dataclass(frozen=True)
class Service:
    """An open store. Reads go through here where they may meet a missing index."""

    settings: Settings
    client: Client
    functions: Functions
    embedder: Embedder
    backfill: Backfill
    reader: Reader
    browser: Browser
    writer: Writer

    def owner(self, user: str) -> Owner:
        """Return the owner of a user id.

        Raises:
            InvalidInput: it is empty, longer than 256 characters, or holds NUL.
        """
        if not 0 < len(user) <= 256 or "\0" in user:
            raise InvalidInput("a user id has 1 to 256 characters, none of them NUL", field="user")
        return Owner(user, self.settings.namespace)

    async def search(self, owner: Owner, request: SearchRequest) -> SearchReply:
        """Return the best memories; see `Reader.search`."""
        return await self._repaired(owner, lambda: self.reader.search(owner, request))

    async def search_each(self, owner: Owner, requests: Sequence[SearchRequest]) -> list[SearchReply]:
        """Return one reply per request; see `Reader.search_each`."""
        return await self._repaired(owner, lambda: self.reader.search_each(owner, requests))

    async def page(self, owner: Owner, filters: Filters, limit: int, cursor: str | None) -> ListReply:
        """Return memories newest first; see `Browser.page`."""
        return await self._repaired(
            owner, lambda: self.browser.page(owner, filters, limit=limit, cursor=cursor)
        )

    async def _repaired(self, owner: Owner, read: Callable[[], Awaitable[T]]) -> T:
        try:
            return await read()
        except IndexMissing:
            await self.writer.open_index(owner)
            await rebuild_index(self.functions, owner)
            return await read()

    async def ping(self) -> None:
        """Return when Redis answers.

        Raises:
            RedisUnavailable: it does not.
        """
        await self.client.execute("PING")


@asynccontextmanager
async def open_service(settings: Settings, *, any_embedder: bool = False) -> AsyncIterator[Service]:
    """Open a store: start Redis if none is named, check it, load Functions and embedder.

    Args:
        any_embedder: open it although its vectors come from another embedder; for `redismem reembed`.

    Raises:
        Misconfigured: the server, the platform or the settings do not allow it.
        EmbedderMismatch: the store's vectors come from another embedder.
        RedisUnavailable, EmbedderUnavailable: they do not answer.
    """
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(open_client(settings))
        await check_server(client)
        await load_libraries(client)
        embedder = await open_embedder(settings)
        stack.push_async_callback(embedder.close)
        with suppress(*(EmbedderMismatch,) if any_embedder else ()):
            await claim(client, embedder)
        functions = Functions(client)
        backfill = Backfill(functions, embedder)
        stack.push_async_callback(backfill.close)
        yield Service(
            settings=settings,
            client=client,
            functions=functions,
            embedder=embedder,
            backfill=backfill,
            reader=Reader(functions, embedder),
            browser=Browser(functions),
            writer=Writer(functions, embedder, backfill, log_length=settings.log_length),
        )


@asynccontextmanager
async def open_client(settings: Settings) -> AsyncIterator[Client]:
    """Connect to the Redis of the settings, or to the embedded one of the data dir."""
    async with AsyncExitStack() as stack:
        url = settings.redis_url
        if not url:
            url = (await stack.enter_async_context(EmbeddedRedis(settings.data_dir))).url
        client = Client(settings, url)
        stack.push_async_callback(client.close)
        yield client
