"""The only reader of the environment (`REDISMEM_*`), and the only home of defaults."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, get_args

from redismem.errors import Misconfigured

HnswProfile = Literal["production", "high_recall", "low_latency"]

#: what tells which memories a conversation will need next
Signal = Literal["message", "topic", "entity", "time", "follow_up", "depth", "typing"]

LogFormat = Literal["text", "json"]

EmbedderName = Literal["minilm", "sentence-transformers", "openai", "deterministic"]

#: the longest lease of any process of a fleet: what a strong write waits when one of them is silent
MAX_LEASE_S = 2.0

_PREFIX = "REDISMEM_"
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.\-\[\]:]+")
_REDIS_SCHEMES = ("redis://", "rediss://", "unix://")


def _default_data_dir() -> Path:
    base = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(base).expanduser() / "redismem"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a process runs. Each field is set by `REDISMEM_<NAME>`; the CLI's options win over it.

    Raises:
        Misconfigured: a value is outside its range; the message names the variable.
    """

    #: redis://, rediss:// or unix:// URL of a server with the search module; empty: embedded
    redis_url: str = field(default="", repr=False)
    #: directory of the embedded server's append-only files
    data_dir: Path = field(default_factory=_default_data_dir)
    #: calls that may wait for Redis at once, per process; more are refused with 503, because Redis is single
    #: threaded and a longer queue only makes everyone late
    redis_in_flight: int = 1024
    #: seconds until an unanswered Redis call is an error; a slice of the longest Function takes 0.02
    redis_timeout_s: float = 2.0

    #: address to serve on; loopback only, because without API keys anyone who connects may read
    host: str = "127.0.0.1"
    #: TCP port to serve on
    port: int = 8000
    #: answer without API keys although other machines can connect
    insecure: bool = False
    #: service processes; one per two cores, because the embedder uses two threads
    workers: int = 1
    #: namespace of all users of this process; keeps stores of several applications apart
    namespace: str = ""

    #: which embedder turns text into vectors
    embedder: EmbedderName = "minilm"
    #: model name or path (sentence-transformers), model name (openai)
    embedder_model: str = ""
    #: base URL of an OpenAI-compatible endpoint, e.g. http://127.0.0.1:11434/v1
    embedder_url: str = ""
    #: key of that endpoint
    embedder_key: str = field(default="", repr=False)
    #: seconds an embedding may take, retries included
    embedder_deadline_s: float = 10.0
    #: threads of the bundled model; 2 cut the latency of a short query by 20 to 40 %
    embedder_threads: int = 2
    #: allows the deterministic embedder, whose vectors carry no meaning
    testing: bool = False

    #: entries of the in-process cache (L1); 0 turns it off
    l1_entries: int = 100_000
    #: bytes of L1, measured as the process really holds them
    l1_bytes: int = 64 * 1024 * 1024
    #: cached searches a user in Redis (L2), about 0.4 KB each; 0 turns it off
    l2_searches: int = 128
    #: seconds a cached search may miss a new memory
    search_ttl_s: float = 60.0
    #: the same for searches bounded to the past, which new memories rarely join
    past_search_ttl_s: float = 300.0
    #: seconds L1 keeps a memory
    memory_ttl_s: float = 30.0
    #: seconds the vector of a query is kept in L1 and Redis, 0.8 KB each; vectors never go stale, but fill
    embedding_ttl_s: float = 600.0
    #: hot memories kept a user, and seconds since their last access until they are cold
    hot_capacity: int = 1000
    hot_ttl_s: float = 1800.0
    #: seconds L1 may answer on one proof that it missed no invalidation; at most what others wait for
    lease_s: float = 2.0
    #: answer from L1, within the TTLs above and marked as stale, while Redis is away; a delete that other
    #: processes acknowledged meanwhile is then not seen
    stale_if_error: bool = False

    #: memories from which a user gets an HNSW graph beside the exact index; below four fifths it goes again
    hnsw_threshold: int = 10_000
    #: parameters of new graphs; a user's own are set by `redismem index rebuild`
    hnsw_profile: HnswProfile = "production"
    #: days without a read or write after which a user's index may be dropped (its memories stay); 0: never
    idle_index_days: float = 0.0
    #: directory or fsspec URL (s3://bucket/path …) that quarters are archived to; empty: no archive
    archive_url: str = field(default="", repr=False)
    #: quarters before the current one that stay in Redis when there is an archive
    archive_after_quarters: int = 8
    #: seconds between two rounds of maintenance in `serve`; 0: none, `redismem index maintain` does it
    maintain_every_s: float = 60.0
    #: `serve` runs a worker in a process beside it; 0: derived data is made by `redismem worker` only
    worker: bool = True
    #: days in which the importance of a semantic memory halves when nobody uses it; other types in proportion
    half_life_days: float = 180.0
    #: base URL of an OpenAI-compatible endpoint that writes summaries; empty: they are extracted
    llm_url: str = ""
    #: its model, and its key
    llm_model: str = ""
    llm_key: str = field(default="", repr=False)
    #: seconds a summary may take until it is extracted instead
    llm_timeout_s: float = 20.0
    #: seconds a session lives after its last message
    session_ttl_s: int = 86_400
    #: signals that load memories before they are asked for, parted by commas; empty: none
    prefetch: str = ",".join(get_args(Signal))
    #: loads at once, a process; what comes beyond is left out
    prefetch_lanes: int = 2
    #: name or path of a spaCy pipeline that finds entities in texts; empty: known names and capitals only
    spacy_model: str = ""
    #: users, the most recently active first, whose indexes and hot memories are warm before `serve` is ready
    warm_users: int = 100

    #: bytes of a request body; larger ones are refused with 413
    max_body_bytes: int = 1024 * 1024
    #: events kept per owner, about 100 bytes each
    log_length: int = 10_000
    #: requests that a process works on at once, answers from L1 aside; more are refused with 503
    max_in_flight: int = 256
    #: milliseconds from which reads count as slow: while many are, fewer are let in; 0: the limit stays
    overload_ms: float = 50.0
    #: seconds a request may take, streams and imports aside; then it is answered 504
    request_timeout_s: float = 30.0
    #: seconds for which the reply to a request with an Idempotency-Key is kept for its repetitions
    idempotency_ttl_s: float = 86_400.0
    #: origins of web pages that may call the API, parted by commas; empty: none (CORS is off)
    cors_origins: str = ""

    #: how log lines look
    log_format: LogFormat = "text"
    #: milliseconds from which a request is logged with its timing
    slow_request_ms: float = 500.0
    #: log every request
    access_log: bool = False

    def __post_init__(self) -> None:
        self._check_choices()
        if self.llm_url and not self.llm_model:
            raise _wrong("llm_model", "is required with REDISMEM_LLM_URL")
        if self.embedder == "openai" and not (self.embedder_url and self.embedder_model):
            raise _wrong("embedder_url", "and REDISMEM_EMBEDDER_MODEL are required for 'openai'")
        for name, low, high in _RANGES:
            if not low <= getattr(self, name) <= high:
                raise _wrong(name, f"must be between {low} and {high}")
        if len(self.namespace) > 256 or "\0" in self.namespace:
            raise _wrong("namespace", "must have at most 256 characters, none of them NUL")

    def _check_choices(self) -> None:
        if self.redis_url and not self.redis_url.startswith(_REDIS_SCHEMES):
            raise _wrong("redis_url", f"must start with one of {', '.join(_REDIS_SCHEMES)}")
        if self.embedder not in get_args(EmbedderName):
            raise _wrong("embedder", f"must be one of {', '.join(get_args(EmbedderName))}")
        if self.log_format not in get_args(LogFormat):
            raise _wrong("log_format", f"must be one of {', '.join(get_args(LogFormat))}")
        for origin in self.origins:
            if not _ORIGIN.fullmatch(origin):
                raise _wrong("cors_origins", f"takes origins such as https://app.example.com, not {origin!r}")
        if self.hnsw_profile not in get_args(HnswProfile):
            raise _wrong("hnsw_profile", f"must be one of {', '.join(get_args(HnswProfile))}")
        if self.embedder == "deterministic" and not self.testing:
            raise _wrong(
                "embedder",
                "'deterministic' gives vectors without meaning and is for tests only; "
                "use 'minilm', or set REDISMEM_TESTING=1",
            )
        for name in sorted(self.signals - set(get_args(Signal))):
            raise _wrong("prefetch", f"names no signal {name!r}: use {', '.join(get_args(Signal))}")

    @property
    def may_be_open(self) -> bool:
        """Whether a store without API keys is served to everybody who can connect."""
        with suppress(ValueError):
            return self.insecure or ipaddress.ip_address(self.host).is_loopback
        return self.insecure or self.host == "localhost"

    @property
    def signals(self) -> frozenset[str]:
        """The signals that are on."""
        return frozenset(name.strip() for name in self.prefetch.split(",") if name.strip())

    @property
    def origins(self) -> tuple[str, ...]:
        """The origins that CORS allows."""
        return tuple(one.strip() for one in self.cors_origins.split(",") if one.strip())

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None, **chosen: object) -> Settings:
        """Return settings from `environ` (default: the process's), overridden by `chosen` not None."""
        environ = os.environ if environ is None else environ
        values: dict[str, object] = {}
        for item in fields(cls):
            raw = environ.get(_PREFIX + item.name.upper())
            if raw is not None:
                values[item.name] = _parsed(item.name, str(item.type), raw)
        values.update({name: value for name, value in chosen.items() if value is not None})
        return cls(**values)  # type: ignore[arg-type]  # each value was parsed by its field's type

    def to_environment(self) -> dict[str, str]:
        """Return the variables from which another process reads these settings."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {
            _PREFIX + name.upper(): str(int(value) if isinstance(value, bool) else value)
            for name, value in values.items()
        }


#: name, lowest, highest
_RANGES = (
    ("redis_in_flight", 1, 1_000_000),
    ("redis_timeout_s", 0.05, 600),
    ("port", 0, 65_535),
    ("workers", 1, 256),
    ("embedder_deadline_s", 0.05, 600),
    ("embedder_threads", 1, 256),
    ("l1_entries", 0, 100_000_000),
    ("l1_bytes", 1024, 1024**4),
    ("l2_searches", 0, 10_000),
    ("search_ttl_s", 0.1, 60),
    ("past_search_ttl_s", 0.1, 300),
    ("memory_ttl_s", 0.1, 30),
    ("embedding_ttl_s", 0.1, 86_400),
    ("hot_capacity", 1, 10_000),
    ("hot_ttl_s", 1, 30 * 86_400),
    ("lease_s", 0.2, MAX_LEASE_S),
    ("hnsw_threshold", 100, 100_000_000),
    ("idle_index_days", 0, 36_500),
    ("archive_after_quarters", 1, 4_000),
    ("maintain_every_s", 0, 86_400),
    ("warm_users", 0, 100_000),
    ("session_ttl_s", 60, 30 * 86_400),
    ("prefetch_lanes", 1, 64),
    ("half_life_days", 1, 36_500),
    ("llm_timeout_s", 0.1, 600),
    ("max_body_bytes", 1024, 1024**3),
    ("log_length", 1, 10_000_000),
    ("max_in_flight", 1, 100_000),
    ("overload_ms", 0, 600_000),
    ("request_timeout_s", 0.1, 3_600),
    ("idempotency_ttl_s", 1, 2_592_000),
    ("slow_request_ms", 0, 600_000),
)


def _wrong(name: str, problem: str) -> Misconfigured:
    return Misconfigured(f"{_PREFIX}{name.upper()} {problem}.", field=name)


def _parsed(name: str, kind: str, raw: str) -> object:
    try:
        if kind == "int":
            return int(raw)
        if kind == "float":
            return float(raw)
    except ValueError as exc:
        raise _wrong(name, f"must be a number, not {raw!r}") from exc
    if kind == "bool":
        if raw.lower() not in ("0", "1", "true", "false", "yes", "no"):
            raise _wrong(name, f"must be 1 or 0, not {raw!r}")
        return raw.lower() in ("1", "true", "yes")
    return Path(raw).expanduser() if kind == "Path" else raw
