"""The only place that names days, weeks and months. Pure; in UTC."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, timedelta
from typing import Literal

from redismem.errors import InvalidInput

PeriodKind = Literal["day", "week", "month"]

#: how each kind is written, for errors
SHAPES = {"day": "2026-11-26", "week": "2026-W48", "month": "2026-11"}

_WEEK = re.compile(r"([0-9]{4})-W([0-9]{2})\Z")
_MONTH = re.compile(r"([0-9]{4})-([0-9]{2})\Z")


def names_of(moment: datetime) -> list[tuple[PeriodKind, str]]:
    """Return the day, the ISO week and the month of a moment."""
    year, week, _ = moment.isocalendar()
    return [
        ("day", moment.date().isoformat()),
        ("week", f"{year:04d}-W{week:02d}"),
        ("month", moment.date().isoformat()[:7]),
    ]


def bounds(kind: str, name: str) -> tuple[float, float]:
    """Return begin and end of a period, epoch seconds; the end is not in it.

    Raises:
        InvalidInput: the name is not of this kind.
    """
    try:
        first, end = _days(kind, name)
        return _epoch(first), _epoch(end)
    except (ValueError, OverflowError) as exc:
        raise InvalidInput(f"a {kind} is written as {SHAPES[kind]}", field="name") from exc


def _days(kind: str, name: str) -> tuple[date, date]:
    if kind == "day" and re.fullmatch(r"\d{4}-\d{2}-\d{2}", name, re.ASCII):
        first = date.fromisoformat(name)
        return first, first + timedelta(days=1)
    if kind == "week" and (match := _WEEK.match(name)):
        first = date.fromisocalendar(int(match[1]), int(match[2]), 1)
        return first, first + timedelta(days=7)
    if kind == "month" and (match := _MONTH.match(name)):
        first = date(int(match[1]), int(match[2]), 1)
        return first, (first + timedelta(days=31)).replace(day=1)
    raise ValueError(name)


def _epoch(day: date) -> float:
    return datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()
