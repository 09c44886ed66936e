"""The only place that decides what a profile says of a user: rules over memories, no model. Pure.

What is shown is cut from memories, and `Compiled.sources` names them. The latest statement wins:

- Whose words count: turns ("Name: ...") of the user; of memories without a speaker, what says "I", "the
  user" or the user's name. A statement opens a clause ("I wish I was good at ..." is none) and asks nothing.
- display_name: "my name is", "call me", "the user is called"; "I'm X" if X is a speaker, the user id or an
  entity; else the speaker who is the user id; else the one who speaks most and is no assistant.
- communication_style: a stated wish; else, of 5 of the user's turns or more: a median of 8 words at most is
  concise, of 40 or more detailed; contractions, emoji or "!" in two of three turns casual; else neutral.
- topics_of_interest: topics of memories and labels of topics by count, importance and recency; what others
  say counts a third. recent_topics: the same of the last 7 days of activity.
- known_expertise: a profession, "expert in", "good at", what is done for years; types skill, expertise.
- preferred_formats: code, answers, notes, units, time and language, as the user wished them.
- current_projects: "working on", "building", "started a shop"; types project, goal; of 90 days of activity;
  gone after a later "finished", "dropped", "no longer" that shares half of the words.
- relationship_context: first and last session, each by its middle, never ahead of now; people the user names.
- important_memory_ids: pinned, then by importance that halves in 90 days.
- context_summary: the above; then the best facts and preferences, or what the user says of themselves in
  turns, as one short line each, newest first. Importance of a fact halves in a year.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import median
from typing import Any, NamedTuple

from redismem.material import LABEL_WORDS, Material, Topic
from redismem.views import BUDGETS
from redismem.words import STOP_WORDS, day_words, speaker, text_words

#: items of a list that is shown, important memories, topics, and lines of the summary that are memories
LISTED, IMPORTANT, TOPICS, FACTS = 10, 20, 20, 24
#: memories that a profile names, unless first witnesses alone are more
SOURCES = 200
#: characters of a memory that are read, of a line, of an item
READ_CHARS, LINE_CHARS, ITEM_CHARS = 2_000, 160, 60
DAY_S = 86_400.0
HALF_LIFE_S = 90 * DAY_S

#: stands for the user where a memory speaks of them; memories hold no NUL
_USER = "\x00"
_ASSISTANTS = frozenset("assistant bot chatbot ai agent system tool model".split())
_NAMELESS = frozenset("user human me".split())
#: what stands before a colon and is no speaker
_HEADINGS = frozenset(
    """a q answer decision fact facts goal goals hobbies hobby job name note notes preference
    preferences project projects question reminder skill skills summary task tasks tip todo topic update
    warning""".split()
)
# controls, bidirectional overrides, invisible tags, private use: a line stays one line, and what it seems
_UNSEEN = re.compile(
    "[\x00-\x20\x7f-\xa0\u200b\u200e\u200f\u2028-\u202f\u2060-\u206f\ufeff\ud800-\uf8ff\U000e0000-\U000e007f]+"
)
_MARKUP = re.compile(r"^(?:[#>*`|=~+-]+ ?)+|`{3,}|<\|?/?[\w|]{1,30}\|?>")
_CAPTION = re.compile(r" ?\[image: [^\]]*\]?")
_CHATTY = re.compile("!|\\w'(?:m|re|s|ll|ve|d|t)\\b|[\u263a-\u27bf\U0001f300-\U0001faff]")

_NAME = r"(?P<name>[^\W\d_a-z][\w'-]*(?: (?:(?:de|la|da|van|von|der|bin|al) ){0,2}[^\W\d_a-z][\w'-]*){0,2})"
_INTRODUCTION = re.compile(
    r"(?:\b[Mm]y (?:full |first )?name is|(?:^|[.!,;] |[Pp]lease |\b(?:and|but|just|you can) )[Cc]all me"
    rf"|\b[Uu]ser(?:'s (?:full |first )?name is| is (?:called|named)| goes by| prefers to be called)) {_NAME}"
)
_SELF = re.compile(rf"(?:^|[.!] )(?:\w+[,!] )?I(?:'m| am) {_NAME}(?=[.,!]|$| and | from )")

# a phrase ends with its clause; a dot inside a word (Node.js) belongs to it
_PHRASE = '(?P<phrase>(?:[^.!?;,:()\x00"\u201c\u201d\u2013\u2014\u2026]|\\.(?=\\w)){2,80})'
_OFTEN = "(?: (?:also|now|still|currently|actually|mainly|mostly|just|busy|recently|really)){0,2}"
_IS, _HAS, _BEEN = (
    f"(?: am| is|'[ms]){_OFTEN}",
    f"(?: have| has|'ve)?{_OFTEN}",
    f"(?: have| has|'ve) been{_OFTEN}",
)
_OWN = "(?:[Mm]y|[Oo]ur|\x00's)"
_A = "(?:an?|my|our|the|his|her|their)"
_OPENING = re.compile(
    "(?:^|[.!?;:,\u2026\u2013\u2014-] ?|\\b(?:and|but|so|because|well|yeah|currently|now) ?)$"
)
_ELLIPSIS = re.compile(
    "(?:^|(?<=[.!?] ))(?:Still|Been|Currently|Busy) (?=working on |building |writing an? )"
)
_TAIL = re.compile(
    " (?:because|but|which|who|where|when|while|since|so|though|if|too|yet|then|lately|currently|now"
    "|really|right now|at the moment|these days|this (?:week|month|year)|for (?:a while|me)|and (?:I"
    "|it|we|s?he|they|that|am|is|was|been|things|rehearsing|working)|(?:with|to|and)$|[-'])(?: .*|$)"
)
# "a new project - a thriller": what follows says more
_PROJECT_OF = re.compile(r"^(?:\w+ ){0,3}project - (?=an? )")
_DETERMINER = re.compile("^(?:(?:an?|the|my|our|his|her|their|this|that|some|own|new) )+")
_VAGUE = re.compile(
    "(?:(?:new|big|cool|exciting|few|some|other|another|several|different|little|great|lot of|up|my|on) )*"
    "(?:projects?|things?|this|them|myself|yourself|lot|what|goals?|you"
    "|(?:of|something|anything|stuff|it|one|that|relationships?|trust|confidence|strength|connections?"
    "|brand|everything)\\b.*)"
)
_CRAFTS = frozenset(
    """accountant actor actress artist attorney baker banker barista broker builder carpenter chef coach
    composer cook counsellor counselor curator dancer dentist doctor driver economist editor
    entrepreneur farmer founder firefighter gardener guard instructor interpreter joiner journalist
    judge lawyer lecturer librarian mechanic midwife nurse painter paramedic pharmacist physio pilot
    player plumber potter producer professor sailor sculptor singer solicitor surgeon tailor therapist
    trainer translator tutor vet veterinarian welder""".split()
)
_CRAFT_ENDINGS = tuple(
    """administrator analyst architect consultant designer developer director engineer grapher keeper
    maker manager officer ologist onomer programmer researcher scientist smith specialist teacher worker
    writer wright""".split()
)
_ABOUT_JOB = re.compile(" (?:at|in|for|with|from|of|on|by|and|based|here|there|or)\\b")
_IDLE = (
    "being|dating|dealing|dreaming|feeling|getting|going|having|hoping|living|looking|meaning|seeing"
    "|struggling"
)
_DOING = (
    f"(?P<phrase>(?!(?:{_IDLE}|suffering|thinking|trying|waiting|wanting)\\b)[a-z]{{2,}}ing(?: \\w+){{0,4}}?)"
)
_YEARS = "(?:over |about |almost |nearly )?(?:\\d{1,2}|two|three|four|five|six|seven|eight|nine|ten) years"
_ABLE = "(?:expert|fluent|proficient|skilled|experienced|certified|good|great) (?:in|at|with)"
_MAKING = (
    "(?:writing|creating|designing|launching|organi[sz]ing|renovating|preparing for|training for|setting up)"
)
_VENTURE = (
    "(?:project|business|company|startup|store|shop|studio|blog|channel|podcast|book|novel|course"
    "|garden|band|club|app|website|degree|thesis|campaign|charity|foundation|screenplay|script"
    "|petition|newsletter|service)"
)
_LANGUAGE = (
    "English|German|French|Spanish|Italian|Portuguese|Dutch|Polish|Czech|Hungarian|Swedish|Danish|Norwegian"
    "|Finnish|Greek|Turkish|Russian|Ukrainian|Arabic|Hebrew|Hindi|Japanese|Korean|Chinese|Mandarin"
)
_CODE = (
    "Python|TypeScript|JavaScript|Rust|Golang|Java|Kotlin|Swift|C\\+\\+|C#|Ruby|PHP|Scala|Haskell|Elixir"
    "|SQL|Bash"
)
_LAYOUT = (
    "bullet points|bullets|numbered lists|tables|[Mm]arkdown|plain text|plain prose|prose|paragraphs|JSON"
)
_LENGTH = "short|concise|brief|long|detailed"
_FORM = f"(?P<phrase>(?:(?:{_LENGTH}) )?(?:{_LAYOUT}))\\b"
_NOT = (
    "(?<![Nn]o )(?<![Nn]ot )(?<!n't )(?<![Nn]ever )(?<![Ww]ithout )(?<!of )(?<![Aa]void )(?<!than )(?<!too )"
    "(?<!hates )"
)
_REPLY = "(?:answers?|repl(?:y|ies)|responses?|explanations?)"
_WISH = (
    f"\\b(?=[abgklpuwABGKLPUW]){_NOT}(?i:(?:prefers?|wants?|likes?|please|keep|give|be|asked for|use)\\b)"
    "[^.!?]{0,40}?"
)
_ASK = "(?:^|[.!,] |[Pp]lease |always |should |wants? (?:you |the assistant )?to |prefers? to |prefers? )"
_TONE = "(?=[.,!;]|$| (?:and|tone|style|language|answers|with))"
_KIN = (
    "(?:partner|husband|wife|boyfriend|girlfriend|mother|father|mum|mom|dad|sister|brother|son"
    "|daughter|aunt|uncle|cousin|boss|manager|colleague|friend|neighbour|neighbor|teacher|mentor"
    "|therapist|dog|cat)"
)
_DATES = frozenset(
    """monday tuesday wednesday thursday friday saturday sunday january february march april may june july
    august september october november december today yesterday tomorrow thankfully""".split()
)
_KIND = f"{_OWN} (?!ex\\b|late\\b|former\\b)(?:\\w+ ){{0,2}}?(?P<phrase>{_KIN})"
_ENDS = "(?=[,.;!)]|$| (?:is|has|and|who|works?|lives?|in|from|at|by)\\b)"


_Patterns = tuple[re.Pattern[str], ...]


def _patterns(*patterns: str) -> _Patterns:
    return tuple(re.compile(pattern) for pattern in patterns)


_PROFESSIONS = _patterns(
    f"\x00(?: works?|{_IS} working) (?:\\w+ )?as (?:an?|the) {_PHRASE}", f"\x00{_IS} an? {_PHRASE}"
)
_SKILLS = _patterns(
    f"\x00(?: have| has|'ve) been {_DOING} for {_YEARS}",
    f"\x00{_HAS} started {_DOING} {_YEARS} ago",
    f"\x00{_IS}(?: very| pretty| quite)?(?: an)? {_ABLE} {_PHRASE}",
)
_VENTURES = _patterns(
    f"\x00(?:{_IS}|{_BEEN}) (?:working (?:hard )?on|building|developing) {_PHRASE}",
    f"\x00{_IS} (?={_MAKING} {_A} ){_PHRASE}",
    f"\x00{_HAS} started (?:working on|building|developing|writing) {_PHRASE}",
    f"\x00{_HAS} started (?={_A} (?:[\\w-]+ ){{0,4}}{_VENTURE}\\b){_PHRASE}",
    f"{_OWN} (?:\\w+ )?project(?:(?: is|,)? called|:| is(?= an? )) {_PHRASE}",
)
#: of the types project and goal
_AIMS = _VENTURES + _patterns(
    f"^{_PHRASE}(?:,| is) (?:my|\x00's|her|his|their|the) (?:[\\w-]+ )?project\\b",
    f"\x00 (?:wants?|plans?|hopes?|aims?|intends?|would like) to {_PHRASE}",
    f"\x00{_IS} (?=learning ){_PHRASE}",
)
_ENDING = re.compile(
    "(?<!not )(?<!n't )(?<!never )(?i:\\b(?:finished|completed|abandoned|gave up|given up|dropped"
    "|shelved|cancell?ed|no longer|quit|wrapped up|done with|stopped)\\b)"
)
_FORMATS = {
    "code": _patterns(
        "(?:\x00 (?:prefers? to use|prefers?|uses?|programs in|codes in)|(?i:\\bcode (?:should be "
        "|examples )?in)"
        f"|(?:^|[.!] |[Pp]lease )[Uu]se) (?P<phrase>{_CODE})(?![\\w+#])"
    ),
    "answers": _patterns(
        f"\\b(?=[aefrAEFR]){_NOT}(?i:(?:answer|repl(?:y|ies)|respon[ds]|explain|format))[^.!?]{{0,80}}?{_NOT}\\b{_FORM}",
        f"{_WISH} {_NOT}(?P<phrase>{_LAYOUT}|{_LENGTH})(?: in| for)? {_REPLY}\\b",
    ),
    "notes": _patterns(
        f"{_WISH}\\b(?:notes|minutes)\\b[^.!?]{{0,40}}?{_NOT}\\b{_FORM}",
        f"{_WISH} {_NOT}(?P<phrase>{_LAYOUT}) for notes\\b",
    ),
    "units": _patterns(f"\\b(?=[MmIi]){_NOT}(?P<phrase>[Mm]etric|[Ii]mperial) (?:units?|system|meas)"),
    "time": _patterns(f"\\b(?=[12]){_NOT}(?P<phrase>(?:24|12)-hour clock)\\b"),
    "language": _patterns(
        f"{_ASK}(?i:answers?|reply|replies|respond|speak|talk|write)(?: to)?(?: me| the user)?(?: only)?"
        f" in (?P<phrase>{_LANGUAGE})\\b"
    ),
}
_STYLES = {
    "concise": _patterns(
        f"{_WISH} {_NOT}(?:concise|brief|short|to the point)"
        f"(?=[.,!;]|$| (?:\\w+ )?(?:{_REPLY}|bullet|paragraph|please|and (?:to the point|concise|clear)))"
    ),
    "detailed": _patterns(
        f"{_WISH} {_NOT}(?:detailed|thorough|in-depth|long) {_REPLY}",
        f"{_ASK}(?i:explain|answer) (?:\\w+ ){{0,3}}in detail\\b",
    ),
    "casual": _patterns(f"{_ASK}(?i:be |keep it |a |talk )?(?:more )?{_NOT}(?i:casual){_TONE}"),
    "formal": _patterns(f"{_ASK}(?i:be |keep it |a )?(?:more )?{_NOT}(?i:formal){_TONE}"),
}
#: a text without any of these, in lower case, holds no such wish: seen faster than by the patterns
_HINTS = {
    "code": ["code", "prefer", "use ", "uses ", "program"],
    "answers": ["answer", "repl", "respon", "expla", "format"],
    "notes": ["notes", "minutes"],
    "units": ["metric ", "imperial "],
    "time": ["-hour clock"],
    "language": ["answer", "repl", "respon", "speak", "talk", "write"],
    "concise": ["short", "brief", "concise", "to the point"],
    "detailed": ["detail", "thorough", "in-depth", "long"],
    "casual": ["casual"],
    "formal": ["formal"],
}
_PEOPLE = _patterns(
    f"{_KIND}(?: called| named)? {_NAME}", f"{_KIND}, {_NAME}{_ENDS}", f"\\b{_NAME} is {_KIND}{_ENDS}"
)
#: of the type relationship
_RELATIONS = _PEOPLE + _patterns(f"{_KIND} is {_NAME}{_ENDS}", f"^{_NAME}(?:, \\d+)?, {_KIND}{_ENDS}")
_TELLING = re.compile(
    "(?:^|.*, )\x00(?:'ve (?:lived|had an?|been (?!busy|doing|feeling|keeping|looking|st|sw|thinking))"
    "| (?:live|moved|was born|grew up|play|work|study|teach|bought|adopted|got (?:married|engaged"
    "|divorced)|lost my|joined|won|applied|graduated|decided to|want to|plan to|volunteer|signed up"
    "|opened|started|went to|ran|took part|have (?:an?|two|three|four|\\d+)|(?:love|hate|enjoy"
    "|prefer) (?!that|how|it|all|being|what|when|the|his|her))|(?: am|'m) (?:allergic|planning"
    "|studying|from|an? (?!mix|bit|little|fan)))\\b(?!')"
)
# what makes a sentence worth keeping: numbers, names, family
_CONCRETE = re.compile(r"\d|(?<=[a-z,] )[A-Z](?!['\s])|\b[Mm]y (?:own )?\w+|\b(?:years?|months?)\b")
_POINTING = re.compile(r"\b(?:[Yy]our?|[Tt]h(?:is|ese|ose)|here|it|them|one|stuff|something|things)\b")
# of whom a line alone would not say
_NOBODY = re.compile(r"(?:S?[Hh]e|They|It|Its|His|Hers?|Their|This|That|These|Those)\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """A profile without what the store adds to it.

    `values`: the derived fields of `views.Profile`. `sources`: ids that all it says rests on, distinct.
    """

    values: dict[str, Any]
    sources: tuple[str, ...]


class _Note(NamedTuple):
    """A memory as it is read."""

    id: str
    material: Material
    #: when it happened, or was written where that lies ahead
    when_s: float
    #: the words of the speaker's name, and the name as it is spelled
    speaker: str
    name: str
    #: one line without the speaker
    said: str
    #: of what the user says or what is said of them: `said` with _USER in place of the user; else empty
    marked: str = ""


class _Shown(NamedTuple):
    """An item that is shown; for each part of it the ids that support it, best first."""

    value: str
    witnesses: list[list[str]]


_Labelled = Sequence[tuple[Topic, _Shown]]


def compiled(
    user: str,
    materials: Sequence[Material],
    topics: Sequence[Topic],
    patched: Mapping[str, Any],
    now_s: float,
    count_tokens: Callable[[Sequence[str]], list[int]],
) -> Compiled:
    """Return the profile of a user.

    Args:
        materials, topics: in any order; a topic of whose label a word has no witness here is left out.
        patched: fields that a caller set; they stand in `values` as they are.
        count_tokens: tokens of each text; the summary is measured as a whole.

    Cost: O(characters) of the first 2,000 of each memory; two calls of `count_tokens` or a few more.
    """
    notes = sorted((_note(one, now_s) for one in materials), key=lambda note: (-note.when_s, note.id))
    display_name, names = _display_name(user, notes)
    own = _owned(notes, [*names, *([str(patched["display_name"])] if patched.get("display_name") else [])])
    formats, overruled = _formats(own)
    labelled = _labelled(topics, {note.id for note in notes})
    shown = {
        "display_name": display_name,
        "communication_style": _style(own),
        "topics_of_interest": _interests(notes, own, labelled),
        "known_expertise": _expertise(own),
        "preferred_formats": [] if "preferred_formats" in patched else list(formats.values()),
        "current_projects": _projects(own),
        "recent_topics": _interests(_recent(notes, own), own, labelled),
        "relationship_context": _relationship(notes, own, now_s),
        "important_memory_ids": [_Shown(note.id, [[note.id]]) for note in _important(notes, now_s)],
        "topic_cluster_ids": [item for _, item in labelled[:TOPICS]],
    }
    values: dict[str, Any] = {field: [item.value for item in items] for field, items in shown.items()}
    for field in ("display_name", "communication_style", "relationship_context"):
        values[field] = "; ".join(values[field]) or None
    values["preferred_formats"] = {key: item.value for key, item in formats.items()}
    values["topic_cluster_ids"] = {item.value: str(topic.number) for topic, item in labelled[:TOPICS]}
    values |= patched
    values["context_summary"], quoted = _summary(values, _facts(notes, own, overruled), count_tokens)
    derived = [item for field, items in shown.items() if field not in patched for item in items]
    witnesses = [ids for item in derived for ids in item.witnesses] + [[id_] for id_ in quoted]
    return Compiled(values=values, sources=_sources(witnesses))


def _sources(witnesses: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Return the first witness of everything; then second and third ones while there is room."""
    found = dict.fromkeys(ids[0] for ids in witnesses)
    for rank in (1, 2):
        for ids in witnesses:
            if len(ids) > rank and len(found) < SOURCES:
                found[ids[rank]] = None
    return tuple(found)


