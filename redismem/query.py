"""The only place that speaks RediSearch's query language: index schema, filters, the union of words.

Nothing a caller wrote reaches a query except as a TAG value with every ASCII non-alphanumeric
character escaped, as a number, or as a word made of word characters only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any
from urllib.parse import quote

import msgspec

from redismem.filters import (
    Filters,
    NumberRange,
    PartitionRange,
    TagMatch,
    TimeRange,
    quarter_name,
    quarter_number,
)
from redismem.keys import NO_SEPARATOR, TAG_SEPARATOR, Owner
from redismem.periods import bounds

_ESCAPED = re.compile(r"([^0-9A-Za-z\x80-\U0010ffff])")

# kind of a summary -> the field that names what it is of
_SOURCE_FIELDS = {"topic": "cluster", "entity": "entities", "session": "session_id"}


def words_query(words: Sequence[str], filter_: str) -> str:
    """Return a query for memories with any of `words` that satisfy the filter; empty without words.

    The filter stands beside each word, not beside the union of all: below an intersection the unions
    of RediSearch 2.10.5 lose words they skipped past, and with them BM25 scores (evidence recall@10
    on one conversation 0.52 instead of 0.60; decision D6).
    """
    terms = [_KEYWORDS.get(word, word) for word in words]
    if not terms:
        return ""
    if filter_ == "*":
        return f"({'|'.join(terms)})"
    if len(filter_) * len(terms) > _BESIDE_CHARS:
        return f"({'|'.join(terms)}) {filter_}"
    return "|".join(f"({term} {filter_})" for term in terms)


#: filters that would be longer than this beside all words stand once: repeated beside each of 64 words, the
#: largest that is accepted would hold Redis for 0.4 s
_BESIDE_CHARS = 16_384

#: words that the query language takes for its own, written as exact patterns
_KEYWORDS = {"ismissing": "w'ismissing'"}


def escaped_tag(value: str) -> str:
    """Return `value` as it may stand inside `{…}` of a TAG query."""
    return _ESCAPED.sub(r"\\\1", value)


def packed_tags(values: Iterable[str]) -> str:
    """Return values joined for a multi-valued TAG field; the separator inside a value is encoded."""
    return TAG_SEPARATOR.join(_packed(value) for value in values)


def _packed(value: str) -> str:
    return value.replace("%", "%25").replace(TAG_SEPARATOR, "%7C")


def unpacked_tags(raw: str) -> list[str]:
    """Return the values of a multi-valued TAG field; inverse of `packed_tags`."""
    parts = [part for part in raw.split(TAG_SEPARATOR) if part] if raw else []
    if "%" in raw:
        return [part.replace("%7C", TAG_SEPARATOR).replace("%25", "%") for part in parts]
    return parts


def metadata_tags(metadata: Mapping[str, Any]) -> list[str]:
    """Return one tag per top-level scalar of `metadata`, equal exactly when key and value are."""
    return [metadata_tag(key, value) for key, value in metadata.items() if not isinstance(value, dict | list)]


def metadata_tag(key: str, value: Any) -> str:
    """Return the tag `key=value`; long ones by digest, because TAG values are bounded."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
        value = int(value)  # JSON writers differ on 1 and 1.0
    shown = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    kind = "'" if isinstance(value, str) else ""
    tag = f"{quote(key, safe='')}={kind}{quote(shown, safe='')}"
    return tag if len(tag) <= 256 else blake2b(tag.encode(), digest_size=20).hexdigest()


def epoch(moment: datetime) -> float:
    """Return seconds since 1970; a time without zone is UTC."""
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def filter_query(filters: Filters) -> str:
    """Return the query of memories that satisfy `filters`; `*` for all."""
    parts: list[str] = []
    if filters.superseded != "include":
        negation = "-" if filters.superseded == "only" else ""
        parts.append(f"{negation}ismissing(@superseded_by)")
    for name in ("memory_type", "session_id", "cluster"):
        value = getattr(filters, name)
        if value is not None:
            parts.append(_any_of(name, [value] if isinstance(value, str) else value))
    for name in ("topics", "entities"):
        parts.extend(_tag_parts(name, getattr(filters, name)))
    if filters.partition is not None:
        parts.append(_any_of("partition", filtered_quarters(filters.partition) or ["none"]))
    for name in ("importance", "confidence", "created_at", "updated_at", "event_date"):
        bounds = getattr(filters, name)
        if bounds is not None:
            parts.append(_range(name, bounds))
    for key, value in (filters.metadata or {}).items():
        parts.append(_any_of("metadata_tags", [_packed(metadata_tag(key, value))]))
    if filters.pinned is not None:
        parts.append(_any_of("pinned", ["1" if filters.pinned else "0"]))
    return " ".join(parts) or "*"


