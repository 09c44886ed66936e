from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redismem.errors import InvalidInput
from redismem.periods import SHAPES, PeriodKind, bounds, names_of

DAY_S = 86_400

# years of four digits, up to the last whose periods all end in a year that there is
MOMENTS = st.datetimes(datetime(1000, 1, 1), datetime(9999, 11, 30), timezones=st.just(UTC))


def span(kind: str, name: str) -> tuple[str, str]:
    """Return the first day of a period and the one after it."""
    first, end = (datetime.fromtimestamp(0, UTC) + timedelta(seconds=at) for at in bounds(kind, name))
    assert (first.time(), end.time()) == (datetime.min.time(), datetime.min.time())
    return f"{first:%Y-%m-%d}", f"{end:%Y-%m-%d}"


def test_every_kind_has_a_shape_that_is_one_of_its_names() -> None:
    assert set(SHAPES) == set(get_args(PeriodKind))
    for kind, name in SHAPES.items():
        assert (kind, name) in names_of(datetime(2026, 11, 26, tzinfo=UTC))
        bounds(kind, name)


@pytest.mark.parametrize(
    ("moment", "names"),
    [
        ((2026, 11, 26), ["2026-11-26", "2026-W48", "2026-11"]),
        ((2026, 1, 1), ["2026-01-01", "2026-W01", "2026-01"]),
        ((2027, 1, 1), ["2027-01-01", "2026-W53", "2027-01"]),
        ((2026, 12, 31), ["2026-12-31", "2026-W53", "2026-12"]),
        ((2024, 12, 30), ["2024-12-30", "2025-W01", "2024-12"]),
        ((2023, 1, 1), ["2023-01-01", "2022-W52", "2023-01"]),
        ((2024, 2, 29), ["2024-02-29", "2024-W09", "2024-02"]),
        ((9999, 12, 31), ["9999-12-31", "9999-W52", "9999-12"]),
    ],
)
def test_a_moment_has_a_day_an_iso_week_and_a_month(moment: tuple[int, int, int], names: list[str]) -> None:
    for hour in (0, 23):
        found = names_of(datetime(*moment, hour, 59, 59, 999_999, tzinfo=UTC))
        assert found == list(zip(("day", "week", "month"), names, strict=True))


@pytest.mark.parametrize(
    ("kind", "name", "first", "end"),
    [
        ("day", "2026-11-26", "2026-11-26", "2026-11-27"),
        ("day", "2024-02-29", "2024-02-29", "2024-03-01"),
        ("day", "2026-12-31", "2026-12-31", "2027-01-01"),
        ("week", "2026-W48", "2026-11-23", "2026-11-30"),
        ("week", "2026-W53", "2026-12-28", "2027-01-04"),
        ("week", "2020-W53", "2020-12-28", "2021-01-04"),
        ("week", "2025-W01", "2024-12-30", "2025-01-06"),
        ("month", "2026-11", "2026-11-01", "2026-12-01"),
        ("month", "2026-12", "2026-12-01", "2027-01-01"),
        ("month", "2026-01", "2026-01-01", "2026-02-01"),
        ("month", "2024-02", "2024-02-01", "2024-03-01"),
        ("month", "2026-02", "2026-02-01", "2026-03-01"),
        ("month", "1969-12", "1969-12-01", "1970-01-01"),
    ],
)
def test_a_period_ends_where_the_next_begins(kind: str, name: str, first: str, end: str) -> None:
    assert span(kind, name) == (first, end)


def test_bounds_are_epoch_seconds_in_utc() -> None:
    assert bounds("day", "1970-01-01") == (0, DAY_S)
    assert bounds("month", "1970-01") == (0, 31 * DAY_S)
    assert bounds("week", "1970-W01") == (-3 * DAY_S, 4 * DAY_S)
    assert bounds("day", "0001-01-01")[0] == datetime(1, 1, 1, tzinfo=UTC).timestamp()


@given(MOMENTS)
def test_the_periods_of_a_moment_hold_it_and_hold_each_other(moment: datetime) -> None:
    found = {kind: bounds(kind, name) for kind, name in names_of(moment)}
    assert set(found) == set(SHAPES)
    for first, end in found.values():
        assert first <= moment.timestamp() < end
    day, week, month = (found[kind] for kind in ("day", "week", "month"))
    assert day[1] - day[0] == DAY_S
    assert week[1] - week[0] == 7 * DAY_S
    assert 28 * DAY_S <= month[1] - month[0] <= 31 * DAY_S
    for longer in (week, month):
        assert longer[0] <= day[0]
        assert day[1] <= longer[1]


@given(MOMENTS)
def test_the_end_of_a_period_belongs_to_the_next_of_its_kind(moment: datetime) -> None:
    for kind, name in names_of(moment):
        _, end = bounds(kind, name)
        following = dict(names_of(datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=end)))[kind]
        assert following > name
        assert bounds(kind, following)[0] == end


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("day", name) for name in ("2026-02-30", "2023-02-29", "2026-13-01", "2026-00-10", "2026-11-00")),
        *(("day", name) for name in ("2026-1-2", "20261126", "26-11-26", "2026-W48-4", "2026/11/26", "")),
        *(
            ("day", name)
            for name in (" 2026-11-26", "2026-11-26\n", "2026-11-26T00:00", "+2026-11-26", "today")
        ),
        *(("day", name) for name in ("٢٠٢٦-١١-٢٦", "2026-11", "2026-W48", "0000-01-01", "10000-01-01")),
        *(("week", name) for name in ("2026-W00", "2026-W54", "2025-W53", "2026-w48", "2026W48", "2026-W4")),
        *(("week", name) for name in ("2026-W48\n", "2026-W048", "2026-48", "2026-11", "0000-W01", "")),
        *(("month", name) for name in ("2026-00", "2026-13", "2026-1", "202611", "2026-11-", "2026-11-26")),
        *(("month", name) for name in ("2026-11\n", "2026-W48", "-026-11", "0000-01", "November", "")),
    ],
)
def test_what_is_no_name_is_refused_with_the_shape_it_should_have(kind: str, name: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(SHAPES[kind])) as refused:
        bounds(kind, name)
    assert refused.value.field == "name"
    assert kind in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "name"), [("day", "9999-12-31"), ("week", "9999-W52"), ("month", "9999-12")]
)
def test_a_period_that_would_end_in_the_year_10000_is_refused(kind: str, name: str) -> None:
    with pytest.raises(InvalidInput):
        bounds(kind, name)


@pytest.mark.parametrize(
    ("kind", "name"), [("week", "٢٠٢٦-W٤٨"), ("week", "2026-W４８"), ("month", "２０２６-１１")]
)
def test_a_name_has_ascii_digits(kind: str, name: str) -> None:
    with pytest.raises(InvalidInput):
        bounds(kind, name)


def test_years_before_1000_have_four_digits() -> None:
    for kind, name in names_of(datetime(987, 6, 5, tzinfo=UTC)):
        bounds(kind, name)
