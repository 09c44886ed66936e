"""The only place that shortens texts without a model: summaries made of the sentences themselves. Pure.

Idea: maximal marginal relevance (Carbonell & Goldstein, "The use of MMR", SIGIR 1998) over sentences whose
relevance is their nearness to the centroid of all (Radev et al., "Centroid-based summarization", 2004).
Again and again the sentence is taken that is nearest to what all of them say and farthest from those taken
before; at last they are put in the order of time.

It departs from the sources in four points. Relevance also counts a sentence's weight: importance, and how
much it can say alone. A sentence that repeats a chosen one is refused, not only put last, however much room
is left. Of two sentences that differ in numbers or negations alone the later one is told. And the centroid
is that of embeddings instead of word weights.

What the constants cost: `REPEATED` lower loses facts that look alike, higher tells them twice. `REDUNDANCY`
lower dwells on one subject, and what all talk about is seldom what happened; `WEIGHT` lower tells how it was
instead of what it was. Of 128 sessions of five LoCoMo conversations 150 tokens each hold this share
of the words that answer questions about that day: sentences at random 0.21, the most central ones 0.11, MMR
without weights 0.21 to 0.26, these constants 0.34. The lists of words are English: in other languages
greetings stay in, as short sentences far from the centroid.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from redismem.material import Material
from redismem.words import STOP_WORDS, day_words, speaker, text_words

#: cosine with a chosen sentence from which another one repeats it
REPEATED = 0.85
#: share of a sentence's telling words that a chosen one has, from which it repeats it
REPEATED_WORDS = 0.8
#: taken off for a cosine of 1 with a chosen sentence, where a cosine of 1 with the centroid adds 1
REDUNDANCY = 0.9
#: added for a weight of 1; importance is 0.5 unless someone says otherwise
WEIGHT = 1.0
#: telling words, and one, from which a sentence says enough alone
CLEAR_WORDS = 8
#: of the shortlist: this part is the most important, whenever it was
IMPORTANT_PART = 4
#: memories of one stretch of time that get into the shortlist, when all stretches get the same
STRETCH = 4
#: sentences of each memory that are read for it
LISTED_SENTENCES = 4

#: characters of a memory that are read, sentences of it, and characters of a sentence
MOST_TEXT_CHARS = 20_000
MOST_SENTENCES = 40
MOST_CHARS = 240
#: sentences that are compared: the weightiest
MOST_CANDIDATES = 2_000

#: what talk opens with; one other word after it says nothing more
OPENERS = frozenset(
    """aw aww awesome bye cheers congrats congratulations cool good goodbye great ha haha hello hey hi hiya
    lol nice oh ok okay sure thank thanks whoa wow yay yeah yep yes yup""".split()
)
CHATTER = OPENERS | frozenset(
    """absolutely agree agreed amazing best better bet care chat come completely definitely easy else even
    exactly exciting fantastic feel fun get getting give glad go goes going gonna gotta hang happen happened
    happy hear heard hope idea incredible inspiring interesting keep kind know later let like look looking
    looks lot lots love lovely luck lucky make makes many maybe mean means much need new pretty proud rad
    really right say see seems soon sound sounds stuff super support sweet take talk tell thing things think
    thinking time totally true truly wait wanna want way well wonderful word worry""".split()
)
_TIMES = frozenset(
    """yesterday today tonight tomorrow week weekend month year morning last ago next monday tuesday
    wednesday thursday friday saturday sunday january february march april may june july august september
    october november december""".split()
)
_BACK_REFERENCES = frozenset("it that this they these those he she its".split())
_FIRST_PERSON = frozenset("i me my mine we us our".split())
_SECOND_PERSON = frozenset("you your yours".split())
_NEGATIONS = frozenset("no not never none nothing without don doesn didn isn aren wasn won cannot".split())
_QUESTION_MARKS = ("?", "\uff1f", "\u061f")

_BULLET = re.compile("^(?:[-*\u2022\u00b7]|\\d{1,2}[.)]) ")
# After an end mark and closing quotes; before a remark in brackets that ends the line. CJK need no blank.
_END = re.compile(
    "(?<=[.!?\u2026\u061f\u0964])[\"')\u201d\u2019]* (?![a-z])"
    "|(?<=[\u3002\uff01\uff1f])"
    "| (?=\\[[^\\[\\]]*\\]$)"
)
_ABBREVIATED = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|Prof|Jr|Sr|vs|No|e\.g|i\.e|approx|[A-HJ-Z])\.$")


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence of a memory, with who says it."""

    text: str
    #: id of the memory
    source: str
    moment_s: float
    #: 0..1, pinned 1..2: importance, less where it says little alone
    weight: float


