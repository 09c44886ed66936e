"""The only place that says which memories are near each other, and which of them look wrong. Pure.

Nothing here merges anything: a flag is a question to whoever may correct or delete.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from redismem.material import Material
from redismem.words import STOP_WORDS, speaker, text_words

#: nearest memories kept a memory
NEAREST = 10
#: cosine from which two memories say the same
DUPLICATE = 0.97
#: cosine from which two memories of one topic may contradict each other. The words decide; below it
#: hardly any pair shares enough of them
SIMILAR = 0.70
#: the same where the topic of either is not known
SIMILAR_UNTAGGED = 0.75

#: scores of one block of rows: 32 MB
_BLOCK_SCORES = 8_000_000
#: equal vectors get cosines that differ by less, depending on where a block ends
_ROUNDING = 1e-6
#: characters that are read, and sentences of them
_MAX_CHARS = 1_000
_MAX_SENTENCES = 12


def nearest(vectors: NDArray[np.float32], rows: Sequence[int]) -> list[list[tuple[int, float]]]:
    """Return for each of `rows` its `NEAREST` other rows and their cosines, best first.

    Args:
        vectors: unit rows; shape (n, dim).

    Returns:
        Fewer where there are fewer; equal cosines (6 digits) in the order of the rows.

    Cost: O(rows n dim), about 100 MB beside the vectors (n = 50,000).
    """
    kept = min(NEAREST, len(vectors) - 1)
    if kept < 1:
        return [[] for _ in rows]
    step = max(1, _BLOCK_SCORES // len(vectors))
    found = []
    for first in range(0, len(rows), step):
        block = np.asarray(rows[first : first + step], np.intp)
        scores = vectors[block] @ vectors.T
        scores[np.arange(len(block)), block] = -np.inf  # a memory is not its own neighbour
        lowest = np.partition(scores, -kept, axis=1)[:, -kept] - _ROUNDING
        found += [_best(line, bound, kept) for line, bound in zip(scores, lowest, strict=True)]
    return found


def _best(scores: NDArray[np.float32], bound: float, kept: int) -> list[tuple[int, float]]:
    near = np.flatnonzero(scores >= bound)
    cosines = np.round(np.clip(scores[near].astype(np.float64), -1, 1), 6)
    order = np.argsort(-cosines, kind="stable")[:kept]
    return [(int(near[at]), float(cosines[at])) for at in order]


@dataclass(frozen=True, slots=True)
class Flag:
    """What is wrong with a pair."""

    kind: Literal["duplicate", "contradiction"]
    #: number, negation or value; empty for duplicates
    why: str


def flagged(one: Material, other: Material, cosine: float) -> Flag | None:
    """Return whether two memories say the same, or seem to contradict each other; None: neither.

    A contradiction is two statements with the same subject and the same words but for a number, a negation
    or a value, from different moments. All of these must hold; whatever is in doubt is no contradiction:

    - entity: a shared one; both about the user; or, where either has none, not said of themselves by
      different speakers. In any case the two sentences open with the same content words.
    - topic: a shared tag or the same cluster, and a cosine of `SIMILAR`; `SIMILAR_UNTAGGED` where there is
      nothing to compare.
    - later: the moments differ by a second or more.
    - words: see `_number`, `_negation`, `_value`. Questions, conditions and what sentences of both have in
      common are left out before. Only English is read.

    A pair from `DUPLICATE` on is no duplicate if its numbers or negations differ, or if each has a name that
    the other lacks, contradiction or not.

    Cost: about 0.3 ms a pair of cosine `SIMILAR` or more, whose words are read; nothing below.
    """
    if cosine < SIMILAR:
        return None
    near = cosine >= DUPLICATE
    possible = (
        abs(one.moment_s - other.moment_s) >= 1
        and cosine >= _similar_from(one, other)
        and _may_share_entity(one, other)
    )
    if not near and not possible:
        return None
    texts = (one.text[:_MAX_CHARS], other.text[:_MAX_CHARS])
    why = _difference(*texts)
    if why and possible:
        return Flag("contradiction", why)
    return Flag("duplicate", "") if near and not why and _tell_the_same(*texts) else None


def _similar_from(one: Material, other: Material) -> float:
    """Return the cosine from which the pair counts as one topic; above 1: never."""
    tags = [{topic.casefold() for topic in item.topics} for item in (one, other)]
    if tags[0] & tags[1] or (one.cluster and one.cluster == other.cluster):
        return SIMILAR
    comparable = all(tags) or (one.cluster and other.cluster)
    return 2.0 if comparable else SIMILAR_UNTAGGED


def _may_share_entity(one: Material, other: Material) -> bool:
    of_user = [bool(_FIRST_PERSON.search(item.text)) for item in (one, other)]
    speakers = {speaker(item.text) for item in (one, other)} - {""}
    if len(speakers) == 2 and any(of_user):
        return False  # each says it of themselves
    names = [{name.casefold() for name in item.entities} for item in (one, other)]
    return all(of_user) or not all(names) or bool(names[0] & names[1])


@dataclass(frozen=True, slots=True)
class _Sentence:
    """A statement, as far as two are compared."""

    #: stems in order, without stop words; the first person is `i`
    order: tuple[str, ...]
    #: the first of them: `i`, `i sister` of my sister, `meeting`
    subject: tuple[str, ...]
    #: what is left of them without numbers, negations and verdicts
    words: frozenset[str]
    #: numbers, hours, months and weekdays
    numbers: frozenset[str]
    #: not, never, hates
    negated: bool
    #: no longer, quit: a negation that lasts
    ended: bool
    plain: str

    def is_passing(self) -> bool:
        """Return whether it tells of one occasion, which stays true after the next one."""
        return bool(_PASSING.search(self.plain)) or any(map(_is_event, text_words(self.plain)))


def _difference(one: str, other: str) -> str:
    """Return number, negation or value, the first that two sentences of the texts differ by; or nothing."""
    left, right = (list(_sentences(text)) for text in (one, other))
    shared = {sentence.order for sentence in left} & {sentence.order for sentence in right}
    for name, rule in (("number", _number), ("negation", _negation), ("value", _value)):
        for a, b in product(left, right):
            own = a.order not in shared and b.order not in shared
            if own and a.subject == b.subject and rule(a, b):
                return name
    return ""


def _number(a: _Sentence, b: _Sentence) -> bool:
    """Each has a number that the other lacks: `rent is 900 euros`, `rent is 1,000 euros a month`.

    Another number on another weekday is another occasion.
    """
    own = [a.numbers - b.numbers, b.numbers - a.numbers]
    if not all(own) or a.negated != b.negated or a.words <= {"i"} or not _alike(a, b):
        return False
    another_occasion = all(side & _WEEKDAYS and side - _WEEKDAYS for side in own)
    return not (another_occasion or a.is_passing() or b.is_passing())


def _negation(a: _Sentence, b: _Sentence) -> bool:
    """One denies or ends what the other says: `eats meat`, `stopped eating meat`."""
    denied = [side.negated + side.ended for side in (a, b)]
    if sorted(denied) != [0, 1] or a.numbers != b.numbers:
        return False
    if len(a.words & b.words) < 2 or not _alike(a, b):
        return False
    return not any(side.is_passing() and not side.ended for side in (a, b))


def _alike(a: _Sentence, b: _Sentence) -> bool:
    """Return whether one has only words of the other and two of three, or three of four are shared."""
    shared = len(a.words & b.words)
    fewer, more = sorted((len(a.words), len(b.words)))
    return (shared == fewer and 3 * shared >= 2 * more) or 4 * shared >= 3 * len(a.words | b.words)


def _value(a: _Sentence, b: _Sentence) -> bool:
    """The sentences part in one place, by one or two words, after words that leave room for one value only.

    `lives in Berlin / Munich` and `favorite color is blue / green`, but not `likes tea / coffee`.
    """
    if a.negated or b.negated or a.ended or b.ended:
        return False
    start = _shared_start(a.order, b.order)
    end = _shared_start(a.order[start:][::-1], b.order[start:][::-1])
    values = [[word for word in side.order[start : len(side.order) - end] if word != "a"] for side in (a, b)]
    if not all(1 <= len(value) <= 2 for value in values) or set(values[0]) & set(values[1]):
        return False
    if any(word in _NO_VALUES or word in a.numbers | b.numbers for value in values for word in value):
        return False
    before = a.order[:start]
    # my manager is …, Anna is a …: who somebody is, not how
    is_named = bool(before) and "be" in before and (before[-1] == "a" or before.index("be") >= 2)
    return (is_named or not _SINGLE.isdisjoint(before)) and not (a.is_passing() or b.is_passing())


def _shared_start(one: Sequence[str], other: Sequence[str]) -> int:
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _tell_the_same(one: str, other: str) -> bool:
    figures = [
        {word for word in _tokens(text_words(_plain(text))) if _is_figure(word)} for text in (one, other)
    ]
    names = [set(_NAME.findall(text)) for text in (one, other)]
    return figures[0] == figures[1] and (names[0] <= names[1] or names[1] <= names[0])


def _is_figure(word: str) -> bool:
    return _is_number(word) or word in _NEGATIONS or any(map(str.isdigit, word))


def _sentences(text: str) -> Iterator[_Sentence]:
    """Yield the statements of a text: no questions, conditions, or asides in brackets."""
    text = _LABEL.sub(r"\1 is", text)
    spoken = text.split(":", 1)[1] if speaker(text) else text
    parts = _SENTENCE_END.split(_plain(_ASIDE.sub(" ", spoken)))
    for part in parts[:_MAX_SENTENCES]:
        if not part.rstrip().endswith("?") and not _NO_STATEMENT.search(part):
            yield _sentence(_ENDED.sub(" ended ", _IDIOM.sub(" ", part)))


def _sentence(plain: str) -> _Sentence:
    raw = text_words(_WHEN.sub(" ", plain))
    order = tuple(_stem(word) for word in _tokens(raw) if word not in _FILLERS)
    telling = [word for word in order if word not in _NOT_COMPARED and not _is_number(word)]
    return _Sentence(
        order=order,
        subject=tuple(telling[: 2 if raw and raw[0] in ("my", "our") else 1]),
        words=frozenset(telling),
        numbers=frozenset(filter(_is_number, order)),
        negated=not _NEGATIONS.isdisjoint(raw),
        ended="ended" in raw,
        plain=plain,
    )


def _plain(text: str) -> str:
    """Return a text with numbers, hours, negations and the user written in one way."""
    text = text.replace("\u2019", "'")
    for pattern, written in _SPELLINGS:
        text = pattern.sub(written, text)
    return text


def _afternoon(match: re.Match[str]) -> str:
    return f"{int(match[1]) - 12}:{match[2]} p_m"


def _tokens(words: list[str]) -> list[str]:
    """Return the words that carry something; a number that only names something is one word with it."""
    found: list[str] = []
    before = ""
    for word in words:
        token = _SAME.get(word, word)
        if before in _TENS and token in _UNITS:
            found[-1] = str(int(found[-1]) + int(token))
        elif word in _POWERS and before in _SAME and found[-1].isdigit():
            found[-1] = str(int(found[-1]) * _POWERS[word])
        elif token.isdigit() and before in _NUMBERED:
            found[-1] += "_" + token
        elif token in _KEPT or token not in STOP_WORDS:
            found.append(token)
        before = word
    return found


def _is_number(word: str) -> bool:
    return word[0].isdigit() or word in _CALENDAR


def _is_event(word: str) -> bool:
    return word in _PAST or (word.endswith("ed") and len(word) > 4 and word not in _STATES)


def _stem(word: str) -> str:
    if _is_number(word) or not word.isascii():
        return word
    for ending in ("ing", "ed", "es", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3 and not word.endswith("ss"):
            word = word.removesuffix(ending)
            break
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "sl":
        word = word[:-1]
    return word.removesuffix("e") if len(word) > 3 else word


_FIRST_PERSON = re.compile(r"\b(?:I|[Mm]y|[Mm]e|[Ww]e|[Oo]ur|[Uu]ser)\b")
# a capitalised word that does not open a sentence
_NAME = re.compile(r"(?<=[\w,'] )[A-Z]\w+")
# Favorite color: blue. Who speaks has capitals in each word
_LABEL = re.compile(r"^(\w+(?: [a-z]\w*){1,2}):(?= )")
_SENTENCE_END = re.compile(r"(?<=[.!?;])\s+|\n+")
_ASIDE = re.compile(r"\[[^\]]*\]|\([^)]*\)")
_NO_STATEMENT = re.compile(
    r"\b(?:if|maybe|perhaps|might|wish|hope|would|could)\b"
    r"|^\W*(?:who|what|where|when|why|how|which|is|are|am|do(?! not)|does|did|can|will|should)\b",
    re.IGNORECASE,
)
_IDIOM = re.compile(
    r"\b(?:not (?:only|just|sure|bad|to mention)|why not|can not wait|do not worry|never mind"
    r"|oh no|no (?:problem|worries|doubt|matter|way|wonder))\b",
    re.IGNORECASE,
)
_ENDED = re.compile(
    r"\b(?:no longer|no more|not any ?more|stop(?:s|ped|ping)?|quit(?:s|ting)?|g(?:ive|ave|iven) up"
    r"|used to)\b",
    re.IGNORECASE,
)
_PASSING = re.compile(
    r"\b(?:today|tonight|yesterday|tomorrow|ago|lately|recently|soon|just|let's"
    r"|(?:this|last|next) (?!to\b)\w+"
    r"|(?:have|has) (?:not|never)|work\w* (?:on(?! (?:week|\w+day))|out|hard)"
    r"|(?:is|am|are) (?!working (?:at|for|as)\b|living\b)\w+ing)\b",
    re.IGNORECASE,
)
_WHEN = re.compile(r"\b(?:last|this) (?:week|weekend|month|year|spring|summer|fall|autumn|winter)\b")
_SPELLINGS: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"\b(?:the )?user's\b", re.IGNORECASE), "my"),
    (re.compile(r"\b(?:the )?user\b", re.IGNORECASE), "I"),
    (re.compile(r"\b(?:can't|cannot)\b", re.IGNORECASE), "can not"),
    (re.compile(r"\bwon't\b", re.IGNORECASE), "will not"),
    (re.compile(r"n't\b"), " not"),
    (re.compile(r"'m\b"), " am"),
    (re.compile(r"\b(May|March)\b(?! I\b)"), r"month_\1"),
    (re.compile(r"\b(?:is|are) called\b", re.IGNORECASE), "is named"),
    (re.compile(r"(?<=\d),(?=\d{3}\b)"), ""),
    (re.compile(r"\b(1[3-9]|2[0-3]):([0-5]\d)\b"), _afternoon),
    (re.compile(r"(?<=\d):00\b"), ""),
    (re.compile(r"(?<=\d)[.:](?=\d)"), "_"),
    (re.compile(r"(?<=\d)\s*([ap])\.?m\b(?:\.(?= [a-z]))?", re.IGNORECASE), r" \1_m"),
    (re.compile(r"(?<=\d)(?=[a-z]{1,3}\b)"), " "),  # 20mg, 3rd
)

_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_SMALL = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen""".split()
_UNITS = frozenset("123456789")
_POWERS = {"hundred": 100, "thousand": 1_000, "million": 1_000_000}
#: words that are compared as another one
_SAME = (
    {word: str(number) for number, word in enumerate(_SMALL)}
    | {word: str(10 * number) for number, word in enumerate(_TENS, 2)}
    | dict.fromkeys("me my mine we our us".split(), "i")
    | {"is": "be", "am": "be", "an": "a", "dozen": "12", "favourite": "favorite", "colour": "color"}
)
_WEEKDAYS = frozenset("monday tuesday wednesday thursday friday saturday sunday".split())
_CALENDAR = _WEEKDAYS.union(
    """january february month_march april month_may june july august september october november december
    a_m p_m""".split()
)
#: what a number after it names, rather than counts
_NUMBERED = frozenset(
    """bus chapter day episode flight gate invoice level lesson line order page part phase platform room
    season step ticket train version""".split()
)
#: stop words that tell sentences apart
_KEPT = frozenset("a be i no not".split())
_NEGATIONS = frozenset("no nor not never without hate hates dislike dislikes".split())
_FILLERS = frozenset(
    """actually already also always anymore currently definitely every hey just much now nd oh often ok okay
    please quite rd really still st th today totally usually well yeah yes""".split()
)
#: what an event is told with, where it does not end in -ed
_PAST = frozenset(
    """ate bought broke brought built came caught did drank drew drove felt flew found gave got had heard held
    lost made met paid ran said sang sat saw sent slept sold spent swam taught told took went were was won
    wore wrote""".split()
)
#: what does end in -ed, but lasts
_STATES = frozenset(
    """allowed based detailed divorced employed ended engaged excited hundred indeed interested limited
    located married moved named need planned retired scared scheduled speed supposed tired used""".split()
)
#: stems of verdicts and of words that say little; with those that are told apart elsewhere
_NOT_COMPARED = _NEGATIONS.union(
    "a be end".split(),
    map(
        _stem,
        """adore dislike enjoy feel get getting go going gonna got guess hate know like love mean
        say see stand sure think want""".split(),
    ),
)
#: what somebody has one of at a time
_SINGLE = frozenset(
    map(_stem, "birthday born engaged favorite live married move password prefer study work".split())
)
#: how something is found to be, or how somebody is for a while
_NO_VALUES = frozenset(
    map(
        _stem,
        """amazing awesome back bad beautiful busy cool easy excited fantastic fine fun glad good great happy
        hard here home hungry incredible large lovely nice perfect proud ready sad sick small there tired
        tough well wonderful""".split(),
    )
)