def source_query(kind: str, name: str) -> str:
    """Return the query of memories that a summary may be made from.

    Args:
        kind: see `views.SummaryKind`. Of a period: what happened then, or was written then and has no date.
        name: a topic's number, a period, an entity as a TAG field holds it, or a session's id.

    Raises:
        InvalidInput: a period that is not written as one.
    """
    if field := _SOURCE_FIELDS.get(kind):
        found = _any_of(field, [name])
    else:
        first, end = bounds(kind, name)
        undated = f"(@created_at:[{first} ({end}] -@event_date:[-inf +inf])"
        found = f"(@event_date:[{first} ({end}])|{undated}"
    return f"({found}) ismissing(@superseded_by)"


def filtered_quarters(partition: str | list[str] | PartitionRange) -> list[str]:
    """Return the quarters that a filter names."""
    if isinstance(partition, PartitionRange):
        first, last = quarter_number(partition.gte), quarter_number(partition.lte)
        return [quarter_name(number) for number in range(first, last + 1)]
    return [partition] if isinstance(partition, str) else partition


def _tag_parts(name: str, value: str | list[str] | TagMatch | None) -> list[str]:
    if value is None:
        return []
    match = (
        value if isinstance(value, TagMatch) else TagMatch(any=[value] if isinstance(value, str) else value)
    )
    parts = [_any_of(name, [_packed(one)]) for one in match.all]
    if match.any:
        parts.append(_any_of(name, [_packed(one) for one in match.any]))
    if match.none:
        parts.append("-" + _any_of(name, [_packed(one) for one in match.none]))
    return parts


def _any_of(name: str, values: Iterable[str]) -> str:
    return f"@{name}:{{{'|'.join(escaped_tag(value) for value in values)}}}"


def _range(name: str, bounds: NumberRange | TimeRange) -> str:
    def number(value: float | datetime) -> str:
        return format(epoch(value) if isinstance(value, datetime) else value, ".17g")

    low = f"({number(bounds.gt)}" if bounds.gt is not None else "-inf"
    high = f"({number(bounds.lt)}" if bounds.lt is not None else "+inf"
    if bounds.gte is not None:
        low = number(bounds.gte)
    if bounds.lte is not None:
        high = number(bounds.lte)
    return f"@{name}:[{low} {high}]"


def index_schema(owner: Owner, vector_field: str, dim: int, *, again: bool = False) -> list[str]:
    """Return the arguments of FT.CREATE for one owner's exact index.

    STOPWORDS 0: a union of stop words crashes RediSearch 2.10.5 otherwise. BLOCK_SIZE 64: the
    default of 1,024 costs 0.8 MB per index. SKIPINITIALSCAN: the scan walks every key of the server.
    """
    one_value = ["TAG", "SEPARATOR", NO_SEPARATOR, "CASESENSITIVE"]
    many_values = ["TAG", "SEPARATOR", TAG_SEPARATOR, "CASESENSITIVE"]
    return [
        owner.physical_index(vector_field, again=again),
        *["ON", "HASH", "PREFIX", "1", owner.memory_prefix],
        *["STOPWORDS", "0", "SKIPINITIALSCAN", "SCHEMA"],
        *["text", "TEXT", "words", "TEXT", "day", "TEXT"],
        *["pk", *one_value, "session_id", *one_value, "memory_type", *one_value, "pinned", *one_value],
        *["superseded_by", *one_value, "INDEXMISSING"],
        *["topics", *many_values, "entities", *many_values, "metadata_tags", *many_values],
        *["created_at", "NUMERIC", "SORTABLE", "updated_at", "NUMERIC", "event_date", "NUMERIC"],
        *["importance", "NUMERIC", "confidence", "NUMERIC", "partition", *one_value, "cluster", *many_values],
        *[vector_field, "AS", "embedding", "VECTOR", "FLAT", "8"],
        *["TYPE", "FLOAT16", "DIM", str(dim), "DISTANCE_METRIC", "COSINE", "BLOCK_SIZE", "64"],
        "INDEXMISSING",
    ]
