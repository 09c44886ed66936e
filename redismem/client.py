"""The only place that talks to redis-py: connecting, and turning its errors into ours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from redis import exceptions as foreign
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff

from redismem.errors import Misconfigured, RedisUnavailable, StoreError
from redismem.settings import Settings

Argument = str | bytes | int | float

#: seconds to wait for a free connection before a request is refused
POOL_WAIT_S = 2.0


class FunctionMissing(StoreError):
    """A function library is not loaded (FUNCTION FLUSH, a fresh server): load it and try again."""


class Client:
    """A pool of connections to one Redis. RESP2, bytes in and out."""

    def __init__(self, settings: Settings, url: str) -> None:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=64,
            timeout=POOL_WAIT_S,
            protocol=2,
            socket_timeout=settings.redis_timeout_s,
            socket_connect_timeout=settings.redis_timeout_s,
            # one more try when a pooled connection turns out to be dead; our writes may be repeated
            retry=Retry(ExponentialBackoff(cap=0.05, base=0.01), 1),
            client_name="redismem",
        )
        self.redis: Redis = Redis.from_pool(pool)
        # replies stay as Redis sent them: what redis-py makes of one command differs between versions
        self.redis.response_callbacks.clear()

    async def execute(self, *command: Argument) -> Any:
        """Return the reply of one command. Cost: one round trip."""
        with translated():
            return await self.redis.execute_command(*command)

    async def pipeline(self, commands: Sequence[Sequence[Argument]]) -> list[Any]:
        """Return the replies of several commands, in order; not a transaction. Cost: one round trip."""
        with translated():
            async with self.redis.pipeline(transaction=False) as pipe:
                for command in commands:
                    pipe.execute_command(*command)
                return list(await pipe.execute())

    async def close(self) -> None:
        """Close every connection."""
        await self.redis.aclose()


@contextmanager
def translated() -> Iterator[None]:
    """Turn redis-py's errors into ours, from exc."""
    try:
        yield
    except (foreign.AuthenticationError, foreign.AuthorizationError, foreign.NoPermissionError) as exc:
        raise Misconfigured(f"Redis refused the credentials of REDISMEM_REDIS_URL: {exc}") from exc
    except (
        foreign.ConnectionError,
        foreign.TimeoutError,
        foreign.ReadOnlyError,
        foreign.OutOfMemoryError,
    ) as exc:
        raise RedisUnavailable(f"Redis cannot answer now ({type(exc).__name__}): {exc}") from exc
    except foreign.ResponseError as exc:
        text = str(exc)
        if "Function not found" in text:
            raise FunctionMissing(text) from exc
        if text.startswith(("LOADING", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "MISCONF", "OOM")) or (
            "OOM command not allowed" in text
        ):
            raise RedisUnavailable(f"Redis cannot answer now: {text}") from exc
        raise StoreError(f"Redis: {text}") from exc
    except foreign.RedisError as exc:
        raise StoreError(f"redis-py: {exc}") from exc
