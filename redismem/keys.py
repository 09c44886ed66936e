"""The only place that makes Redis names.

Every key of one owner carries the hash tag `{tag}`, so all of them live on one cluster slot.
The tag is percent-encoded: building a name is injective, and no character of a user id can
leave its place. A memory id stands last in its key, so it needs no encoding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import quote, unquote

#: separates the values of multi-valued TAG fields; inside a value it is percent-encoded
TAG_SEPARATOR = "|"

#: separates nothing: single-valued TAG fields must not be split, and no valid value holds it
NO_SEPARATOR = "\x1f"

#: hash of store-wide facts: schema version, embedder, dimension
STORE = "redismem:store"

#: held while function libraries are loaded, so that two starters cannot downgrade each other
FUNCTIONS_LOCK = "redismem:lock:functions"

#: held by the one process that maintains the store
MAINTENANCE_LOCK = "redismem:lock:maintain"

#: hash of the processes whose L1 may answer: process id -> "", each field with a TTL
LEASES = "redismem:leases"

#: channel of barriers, heard by every process; a process's own channel is this, a colon and its id
COHERENCE_CHANNEL = "redismem:coherence"

MEMORY_PREFIX = "redismem:memory:"

#: vector fields of a record; re-embedding fills the idle one and then switches
VECTOR_FIELDS = ("embedding", "embedding_next")

META_PATTERN = "redismem:meta:*"

PROFILE_PREFIX = "redismem:profile:"

#: stands for the profile where L1 is told which memories changed; no memory has such an id
PROFILE_ID = "\0profile"

SESSION_PREFIX = "redismem:session:"

#: jobs that may start: stream, read by the consumer group JOB_GROUP; an entry's `job` is "<owner tag> <kind>"
JOBS, JOB_GROUP = "redismem:jobs", "workers"

#: jobs that wait: zset of job -> ms from which it may start
JOBS_LATER = "redismem:jobs:later"

#: hash of jobs that are in the stream -> id of their entry
JOBS_LIVE = "redismem:jobs:live"

#: zset of jobs that were done lately -> ms until which they rest, so that long ones do not follow each other
JOBS_REST = "redismem:jobs:rest"

#: hash of jobs that failed -> how often, and the last error
JOBS_TRIES = "redismem:jobs:tries"

#: hash of dead letters: jobs that failed too often -> when, how often and why, as JSON
JOBS_DEAD = "redismem:jobs:dead"

#: hash of memory types -> weights by age in days, as JSON; lua/derive.lua decays importance by it
WEIGHTS = "redismem:weights"

#: hash of API keys: id -> JSON, without the secret
API_KEYS = "redismem:keys"

#: stands for the API keys where L1 is told what changed; they belong to nobody
API_KEYS_ID = "*"

#: of the history of counts; the tag keeps it on one slot
SERIES_PREFIX = "redismem:series:{ops}:"


def embedding_key(model: str, digest: str) -> str:
    """Return the key of a cached query vector; `digest` is hexadecimal."""
    return f"redismem:embed:{_encoded(model)}:{digest}"


def rate_key(key_id: str) -> str:
    """Return the key of what an API key may still take."""
    return f"redismem:rate:{key_id}"


def series_keys(moment_s: float) -> tuple[str, str]:
    """Return the keys of the counts of the minute and the day of a moment, epoch seconds in UTC."""
    minute = int(moment_s) // 60
    return f"{SERIES_PREFIX}m:{minute}", f"{SERIES_PREFIX}d:{minute // (60 * 24)}"


def split_memory_key(key: str) -> tuple[str, str] | None:
    """Return owner tag and memory id of a memory's key; None for any other."""
    return _split(MEMORY_PREFIX, key)


def _split(prefix: str, key: str) -> tuple[str, str] | None:
    rest = key.removeprefix(prefix)
    tag, found, name = rest.partition("}:")
    if rest == key or not found or not tag.startswith("{"):
        return None
    return tag[1:], name


def session_mark(session_id: str) -> str:
    """Return what stands for a session where L1 is told which memories changed; no memory has such an id."""
    return f"\0session:{session_id}"


def split_session_key(key: str) -> tuple[str, str] | None:
    """Return owner tag and session id of a session's key; None for any other."""
    return _split(SESSION_PREFIX, key)


def split_profile_key(key: str) -> str | None:
    """Return the owner tag of a profile's key; None for any other."""
    rest = key.removeprefix(PROFILE_PREFIX)
    return rest[1:-1] if rest != key and rest.startswith("{") and rest.endswith("}") else None


