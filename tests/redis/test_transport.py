"""The way to Redis: TLS with right and wrong certificates, and a user with no more rights than are needed.

The embedded server speaks no TLS, so a terminator of this file stands in front of it, as stunnel or a managed
service would. Its certificates are made with the `openssl` command.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest
from redis.asyncio.connection import parse_url

from redismem.client import Client
from redismem.conversation import ContextRequest, MessageInput, SessionInput
from redismem.doctor import examine
from redismem.embedded import EmbeddedRedis
from redismem.errors import Misconfigured, RedisMemError, RedisUnavailable
from redismem.keyring import KeyRing
from redismem.om import memory_model
from redismem.ratelimit import Limiter
from redismem.reembed import Reembedder
from redismem.service import Service, open_service
from redismem.settings import Settings
from redismem.types import CorrectionRequest, MemoryInput, MemoryPatch, SearchRequest
from tests.conftest import until

#: what `redismem serve` needs of a Redis 8; README has the same. Redis 7.4 has no commands that begin with v
RIGHTS = """
    ~redismem:* &redismem:* &__redis__:invalidate
    +ping +select +info +module|list +client|id +client|setname +client|setinfo +client|tracking
    +subscribe +publish +multi +exec +eval +fcall +fcall_ro +function|list +function|load +bgrewriteaof
    +scan +type +exists +del +unlink +expire +pexpire +pttl +get +set
    +hset +hsetnx +hget +hmget +hgetall +hdel +hexists +hincrby +hkeys +hlen +hscan +hrandfield
    +hpexpire +hpttl
    +sadd +srem +smembers
    +zadd +zrem +zcard +zcount +zincrby +zrange +zrangebyscore +zremrangebyscore +zrevrange +zscan +zscore
    +xadd +xack +xclaim +xdel +xgroup|create +xlen +xpending +xrange +xreadgroup
    +vadd +vcard +vismember +vrem +vsim
    +ft.create +ft.alter +ft.aliasupdate +ft.dropindex +ft.info +ft.search +ft.tagvals
"""

#: what `redismem doctor` and `redismem index show` need besides
OPERATOR_RIGHTS = "+config|get +memory|usage"

#: of redis-py, when it connects
_CONNECTING = {"select"}

PASSWORD = "s3cret"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two authorities, `ca` and `other`; the first has signed `server` and `client`."""
    folder = tmp_path_factory.mktemp("certificates")

    def make(name: str, *options: str) -> None:
        words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2".split()
        files = ["-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}"]
        subprocess.run(["openssl", *words, *files, *options], cwd=folder, check=True, capture_output=True)

    signed = "-CA ca.pem -CAkey ca.key -addext basicConstraints=critical,CA:FALSE".split()
    make("ca")
    make("other")
    make("server", *signed, "-addext", "subjectAltName=IP:127.0.0.1")
    make("client", *signed)
    return folder


