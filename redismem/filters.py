"""The only place that says by what memories can be told apart: tags, numbers, times, metadata."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Annotated, Literal

from msgspec import Meta, Struct, field

from redismem.fields import AnyOf, MemoryType, MemoryTypes, Name, Names, Scalar, checked_name, checked_names


class TagMatch(Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Values of a multi-valued field: at least one of `any`, each of `all`, none of `none`."""

    any: Names = field(default_factory=list)
    all: Names = field(default_factory=list)
    none: Names = field(default_factory=list)

    def __post_init__(self) -> None:
        self.any = checked_names(self.any, "any")
        self.all = checked_names(self.all, "all")
        self.none = checked_names(self.none, "none")
        if not (self.any or self.all or self.none):
            raise ValueError("a tag filter needs `any`, `all` or `none`")


class NumberRange(Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """At least one bound of a number; `gt` or `gte`, `lt` or `lte`."""

    gt: float | None = None
    gte: float | None = None
    lt: float | None = None
    lte: float | None = None

    def __post_init__(self) -> None:
        _checked_bounds(self)


class TimeRange(Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """At least one bound in time, RFC 3339 (without zone: UTC); `gt` or `gte`, `lt` or `lte`."""

    gt: datetime | None = None
    gte: datetime | None = None
    lt: datetime | None = None
    lte: datetime | None = None

    def __post_init__(self) -> None:
        _checked_bounds(self)


def _checked_bounds(bounds: NumberRange | TimeRange) -> None:
    given = [name for name in ("gt", "gte", "lt", "lte") if getattr(bounds, name) is not None]
    if not given:
        raise ValueError("a range needs at least one of `gt`, `gte`, `lt`, `lte`")
    for name in given:
        value = getattr(bounds, name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"`{name}` must be a finite number")
    if {"gt", "gte"} <= set(given) or {"lt", "lte"} <= set(given):
        raise ValueError("give `gt` or `gte`, `lt` or `lte`, not both")


#: a quarter of a year
Partition = Annotated[str, Meta(pattern=r"^[0-9]{4}-Q[1-4]\Z")]
Partitions = Annotated[list[Partition], Meta(min_length=1, max_length=100)]


#: one of the quarters that a range is spelled out into
RangedPartition = Annotated[str, Meta(pattern=r"^(19[7-9][0-9]|20[0-6][0-9])-Q[1-4]\Z")]


class PartitionRange(Struct, forbid_unknown_fields=True, kw_only=True):
    """Quarters of the years 1970 to 2069, from `gte` to `lte`."""

    gte: RangedPartition
    lte: RangedPartition


def quarter_number(quarter: str) -> int:
    """Return a number for a quarter such as 2026-Q1: consecutive ones differ by 1."""
    return 4 * int(quarter[:4]) + int(quarter[6]) - 1


def quarter_name(number: int) -> str:
    """Return the quarter of a number."""
    return f"{number // 4:04d}-Q{number % 4 + 1}"


TagFilter = Name | AnyOf | TagMatch


class Filters(Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Conditions that all hold. A list of names means any of them.

    `partition` is the quarter of `event_date`, or of the writing where there is none.
    `cluster` is the id of a topic, or `uncategorized`. `metadata` compares top-level scalar values for
    equality. `superseded` hides memories that a correction replaced unless it says otherwise.
    """

    memory_type: MemoryType | MemoryTypes | None = None
    topics: TagFilter | None = None
    entities: TagFilter | None = None
    session_id: Name | AnyOf | None = None
    cluster: Name | AnyOf | None = None
    partition: Partition | Partitions | PartitionRange | None = None
    importance: NumberRange | None = None
    confidence: NumberRange | None = None
    created_at: TimeRange | None = None
    updated_at: TimeRange | None = None
    event_date: TimeRange | None = None
    metadata: Annotated[dict[str, Scalar], Meta(max_length=20)] | None = None
    pinned: bool | None = None
    superseded: Literal["exclude", "include", "only"] = "exclude"

    def __post_init__(self) -> None:
        for name in ("topics", "entities", "session_id", "cluster"):
            value = getattr(self, name)
            if isinstance(value, str):
                setattr(self, name, checked_name(value, name))
            elif isinstance(value, list):
                setattr(self, name, checked_names(value, name))