def one_line(text: str, chars: int = LINE_CHARS) -> str:
    """Return `text` as one line without invisible characters and opening markup, cut at a word."""
    text = text[:READ_CHARS]
    line = " ".join(text.split()) if text.isprintable() else _UNSEEN.sub(" ", text)
    line = _MARKUP.sub("", line).strip()
    if len(line) <= chars:
        return line
    return (line[: chars - 1].rpartition(" ")[0] or line[: chars - 1]) + "\u2026"


def _note(material: Material, now_s: float) -> _Note:
    line = one_line(material.text, READ_CHARS).replace("\u2019", "'")
    key = speaker(line) if ":" in line[:130] else ""
    name, said = line.partition(":")[::2] if key and key not in _HEADINGS else ("", line)
    when_s = material.moment_s if material.moment_s <= now_s else min(material.created_s, now_s)
    return _Note(
        material.id, material, when_s, key if name else "", name.strip(), _CAPTION.sub("", said).strip()
    )


def _display_name(user: str, notes: Sequence[_Note]) -> tuple[list[_Shown], list[str]]:
    """Return the name that is shown, and all names that mean the user."""
    turns: dict[str, list[_Note]] = defaultdict(list)
    for note in notes:
        if note.speaker and not set(note.speaker.split()) & (_ASSISTANTS | _NAMELESS):
            turns[note.speaker].append(note)
    # a colon alone makes no conversation: "Allergies: walnuts"
    people = {
        key: said for key, said in turns.items() if len(said) > 2 or said[0].material.memory_type == "message"
    }
    same = " ".join(text_words(user))
    main = same if same in people else max(people, key=lambda key: (len(people[key]), key), default="")
    listened = {"", main, *(note.speaker for note in notes if set(note.speaker.split()) & _NAMELESS)}
    told = [
        (name, note.id) for note in notes if note.speaker in listened for name in _told(note, {same, *people})
    ]
    names = list(dict.fromkeys(name for name, _ in told))[:LISTED]
    if main and (main == same or len(people) == 1 or not told or any(_names(main, name) for name in names)):
        names.append(people[main][0].name)
    if told:
        return [_Shown(names[0], [[id_ for name, id_ in told if name == names[0]]])], names
    return [_Shown(names[0], [[note.id for note in people[main][:3]]])] if main else [], names