class Terminator:
    """Takes TLS off what goes to a Redis; counts the connections that came through."""

    def __init__(self, redis_url: str, certificates: Path, *, asks_client: bool = False) -> None:
        self.connections = 0
        self.port = 0
        self._address = parse_url(redis_url)
        self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._tls.load_cert_chain(certificates / "server.pem", certificates / "server.key")
        if asks_client:
            self._tls.load_verify_locations(certificates / "ca.pem")
            self._tls.verify_mode = ssl.CERT_REQUIRED
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()

    def url(self, **options: object) -> str:
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return f"rediss://127.0.0.1:{self.port}/0?{query}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        behind, to_redis = await asyncio.open_unix_connection(self._address["path"])
        await asyncio.gather(_copy(reader, to_redis), _copy(behind, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError, asyncio.CancelledError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.close()


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[EmbeddedRedis]:
    """A server of the test's own: it gets users."""
    async with EmbeddedRedis(tmp_path / "redis", persist=False) as opened:
        yield opened


@pytest.fixture
async def tls(redis: EmbeddedRedis, certificates: Path) -> AsyncIterator[Terminator]:
    async with Terminator(redis.url, certificates) as opened:
        yield opened


def settings_for(url: str, **values: Any) -> Settings:
    return Settings(redis_url=url, embedder="deterministic", testing=True, lease_s=0.5, **values)


async def used(service: Service) -> None:
    """Let a service do what services do, down to the barrier of a delete and the jobs of the worker."""
    owner, writer = service.owner("alice"), service.writer
    await until("the push connection stands", lambda: asyncio.sleep(0, service.coherence.is_live()))
    texts = {"a": "likes tea", "b": "has a boat", "c": "Anna lives in Kent"}
    await writer.put(owner, [MemoryInput(id=name, text=text) for name, text in texts.items()])
    found = await service.search(owner, SearchRequest(text="tea"))
    assert found.memories[0].id == "a"
    await service.tiers.search(owner, SearchRequest(text="boat"))
    await writer.update(owner, "a", MemoryPatch(importance=0.9))
    await writer.correct(owner, CorrectionRequest(ids=["b"], memory=MemoryInput(text="sold the boat")))
    await writer.delete(owner, "a")
    assert service.coherence.counts["barriers"] >= 2
    assert service.coherence.counts["barrier_timeouts"] == 0
    await service.sessions.open(owner, SessionInput(id="s"))
    said = [MessageInput(role="user", text="Where does Anna live?")]
    await service.sessions.say(owner, "s", said)
    context = await service.contexts.whole(owner, ContextRequest(session_id="s", stages=4))
    assert "Kent" in str(context)
    await service.contexts.drained()
    await service.touches.close()
    await service.sessions.close(owner, "s")
    assert await service.worker.settle(ahead_s=7200) > 0
    await service.views.profile(owner)
    await service.views.topics(owner)
    assert await service.maintenance.round() is not None
    ring = KeyRing(service.client, service.l1, service.coherence, service.settings)
    key, token = await ring.create(name="agent", scopes=["read"], rate_per_s=1)
    assert (await ring.table()).holder(token) == key
    assert await Limiter(service.functions).take(key) == 0
    await ring.revoke(key.id)
    await Reembedder(service.client, service.functions, service.embedder).run(lambda *_: None)
    assert (await writer.forget(owner)).memories > 0


# TLS ------------------------------------------------------------------------------------------


async def test_a_service_runs_over_tls_with_every_connection(tls: Terminator, certificates: Path) -> None:
    url = tls.url(ssl_ca_certs=certificates / "ca.pem", ssl_cert_reqs="required")
    async with open_service(settings_for(url)) as service:
        await used(service)
    assert tls.connections >= 2, "calls, and pushes"


async def test_what_another_process_changes_is_pushed_over_tls(
    redis: EmbeddedRedis, tls: Terminator, certificates: Path
) -> None:
    url = tls.url(ssl_ca_certs=certificates / "ca.pem")
    request = SearchRequest(text="tea")
    async with open_service(settings_for(url)) as service, open_service(settings_for(redis.url)) as other:
        owner = service.owner("alice")
        await other.writer.put(owner, [MemoryInput(id="a", text="likes tea")])

        async def known() -> bool:
            await service.tiers.search(owner, request)
            return service.tiers.known_search(owner, request) is not None

        await until("L1 has the search", known)
        await other.writer.delete(owner, "a")
        assert service.tiers.known_search(owner, request) is None
        assert other.coherence.counts["barrier_timeouts"] == 0


async def test_redis_om_reads_over_tls(
    tls: Terminator, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = tls.url(ssl_ca_certs=certificates / "ca.pem", ssl_cert_reqs="required")
    async with open_service(settings_for(url)) as service:
        await service.writer.put(service.owner("alice"), [MemoryInput(id="a", text="likes tea")])
    monkeypatch.setenv("REDISMEM_REDIS_URL", url)
    model: Any = memory_model("alice")
    assert [memory.pk for memory in await model.find(model.text % "tea").all()] == ["a"]
    await model.db().aclose()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"ssl_ca_certs": "other.pem"}, "certificate verify failed"),
        ({}, "certificate verify failed"),
        ({"ssl_ca_certs": "missing.pem"}, "No such file"),
        ({"ssl_ca_certs": "ca.key"}, "no certificate"),
    ],
)
async def test_a_server_that_cannot_be_trusted_is_refused_soon_and_with_the_reason(
    tls: Terminator, certificates: Path, options: dict[str, str], reason: str
) -> None:
    url = tls.url(**{name: certificates / file for name, file in options.items()})
    began_s = time.monotonic()
    with pytest.raises(RedisUnavailable) as caught:
        async with open_service(settings_for(url)):
            pass
    assert reason in caught.value.detail
    assert time.monotonic() - began_s < 5