@dataclass(frozen=True, slots=True)
class Extract:
    """A summary. `sources`: the memories it was made of, in the order of the text; `tokens` of the text."""

    text: str
    sources: tuple[str, ...]
    tokens: int


def sentences(material: Material) -> list[Sentence]:
    """Return what a memory says, in order; empty when that is nothing but chatter.

    `Speaker: ` opens each sentence of a turn. Sentences over 240 characters end in `…`; what is after 20,000
    characters or 40 sentences is left out.
    """
    weight = material.importance + material.pinned
    return [
        Sentence(name + _shortened(said), material.id, material.moment_s, weight * clarity)
        for name, said, clarity in islice(_statements(material), MOST_SENTENCES)
    ]


def _statements(material: Material) -> Iterator[tuple[str, str, float]]:
    """Yield who speaks (`Name: `), what, and how much it says alone."""
    name = ""
    for written in material.text[:MOST_TEXT_CHARS].splitlines():
        line = _BULLET.sub("", " ".join(written.split()), count=1)
        if speaker(line):
            name, line = _turn(line)
        is_talk = bool(name) or material.memory_type == "message"
        for said in _split(line):
            clarity = _clarity(said, is_talk=is_talk)
            if clarity:
                yield name, said, clarity


def _turn(text: str) -> tuple[str, str]:
    """Return `Name: ` and what is said; the name is empty when nobody is named."""
    if not speaker(text):
        return "", text
    name, _, said = text.partition(":")
    return f"{name.strip()}: ", said.strip()


def _split(line: str) -> Iterator[str]:
    start = 0
    for end in _END.finditer(line):
        piece = line[start : end.end()].strip()
        if piece and not _ABBREVIATED.search(piece):
            yield piece
            start = end.end()
    if rest := line[start:].strip():
        yield rest


def _clarity(said: str, *, is_talk: bool) -> float:
    """Return 0..1: how much a sentence says without those around it; 0 for chatter."""
    words = text_words(said)
    if not words:
        return 0.0
    telling = {word for word in words if word not in STOP_WORDS and word[0].isalnum()}  # no emoji
    if is_talk:
        telling -= CHATTER
        opens_only = len(telling) == 1 and len(words) <= 4 and words[0] in OPENERS
        asks_only = len(telling) < 3 and said.endswith(_QUESTION_MARKS)
        if not telling or opens_only or asks_only:
            return 0.0
    clarity = (1 + len(telling)) / CLEAR_WORDS
    if not _TIMES.isdisjoint(words):
        clarity *= 1.3  # what happened, rather than how it was
    if said.endswith(_QUESTION_MARKS):
        clarity *= 0.3
    if said.startswith("["):
        clarity *= 0.5
    if words[0] in _BACK_REFERENCES:
        clarity *= 0.7
    if is_talk and not _SECOND_PERSON.isdisjoint(words) and _FIRST_PERSON.isdisjoint(words):
        clarity *= 0.6  # about what the other one has told
    return min(1.0, clarity)


