"""The only place that defines what can go wrong, and which HTTP status says so.

RedisMemError
├── InvalidInput            422  a field has a wrong value
│   └── MalformedBody       400  the body is not the JSON it claims to be
├── Unauthorized            401  no valid API key
├── Forbidden               403  the API key does not allow it
├── PayloadTooLarge         413  the body is larger than the limit
├── RateLimited             429  the API key asks too often
├── NotFound                404  no such memory
├── Conflict                409  the request contradicts what is stored
│   └── InProgress          …    the first try of this request is still being answered
├── VersionMismatch         412  If-Match names an older version
├── Unavailable             503  try again: Redis or the embedder cannot answer now
│   ├── RedisUnavailable
│   │   └── WritesRefused   …    it answers reads only
│   ├── Overloaded          …    too much is asked at once
│   ├── EmbedderUnavailable
│   └── IndexMissing
├── DeadlineExceeded        504  the time budget ended before an answer
├── EmbedderMismatch        409  the store holds vectors of another embedder
├── ArchiveDamaged          500  a file of the archive is missing, or is not what its manifest says
├── StoreError              500  Redis answered with an error we did not expect: a defect
└── Misconfigured           500  the process cannot start like this; shown by the CLI
"""

from __future__ import annotations


class RedisMemError(Exception):
    """Any failure of redismem that a caller may see.

    Args:
        message: what happened and what to do about it, without memory text.
        field: path of the offending input field, as the caller wrote it.
    """

    status = 500
    code = "internal"
    #: what else an operator should know, such as an address; for logs and the shell, not for callers
    detail = ""
    #: of the reply that carried it, where it came from a service
    request_id: str | None = None

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field


class InvalidInput(RedisMemError):
    """A field has a value outside its contract: correct the named field."""

    status = 422
    code = "invalid"

    @classmethod
    def from_value(cls, exc: ValueError, where: str = "") -> InvalidInput:
        """Return the error of a check in `types` or `codec`, whose message opens with the field's name."""
        message = str(exc)
        name = message.split("`")[1] if message.startswith("`") else ""
        return cls(message, field=".".join(part for part in (where, name) if part) or None)


class MalformedBody(InvalidInput):
    """The body cannot be parsed: send valid JSON."""

    status = 400
    code = "malformed"


class Unauthorized(RedisMemError):
    """No API key, or none that is valid; it does not say which."""

    status = 401
    code = "unauthorized"


class Forbidden(RedisMemError):
    """The API key does not allow that; it does not say why."""

    status = 403
    code = "forbidden"


class PayloadTooLarge(RedisMemError):
    """The body exceeds the limit: split it."""

    status = 413
    code = "too_large"


class NotFound(RedisMemError):
    """The memory does not exist, or no longer does."""

    status = 404
    code = "not_found"


class Conflict(RedisMemError):
    """What is stored contradicts the request: read it again and decide."""

    status = 409
    code = "conflict"


class InProgress(Conflict):
    """The first request with this Idempotency-Key is still being answered: ask again after Retry-After."""

    code = "in_progress"
    retry_after_s = 1


class VersionMismatch(RedisMemError):
    """The record changed since it was read: read it again, merge, retry."""

    status = 412
    code = "version_mismatch"


class Unavailable(RedisMemError):
    """A service behind us cannot answer now: retry after the seconds of Retry-After."""

    status = 503
    code = "unavailable"
    retry_after_s = 1


class RateLimited(RedisMemError):
    """The API key asks more often than it may: wait for the seconds of Retry-After."""

    status = 429
    code = "rate_limited"
    retry_after_s = 1


class Overloaded(Unavailable):
    """More is asked at once than can be answered in time: try again, not all at once."""

    code = "overloaded"


class RedisUnavailable(Unavailable):
    """Redis is away, still loading, read-only or out of memory."""

    code = "redis_unavailable"


class WritesRefused(RedisUnavailable):
    """Redis refuses writes (out of memory, a replica, a full disk) while it still answers reads."""


class EmbedderUnavailable(Unavailable):
    """The embedder cannot answer now; words are still searchable."""

    code = "embedder_unavailable"


class IndexMissing(Unavailable):
    """A user has memories but no index (it was dropped by hand): rebuild it and ask again."""

    code = "index_missing"


class DeadlineExceeded(RedisMemError):
    """The time budget ended first: allow more time or ask for less."""

    status = 504
    code = "deadline_exceeded"


class EmbedderMismatch(RedisMemError):
    """The store's vectors come from another embedder: run `redismem reembed`."""

    status = 409
    code = "embedder_mismatch"


class ArchiveDamaged(RedisMemError):
    """A file of the archive is missing or altered: bring it back from a backup; Redis was not touched."""

    code = "archive_damaged"


class StoreError(RedisMemError):
    """Redis refused a command of ours: a defect, or a foreign hand in the schema."""

    code = "store_error"


class Misconfigured(RedisMemError):
    """The environment or the Redis server does not allow a start; the message has the remedy."""

    code = "misconfigured"
