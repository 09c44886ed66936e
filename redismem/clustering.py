"""The only place that decides what a user's topics are: groups of memories, their numbers, their labels.

The idea: HDBSCAN finds dense groups, class-based TF-IDF names them, overlap with the last run numbers
them. Pure: the same input gives the same topics. Where HDBSCAN is departed from, and what that costs:

- It sees DIMENSIONS principal components, made unit again. In 384 dimensions all distances are alike and
  it returns one giant cluster, or noise for three memories of four. A topic that only weak components
  tell from others is not seen.
- It returns the leaves of its tree, not the most stable clusters: in chats those are as often as not one
  cluster of nearly everything. Large topics come in parts.
- It does not see messages with fewer than MIN_TELLING words that tell anything: greetings and thanks are
  otherwise the densest topic of a chat.
- It does not see more than MAX_CLUSTERED memories, spread over time: its time grows with their square. A
  topic with fewer than MIN_CLUSTER_SIZE memories among those is not seen.
- What it did not see or calls noise joins the nearest topic within whose reach it is, as a new memory will.

Source: Campello, Moulavi, Sander 2013 (HDBSCAN); Grootendorst 2022 (BERTopic: class-based TF-IDF).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from redismem.material import LABEL_WORDS, LabelWord, Material, Topic
from redismem.words import STOP_WORDS, speaker, text_words

Vectors = NDArray[np.float32]
Rows = NDArray[np.intp]

MIN_CLUSTER_SIZE = 5
MIN_SAMPLES = 3

#: principal components that HDBSCAN sees; with more, more is noise, with fewer, unlike things meet
DIMENSIONS = 20

#: memories that HDBSCAN sees at most: 3 s and 0.3 GB
MAX_CLUSTERED = 8_000

MIN_TELLING = 3

#: percent of members that would lie outside if they were new; more: less noise and looser topics
OUTSIDE_PERCENT = 25

#: cosine with the mean of the others that a member has at least, in the vectors and in the vectors less
#: their mean: random vectors have less than 0.2, a quarter of the members of real topics less than 0.3 to 0.8
MIN_LIKENESS = 0.3

#: what the cosine of equal float32 vectors may lack of 1
ROUNDING = 1e-5

#: rows compared with all centroids at once; bounds memory
BATCH = 4_096

#: a known topic of which fewer memories are left in a new one is not the same topic: three of
#: MIN_CLUSTER_SIZE are the least majority that there can be
MIN_SHARED = 3

MAX_WORDS = 8
MAX_WITNESSES = 3

#: members that must have a word before it is preferred
MIN_MEMBERS = 3

#: what a tag counts beside being a word of the memory: it is what the writer says the memory is about
TAG_WEIGHT = 2

#: letters of a word that stems are made of
MIN_STEM = 4

# three letters in a row, or two of a script that writes few letters a word or is cut into bigrams (beyond
# Latin, Greek and Cyrillic)
_LETTERS = re.compile("[^\\W\\d_]{3}|[^\\W\\d_\u0000-\u052f]{2}")

# words that keep a chat going whatever it is about, of time and of amount: they would be the best label of
# every group of short answers
FILLER = frozenset(
    """absolutely actually agree alright amazing anything appreciate awesome aww believe bit bye catch chat
    chatted congrats cool day days definitely else ever everything exactly feel feeling feels fun get gets
    getting give glad goes going gonna good got gotta great happen happened happy hear heard hello hey
    hope image keep know last lately let like long look looks lot love made make makes making man maybe
    mean means much need new next nice okay one photo picture please pretty really recently right say says
    see seems since something soon sorry sound sounds still stuff sure take talk talked thank thanks thing
    things think time times today tomorrow totally tried try wait want way week weekend well woah
    wonderful wow yay yeah year years yep yes yesterday yet yup""".split()
)


@dataclass(frozen=True, slots=True)
class Known:
    """A topic of the last run."""

    number: int
    #: ids
    members: frozenset[str]


@dataclass(frozen=True, slots=True, eq=False)
class Centre:
    """What decides whether a new memory belongs to a topic."""

    number: int
    #: unit; shape (dim,)
    centroid: Vectors
    #: cosine from which a memory belongs
    reach: float


def clustered(
    materials: Sequence[Material],
    vectors: Vectors,
    known: Sequence[Known] = (),
    *,
    first_number: int = 1,
) -> list[Topic]:
    """Return the topics of a user's memories; a memory that is in none of them is uncategorized.

    Args:
        vectors: one for each material; shape (n, dim), unit rows. A zero row belongs nowhere.
        known: the topics of the last run; a topic that is one of them keeps its number.
        first_number: higher than any number ever given to this user's topics, so that none comes back.

    Returns:
        Largest first; members in the order of `materials`. Empty below 2 x MIN_CLUSTER_SIZE memories or so:
        one group without anything around it is no topic.

    Cost: O(n² DIMENSIONS) time up to MAX_CLUSTERED memories, then O(n x topics x dim).
    """
    terms = _terms(materials)
    usable = np.flatnonzero(np.isfinite(vectors).all(axis=1) & vectors.any(axis=1))
    telling = [
        row
        for row in usable.tolist()
        if materials[row].memory_type != "message" or len(terms[row]) >= MIN_TELLING
    ]
    groups = _groups(vectors, usable, _spread(materials, telling))
    # what no word names is no topic
    groups = [rows for rows in groups if any(terms[row] for row in rows)]
    groups.sort(key=lambda rows: (-len(rows), int(rows[0])))
    members = [tuple(materials[row].id for row in rows) for rows in groups]
    present = frozenset(material.id for material in materials)
    still_known = [Known(topic.number, topic.members & present) for topic in known]
    numbers = _numbers([frozenset(ids) for ids in members], still_known, first_number)
    topics = []
    for number, rows, ids, words in zip(
        numbers, groups, members, _labels(materials, terms, groups), strict=True
    ):
        centroid, reach = _centre(vectors[rows])
        topics.append(Topic(number=number, words=words, centroid=centroid, reach=reach, members=ids))
    return topics


def assigned(vectors: Vectors, topics: Sequence[Centre]) -> list[int]:
    """Return for each vector the number of the nearest topic within whose reach it is; 0: of none.

    Args:
        vectors: shape (n, dim), unit rows.
    """
    numbers = np.array([*(topic.number for topic in topics), 0])
    nearest = _nearest(vectors, [(topic.centroid, topic.reach) for topic in topics])
    return [int(number) for number in numbers[nearest]]


def _spread(materials: Sequence[Material], rows: Sequence[int]) -> Rows:
    ordered = sorted(rows, key=lambda row: (materials[row].moment_s, materials[row].id))
    count = min(len(ordered), MAX_CLUSTERED)
    return np.array(ordered, np.intp)[np.linspace(0, len(ordered) - 1, count).round().astype(np.intp)]


def _groups(vectors: Vectors, usable: Rows, seen: Rows) -> list[Rows]:
    """Return the rows of each topic: HDBSCAN's of `seen`, then the others that are within reach."""
    if len(seen) < MIN_CLUSTER_SIZE:
        return []
    labels = np.full(len(vectors), -1, np.intp)
    labels[seen] = _dense(vectors[seen])
    centres = [_centre(vectors[labels == label]) for label in range(labels.max() + 1)]
    free = usable[labels[usable] < 0]
    labels[free] = _nearest(vectors[free], centres)
    return [np.flatnonzero(labels == label) for label in range(len(centres))]