async def test_a_certificate_for_another_host_is_refused(tls: Terminator, certificates: Path) -> None:
    url = tls.url(ssl_ca_certs=certificates / "ca.pem").replace("127.0.0.1", "localhost")
    with pytest.raises(RedisUnavailable) as caught:
        async with open_service(settings_for(url)):
            pass
    assert "Hostname mismatch" in caught.value.detail


async def test_a_connection_without_tls_to_a_server_with_it_is_refused(tls: Terminator) -> None:
    with pytest.raises(RedisUnavailable):
        async with open_service(settings_for(f"redis://127.0.0.1:{tls.port}/0")):
            pass


async def test_a_server_that_asks_for_a_certificate_gets_the_one_of_the_url(
    redis: EmbeddedRedis, certificates: Path
) -> None:
    trusted = {"ssl_ca_certs": certificates / "ca.pem"}
    own = {"ssl_certfile": certificates / "client.pem", "ssl_keyfile": certificates / "client.key"}
    async with Terminator(redis.url, certificates, asks_client=True) as tls:
        client = Client(Settings(), tls.url(**trusted, **own))
        assert await client.execute("PING") == b"PONG"
        await client.close()
        stranger = Client(Settings(), tls.url(**trusted))
        with pytest.raises(RedisUnavailable):
            await stranger.execute("PING")
        await stranger.close()


# users ----------------------------------------------------------------------------------------


@pytest.fixture
async def admin(redis: EmbeddedRedis) -> AsyncIterator[Client]:
    client = Client(Settings(), redis.url)
    yield client
    await client.close()


async def url_of(redis: EmbeddedRedis, admin: Client, rights: str) -> str:
    """Return the URL of a new user who has these rights and no others."""
    await admin.execute("ACL", "SETUSER", "redismem", "reset", "on", f">{PASSWORD}", *rights.split())
    return redis.url.replace("unix://", f"unix://redismem:{PASSWORD}@")


async def denials(admin: Client) -> list[tuple[bytes, bytes]]:
    """Return what Redis refused a user: why, and what."""
    entries = [dict(zip(row[::2], row[1::2], strict=True)) for row in await admin.execute("ACL", "LOG")]
    refused = [(entry[b"reason"], entry[b"object"]) for entry in entries]
    # rm_forget drops indexes that are not there, one of them without a name
    return [one for one in refused if one != (b"key", b"")]


async def test_a_user_with_our_rights_runs_a_service(redis: EmbeddedRedis, admin: Client) -> None:
    url = await url_of(redis, admin, RIGHTS)
    async with open_service(settings_for(url, hnsw_threshold=100)) as service:
        await used(service)
        owner = service.owner("large")
        await service.writer.put(owner, [MemoryInput(text=f"memory {number}") for number in range(120)])
        report = await service.maintenance.round()
        assert report is not None
        assert report.done == {"promote": 1}
    assert await denials(admin) == []