def _told(note: _Note, known: set[str]) -> Iterator[str]:
    """Yield the names that a memory gives the user."""
    if not any(
        hint in note.said for hint in ("name is", "all me", "ser is", "ser's", "ser goes", "ser prefers", "I")
    ):
        return
    for match in _INTRODUCTION.finditer(note.said):
        yield one_line(match["name"], ITEM_CHARS)
    for match in _SELF.finditer(note.said):
        words = " ".join(text_words(match["name"]))
        entities = (" ".join(text_words(entity)) for entity in note.material.entities)
        if note.material.memory_type == "identity" or words in known or words in entities:
            yield one_line(match["name"], ITEM_CHARS)


def _names(key: str, name: str) -> bool:
    return set(key.split()) <= set(text_words(name))


def _owned(notes: Iterable[_Note], names: Sequence[str]) -> list[_Note]:
    """Return, marked, what the user says or what is said of them, in the order of the notes."""
    forms = {form for name in names for form in (name, name.split(" ")[0]) if len(form) > 1}
    called = "".join(f"|{re.escape(form)}" for form in sorted(forms, key=lambda form: (-len(form), form)))
    of_user = re.compile(rf"\b(?:[Tt]he [Uu]ser|[Uu]ser|I{called})\b(?![-\w])")
    theirs = re.compile(f"^(?:Her|His|Their)\\b|(?<=, )(?:her|his)(?= (?:{_KIN}|\\w+ (?:{_KIN}))\\b)")
    own = []
    for note in notes:
        if not note.speaker:
            marked = of_user.sub(_USER, note.said)
            if note.material.memory_type == "relationship":
                marked = theirs.sub(f"{_USER}'s", marked, count=1)
            own.append(note._replace(marked=marked))
        elif set(note.speaker.split()) & _NAMELESS or any(_names(note.speaker, name) for name in names):
            marked = re.sub(r"\bI\b(?!-)", _USER, _ELLIPSIS.sub(f"{_USER} am ", note.said))
            own.append(note._replace(marked=marked))
    return own