def _dense(vectors: Vectors) -> Rows:
    """Return the number of each row's group, from 0; -1: noise."""
    centred = vectors.astype(np.float64)
    centred -= centred.mean(axis=0)
    # here, because it takes a second and 100 MB, which only the process that clusters should spend
    from sklearn.cluster import HDBSCAN  # type: ignore[import-untyped]  # noqa: PLC0415

    method = HDBSCAN(
        min_cluster_size=MIN_CLUSTER_SIZE,
        min_samples=MIN_SAMPLES,
        metric="euclidean",
        cluster_selection_method="leaf",
        algorithm="kd_tree",  # the brute one makes a matrix of all pairs
        copy=True,
    )
    found = np.asarray(method.fit(_components(centred)).labels_, np.intp)
    # what agrees in a few components only, such as all that is far from everything, is no group; less their
    # mean vectors of any model spread, but then a topic of most memories makes the others look alike
    whole = _unit(centred)
    labels = np.full(len(found), -1, np.intp)
    for label in range(found.max() + 1):
        rows = np.flatnonzero(found == label)
        likeness = np.minimum(_likeness(whole[rows]), _likeness(vectors[rows]))
        alike = rows[likeness >= MIN_LIKENESS]
        if len(alike) >= MIN_CLUSTER_SIZE:
            labels[alike] = labels.max() + 1
    return labels