async def test_redis_om_writes_and_reads_with_our_rights(
    redis: EmbeddedRedis, admin: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = await url_of(redis, admin, RIGHTS)
    async with open_service(settings_for(url)):
        pass
    monkeypatch.setenv("REDISMEM_REDIS_URL", url)
    model: Any = memory_model("alice")
    await model(text="likes tea").save()
    assert [memory.text for memory in await model.find(model.text % "tea").all()] == ["likes tea"]
    await model.db().aclose()
    assert await denials(admin) == []


async def test_the_doctor_works_with_an_operators_rights(redis: EmbeddedRedis, admin: Client) -> None:
    url = await url_of(redis, admin, f"{RIGHTS} {OPERATOR_RIGHTS}")
    found = await examine(settings_for(url))
    assert [finding.name for finding in found if finding.status == "fail"] == []
    assert await denials(admin) == []


async def test_the_rights_are_those_of_the_commands_in_the_source_and_no_more(admin: Client) -> None:
    commands = {raw.decode().lower() for raw in await admin.execute("COMMAND", "LIST")}
    root = Path(__file__).parents[2]
    files = [*(root / "redismem").rglob("*.py"), *(root / "lua").rglob("*.lua")]
    quoted = {
        word.lower()
        for path in files
        for word in re.findall(r"""["']([A-Z][A-Z._]+)["']""", path.read_text())
    }
    granted = {word[1:].partition("|")[0] for word in f"{RIGHTS} {OPERATOR_RIGHTS}".split() if word[0] == "+"}
    assert granted - _CONNECTING == quoted & commands


async def test_our_user_reads_and_writes_nothing_but_our_keys_and_channels(
    redis: EmbeddedRedis, admin: Client
) -> None:
    client = Client(Settings(), await url_of(redis, admin, RIGHTS))
    await admin.execute("SET", "other", "secret")
    refused: list[tuple[str, ...]] = [
        ("GET", "other"),
        ("SET", "other", "x"),
        ("DEL", "other"),
        ("EVAL", "return redis.call('GET', 'other')", "0"),
        ("PUBLISH", "other", "x"),
        ("FLUSHALL",),
        ("KEYS", "*"),
        ("CONFIG", "GET", "*"),
        ("ACL", "LIST"),
        ("FUNCTION", "FLUSH"),
        ("CLIENT", "LIST"),
        ("SHUTDOWN",),
    ]
    for command in refused:
        with pytest.raises(RedisMemError, match=r"(?i)permission|access"):
            await client.execute(*command)
    await client.close()


@pytest.mark.parametrize("login", [f"redismem:{PASSWORD}x", f"nobody:{PASSWORD}", ""])
async def test_a_wrong_login_is_told_as_such_and_soon(
    redis: EmbeddedRedis, admin: Client, login: str
) -> None:
    right = await url_of(redis, admin, RIGHTS)
    await admin.execute("ACL", "SETUSER", "default", "resetpass", ">other")
    url = right.replace(f"redismem:{PASSWORD}", login) if login else redis.url
    began_s = time.monotonic()
    with pytest.raises(Misconfigured, match="refused the credentials of REDISMEM_REDIS_URL") as caught:
        async with open_service(settings_for(url)):
            pass
    assert PASSWORD not in str(caught.value)
    assert time.monotonic() - began_s < 5


async def test_a_user_without_a_right_is_told_which(redis: EmbeddedRedis, admin: Client) -> None:
    url = await url_of(redis, admin, RIGHTS.replace("+function|load ", ""))
    with pytest.raises(Misconfigured, match=r"function\|load"):
        async with open_service(settings_for(url)):
            pass


async def test_a_process_without_the_right_to_hear_pushes_serves_without_l1(
    redis: EmbeddedRedis, admin: Client
) -> None:
    """It is slower, but nothing of it is ever stale."""
    url = await url_of(redis, admin, RIGHTS.replace("&__redis__:invalidate", ""))
    async with open_service(replace(settings_for(url), redis_timeout_s=1)) as service:
        owner, request = service.owner("alice"), SearchRequest(text="tea")
        await service.writer.put(owner, [MemoryInput(id="a", text="likes tea")])
        await service.tiers.search(owner, request)
        assert service.tiers.known_search(owner, request) is None
        assert not service.coherence.is_live()
