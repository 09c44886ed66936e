"""The only place that finds in a text whom and what it is about: names. Pure.

Names that a user's memories have are looked up; else a run of capitalised words is taken for a name.

What is decided, and its limits:

* Case: a name with a capital is met as it is spelled, or all in capitals. A text without any capital, or
  without any small letter, meets it in any case, unless it is one common word (`Will`, `Rose`, `US`). A name
  without capitals is met in any case; a stop word is none.
* At the start of a sentence `Will`, `Hope` or `May` is a word, unless a comma, a colon or `'s` follows.
  `Mark` and `Rose` are names there.
* Words: `Ann` is in "Ann's" and "Ann-like", not in "Anna", "Ann-Marie" or "O'Ann". Names of scripts without
  blanks, and of symbols, are met anywhere. Blanks count as one; accents must be those of the name.
* Capitals say something in English and its like: the lists of words are English; German nouns would be names,
  Chinese has none. Weekdays, months and the pronoun I are none; more than six capitalised words are a
  headline. A word that opens a sentence is a name unless it is listed or ends like a verb.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from redismem.words import STOP_WORDS, speaker

#: words of a run of capitals; a longer one is a headline
MOST_WORDS = 6
#: words, symbols and letters of scripts without blanks of a name; longer names are never found
MOST_TOKENS = 32

#: words that are names too: without a capital, words
COMMON_WORDS = STOP_WORDS | frozenset(
    """amber angel april art august autumn bill bliss buck cat chance charity chase chip christian cliff
    cook crystal dawn dean destiny dot drew earl faith fisher forest frank gene ginger grace grant
    guy harmony harvest haven hazel honey hope hunter jade jersey jewel joy june lane mark mason may
    melody mercy miles mint misty olive opal page pat patience pearl penny pepper piper poppy price
    prince ray reed rich river rob robin rock rod rose ruby rusty sage sandy sky sparrow stone storm
    sue summer sunny temple trinity us violet wade ward willow winter wolf wood young""".split()
)
#: words that open a sentence, or are shouted, and then are no names; beside stop words
OPENERS = frozenset(
    """absolutely actually adorable agree ah almost alone already alright always amazing animals another
    answer anybody anyone anything anytime anyway anyways apart apparently appreciate around art ask
    assistant autumn aw awesome aww awww back bad basically beautiful believe besides best bet
    better big book books both brave brb brings btw build bummer busy buy bye call care catch
    challenges chance change chase chat check cheers cherish come congrats congratulations cook cool
    count course crazy create cute dance dang dear definitely different difficult done dude easy
    either else enjoy enough especially even ever every everybody everyone everything everywhere
    exactly fair family feel feels felt finally fine first follow fri friday friends fun funny fyi
    get give gives glad go god going gonna good goodbye gosh got gotcha gotta grant great guess guy
    ha haha half hang happy hard hear heard hello help hey hi highly hmm hold home honestly hope
    hopefully however huge idk imagine imo impressive instead interesting keep kids kind kudos last lately
    later least lemme less let let's life like listen little lol long look looks lost lots love
    lovely luckily lucky made mainly make makes many may maybe mean means meanwhile meet men mental
    met mine mm mmm mom moments mon monday morning mostly much music must nah name nature need neither
    never new next nice nobody none nope note nothing oh ok okay old omg one oof oops others ouch
    overall page people perfect perhaps pets phew please plus possibly pretty price probably
    progress proud ps put question quick quite rather read reading really recently remember reminder
    reminds rest rich right sad sadly saturday say see seems seen seriously several shall show since
    small somebody someone something sometimes somewhat soon sorry sound sounds speak speaking
    special start stay still stop strong stuff success summary summer sunday super support sure
    surely sweet system take takes talk task tell thank thankfully thanks thing things think
    thinking though thoughts three thu thurs thursday thx time tip today todo together tomorrow
    tonight tons took topic totally tough true truly trust try tue tues tuesday turn two ugh um
    understand unfortunately update us use user usually wait wanna want warning watch way wed
    wednesday welcome well whatever whenever wherever whether whoa whose winter wish within without
    woah women wonderful woo woohoo words work worries wow write wtf y'all yay yea yeah year years
    yep yes yesterday yet yo young yum yup""".split()
)
_MONTHS = frozenset(
    "january february march april may june july august september october november december".split()
)
_NOBODY = frozenset(
    "i me my mine myself you your yours he him his she her hers we our they them their".split()
)
_VERBLIKE = re.compile(r"\w{3,}(?:ing|(?<!fr|hm|mm)ed)\Z")
_TITLES = frozenset("Mr Mrs Ms Dr St Prof".split())
_JOINERS = frozenset("of the de da di del la le van von der den al bin &".split())

# scripts without blanks between words: Thai, Lao, Burmese, Khmer, Chinese, Japanese; and Korean
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
)
# a run of letters and digits; a letter of such a script; a symbol
_TOKEN = re.compile(rf"[^\W{_UNSPACED}]+|\S")
_CAPITALS = re.compile(
    r"(?P<word>[^\W\d_]\w*(?:['\u2019-]\w+)*|[A-Z]&[A-Z]\b)|(?P<blank>[^\S\n]+)|[^\s\w]|\d\w*|_|\n"
)
# of these words the ones that are names where they do not open a sentence
_NAMES_ANYWHERE = frozenset("will don hope may art rich summer grant chase young price page".split())
_PRONOUN = re.compile("I(?:['\u2019]\\w+)?\\Z")
_APOSTROPHES = "'\u2019"
_NO_START = frozenset(",;-/&%#@*'\u2019\u2013")


@dataclass(frozen=True, slots=True)
class Entity:
    """A name in a text. `is_known`: the user's memories have it."""

    name: str
    is_known: bool