def _shortened(said: str) -> str:
    if len(said) <= MOST_CHARS:
        return said
    cut, _, half = said[: MOST_CHARS - 1].rpartition(" ")
    whole = cut if len(half) < MOST_CHARS // 2 else cut + " " + half  # a script without blanks
    return whole.strip().rstrip(",;:-") + "\u2026"


def shortlist(materials: Sequence[Material], vectors: NDArray[np.float32], most: int = 60) -> list[int]:
    """Return the places of `most` memories to summarise a group by, ascending; all of a smaller group.

    A quarter are the most important (more when more are pinned, up to half). The others are the most central
    ones of each stretch of time, so that no time is passed over.

    Args:
        vectors: unit rows of the memories; shape (len(materials), dim).

    Cost: O(n dim), and reading the beginning of n texts: 0.3 ms each.
    """
    if len(materials) <= most:
        return list(range(len(materials)))
    importance = np.array([item.importance + item.pinned for item in materials])
    clarity = [
        max((clarity for _, _, clarity in islice(_statements(item), LISTED_SENTENCES)), default=0.0)
        for item in materials
    ]
    weights = importance * np.array(clarity)
    merit = _centrality(vectors, weights) + WEIGHT * weights
    pinned = sum(item.pinned for item in materials)
    important = np.lexsort((-merit, -importance))[: max(most // IMPORTANT_PART, min(pinned, most // 2))]
    moments = np.array([item.moment_s for item in materials])
    others = np.setdiff1d(np.arange(len(materials)), important)
    others = others[np.argsort(moments[others], kind="stable")]
    ranked = []
    for stretch in np.array_split(others, -(-(most - len(important)) // STRETCH)):
        ranked += [(rank, place) for rank, place in enumerate(stretch[np.argsort(-merit[stretch])])]
    ranked.sort(key=lambda entry: (entry[0], -merit[entry[1]]))
    return sorted(
        int(place) for place in (*important, *(place for _, place in ranked[: most - len(important)]))
    )


def _centrality(vectors: NDArray[np.float32], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return each row's cosine with the weighted mean of all."""
    mean = np.maximum(weights, 0.05) @ vectors
    found: NDArray[np.float64] = vectors @ (mean / max(float(np.linalg.norm(mean)), 1e-9))
    return found


def extracted(
    candidates: Sequence[Sentence],
    vectors: NDArray[np.float32],
    budget_tokens: int,
    count_tokens: Callable[[Sequence[str]], list[int]],
    *,
    dated: bool = False,
) -> Extract:
    """Return the sentences that say most, in the order of time, each fact once.

    What one speaker says in a row is one line, which opens with the name; without a name, what a memory says.

    Args:
        vectors: unit rows of the candidates; shape (len(candidates), dim).
        count_tokens: as an embedder's; never exceeded by `Extract.tokens`, which is of the whole text.
        dated: whether a line opens with the day (UTC) where it changes.

    Returns:
        Empty without candidates, or when not even the first words of one fit.

    Cost: O(n dim) for each chosen sentence; `count_tokens` of all candidates once, and of the text for each.
    """
    pool = _Pool(candidates, vectors, count_tokens)
    first = pool.best()
    text, tokens = "", 0
    pool.refuse_longer(budget_tokens)
    while (place := pool.best()) is not None:
        longer = _rendered([pool.told[i] for i in sorted((*pool.chosen, place))], dated=dated)
        count = count_tokens([longer])[0]
        if count > budget_tokens:
            pool.refuse(place)
            continue
        pool.choose(place)
        text, tokens = longer, count
        pool.refuse_longer(budget_tokens - tokens)
    if first is not None and not pool.chosen:
        return _beginning(pool.told[first], budget_tokens, count_tokens, dated=dated)
    sources = dict.fromkeys(pool.told[place].source for place in sorted(pool.chosen))
    return Extract(text, tuple(sources), tokens)


class _Pool:
    """Candidates in the order of time, and what each would add to those chosen."""

    def __init__(
        self,
        candidates: Sequence[Sentence],
        vectors: NDArray[np.float32],
        count_tokens: Callable[[Sequence[str]], list[int]],
    ) -> None:
        weightiest = sorted(range(len(candidates)), key=lambda i: -candidates[i].weight)[:MOST_CANDIDATES]
        places = sorted(weightiest, key=lambda i: (candidates[i].moment_s, i))
        self.told = [candidates[i] for i in places]
        self.chosen: list[int] = []
        self._vectors = vectors[places]
        self._sizes = np.array(count_tokens([_turn(item.text)[1] for item in self.told]))
        self._words = [frozenset(text_words(item.text)) for item in self.told]
        weights = np.array([item.weight for item in self.told])
        self._relevance = _centrality(self._vectors, weights) + WEIGHT * weights  # -inf: refused
        self._nearest = np.zeros(len(places))

    def best(self) -> int | None:
        """Return the place of what adds most, in its latest version; None when nothing is left."""
        if not self.told:
            return None
        place = int(np.argmax(self._relevance - REDUNDANCY * self._nearest))
        if self._relevance[place] == -np.inf:
            return None
        for later in np.flatnonzero(self._vectors @ self._vectors[place] >= REPEATED):
            is_open = self._relevance[later] > -np.inf
            if later > place and is_open and _is_other_version(self._words[place], self._words[later]):
                self.refuse(place)
                place = int(later)
        return place

    def refuse(self, place: int) -> None:
        self._relevance[place] = -np.inf

    def refuse_longer(self, tokens: int) -> None:
        """Refuse what is longer even where it needs no name before it."""
        self._relevance[self._sizes > tokens] = -np.inf

    def choose(self, place: int) -> None:
        """Add to the chosen, and refuse what repeats it."""
        self.chosen.append(place)
        cosines = self._vectors @ self._vectors[place]
        self._nearest = np.maximum(self._nearest, cosines)
        self._relevance[cosines >= REPEATED] = -np.inf
        known = self._words[place]
        for other in np.flatnonzero(self._relevance > -np.inf):
            telling = self._words[other] - STOP_WORDS
            if len(telling & known) >= REPEATED_WORDS * len(telling):
                self.refuse(int(other))
        self.refuse(place)


def _is_other_version(words: frozenset[str], others: frozenset[str]) -> bool:
    """Return whether two statements differ in numbers or negations, and else only in stop words."""
    different = words ^ others
    values = {word for word in different if word in _NEGATIONS or any(map(str.isdigit, word))}
    return bool(values) and different - values <= STOP_WORDS


def _rendered(told: Sequence[Sentence], *, dated: bool) -> str:
    lines: list[str] = []
    last_day = last_voice = ""
    for item in told:
        name, said = _turn(item.text)
        day = f"{_day(item.moment_s)}: " if dated else ""
        voice = name or item.source
        if lines and (day, voice) == (last_day, last_voice):
            lines[-1] += (". " if lines[-1][-1].isalnum() else " ") + said
        else:
            lines.append(("" if day == last_day else day) + name + said)
        last_day, last_voice = day, voice
    return "\n".join(lines)


def _day(moment_s: float) -> str:
    return day_words(datetime.fromtimestamp(moment_s, UTC)).rpartition(" ")[0]


def _beginning(
    item: Sentence, budget_tokens: int, count_tokens: Callable[[Sequence[str]], list[int]], *, dated: bool
) -> Extract:
    """Return as much of one sentence as fits; empty when that is less than three words."""
    name, said = _turn(item.text)
    words = said.split()
    for count in range(len(words) - 1, 2, -1):
        begun = replace(item, text=name + " ".join(words[:count]).rstrip(",;:-") + "\u2026")
        text = _rendered([begun], dated=dated)
        tokens = count_tokens([text])[0]
        if tokens <= budget_tokens:
            return Extract(text, (item.source,), tokens)
    return Extract("", (), 0)
