"""Quarters: their numbers, their ranges, and which of the archived ones a search reaches."""

import msgspec
import pytest

from redismem.codec import reached
from redismem.filters import Filters, PartitionRange, quarter_name, quarter_number
from redismem.query import filter_query

QUARTERS = ["2023-Q4", "2024-Q1", "2024-Q2", "2025-Q1"]


def test_consecutive_quarters_have_consecutive_numbers() -> None:
    assert quarter_number("2025-Q1") - quarter_number("2024-Q4") == 1
    assert [quarter_name(quarter_number(name)) for name in QUARTERS] == QUARTERS


def test_a_range_of_quarters_becomes_its_quarters() -> None:
    filters = Filters(partition=PartitionRange(gte="2024-Q4", lte="2025-Q2"), superseded="include")
    assert filter_query(filters) == r"@partition:{2024\-Q4|2025\-Q1|2025\-Q2}"


@pytest.mark.parametrize(
    "partition",
    ["2024", "2024-Q5", "24-Q1", "2024-Q1\n", {"gte": "2024-Q2"}, {"gte": "1969-Q4", "lte": "2024-Q1"}, []],
)
def test_what_is_no_quarter_is_refused(partition: object) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"partition": partition}, Filters)


def test_a_range_stays_within_a_hundred_years() -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"partition": {"gte": "1969-Q4", "lte": "2024-Q1"}}, Filters)


def test_a_range_that_runs_backward_matches_nothing() -> None:
    filters = Filters(partition=PartitionRange(gte="2024-Q2", lte="2024-Q1"), superseded="include")
    assert filter_query(filters) == "@partition:{none}"
    assert reached(filters, QUARTERS) == []


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        ({}, QUARTERS),
        ({"partition": "2024-Q1"}, ["2024-Q1"]),
        ({"partition": {"gte": "2024-Q1", "lte": "2024-Q4"}}, ["2024-Q1", "2024-Q2"]),
        ({"event_date": {"gte": "2024-02-01T00:00:00Z"}}, ["2024-Q1", "2024-Q2", "2025-Q1"]),
        (
            {"event_date": {"gt": "2024-05-01T00:00:00Z", "lt": "2025-01-01T00:00:00Z"}},
            ["2024-Q2", "2025-Q1"],
        ),
        ({"event_date": {"lte": "2023-12-31T23:00:00Z"}}, ["2023-Q4"]),
        ({"event_date": {"gte": "2026-01-01T00:00:00Z"}}, []),
        ({"created_at": {"gte": "2026-01-01T00:00:00Z"}}, QUARTERS),
    ],
)
def test_a_search_reaches_the_quarters_that_its_filters_do_not_rule_out(
    filters: dict[str, object], found: list[str]
) -> None:
    assert reached(msgspec.convert(filters, Filters), QUARTERS[::-1]) == found
