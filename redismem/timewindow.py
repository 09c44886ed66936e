"""The only place that reads from a text which stretch of the past it speaks of. Pure, and slow.

Idea: a grammar of English phrases finds them, `dateparser` reads the point of time that a phrase names, and
the point is widened to the period the phrase speaks of: a day, an ISO week, a month, a season, a year.
`dateparser.search` is not used: of "what did we do" it makes a Wednesday, of "I may" the fifth month.

What is decided:

* A phrase that leaves open which one is meant means the latest that has begun: "in March", "on Monday" (never
  today), "8 May". With "last" it is the latest that is over, and not the present one.
* "the other day" is the last seven days; "a few days ago" is two to six of them, "a couple" one to three,
  "several" three to ten. "last night" is noon to noon. An hour ago is the day that was.
* Seasons are northern and begin with a month; the winter of a year ends in the next one.
* 8/5/2023 is in August.
* "since" a period is from its begin until today.

Not found: holidays, "the 3rd", two phrases that bound one window, any language but English. A month without a
preposition or a number beside it is none ("June called"), nor is "may" or "march" in front of a number.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from itertools import islice

from redismem.words import ascii_lower

#: characters of a text that are read, and phrases in them
MOST_CHARS = 1_000
MOST_PHRASES = 8

_DAY = timedelta(days=1)
_WEEK = timedelta(days=7)

_COUNTS = {
    **dict.fromkeys(("a", "an", "one"), (1, 1)),
    **{
        word: (number, number)
        for number, word in enumerate(
            "two three four five six seven eight nine ten eleven twelve".split(), start=2
        )
    },
    "couple": (1, 3),
    "few": (2, 6),
    "several": (3, 10),
}
#: the month each begins with
_SEASONS = {"spring": 3, "summer": 6, "autumn": 9, "fall": 9, "winter": 12}

_COUNT = rf"(?:\d{{1,3}}|(?:a[ ])?(?:couple(?:[ ]of)?|few)|{'|'.join(_COUNTS)})"
_YEAR = r"(?:19|20)\d\d\b(?![-.,]\d)"
_MONTHS = "january february march april may june july august september october november december".split()
_SHORT_MONTHS = "jan feb mar apr jun jul aug sep sept oct nov dec".split()
_MONTH = f"(?:{'|'.join(_MONTHS)})"
_ANY_MONTH = rf"(?:{'|'.join(_MONTHS)}|(?:{'|'.join(_SHORT_MONTHS)})\b\.?)"
_DAY_OF_MONTH = r"\d{1,2}(?:st|nd|rd|th)?\b"
_WEEKDAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
_WEEKDAY = "(?:mon|tues|wednes|thurs|fri|satur|sun)day"
_SHORT_WEEKDAYS = "mon tue tues wed thu thur thurs fri sat sun".split()
_SEASON = f"(?:{'|'.join(_SEASONS)})"
_PART = "(?:early|mid|late)[ -]"

_OPENING = """the since day yesterday today this on last past in during of over at until start beginning
    middle end month weekend half early mid late""".split()
_FIRST_WORDS = "|".join([*_OPENING, *_MONTHS, *_SHORT_MONTHS, *_WEEKDAYS, *_SEASONS, *_COUNTS])

# The name of a group is the name of its reader. The lookahead is for speed: most words begin no phrase.
_PHRASE = re.compile(
    rf"""\b(?=[0-9]|(?:{_FIRST_WORDS})\b)
    (?:since[ ])?(?:
    (?P<day>
        (?:{_WEEKDAY},?[ ])?
        (?:(?:the[ ])?{_DAY_OF_MONTH}(?:[ ]of)?[ ]{_ANY_MONTH}|{_ANY_MONTH}[ ]{_DAY_OF_MONTH})
        (?:,?[ ]{_YEAR})?
        |(?:19|20)\d\d-\d\d?-\d\d?(?!\d)|\d\d?(?P<mark>[/.])\d\d?(?P=mark)(?:19|20)\d\d\b
        |(?:(?:the[ ])?day[ ]before[ ])?yesterday\b|today\b|this[ ](?:morning|afternoon|evening)\b
        |(?<!next[ ])(?<!every[ ])(?<!each[ ])(?<!this[ ])(?<!coming[ ])(?:(?:on|last|past)[ ])?{_WEEKDAY}\b
        |last[ ](?:{"|".join(_SHORT_WEEKDAYS)})\b
    )
    |(?P<month>
        {_ANY_MONTH}(?:[ ]of)?,?[ ]{_YEAR}
        |(?:(?:in|during|last|(?:start|beginning|middle|end|month|weekend)[ ]of)[ ]|(?<=since[ ]))
         (?:{_PART})?{_MONTH}\b(?!['\u2019]s\b)(?:(?:[ ]of)?,?[ ]{_YEAR})?
    )
    |(?P<season>
        (?:(?:last|this|past|(?:in|during|over)[ ]the|(?<=since[ ])the)[ ](?:{_PART})?{_SEASON}\b
         |{_SEASON}\b(?=[ ](?:of[ ])?{_YEAR}))
        (?:[ ](?:of[ ])?{_YEAR})?
    )
    |(?P<ago>
        (?:{_COUNT}[ ](?:minute|hour|day|week|month|year)s?|half[ ]an[ ]hour|half[ ]a[ ]year)[ ](?:ago|back)\b
    )
    |(?P<rolling>(?:last|past)[ ]{_COUNT}[ ](?:day|week|month|year)s\b|past[ ](?:week|month|year)\b)
    |(?P<unit>(?:last|this)[ ](?:week|month|year)\b)
    |(?P<weekend>(?:last|past|this|(?:over|at|during|on)[ ]the)[ ]weekend\b)
    |(?P<night>last[ ](?:night|evening)\b)
    |(?P<lately>the[ ]other[ ](?:day|night|evening)\b)
    |(?P<decade>(?:(?:in|during|of)[ ](?:the[ ])?|(?<=since[ ])(?:the[ ])?)(?:{_PART})?
        (?:(?:19|20)\d|['\u2019]?[5-9])0s\b)
    |(?P<year>(?:(?:in|during|of|until)[ ]|(?<=since[ ]))(?:{_PART})?{_YEAR})
    )""",
    re.VERBOSE,
)
# of these each phrase has one
_TELLING = frozenset(
    [
        *_MONTHS,
        *_SHORT_MONTHS,
        *_WEEKDAYS,
        *_SHORT_WEEKDAYS,
        *_SEASONS,
        *map(str, range(1900, 2100)),
        *(f"{century}{decade}0s" for century in ("", "19", "20") for decade in range(10)),
        *"yesterday today weekend ago".split(),
    ]
)
# or one of each of these
_SPANS = frozenset(
    """minute minutes hour hours day days week weeks month months year years night morning afternoon
    evening""".split()
)
_WHICH = frozenset("this last past back other".split())
_BLANKED = str.maketrans(
    dict.fromkeys(string.punctuation + "\u2018\u2019\u201c\u201d\u2026\u2013\u2014", " ")
)

# without a capital these are verbs
_VERBS = re.compile(r"\b(?:may|march|mar) \d\d?\Z|\d (?:may|march|mar)\Z")

_Days = tuple[date, date]


@dataclass(frozen=True, slots=True)
class TimeWindow:
    """A stretch of time in UTC that a text speaks of; `end` is not in it. `phrase` is as the text has it."""

    start: datetime
    end: datetime
    phrase: str


def has_time(text: str) -> bool:
    """Return whether `text` has a phrase that may name a time; where it has none, `window` finds none.

    Cost: 10 us for 100 characters without any word of time, 40 us for 1,000 and more; with such a word 0.4 us
    a character. No library.
    """
    return next(_phrases(text), None) is not None


def window(text: str, now: datetime) -> TimeWindow | None:
    """Return the stretch of the past that `text` speaks of; None when it names none.

    Of several it is the first that is over, else the first that has begun. Days are those of the zone
    of `now`.

    Args:
        now: when the text was said; with a zone.

    Cost: the first call of a process 0.4 s (half of it imports `dateparser`), then 1 ms a phrase, eight
    at most. It holds the interpreter: call it from a thread that nobody waits for.
    """
    running = None
    for kind, phrase in islice(_phrases(text), MOST_PHRASES):
        found = _found(kind, phrase, now)
        if found and found.end <= now:
            return found
        running = running or found
    return running


def _phrases(text: str) -> Iterator[tuple[str, str]]:
    """Yield the kind of each phrase, and the phrase as it is written."""
    line = " ".join(text[:MOST_CHARS].split())
    lowered = ascii_lower(line)
    words = frozenset(lowered.translate(_BLANKED).split())
    if _TELLING.isdisjoint(words) and (_SPANS.isdisjoint(words) or _WHICH.isdisjoint(words)):
        return
    for match in _PHRASE.finditer(lowered):
        phrase = line[match.start() : match.end()]
        if match.lastgroup and not _VERBS.search(phrase):
            yield match.lastgroup, phrase


def _found(kind: str, phrase: str, now: datetime) -> TimeWindow | None:
    said = ascii_lower(phrase)
    since = said.startswith("since ")
    try:
        days = _READERS[kind](said.removeprefix("since "), now)
        if days is None:
            return None
        first, last = days
        start, end = _midnight(first, now), _midnight(now.date() + _DAY if since else last, now)
        if kind == "night":
            start, end = start + _DAY / 2, end + _DAY / 2
        start, end = start.astimezone(UTC), end.astimezone(UTC)
    except (ValueError, OverflowError):  # a year that there is not
        return None
    # a day may be missing: Samoa had no 30 December 2011
    return TimeWindow(start, end, phrase) if start < end and start <= now else None


def _midnight(day: date, now: datetime) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=now.tzinfo)


def _point(phrase: str, now: datetime) -> date | None:
    # slow to import, and most texts name no time
    from dateparser import parse  # type: ignore[import-untyped]  # noqa: PLC0415

    # A base without hours: dateparser kept something of each base it saw (its issue 985). Without a zone it
    # asks the machine for one, and raises where TZ names none (1.5.0).
    base = datetime(now.year, now.month, now.day)
    settings = {"PREFER_DATES_FROM": "past", "RELATIVE_BASE": base, "TIMEZONE": "UTC"}
    point: datetime | None = parse(phrase, languages=["en"], settings=settings)
    return point.date() if point else None


def _period(unit: str, day: date) -> _Days:
    """Return the day, ISO week, month or year that a day is in."""
    if unit == "week":
        first = day - day.weekday() * _DAY
        return first, first + _WEEK
    if unit == "month":
        first = day.replace(day=1)
        return first, (first + 31 * _DAY).replace(day=1)
    if unit == "year":
        return date(day.year, 1, 1), date(day.year + 1, 1, 1)
    return day, day + _DAY


def _day(phrase: str, now: datetime) -> _Days | None:
    if re.search("this|today", phrase):
        return _period("day", now.date())
    said = re.sub(f"^(?:(?:on|last|past) |{_WEEKDAY},? )", "", phrase)
    day = _point(said, now)
    return _period("day", day) if day else None


def _month(phrase: str, now: datetime) -> _Days | None:
    named = re.search(f"{_ANY_MONTH}(?:(?: of)?,? [0-9]{{4}})?$", phrase)
    day = _point(named[0], now) if named else None
    if day is None:
        return None
    first, end = _period("month", day)
    if phrase.startswith("last ") and end > now.date():
        return _period("month", first.replace(year=first.year - 1))
    return first, end


def _year(phrase: str, now: datetime) -> _Days:
    return _period("year", date(int(phrase[-4:]), 1, 1))


def _decade(phrase: str, now: datetime) -> _Days:
    digits = re.sub(r"\D", "", phrase)
    first = int(digits) if len(digits) == 4 else 1900 + int(digits)
    return date(first, 1, 1), date(first + 10, 1, 1)


def _season(phrase: str, now: datetime) -> _Days:
    name = next(name for name in _SEASONS if name in phrase)
    if given := re.search(r"\d{4}$", phrase):
        return _season_of(name, int(given[0]))
    is_over = phrase.startswith(("last", "past"))
    latest = (_season_of(name, now.year - back) for back in range(3))
    return next(days for days in latest if days[is_over] <= now.date())


def _season_of(name: str, year: int) -> _Days:
    first = date(year, _SEASONS[name], 1)
    return first, (first + 95 * _DAY).replace(day=1)


def _ago(phrase: str, now: datetime) -> _Days | None:
    *count, unit, _ = phrase.replace("half a year", "6 months").replace("half an hour", "1 hours").split()
    unit = unit.removesuffix("s")
    least, most = _counted(count)
    if unit in ("minute", "hour"):
        return _period("day", (now - timedelta(**{unit + "s": least})).date())
    near, far = _point(f"{least} {unit}s ago", now), _point(f"{most} {unit}s ago", now)
    if near is None or far is None:
        return None
    return _period(unit, far)[0], _period(unit, near)[1]


def _counted(words: list[str]) -> tuple[int, int]:
    """Return the least and the most that is meant; of `a couple of` the second word counts."""
    word = next((word for word in words if word in _COUNTS and word != "a"), words[0])
    return _COUNTS[word] if word in _COUNTS else (int(word), int(word))


def _rolling(phrase: str, now: datetime) -> _Days | None:
    _, *count, unit = phrase.split()
    first = _point(f"{_counted(count)[1] if count else 1} {unit.removesuffix('s')}s ago", now)
    return (first, now.date() + _DAY) if first else None


def _unit(phrase: str, now: datetime) -> _Days | None:
    day = _point(phrase, now)
    return _period(phrase.rsplit(maxsplit=1)[-1], day) if day else None


def _weekend(phrase: str, now: datetime) -> _Days:
    today = now.date()
    saturday = today - today.weekday() * _DAY + 5 * _DAY
    if "this" not in phrase and saturday > today:
        saturday -= _WEEK
    if re.search("last|past", phrase) and saturday + 2 * _DAY > today:
        saturday -= _WEEK
    return saturday, saturday + 2 * _DAY


def _night(phrase: str, now: datetime) -> _Days:
    today = now.date()
    return today - _DAY, today


def _lately(phrase: str, now: datetime) -> _Days:
    today = now.date()
    return today - _WEEK, today


_READERS: dict[str, Callable[[str, datetime], _Days | None]] = {
    "day": _day,
    "month": _month,
    "season": _season,
    "ago": _ago,
    "rolling": _rolling,
    "unit": _unit,
    "weekend": _weekend,
    "night": _night,
    "lately": _lately,
    "decade": _decade,
    "year": _year,
}