def _encoded(part: str) -> str:
    # "~" is the one unreserved character that quote() keeps and redis-cli globs dislike
    return quote(part, safe="").replace("~", "%7E")


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose memories: a user inside an optional namespace (1-256 characters each).

    Two owners are the same only if both parts are equal, character by character.
    """

    user: str
    namespace: str = ""
    tag: str = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        tag = _encoded(self.user)
        if self.namespace:
            tag = f"{_encoded(self.namespace)}/{tag}"
        object.__setattr__(self, "tag", tag)

    @classmethod
    def from_tag(cls, tag: str) -> Owner:
        """Return the owner whose tag this is."""
        namespace, _, user = tag.rpartition("/")
        return cls(unquote(user), unquote(namespace))

    @classmethod
    def from_meta_key(cls, key: str) -> Owner:
        """Return the owner of a `redismem:meta:{tag}` key."""
        return cls.from_tag(key[key.index("{") + 1 : key.rindex("}")])

    @property
    def memory_prefix(self) -> str:
        return f"{MEMORY_PREFIX}{{{self.tag}}}:"

    def memory(self, memory_id: str) -> str:
        return self.memory_prefix + memory_id

    @property
    def index(self) -> str:
        """The name that is searched: an alias of the index that serves now."""
        return f"redismem:idx:{{{self.tag}}}"

    def physical_index(self, vector_field: str, *, again: bool = False) -> str:
        """Return the name of an exact index; a refreshed one has either name, in turns."""
        return f"redismem:idx:{{{self.tag}}}:flat:{vector_field}" + (":again" if again else "")

    @property
    def graphs(self) -> tuple[str, str]:
        """Vector sets with the HNSW graph of a large owner: one serves, the other is built beside it."""
        return f"redismem:graph:{{{self.tag}}}:0", f"redismem:graph:{{{self.tag}}}:1"

    @property
    def archived(self) -> str:
        """Ids of archived memories; the score is their quarter, 4 * year + 0 to 3."""
        return f"redismem:archived:{{{self.tag}}}"

    @property
    def ids(self) -> str:
        return f"redismem:ids:{{{self.tag}}}"

    @property
    def meta(self) -> str:
        return f"redismem:meta:{{{self.tag}}}"

    @property
    def log(self) -> str:
        return f"redismem:log:{{{self.tag}}}"

    @property
    def turns(self) -> str:
        return f"redismem:turns:{{{self.tag}}}"

    @property
    def searches(self) -> str:
        """Cached searches (L2): digest of the request -> generation, total, ids and scores."""
        return f"redismem:search:{{{self.tag}}}"

    @property
    def hot(self) -> str:
        """Last access of hot memories, ms."""
        return f"redismem:hot:{{{self.tag}}}"

    @property
    def hits(self) -> str:
        """Access counts of hot memories."""
        return f"redismem:hits:{{{self.tag}}}"

    @property
    def profile(self) -> str:
        return f"{PROFILE_PREFIX}{{{self.tag}}}"

    @property
    def replies(self) -> str:
        """Replies to requests that carried an Idempotency-Key."""
        return f"redismem:idempotency:{{{self.tag}}}"

    @property
    def session_prefix(self) -> str:
        """Of sessions; their id follows."""
        return f"{SESSION_PREFIX}{{{self.tag}}}:"

    def session(self, session_id: str) -> str:
        return self.session_prefix + session_id

    @property
    def sessions(self) -> str:
        """Ids of sessions by their last message."""
        return f"redismem:sessions:{{{self.tag}}}"

    @property
    def summary_prefix(self) -> str:
        """Of summaries; `<kind>:<name>` follows."""
        return f"redismem:summary:{{{self.tag}}}:"

    @property
    def cluster_prefix(self) -> str:
        """Of topics; their number follows."""
        return f"redismem:cluster:{{{self.tag}}}:"

    @property
    def topics(self) -> str:
        """Numbers of topics by their size."""
        return f"redismem:topics:{{{self.tag}}}"

    @property
    def summarized(self) -> str:
        """Names of summaries by when they were made."""
        return f"redismem:summaries:{{{self.tag}}}"

    @property
    def centroids(self) -> str:
        """Vector set of the topics' centroids, for searches of the nearest topics."""
        return f"redismem:centroids:{{{self.tag}}}"

    @property
    def similar(self) -> str:
        """Similarity edges of memories."""
        return f"redismem:similar:{{{self.tag}}}"

    @property
    def fresh(self) -> str:
        """Ids of memories whose edges are to be made."""
        return f"redismem:fresh:{{{self.tag}}}"

    @property
    def used(self) -> str:
        """Last access of memories, epoch s; unlike `hot` for good."""
        return f"redismem:used:{{{self.tag}}}"

    @property
    def conflicts(self) -> str:
        """Pairs that seem to be duplicates or contradictions."""
        return f"redismem:conflicts:{{{self.tag}}}"

    @property
    def derived(self) -> tuple[str, ...]:
        """KEYS of the part `derived` of our Functions, in their order; two are prefixes of keys."""
        made = f"redismem:made:{{{self.tag}}}"
        edges = self.similar, self.conflicts, self.fresh, self.used
        prefixes = self.summary_prefix, self.cluster_prefix
        return (made, self.profile, *edges, self.topics, self.summarized, *prefixes, JOBS_LATER)

    @property
    def written(self) -> tuple[str, ...]:
        """KEYS of the Functions that write memories (lua/write.lua), in their order."""
        caches = self.searches, self.hot, self.hits
        own = self.meta, self.ids, self.log, self.turns, *caches, *self.graphs, self.archived
        return (*own, *self.derived)

    @property
    def forgotten(self) -> tuple[str, ...]:
        """KEYS of rm_forget (lua/owner.lua), in their order: all of the owner but memories and indexes."""
        return (*self.written[:-1], self.centroids, self.sessions, self.session_prefix, self.replies)

    def job(self, kind: str) -> str:
        """Return the name of a job for this owner."""
        return f"{self.tag} {kind}"