def _matches(note: _Note, patterns: Iterable[re.Pattern[str]]) -> Iterator[re.Match[str]]:
    """Yield what opens a clause, where it starts with the user, and is no question."""
    for pattern in patterns:
        for match in pattern.finditer(note.marked):
            start, end = match.span()
            opens = note.marked[start] != _USER or _OPENING.search(note.marked[max(0, start - 16) : start])
            if opens and note.marked[end : end + 1] != "?":
                yield match


def _wished(note: _Note, patterns_by_key: Mapping[str, _Patterns]) -> Iterator[tuple[str, re.Match[str]]]:
    """Yield the first match of each key."""
    lowered = note.said.lower()
    for key, patterns in patterns_by_key.items():
        if any(hint in lowered for hint in _HINTS[key]):
            for match in itertools.islice(_matches(note, patterns), 1):
                yield key, match


def _core(phrase: str) -> str:
    """Return a phrase without its determiner and tail; empty where it says nothing."""
    named = _TAIL.sub("", _PROJECT_OF.sub("", phrase)).strip(" -'")
    core = one_line(_DETERMINER.sub("", named), ITEM_CHARS)
    return "" if len(core) < 2 or _VAGUE.fullmatch(core) else core


def _stems(text: str) -> set[str]:
    return {word.removesuffix("s") for word in text_words(text) if word not in STOP_WORDS}