def _components(centred: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the first DIMENSIONS principal components of each row, made unit."""
    axes = np.linalg.eigh(centred.T @ centred).eigenvectors[:, ::-1][:, :DIMENSIONS]
    return _unit(centred @ axes)


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    # rows that are equal but for rounding must not be blown up into directions
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    unit: NDArray[np.float64] = np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 1e-6)
    return unit


def _likeness(members: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the cosine of each member with the mean of the others.

    As a new memory is compared: in its own mean a member finds itself, and small topics would look tight.
    """
    rows = members.astype(np.float64)
    cosines: NDArray[np.float64] = np.einsum("ij,ij->i", _unit(rows.sum(axis=0) - rows), rows)
    return cosines


def _centre(members: Vectors) -> tuple[Vectors, float]:
    """Return the unit mean of the members, and the reach."""
    centroid = _unit(members.sum(axis=0, dtype=np.float64)).astype(np.float32)
    return centroid, float(np.percentile(_likeness(members), OUTSIDE_PERCENT)) - ROUNDING


def _nearest(vectors: Vectors, centres: Sequence[tuple[Vectors, float]]) -> Rows:
    """Return for each row the index of the nearest centre whose reach it meets; -1: of none."""
    found = np.full(len(vectors), -1, np.intp)
    if not centres:
        return found
    centroids = np.stack([centroid for centroid, _ in centres])
    reaches = np.array([reach for _, reach in centres], np.float32)
    for first in range(0, len(vectors), BATCH):
        cosines = vectors[first : first + BATCH] @ centroids.T
        cosines[~(cosines >= reaches)] = -np.inf
        best = cosines.argmax(axis=1)
        met = np.isfinite(cosines[np.arange(len(best)), best])
        found[first : first + BATCH] = np.where(met, best, -1)
    return found


def _numbers(groups: Sequence[frozenset[str]], known: Sequence[Known], first_number: int) -> list[int]:
    """Return a number for each group: that of the known topic it shares most with, or a new one.

    The same topic is what holds at least half of the smaller of the two, and MIN_SHARED memories. Of the
    smaller, not of both: a topic that doubles, or that loses most of its members to noise, is still what
    its readers know by that number. Each number once, the largest overlap first: of a split topic the
    larger part keeps the number, a merged one has that of the larger part.
    """
    holders = {member: index for index, group in enumerate(groups) for member in group}
    shares = [
        (count, topic, index)
        for topic in known
        for index, count in Counter(holders[one] for one in topic.members if one in holders).items()
        if count >= MIN_SHARED and 2 * count >= min(len(topic.members), len(groups[index]))
    ]
    given: dict[int, int] = {}
    for _, topic, index in sorted(shares, key=lambda share: (-share[0], share[1].number, share[2])):
        if index not in given and topic.number not in given.values():
            given[index] = topic.number
    unused = max([first_number, *(topic.number + 1 for topic in known)])
    for index in range(len(groups)):
        if index not in given:
            given[index] = unused
            unused += 1
    return [given[index] for index in range(len(groups))]


def _terms(materials: Sequence[Material]) -> list[dict[str, str]]:
    """Return for each memory its stems, each with the form the memory has it in.

    They come from its words and tags, without words that tell nothing; a tag of several words is one term.
    """
    names = {name for material in materials for name in speaker(material.text).split()}
    dull = STOP_WORDS | FILLER | names
    terms = []
    for material in materials:
        words = text_words(material.text)
        # the words of "won't" are won and t
        telling = [word for word, after in pairwise((*words, "")) if word not in dull and after != "t"]
        forms = (form for form in (*telling, *_tags(material)) if _LETTERS.search(form))
        terms.append({_stem(form): form for form in forms})
    return terms


def _tags(material: Material) -> list[str]:
    return [" ".join(text_words(tag)) for tag in material.topics]


def _stem(word: str) -> str:
    """Return what the forms of an English word have in common; only compared, never shown."""
    if " " in word:
        return " ".join(map(_stem, word.split()))
    if not word.isascii() or len(word) < MIN_STEM:
        return word
    if word.endswith("s") and word != "news" and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    for ending in ("ing", "ed"):
        if word.endswith(ending) and len(word) >= len(ending) + MIN_STEM:
            word = word.removesuffix(ending)
    word = word.removesuffix("e")
    if word[-1] == word[-2]:
        word = word[:-1]
    return word[:-1] + "i" if word.endswith("y") else word


def _labels(
    materials: Sequence[Material], terms: Sequence[dict[str, str]], groups: Sequence[Rows]
) -> list[tuple[LabelWord, ...]]:
    """Return the label words of each group, best first: class-based TF-IDF, tf log(1 + A / f).

    tf: members that have the term; f: memories that have it; A: terms of a class on average, the
    uncategorized being one. A memory counts once, so that nobody makes a label by saying a word often.
    """
    everywhere = Counter(stem for row in terms for stem in row)
    average = everywhere.total() / (len(groups) + 1)
    labels = []
    for rows in groups:
        here = Counter(stem for row in rows for stem in terms[row])
        tagged = Counter(_stem(tag) for row in rows for tag in _tags(materials[row]))
        scores = {
            stem: (count + TAG_WEIGHT * tagged[stem]) * math.log1p(average / everywhere[stem])
            for stem, count in here.items()
        }
        ranked = sorted(here, key=lambda stem: (-min(here[stem], MIN_MEMBERS), -scores[stem], stem))
        # words of few members only where there is nothing better to show
        shown = [
            stem
            for place, stem in enumerate(_distinct(ranked))
            if place < LABEL_WORDS or here[stem] >= MIN_MEMBERS
        ]
        ordered = sorted(rows.tolist(), key=lambda row: (materials[row].moment_s, materials[row].id))
        labels.append(tuple(_label_word(stem, materials, terms, ordered) for stem in shown))
    return labels


def _distinct(ranked: Sequence[str]) -> list[str]:
    """Return the first MAX_WORDS stems no two of which share a word (a tag may have several)."""
    chosen: list[str] = []
    words: set[str] = set()
    for stem in ranked:
        if len(chosen) < MAX_WORDS and words.isdisjoint(stem.split()):
            chosen.append(stem)
            words.update(stem.split())
    return chosen


def _label_word(
    stem: str, materials: Sequence[Material], terms: Sequence[dict[str, str]], rows: Sequence[int]
) -> LabelWord:
    """Return the form most members have, with the first, the middle and the last of them that have it."""
    forms = Counter(terms[row][stem] for row in rows if stem in terms[row])
    word = min(forms, key=lambda form: (-forms[form], form))
    having = [materials[row].id for row in rows if terms[row].get(stem) == word]
    places = np.linspace(0, len(having) - 1, min(len(having), MAX_WITNESSES)).round().astype(int)
    return LabelWord(word, tuple(having[place] for place in places))