@dataclass(slots=True)
class _Node:
    """Where names go on by their next token, and those that end here.

    They differ in case and blanks: `names` by their spelling, `spellings` by that without case.
    """

    next: dict[str, _Node] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    spellings: dict[str, str] = field(default_factory=dict)


class KnownNames:
    """The names of one user, to be found in texts.

    Cost: 10 us and 0.5 kB a name, once.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._root = _Node()
        for name in names:
            spelled = _normal(name)
            if spelled in STOP_WORDS or spelled.casefold() in _NOBODY:
                continue
            node, tokens = self._root, _TOKEN.findall(spelled)
            if len(tokens) > MOST_TOKENS:
                continue
            for token in tokens:
                node = node.next.setdefault(token.casefold(), _Node())
            if node is not self._root:
                node.names.setdefault(spelled, name)
                node.spellings.setdefault(spelled.casefold(), spelled)

    def found(self, text: str) -> list[str]:
        """Return the names in `text` as they were given: in order of appearance, each once.

        The longest goes first: of "New York" and "York" only "New York" is found.

        Cost: 0.2 ms for 1 kB, however many names; linear in the text, times the tokens of a name at worst
        (0.15 s for 32 KiB made for it).
        """
        if not self._root.next:
            return []
        said = _Said(unicodedata.normalize("NFC", text))
        names: dict[str, None] = {}
        place = 0
        while place < len(said.folded):
            end, name = place + 1, None
            if said.folded[place] in self._root.next:
                end, name = self._longest(said, place)
            if name is not None:
                names[name] = None
            place = end
        return list(names)

    def _longest(self, said: _Said, first: int) -> tuple[int, str | None]:
        """Return the place after the longest name that begins at a token; without one, the next place."""
        best: tuple[int, str | None] = first + 1, None
        node = self._root
        for place in range(first, len(said.folded)):
            if said.folded[place] not in node.next:
                break
            node = node.next[said.folded[place]]
            if node.names and (name := said.meant(node, first, place)) is not None:
                best = place + 1, name
        return best


class _Said:
    """A text cut into tokens, and what its letters say about names."""

    def __init__(self, text: str) -> None:
        self._text = text
        self.tokens = list(_TOKEN.finditer(text))
        self.folded = [token[0].casefold() for token in self.tokens]
        self._is_plain = text == text.lower() or text == text.upper()

    def meant(self, node: _Node, first: int, last: int) -> str | None:
        """Return which of the names that end at a node stands in these tokens."""
        begin, end = self.tokens[first].start(), self.tokens[last].end()
        spelled = " ".join(self._text[begin:end].split())
        name = node.names.get(spelled)
        is_common = spelled.casefold() in COMMON_WORDS
        if name is None:
            other = node.spellings.get(spelled.casefold())
            if other is None or not (other == other.lower() or (self._is_loose(spelled) and not is_common)):
                return None
            name = node.names[other]
        if self._is_inside_word(first, last):
            return None
        if spelled[0].isupper() and _opens_only(spelled.casefold()) and self._opens_sentence(first):
            follows = self._text[end : end + 2]
            return name if follows[:1] in {":", ","} or follows in {"'s", "\u2019s"} else None
        return name

    def _is_loose(self, spelled: str) -> bool:
        """Return whether the case of what is said tells nothing."""
        return self._is_plain or (len(spelled) > 2 and spelled == spelled.upper())

    def _is_inside_word(self, first: int, last: int) -> bool:
        """Return whether the tokens are a part of one word: `Ann` of `Ann-Marie`, `C` of `C++`."""
        begin, end = self.tokens[first].start(), self.tokens[last].end()
        before, after = self._text[max(0, begin - 2) : begin], self._text[end : end + 2]
        if after and (unicodedata.category(after[0]).startswith("M") or after[0] in "+#"):
            return True
        if not (self._text[begin].isalnum() and self._text[end - 1].isalnum()):
            return False
        if len(before) == 2 and before[0].isalnum():
            opening = self.tokens[first - 2][0][0]
            if before[1] in _APOSTROPHES or (before[1] == "-" and (self._is_plain or not opening.islower())):
                return True
        if len(after) == 2 and after[1].isalnum():
            if after[0] in _APOSTROPHES:
                return len(self.tokens[last + 2][0]) > 2  # not 's, 'd, 'll
            return after[0] == "-" and (self._is_plain or not after[1].islower())
        return False

    def _opens_sentence(self, first: int) -> bool:
        if first == 0:
            return True
        previous = self.tokens[first - 1]
        gap = self._text[previous.end() : self.tokens[first].start()]
        return "\n" in gap or not (previous[0][0].isalnum() or previous[0] in _NO_START)


def _opens_only(folded: str) -> bool:
    return folded in STOP_WORDS or folded in OPENERS


def _normal(name: str) -> str:
    return " ".join(unicodedata.normalize("NFC", name).split())


def capitalised(text: str, most: int = 8) -> list[str]:
    """Return at most `most` names that capitals give away, in order, each once.

    None where all is in capitals.

    Cost: 0.2 ms for 1 kB; linear.
    """
    names: dict[str, None] = {}
    if text == text.upper():
        return []
    for line in text.splitlines():
        name, _, said = line.partition(":")
        if speaker(line) and all(word[0].isupper() for word in name.split()):
            line = said  # noqa: PLW2901
            names.update(dict.fromkeys(_names_of(name.split(), opens=True)))
        for words, opens in _runs(line):
            names.update(dict.fromkeys(_names_of(words, opens=opens)))
            if len(names) >= most:
                return list(names)[:most]
    return list(names)[:most]


def _runs(line: str) -> Iterator[tuple[list[str], bool]]:
    """Yield runs of capitalised words, joined over such as `of`, and whether each opens a sentence."""
    run: list[str] = []
    joiners: list[str] = []
    is_start, opens = True, True
    for match in _CAPITALS.finditer(line + "\n"):
        piece = match[0]
        if match["blank"]:
            continue
        is_title_dot = piece == "." and run and not joiners and (run[-1] in _TITLES or len(run[-1]) == 1)
        if match["word"] and piece[0].isupper() and not _PRONOUN.match(piece):
            if not run:
                opens = is_start
            run += [*joiners, piece]
            joiners, is_start = [], False
            if piece.endswith(("'s", "\u2019s")):
                yield run, opens
                run = []
        elif is_title_dot:
            run[-1] += piece
        elif run and piece in _JOINERS and len(joiners) < 2:
            joiners.append(piece)
        else:
            if run:
                yield run, opens
            run, joiners = [], []
            is_start = not piece[0].isalnum() and piece not in _NO_START


def _names_of(words: list[str], *, opens: bool) -> Iterator[str]:
    """Yield the name that a run is, without the ordinary words before it."""
    if len(words) > MOST_WORDS:
        return
    words = [re.sub("['\u2019]s?\\Z", "", word) for word in words]
    first = 0
    while first < len(words) and (
        words[first] in _JOINERS or _is_ordinary(words[first], opens=opens, alone=first == len(words) - 1)
    ):
        first += 1
    name = words[first:]
    if name and not all(word.casefold() in _MONTHS for word in name):
        yield " ".join(name)


def _is_ordinary(word: str, *, opens: bool, alone: bool) -> bool:
    folded = word.casefold().replace("\u2019", "'")
    is_listed = _opens_only(folded) or _opens_only(folded.partition("'")[0]) or folded.endswith("n't")
    if opens:
        return is_listed or bool(_VERBLIKE.match(folded)) or word.partition("-")[2].islower()
    return is_listed and folded not in _NAMES_ANYWHERE and (alone or word.isupper())


def entities_of(text: str, known: KnownNames, also: Iterable[str] = (), most: int = 3) -> list[Entity]:
    """Return at most `most` names of a text: known ones, then those of `also`, then those with capitals.

    A name that is part of one before it is left out.
    """
    taken: list[Entity] = []
    parts: list[str] = []
    listed = [Entity(name, is_known=True) for name in known.found(text)]
    others = (Entity(name, is_known=False) for names in (also, capitalised(text)) for name in names)
    for entity in (*listed, *others):
        words = f" {' '.join(_TOKEN.findall(_normal(entity.name).casefold()))} "
        if len(taken) < most and words.strip() and not any(words in part for part in parts):
            taken.append(entity)
            parts.append(words)
    return taken