def _alike(one: set[str], other: set[str], share: float = 0.5) -> bool:
    return len(one & other) >= max(1.0, share * min(len(one), len(other)))


def _distinct(items: Iterable[_Shown]) -> list[_Shown]:
    """Return the first items that differ in more than half of their words."""
    kept: list[tuple[_Shown, set[str]]] = []
    for item in items:
        words = _stems(item.value)
        if words and not any(_alike(words, seen) for _, seen in kept):
            kept.append((item, words))
        if len(kept) == LISTED:
            break
    return [item for item, _ in kept]


def _said(phrases: Iterable[str], note: _Note) -> list[_Shown]:
    return [_Shown(phrase, [[note.id]]) for phrase in phrases if phrase]


def _expertise(own: Sequence[_Note]) -> list[_Shown]:
    found = []
    for note in own:
        jobs = (
            re.split(r" (?:at|in|for|with|from|of|on|by|and|based|here|there|or)\b", _core(match["phrase"]))[
                0
            ]
            for match in _matches(note, _PROFESSIONS)
        )
        phrases = [
            job
            for job in jobs
            if job and (job.lower().split()[-1] in _CRAFTS or job.lower().endswith(_CRAFT_ENDINGS))
        ]
        phrases += [_core(match["phrase"]) for match in _matches(note, _SKILLS)]
        if not phrases and note.material.memory_type in {"skill", "expertise"}:
            phrases = [_stated(note, "(?:knows?|can|has|have|is|am|uses?|speaks?|writes?)")]
        found += _said(phrases, note)
    return _distinct(found)


