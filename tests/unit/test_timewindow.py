"""Time expressions: which stretch of the past a text speaks of, and that most texts speak of none."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from redismem.timewindow import MOST_CHARS, MOST_PHRASES, TimeWindow, has_time, window

#: a Wednesday
NOW = datetime(2023, 8, 16, 15, 30, tzinfo=UTC)


def days(text: str, now: datetime = NOW) -> tuple[str, str] | None:
    """Return the first day of the window in UTC, and the first after it."""
    found = window(text, now)
    if found is None:
        return None
    assert {found.start.strftime("%H:%M:%S.%f"), found.end.strftime("%H:%M:%S.%f")} == {"00:00:00.000000"}
    return f"{found.start:%Y-%m-%d}", f"{found.end:%Y-%m-%d}"


@pytest.mark.parametrize(
    ("text", "start", "end"),
    [
        ("I saw her yesterday", "2023-08-15", "2023-08-16"),
        ("YESTERDAY!", "2023-08-15", "2023-08-16"),
        ("the day before yesterday", "2023-08-14", "2023-08-15"),
        ("earlier today", "2023-08-16", "2023-08-17"),
        ("I ran this morning", "2023-08-16", "2023-08-17"),
        ("an hour ago", "2023-08-16", "2023-08-17"),
        ("16 hours ago", "2023-08-15", "2023-08-16"),
        ("three days ago", "2023-08-13", "2023-08-14"),
        ("a few days ago", "2023-08-10", "2023-08-15"),
        ("the other day", "2023-08-09", "2023-08-16"),
        ("on 8 May 2023", "2023-05-08", "2023-05-09"),
        ("Monday, 8 May 2023 was", "2023-05-08", "2023-05-09"),
        ("on the 8th of May", "2023-05-08", "2023-05-09"),
        ("on may 8th", "2023-05-08", "2023-05-09"),
        ("8 may 2023", "2023-05-08", "2023-05-09"),
        ("Sept. 3, 2022", "2022-09-03", "2022-09-04"),
        ("8 December", "2022-12-08", "2022-12-09"),
        ("16 August", "2023-08-16", "2023-08-17"),
        ("2023-05-08", "2023-05-08", "2023-05-09"),
        ("13.5.2023", "2023-05-13", "2023-05-14"),
        ("8/5/2023", "2023-08-05", "2023-08-06"),
        ("on Monday", "2023-08-14", "2023-08-15"),
        ("last Friday", "2023-08-11", "2023-08-12"),
        ("last Fri.", "2023-08-11", "2023-08-12"),
        ("last tues", "2023-08-15", "2023-08-16"),
        ("on Wednesday", "2023-08-09", "2023-08-10"),
        ("What did we do last week?", "2023-08-07", "2023-08-14"),
        ("this week", "2023-08-14", "2023-08-21"),
        ("two weeks\n ago", "2023-07-31", "2023-08-07"),
        ("several weeks back", "2023-06-05", "2023-07-31"),
        ("the past two weeks", "2023-08-02", "2023-08-17"),
        ("over the past month", "2023-07-16", "2023-08-17"),
        ("last weekend", "2023-08-12", "2023-08-14"),
        ("over the weekend", "2023-08-12", "2023-08-14"),
        ("in March we went", "2023-03-01", "2023-04-01"),
        ("in late march", "2023-03-01", "2023-04-01"),
        ("in August", "2023-08-01", "2023-09-01"),
        ("last August", "2022-08-01", "2022-09-01"),
        ("in December", "2022-12-01", "2023-01-01"),
        ("June 2021", "2021-06-01", "2021-07-01"),
        ("at the end of May", "2023-05-01", "2023-06-01"),
        ("last month's trip", "2023-07-01", "2023-08-01"),
        ("a couple of months ago", "2023-05-01", "2023-08-01"),
        ("half a year ago", "2023-02-01", "2023-03-01"),
        ("last summer", "2022-06-01", "2022-09-01"),
        ("this summer", "2023-06-01", "2023-09-01"),
        ("last winter", "2022-12-01", "2023-03-01"),
        ("in the fall of 2021", "2021-09-01", "2021-12-01"),
        ("in the winter of 2020", "2020-12-01", "2021-03-01"),
        ("back in 2019", "2019-01-01", "2020-01-01"),
        ("last year", "2022-01-01", "2023-01-01"),
        ("ten years ago", "2013-01-01", "2014-01-01"),
        ("in the early 1990s", "1990-01-01", "2000-01-01"),
        ("in the '80s", "1980-01-01", "1990-01-01"),
        ("since last week", "2023-08-07", "2023-08-17"),
        ("since 2019", "2019-01-01", "2023-08-17"),
        ("since the summer", "2023-06-01", "2023-08-17"),
        ("since 8 May", "2023-05-08", "2023-08-17"),
    ],
)
def test_a_phrase_is_widened_to_the_period_it_speaks_of(text: str, start: str, end: str) -> None:
    assert days(text) == (start, end)
    assert has_time(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I may go, and we will march on",
        "the other 3 may stay; may 8 people come?",
        "the sun is on the second sat",
        "what did we do",
        "I bought 3 apples and 2022 grapes",
        "June called from April's house",
        "in June's house",
        "every Monday, on Mondays, on sat",
        "next Monday or this Monday",
        "next week, tomorrow, in two weeks",
        "this is the last of the past, I'll be back",
        "the other one",
        "call 555-2019-1234",
        "He was born on the 3rd",
        "昨日、先週",
    ],
)
def test_false_friends_name_no_time(text: str) -> None:
    assert not has_time(text)
    assert window(text, NOW) is None


@pytest.mark.parametrize(
    "text", ["on 8 May 2030", "in 2030", "this weekend", "31 June 2023", "on 99/99/2023", "in 2023-24"]
)
def test_what_lies_ahead_or_nowhere_is_no_window(text: str) -> None:
    assert window(text, NOW) is None


def test_last_night_is_noon_to_noon() -> None:
    assert window("last night was fun", NOW) == TimeWindow(
        datetime(2023, 8, 15, 12, tzinfo=UTC), datetime(2023, 8, 16, 12, tzinfo=UTC), "last night"
    )


def test_the_phrase_is_as_the_text_has_it() -> None:
    found = window("Mary: On the 8th of MAY, 2023 we met", NOW)
    assert found is not None
    assert found.phrase == "the 8th of MAY, 2023"


def test_what_is_over_goes_before_what_still_runs() -> None:
    assert days("today I thought of last week") == days("last week")
    assert days("last week, not in March") == days("last week")
    assert days("today, this week") == days("today")


def test_a_phrase_ahead_does_not_hide_one_behind() -> None:
    assert days("in 2030 I will tell of 8 May 2023") == ("2023-05-08", "2023-05-09")


@pytest.mark.parametrize("month", range(1, 13))
def test_last_winter_is_over_and_the_winter_has_begun(month: int) -> None:
    now = datetime(2023, month, 28, tzinfo=UTC)
    last, latest = window("last winter", now), window("this winter", now)
    assert last is not None
    assert latest is not None
    assert last.end <= now
    assert (now - last.end).days < 365
    assert latest.start <= now
    assert (now - latest.start).days < 366


def test_on_a_sunday_the_last_weekend_is_the_one_before() -> None:
    sunday = datetime(2023, 8, 20, 12, tzinfo=UTC)
    assert days("last weekend", sunday) == ("2023-08-12", "2023-08-14")
    assert days("over the weekend", sunday) == days("this weekend", sunday) == ("2023-08-19", "2023-08-21")


def test_days_are_those_of_the_speaker() -> None:
    now = datetime(2023, 8, 16, 1, tzinfo=ZoneInfo("Asia/Tokyo"))  # 15 August in UTC
    found = window("yesterday", now)
    assert found is not None
    assert (found.start, found.end) == (
        datetime(2023, 8, 14, 15, tzinfo=UTC),
        datetime(2023, 8, 15, 15, tzinfo=UTC),
    )
    assert found.start.tzinfo is found.end.tzinfo is UTC


def test_a_day_that_a_zone_skipped_is_no_window() -> None:
    now = datetime(2012, 1, 2, 12, tzinfo=ZoneInfo("Pacific/Apia"))
    assert window("on 29 December 2011", now) is not None
    assert window("on 30 December 2011", now) is None


@pytest.mark.parametrize("year", [1, 9999])
@pytest.mark.parametrize("month_and_day", [(1, 1), (12, 31)])
@pytest.mark.parametrize("hours", [-12, 0, 14])
def test_the_ends_of_the_calendar_raise_nothing(
    year: int, month_and_day: tuple[int, int], hours: int
) -> None:
    zone = ZoneInfo(f"Etc/GMT{-hours:+d}")
    now = datetime(year, *month_and_day, 12, tzinfo=zone)
    phrases = "yesterday|last night|this week|on Monday|in May|last winter|999 years ago|this year|since 2019"
    for phrase in phrases.split("|"):
        found = window(phrase, now)
        assert found is None or found.start < found.end


def test_only_the_beginning_of_a_text_is_read() -> None:
    assert days("x " * (MOST_CHARS // 2 - 5) + "yesterday") is not None
    assert days("x " * MOST_CHARS + "yesterday") is None
    assert days("in 2030 " * MOST_PHRASES + "yesterday") is None
    assert days("in 2030 " * (MOST_PHRASES - 1) + "yesterday") is not None


def test_no_library_is_loaded_for_texts_that_name_no_time() -> None:
    code = (
        "import sys; from datetime import datetime, UTC; from redismem.timewindow import has_time, window;"
        "assert not has_time('we met her'); window('we met her', datetime.now(UTC)); has_time('last week');"
        "assert 'dateparser' not in sys.modules; assert window('last week', datetime.now(UTC));"
        "assert 'dateparser' in sys.modules"
    )
    bad_zone = {**os.environ, "TZ": "No/Where"}  # the machine's own zone is not asked for
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60, env=bad_zone)


WORDS = """yesterday today ago last this past the other since in on during of at over half a an few couple
several week weeks month months year years day days night weekend monday friday May may march January summer
winter 2 31 8th 2022 1990s 999 , . / - 8/5/2023 2023-02-30 early hour minutes back two morning 's""".split()
MOMENTS = st.datetimes(
    datetime(1, 1, 2), datetime(9999, 12, 30), timezones=st.sampled_from([UTC, ZoneInfo("America/St_Johns")])
)


@settings(deadline=None)  # the first call loads the library
@given(st.one_of(st.text(), st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)), MOMENTS)
@example("İ last week", NOW)
@example("\0 yesterday \ud800", NOW)
def test_no_text_raises_and_every_window_has_begun(text: str, now: datetime) -> None:
    found = window(text, now)
    if found is not None:
        assert found.start < found.end
        assert found.start <= now
        assert has_time(text)
        assert found.phrase in " ".join(text.split())
