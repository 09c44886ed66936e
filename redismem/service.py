"""The one object behind HTTP and CLI: opens a store and puts its parts together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec

from redismem.admission import Admission
from redismem.archive import Archive
from redismem.backfill import Backfill
from redismem.browse import Browser
from redismem.client import Client
from redismem.coherence import Coherence
from redismem.context import Contexts
from redismem.derived import Views
from redismem.embed import Embedder, open_embedder
from redismem.embedded import EmbeddedRedis
from redismem.errors import EmbedderMismatch, InvalidInput, Unavailable
from redismem.gathering import Sources
from redismem.graph import Graphs
from redismem.idempotency import Idempotency
from redismem.index import Indexes
from redismem.jobs import Jobs
from redismem.keyring import KeyRing
from redismem.keys import STORE, Owner
from redismem.l1 import L1
from redismem.lualib import Functions, load_libraries
from redismem.maintain import Maintenance, Round
from redismem.metrics import Metrics
from redismem.naming import NameBook
from redismem.overview import Overview
from redismem.prefetch import Prefetcher
from redismem.queryvectors import QueryVectors
from redismem.ratelimit import Limiter
from redismem.read import Reader
from redismem.series import Series
from redismem.sessions import Sessions
from redismem.settings import Settings
from redismem.spacynames import load as load_spacy
from redismem.store import check_server, claim
from redismem.telemetry import Telemetry
from redismem.tiers import Tiers
from redismem.timewindow import window
from redismem.touches import Touches
from redismem.types import SearchReply, SearchRequest, StatsReply
from redismem.warm import Warmer
from redismem.worker.assembly import assembled_worker
from redismem.worker.worker import Worker
from redismem.write import Writer


@dataclass(frozen=True)
class Service:
    """An open store."""

    settings: Settings
    client: Client
    functions: Functions
    embedder: Embedder
    indexes: Indexes
    graphs: Graphs
    backfill: Backfill
    reader: Reader
    browser: Browser
    writer: Writer
    tiers: Tiers
    l1: L1
    coherence: Coherence
    touches: Touches
    archive: Archive
    jobs: Jobs
    views: Views
    worker: Worker
    warmer: Warmer
    maintenance: Maintenance
    sessions: Sessions
    prefetcher: Prefetcher
    contexts: Contexts
    keyring: KeyRing
    limiter: Limiter
    idempotency: Idempotency
    admission: Admission
    metrics: Metrics
    telemetry: Telemetry
    overview: Overview

    def owner(self, user: str, namespace: str | None = None) -> Owner:
        """Return the owner of a user id, in a namespace or in that of the settings.

        Raises:
            InvalidInput: it is empty, longer than 256 characters, or holds NUL.
        """
        if not 0 < len(user) <= 256 or "\0" in user:
            raise InvalidInput("a user id has 1 to 256 characters, none of them NUL", field="user")
        return Owner(user, self.settings.namespace if namespace is None else namespace)

    async def search(self, owner: Owner, request: SearchRequest) -> SearchReply:
        """Return the best memories as of now, for people at a shell; see `Reader.search_each`."""
        return (await self.tiers.find(owner, [msgspec.structs.replace(request, consistency="strong")]))[0]

    async def stats(self) -> StatsReply:
        """Return what the caches of this process hold and did, and what maintenance found last."""
        last = None
        with suppress(Unavailable):
            raw = await self.client.execute("HGET", STORE, "maintenance")
            last = msgspec.json.decode(raw, type=Round) if raw else None
        jobs = None
        with suppress(Unavailable):
            jobs = await self.jobs.counts()
        return StatsReply(
            jobs=None if jobs is None else msgspec.structs.asdict(jobs),
            process=self.coherence.id,
            indexes=None if last is None else msgspec.to_builtins(last),
            l1=self.l1.stats(),
            l2=dict(self.reader.counts),
            reads=dict(self.tiers.counts),
            contexts=dict(self.contexts.counts),
            prefetch=self.prefetcher.stats(),
            coherence={"live": self.coherence.is_live(), **self.coherence.counts},
        )

    @asynccontextmanager
    async def kept_up(self) -> AsyncIterator[None]:
        """Warm up and maintain the store in the background of the block, as a process that serves does."""
        tasks = [
            asyncio.create_task(self.warmer.start()),
            asyncio.create_task(asyncio.to_thread(self._load)),
            asyncio.create_task(self.telemetry.run()),
        ]
        if self.settings.maintain_every_s:
            tasks.append(asyncio.create_task(self.maintenance.run(self.settings.maintain_every_s)))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _load(self) -> None:
        """Load what is imported or built at its first use: a conversation must not wait for it."""
        self.embedder.count_tokens(["tokens"])
        if "time" in self.settings.signals:
            window("yesterday", datetime.now(UTC))

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
        yield await stack.enter_async_context(assembled(settings, client, embedder))


@asynccontextmanager
async def assembled(settings: Settings, client: Client, embedder: Embedder) -> AsyncIterator[Service]:
    """Put the parts of a service together on a checked store whose Functions are loaded."""
    async with AsyncExitStack() as stack:
        functions = Functions(client)
        indexes = Indexes(functions, embedder)
        stack.push_async_callback(indexes.close)
        backfill = Backfill(functions, embedder)
        stack.push_async_callback(backfill.close)
        l1 = L1(max_entries=settings.l1_entries, max_bytes=settings.l1_bytes)
        coherence = Coherence(
            client,
            l1,
            lease_s=settings.lease_s,
            keep_when_lost=settings.stale_if_error,
            answers=settings.l1_entries > 0,
        )
        coherence.start()
        stack.push_async_callback(coherence.close)
        touches = Touches(functions, capacity=settings.hot_capacity, ttl_s=settings.hot_ttl_s)
        stack.push_async_callback(touches.close)
        browser = Browser(functions)
        vectors = QueryVectors(embedder, l1, ttl_s=settings.embedding_ttl_s)
        reader = Reader(functions, embedder, vectors, settings)
        archive = Archive(functions, settings, embedder)
        jobs = Jobs(functions)
        writer = Writer(
            *(functions, embedder, backfill, indexes, archive, coherence, jobs, vectors),
            log_length=settings.log_length,
        )
        views = Views(functions, jobs, coherence)
        worker = assembled_worker(settings, functions, embedder, indexes, jobs, coherence)
        stack.push_async_callback(worker.close)
        tiers = Tiers(indexes, embedder, reader, browser, views, l1, coherence, touches, settings)
        stack.push_async_callback(tiers.close)
        graphs = Graphs(functions)
        warmer = Warmer(client, indexes, tiers, coherence, embedder, settings.warm_users)
        stack.push_async_callback(warmer.close)
        maintenance = Maintenance(client, indexes, graphs, archive, settings, warm=warmer.warm)
        sessions = Sessions(functions, writer, ttl_s=settings.session_ttl_s)
        names = NameBook(client, load_spacy(settings.spacy_model) if settings.spacy_model else None)
        sources = Sources(functions, tiers, sessions, names, vectors, l1, coherence)
        prefetcher = Prefetcher(
            sources, embedder.name, signals=settings.signals, lanes=settings.prefetch_lanes
        )
        stack.push_async_callback(prefetcher.close)
        sessions.heard = prefetcher.heard
        contexts = Contexts(sources, embedder, browser, touches, prefetcher)
        stack.push_async_callback(contexts.close)
        metrics, admission = (
            Metrics(),
            Admission(most=settings.max_in_flight, slow_s=settings.overload_ms / 1000),
        )
        worker.on_done = lambda kind, took_s: metrics.observe("job", took_s, kind)
        telemetry = Telemetry(
            *(client, metrics, Series(functions), l1, reader, coherence, prefetcher, admission),
            *(maintenance, jobs, worker),
        )
        yield Service(
            settings=settings,
            client=client,
            functions=functions,
            embedder=embedder,
            indexes=indexes,
            graphs=graphs,
            backfill=backfill,
            reader=reader,
            browser=browser,
            writer=writer,
            tiers=tiers,
            l1=l1,
            coherence=coherence,
            touches=touches,
            archive=archive,
            jobs=jobs,
            views=views,
            worker=worker,
            warmer=warmer,
            maintenance=maintenance,
            sessions=sessions,
            prefetcher=prefetcher,
            contexts=contexts,
            keyring=KeyRing(client, l1, coherence, settings),
            limiter=Limiter(functions),
            idempotency=Idempotency(functions, settings),
            admission=admission,
            metrics=metrics,
            telemetry=telemetry,
            overview=Overview(telemetry),
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