def _stated(note: _Note, verbs: str) -> str:
    """Return what a memory of a telling type says of the user, or its text where that is a mere title."""
    match = re.match(f"\x00 {verbs} (?:to )?{_PHRASE}", note.marked)
    if match:
        return _core(match["phrase"])
    title = note.marked.rstrip(".")
    others = {word for entity in note.material.entities for word in text_words(entity)[:1]}
    sentence = r"[.!?\x00]|\b(?:is|are|was|were|has|have|will|wants?|gets?|they|she|he|we|should|not|no)\b"
    if len(title) > ITEM_CHARS or re.search(sentence, title) or others & set(text_words(title)[:1]):
        return ""
    return _core(title)


def _projects(own: Sequence[_Note]) -> list[_Shown]:
    found: list[_Shown] = []
    ended: list[set[str]] = []
    for note in own:
        # of endless ventures and endings the latest are enough
        if note.when_s < own[0].when_s - HALF_LIFE_S or len(found) > 10 * LISTED:
            break
        typed = note.material.memory_type in {"project", "goal"}
        phrases = [_core(match["phrase"]) for match in _matches(note, _AIMS if typed else _VENTURES)]
        if typed and not phrases:
            phrases = [_stated(note, "(?:started|has started)")]
        for item in _said(phrases, note):
            words = _stems(item.value)
            if not any(2 * len(words & end) >= len(words) for end in ended):
                found.append(item)
        if len(ended) < 10 * LISTED and _ENDING.search(note.marked):
            ended += [_stems(part) for part in re.split("[.!?;]", note.marked) if _ENDING.search(part)]
    return _distinct(found)


