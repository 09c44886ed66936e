"""The only place that decides what a word is, in memories and in queries. Pure."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from datetime import datetime

#: words of one query; a longer text is cut, its first words usually say what it is about
MAX_QUERY_WORDS = 64

#: bytes of a word that RediSearch 2.10 stores; longer ones are never found
MAX_WORD_BYTES = 128

#: dropped from queries unless nothing else is left (the index itself keeps every word)
STOP_WORDS = frozenset(
    """a about after again all also am an and any are as at be because been before being but by can could
    d did do does doing don down during each few for from further had has have having he her here hers him
    his how i if in into is it its itself just ll m me more most my no nor not now of off on once only or
    other our out over own re s same she should so some such t than that the their them then there these they
    this those through to too under until up ve very was we were what when where which while who whom why will
    with would you your""".split()
)

_MONTHS = "January February March April May June July August September October November December".split()
_WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

_WORD = re.compile(r"\w+")
# up to three words, the first a capitalised one, a colon and a space
_SPEAKER = re.compile("\\s*((?=[^\\W\\d_])(?![a-z])[\\w.'\u2019-]{1,40}(?: [\\w.'\u2019-]{1,40}){0,2}):\\s")
# what RediSearch 2.10 splits words on (no line ends); it lowercases ASCII only and a backslash escapes
_REDISEARCH_SEPARATORS = re.compile(r"""[ \t,.<>{}\[\]"':;!@#$%^&*()\-+=~|/?`]+""")
# scripts without blanks between words: Thai, Lao, Burmese, Khmer, Chinese, Japanese; and Korean, whose
# words carry their particles
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]+"
)
_LONG_WORD = re.compile(rf"\w{{{MAX_WORD_BYTES + 1}}}")
_NOT_PLAIN = re.compile(r"[^\t\x20-\x7e]|\\")


def text_words(text: str) -> list[str]:
    """Return the words of `text`: NFKC, casefolded, Latin also without accents; emoji.

    Scripts that are written without blanks are cut into bigrams of characters.
    """
    if text.isascii():
        words = _WORD.findall(text.lower())
    else:
        # as written, and by compatibility: iPhone\u2122 is found by iphone, \ufb01nal by final
        shapes = dict.fromkeys((text.casefold(), unicodedata.normalize("NFKC", text).casefold()))
        words = list(dict.fromkeys(word for shape in shapes for word in _shape_words(shape)))
        words.extend(bare for word in words.copy() if (bare := _without_accents(word)))
    # RediSearch takes a lone _ for every memory, and stores no more than 128 bytes of a word
    return [word.encode()[:MAX_WORD_BYTES].decode("utf-8", "ignore") for word in words if word.strip("_")]


def _shape_words(folded: str) -> Iterator[str]:
    for run in _WORD.findall(folded):
        for part in _UNSPACED.findall(run):
            yield from (part[i : i + 2] for i in range(max(1, len(part) - 1)))
        yield from (part for part in _UNSPACED.split(run) if part)
    yield from (char for char in folded if unicodedata.category(char) == "So")


def _without_accents(word: str) -> str:
    bare = "".join(char for char in unicodedata.normalize("NFD", word) if not unicodedata.combining(char))
    return bare if bare.isascii() and bare != word else ""


def extra_words(text: str) -> str:
    """Return the words of `text` that RediSearch's own tokenizer would not find in it.

    It lowercases ASCII only, splits on blanks and ASCII punctuation only and reads backslashes as
    escapes (RediSearch 2.10.5): words at line ends or in curly quotes, capitals with accents, CJK and
    Windows paths would be lost.
    """
    if not _NOT_PLAIN.search(text) and not _LONG_WORD.search(text):
        return ""
    runs = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    single = [char for run in runs for part in _UNSPACED.findall(run) for char in part]
    found = set() if "\\" in text else set(_REDISEARCH_SEPARATORS.split(ascii_lower(text)))
    return " ".join(dict.fromkeys(word for word in (*text_words(text), *single) if word not in found))


def ascii_lower(text: str) -> str:
    """Return `text` with only A-Z lowered, as RediSearch does."""
    return text.translate(_ASCII_LOWER)


_ASCII_LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}


def query_words(text: str) -> list[str]:
    """Return the distinct words to search for, without stop words unless there are no others."""
    words = list(dict.fromkeys(text_words(text)))
    telling = [word for word in words if word not in STOP_WORDS]
    return (telling or words)[:MAX_QUERY_WORDS]


def speaker(text: str) -> str:
    """Return the words of the name before a colon that opens a turn (`Mary Ann: …`); empty without one."""
    match = _SPEAKER.match(text)
    return " ".join(text_words(match[1])) if match else ""


def day_words(moment: datetime) -> str:
    """Return a day as people write it in English, such as `8 May 2023 Monday`."""
    return f"{moment.day} {_MONTHS[moment.month - 1]} {moment.year} {_WEEKDAYS[moment.weekday()]}"