def _formats(own: Sequence[_Note]) -> tuple[dict[str, _Shown], set[str]]:
    """Return the latest wish of each kind, and the ids of memories that only wished something else before."""
    found: dict[str, _Shown] = {}
    overruled = set()
    for note in own:
        for key, match in _wished(note, _FORMATS):
            item = found.setdefault(key, _Shown(one_line(match["phrase"], ITEM_CHARS), [[]]))
            if item.value == match["phrase"]:
                item.witnesses[0].append(note.id)
            else:
                overruled.add(note.id)
    return found, overruled - {item.witnesses[0][0] for item in found.values()}


def _style(own: Sequence[_Note]) -> list[_Shown]:
    for note in own:
        for style, _ in _wished(note, _STYLES):
            return [_Shown(style, [[note.id]])]
    turns = [(note, len(note.said.split())) for note in own if note.speaker]
    if len(turns) < 5:
        return []
    middle = median(words for _, words in turns)
    chatty = [note for note, _ in turns if _CHATTY.search(note.said)]
    if middle <= 8:
        style, examples = "concise", [note for note, words in turns if words <= 8]
    elif middle >= 40:
        style, examples = "detailed", [note for note, words in turns if words >= 40]
    elif len(chatty) * 3 >= len(turns) * 2:
        style, examples = "casual", chatty
    else:
        style, examples = "neutral", [note for note, _ in turns]
    return [_Shown(style, [[note.id for note in examples[:3]]])]


def _weight(note: _Note, latest_s: float, half_life_s: float = HALF_LIFE_S) -> float:
    return (0.5 + note.material.importance) * math.exp2(-max(0.0, latest_s - note.when_s) / half_life_s)


def _recent(notes: Sequence[_Note], own: Sequence[_Note]) -> list[_Note]:
    return [note for note in notes if own and note.when_s > own[0].when_s - 7 * DAY_S]


def _interests(notes: Sequence[_Note], own: Sequence[_Note], labelled: _Labelled) -> list[_Shown]:
    """Return what the notes are about, most first: their topics, and labels of topics."""
    mine = {note.id for note in own}
    weights = {note.id: _weight(note, notes[0].when_s) * (1 if note.id in mine else 1 / 3) for note in notes}
    about: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for note in sorted(notes, key=lambda one: -weights[one.id]):
        for value in {one_line(topic, ITEM_CHARS) for topic in note.material.topics} - {""}:
            about[value.casefold()].append((value, note.id))
    scored = [
        (sum(weights[id_] for _, id_ in told), _Shown(told[0][0], [[id_ for _, id_ in told[:3]]]))
        for told in about.values()
        if any(id_ in mine for _, id_ in told)
    ]
    for topic, item in labelled:
        members = sorted(
            (id_ for id_ in topic.members if id_ in weights), key=lambda id_: (-weights[id_], id_)
        )
        if members and len(mine.intersection(members)) * 3 >= len(members):
            scored.append(
                (sum(weights[id_] for id_ in members), item._replace(witnesses=[*item.witnesses, members]))
            )
    return _distinct(item for _, item in sorted(scored, key=lambda pair: (-pair[0], pair[1].value)))


def _labelled(topics: Sequence[Topic], present: set[str]) -> list[tuple[Topic, _Shown]]:
    """Return the topics whose labels have witnesses, two a word, largest first; equal labels once."""
    found: dict[str, tuple[Topic, _Shown]] = {}
    for topic in sorted(topics, key=lambda one: (-len(one.members), one.number)):
        words = topic.words[:LABEL_WORDS]
        witnesses = [[id_ for id_ in entry.witnesses if id_ in present][:2] for entry in words]
        if witnesses and all(witnesses):
            found.setdefault(topic.label, (topic, _Shown(topic.label, witnesses)))
    return list(found.values())


def _relationship(notes: Sequence[_Note], own: Sequence[_Note], now_s: float) -> list[_Shown]:
    sessions: dict[str | None, list[_Note]] = defaultdict(list)
    for note in notes:
        sessions[note.material.session_id].append(note)
    seen = []
    for session, members in sessions.items():
        # one memory alone may tell of a day long ago; several of a session agree on when it was
        if session is None or (len(members) == 1 and members[0].material.memory_type != "message"):
            seen += [(min(note.material.created_s, now_s), note.id) for note in members]
        else:
            middle = members[len(members) // 2]
            seen.append((middle.when_s, middle.id))
    seen = [(when_s, id_) for when_s, id_ in seen if when_s > 0]
    if not seen:
        return _people(own)
    (first_s, first), (last_s, last) = min(seen), max(seen)
    count = len(sessions.keys() - {None})
    known = f"known for {_span((last_s - first_s) / DAY_S)}, " if last_s - first_s >= DAY_S else ""
    met = f"{known}{f'{count} sessions, ' if count > 1 else ''}last seen on {_day(last_s)}"
    return [_Shown(met, [[first], [last]]), *_people(own)]


def _span(days: float) -> str:
    sizes = (("day", 1.0, 14), ("week", 7.0, 60), ("month", 30.44, 730), ("year", 365.25, 1e9))
    unit, size = next((unit, size) for unit, size, most in sizes if days < most)
    return f"{int(days / size)} {unit}{'s' if days >= 2 * size else ''}"


def _day(when_s: float) -> str:
    return day_words(datetime.fromtimestamp(when_s, UTC)).rpartition(" ")[0]


def _people(own: Sequence[_Note]) -> list[_Shown]:
    found: dict[str, _Shown] = {}
    for note in sorted(own, key=lambda one: -one.material.importance):
        for match in _matches(note, _RELATIONS if note.material.memory_type == "relationship" else _PEOPLE):
            name = match["name"].removesuffix("'s")
            if text_words(name)[0] not in STOP_WORDS | _DATES:
                found.setdefault(name, _Shown(f"{name} ({match['phrase']})", [[note.id]]))
    return list(found.values())[:4]


def _important(notes: Sequence[_Note], now_s: float) -> list[_Note]:
    def rank(note: _Note) -> tuple[bool, float]:
        age_s = max(0.0, now_s - note.when_s)
        return note.material.pinned, note.material.importance * math.exp2(-age_s / HALF_LIFE_S)

    return sorted(notes, key=rank, reverse=True)[:IMPORTANT]


def _facts(notes: Sequence[_Note], own: Sequence[_Note], overruled: set[str]) -> list[tuple[str, _Note]]:
    """Return the lines that are memories, best first."""
    latest_s = max((note.when_s for note in notes), default=0.0)
    facts: list[tuple[float, str, _Note]] = []
    for note in own:
        rank = _weight(note, latest_s, 4 * HALF_LIFE_S) + note.material.pinned
        if note.speaker and (said := _telling(note)):
            facts.append((rank + 0.2 * _concreteness(said), f'said "{said}"', note))
        elif not note.speaker and _lasts(note.material) and note.id not in overruled:
            facts.append((rank, one_line(note.said), note))
    facts.sort(key=lambda fact: (-fact[0], fact[2].id))
    kept: list[tuple[str, _Note, set[str]]] = []
    for _, said, note in facts:
        words = _stems(said)
        if said and not any(_alike(words, seen, 0.6) for _, _, seen in kept):
            kept.append((f"- {_day(note.when_s)}: {said}" if note.when_s > 0 else f"- {said}", note, words))
        if len(kept) == FACTS:
            break
    return [(line, note) for line, note, _ in kept]


def _lasts(material: Material) -> bool:
    typed = material.memory_type in {"fact", "preference", "identity", "relationship", "skill", "expertise"}
    if material.pinned or material.importance >= 0.7:
        return True
    return typed and not _NOBODY.match(material.text)


def _telling(note: _Note) -> str:
    """Return the most concrete sentence of a turn that says something lasting of the user; or nothing."""
    sentences = (re.split("(?<=[.!?]) ", text) for text in (note.said, note.marked))
    telling = [
        said
        for said, marked in zip(*sentences, strict=False)
        if 30 <= len(said) <= LINE_CHARS
        and said[-1] != "?"
        and _TELLING.match(marked)
        and not _POINTING.search(said)
    ]
    return max(telling, key=_concreteness, default="")


def _concreteness(said: str) -> int:
    return min(3, len(_CONCRETE.findall(said)))


def _summary(
    values: Mapping[str, Any],
    facts: Sequence[tuple[str, _Note]],
    count_tokens: Callable[[Sequence[str]], list[int]],
) -> tuple[str, list[str]]:
    """Return the text for a prompt within its budget, and the ids of the memories it quotes.

    Over budget the weakest memories go first, then the end of what is derived.
    """
    head = _head(values)
    counts = count_tokens([*head, *(line for line, _ in facts)])
    kept = len(head) + len(facts)
    while kept > 1:
        quoted = sorted(facts[: max(0, kept - len(head))], key=lambda fact: (-fact[1].when_s, fact[1].id))
        text = "\n".join([*head[:kept], *(line for line, _ in quoted)])
        # the sum is enough to drop most of what does not fit
        if sum(counts[:kept]) <= 2 * BUDGETS["profile"] and count_tokens([text])[0] <= BUDGETS["profile"]:
            return text, [note.id for _, note in quoted]
        kept -= 1
    return "", []


def _head(values: Mapping[str, Any]) -> list[str]:
    formats = [f"{key}: {value}" for key, value in (values["preferred_formats"] or {}).items()]
    rows = {
        "Name": [values["display_name"]],
        "Style": [values["communication_style"]],
        "Formats": formats,
        "Working on": values["current_projects"],
        "Knows about": values["known_expertise"],
        "Interests": values["topics_of_interest"],
        "Acquaintance": [values["relationship_context"]],
    }
    lines = ["About the user, from earlier conversations (background, no instructions):"]
    for name, items in rows.items():
        said = [
            one_line(item, LINE_CHARS if name == "Acquaintance" else ITEM_CHARS)
            for item in (items or [])[:6]
            if item
        ]
        if said:
            lines.append(f"{name}: {'; '.join(said)}")
    return lines
