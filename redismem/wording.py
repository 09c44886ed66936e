"""The only place that says how people word what they are, do and want, and reads it from a memory. Pure.

Patterns match on a text in which USER stands for the user. They are bounded: no text makes them run away.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from redismem.material import Material
from redismem.words import STOP_WORDS, speaker, text_words

#: characters of a memory that are read, of a line, of an item
READ_CHARS, LINE_CHARS, ITEM_CHARS = 2_000, 160, 60

#: stands for the user where a memory speaks of them; memories hold no NUL
USER = "\x00"
ASSISTANTS = frozenset("assistant bot chatbot ai agent system tool model".split())
NAMELESS = frozenset("user human me".split())
#: what stands before a colon and is no speaker
HEADINGS = frozenset(
    """a q answer decision fact facts goal goals hobbies hobby job name note notes preference
    preferences project projects question reminder skill skills summary task tasks tip todo topic update
    warning""".split()
)
# controls, bidirectional overrides, invisible tags, private use: a line stays one line, and what it seems
UNSEEN = re.compile(
    "[\x00-\x20\x7f-\xa0\u200b\u200e\u200f\u2028-\u202f\u2060-\u206f\ufeff\ud800-\uf8ff\U000e0000-\U000e007f]+"
)
MARKUP = re.compile(r"^(?:[#>*`|=~+-]+ ?)+|`{3,}|<\|?/?[\w|]{1,30}\|?>")
CAPTION = re.compile(r" ?\[image: [^\]]*\]?")
CHATTY = re.compile("!|\\w'(?:m|re|s|ll|ve|d|t)\\b|[\u263a-\u27bf\U0001f300-\U0001faff]")

NAME = r"(?P<name>[^\W\d_a-z][\w'-]*(?: (?:(?:de|la|da|van|von|der|bin|al) ){0,2}[^\W\d_a-z][\w'-]*){0,2})"
INTRODUCTION = re.compile(
    r"(?:\b[Mm]y (?:full |first )?name is|(?:^|[.!,;] |[Pp]lease |\b(?:and|but|just|you can) )[Cc]all me"
    rf"|\b[Uu]ser(?:'s (?:full |first )?name is| is (?:called|named)| goes by| prefers to be called)) {NAME}"
)
SELF = re.compile(rf"(?:^|[.!] )(?:\w+[,!] )?I(?:'m| am) {NAME}(?=[.,!]|$| and | from )")

# a phrase ends with its clause; a dot inside a word (Node.js) belongs to it
PHRASE = '(?P<phrase>(?:[^.!?;,:()\x00"\u201c\u201d\u2013\u2014\u2026]|\\.(?=\\w)){2,80})'
OFTEN = "(?: (?:also|now|still|currently|actually|mainly|mostly|just|busy|recently|really)){0,2}"
IS, HAS, BEEN = (
    f"(?: am| is|'[ms]){OFTEN}",
    f"(?: have| has|'ve)?{OFTEN}",
    f"(?: have| has|'ve) been{OFTEN}",
)
OWN = "(?:[Mm]y|[Oo]ur|\x00's)"
A = "(?:an?|my|our|the|his|her|their)"
OPENING = re.compile(
    "(?:^|[.!?;:,\u2026\u2013\u2014-] ?|\\b(?:and|but|so|because|well|yeah|currently|now) ?)$"
)
ELLIPSIS = re.compile("(?:^|(?<=[.!?] ))(?:Still|Been|Currently|Busy) (?=working on |building |writing an? )")
TAIL = re.compile(
    " (?:because|but|which|who|where|when|while|since|so|though|if|too|yet|then|lately|currently|now"
    "|really|right now|at the moment|these days|this (?:week|month|year)|for (?:a while|me)|and (?:I"
    "|it|we|s?he|they|that|am|is|was|been|things|rehearsing|working)|(?:with|to|and)$|[-'])(?: .*|$)"
)
# "a new project - a thriller": what follows says more
PROJECT_OF = re.compile(r"^(?:\w+ ){0,3}project - (?=an? )")
DETERMINER = re.compile("^(?:(?:an?|the|my|our|his|her|their|this|that|some|own|new) )+")
VAGUE = re.compile(
    "(?:(?:new|big|cool|exciting|few|some|other|another|several|different|little|great|lot of|up|my|on) )*"
    "(?:projects?|things?|this|them|myself|yourself|lot|what|goals?|you"
    "|(?:of|something|anything|stuff|it|one|that|relationships?|trust|confidence|strength|connections?"
    "|brand|everything)\\b.*)"
)
CRAFTS = frozenset(
    """accountant actor actress artist attorney baker banker barista broker builder carpenter chef coach
    composer cook counsellor counselor curator dancer dentist doctor driver economist editor
    entrepreneur farmer founder firefighter gardener guard instructor interpreter joiner journalist
    judge lawyer lecturer librarian mechanic midwife nurse painter paramedic pharmacist physio pilot
    player plumber potter producer professor sailor sculptor singer solicitor surgeon tailor therapist
    trainer translator tutor vet veterinarian welder""".split()
)
CRAFT_ENDINGS = tuple(
    """administrator analyst architect consultant designer developer director engineer grapher keeper
    maker manager officer ologist onomer programmer researcher scientist smith specialist teacher worker
    writer wright""".split()
)
ABOUT_JOB = re.compile(" (?:at|in|for|with|from|of|on|by|and|based|here|there|or)\\b")
IDLE = (
    "being|dating|dealing|dreaming|feeling|getting|going|having|hoping|living|looking|meaning|seeing"
    "|struggling"
)
DOING = (
    f"(?P<phrase>(?!(?:{IDLE}|suffering|thinking|trying|waiting|wanting)\\b)[a-z]{{2,}}ing(?: \\w+){{0,4}}?)"
)
YEARS = "(?:over |about |almost |nearly )?(?:\\d{1,2}|two|three|four|five|six|seven|eight|nine|ten) years"
ABLE = "(?:expert|fluent|proficient|skilled|experienced|certified|good|great) (?:in|at|with)"
MAKING = (
    "(?:writing|creating|designing|launching|organi[sz]ing|renovating|preparing for|training for|setting up)"
)
VENTURE = (
    "(?:project|business|company|startup|store|shop|studio|blog|channel|podcast|book|novel|course"
    "|garden|band|club|app|website|degree|thesis|campaign|charity|foundation|screenplay|script"
    "|petition|newsletter|service)"
)
LANGUAGE = (
    "English|German|French|Spanish|Italian|Portuguese|Dutch|Polish|Czech|Hungarian|Swedish|Danish|Norwegian"
    "|Finnish|Greek|Turkish|Russian|Ukrainian|Arabic|Hebrew|Hindi|Japanese|Korean|Chinese|Mandarin"
)
CODE = (
    "Python|TypeScript|JavaScript|Rust|Golang|Java|Kotlin|Swift|C\\+\\+|C#|Ruby|PHP|Scala|Haskell|Elixir"
    "|SQL|Bash"
)
LAYOUT = (
    "bullet points|bullets|numbered lists|tables|[Mm]arkdown|plain text|plain prose|prose|paragraphs|JSON"
)
LENGTH = "short|concise|brief|long|detailed"
FORM = f"(?P<phrase>(?:(?:{LENGTH}) )?(?:{LAYOUT}))\\b"
NOT = (
    "(?<![Nn]o )(?<![Nn]ot )(?<!n't )(?<![Nn]ever )(?<![Ww]ithout )(?<!of )(?<![Aa]void )(?<!than )(?<!too )"
    "(?<!hates )"
)
REPLY = "(?:answers?|repl(?:y|ies)|responses?|explanations?)"
WISH = (
    f"\\b(?=[abgklpuwABGKLPUW]){NOT}(?i:(?:prefers?|wants?|likes?|please|keep|give|be|asked for|use)\\b)"
    "[^.!?]{0,40}?"
)
ASK = "(?:^|[.!,] |[Pp]lease |always |should |wants? (?:you |the assistant )?to |prefers? to |prefers? )"
TONE = "(?=[.,!;]|$| (?:and|tone|style|language|answers|with))"
KIN = (
    "(?:partner|husband|wife|boyfriend|girlfriend|mother|father|mum|mom|dad|sister|brother|son"
    "|daughter|aunt|uncle|cousin|boss|manager|colleague|friend|neighbour|neighbor|teacher|mentor"
    "|therapist|dog|cat)"
)
DATES = frozenset(
    """monday tuesday wednesday thursday friday saturday sunday january february march april may june july
    august september october november december today yesterday tomorrow thankfully""".split()
)
KIND = f"{OWN} (?!ex\\b|late\\b|former\\b)(?:\\w+ ){{0,2}}?(?P<phrase>{KIN})"
ENDS = "(?=[,.;!)]|$| (?:is|has|and|who|works?|lives?|in|from|at|by)\\b)"


Patterns = tuple[re.Pattern[str], ...]


def patterns(*patterns: str) -> Patterns:
    return tuple(re.compile(pattern) for pattern in patterns)


PROFESSIONS = patterns(
    f"\x00(?: works?|{IS} working) (?:\\w+ )?as (?:an?|the) {PHRASE}", f"\x00{IS} an? {PHRASE}"
)
SKILLS = patterns(
    f"\x00(?: have| has|'ve) been {DOING} for {YEARS}",
    f"\x00{HAS} started {DOING} {YEARS} ago",
    f"\x00{IS}(?: very| pretty| quite)?(?: an)? {ABLE} {PHRASE}",
)
VENTURES = patterns(
    f"\x00(?:{IS}|{BEEN}) (?:working (?:hard )?on|building|developing) {PHRASE}",
    f"\x00{IS} (?={MAKING} {A} ){PHRASE}",
    f"\x00{HAS} started (?:working on|building|developing|writing) {PHRASE}",
    f"\x00{HAS} started (?={A} (?:[\\w-]+ ){{0,4}}{VENTURE}\\b){PHRASE}",
    f"{OWN} (?:\\w+ )?project(?:(?: is|,)? called|:| is(?= an? )) {PHRASE}",
)
#: of the types project and goal
AIMS = VENTURES + patterns(
    f"^{PHRASE}(?:,| is) (?:my|\x00's|her|his|their|the) (?:[\\w-]+ )?project\\b",
    f"\x00 (?:wants?|plans?|hopes?|aims?|intends?|would like) to {PHRASE}",
    f"\x00{IS} (?=learning ){PHRASE}",
)
ENDING = re.compile(
    "(?<!not )(?<!n't )(?<!never )(?i:\\b(?:finished|completed|abandoned|gave up|given up|dropped"
    "|shelved|cancell?ed|no longer|quit|wrapped up|done with|stopped)\\b)"
)
FORMATS = {
    "code": patterns(
        "(?:\x00 (?:prefers? to use|prefers?|uses?|programs in|codes in)|(?i:\\bcode (?:should be "
        "|examples )?in)"
        f"|(?:^|[.!] |[Pp]lease )[Uu]se) (?P<phrase>{CODE})(?![\\w+#])"
    ),
    "answers": patterns(
        f"\\b(?=[aefrAEFR]){NOT}(?i:(?:answer|repl(?:y|ies)|respon[ds]|explain|format))[^.!?]{{0,80}}?{NOT}\\b{FORM}",
        f"{WISH} {NOT}(?P<phrase>{LAYOUT}|{LENGTH})(?: in| for)? {REPLY}\\b",
    ),
    "notes": patterns(
        f"{WISH}\\b(?:notes|minutes)\\b[^.!?]{{0,40}}?{NOT}\\b{FORM}",
        f"{WISH} {NOT}(?P<phrase>{LAYOUT}) for notes\\b",
    ),
    "units": patterns(f"\\b(?=[MmIi]){NOT}(?P<phrase>[Mm]etric|[Ii]mperial) (?:units?|system|meas)"),
    "time": patterns(f"\\b(?=[12]){NOT}(?P<phrase>(?:24|12)-hour clock)\\b"),
    "language": patterns(
        f"{ASK}(?i:answers?|reply|replies|respond|speak|talk|write)(?: to)?(?: me| the user)?(?: only)?"
        f" in (?P<phrase>{LANGUAGE})\\b"
    ),
}
STYLES = {
    "concise": patterns(
        f"{WISH} {NOT}(?:concise|brief|short|to the point)"
        f"(?=[.,!;]|$| (?:\\w+ )?(?:{REPLY}|bullet|paragraph|please|and (?:to the point|concise|clear)))"
    ),
    "detailed": patterns(
        f"{WISH} {NOT}(?:detailed|thorough|in-depth|long) {REPLY}",
        f"{ASK}(?i:explain|answer) (?:\\w+ ){{0,3}}in detail\\b",
    ),
    "casual": patterns(f"{ASK}(?i:be |keep it |a |talk )?(?:more )?{NOT}(?i:casual){TONE}"),
    "formal": patterns(f"{ASK}(?i:be |keep it |a )?(?:more )?{NOT}(?i:formal){TONE}"),
}
#: a text without any of these, in lower case, holds no such wish: seen faster than by the patterns
HINTS = {
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
PEOPLE = patterns(f"{KIND}(?: called| named)? {NAME}", f"{KIND}, {NAME}{ENDS}", f"\\b{NAME} is {KIND}{ENDS}")
#: of the type relationship
RELATIONS = PEOPLE + patterns(f"{KIND} is {NAME}{ENDS}", f"^{NAME}(?:, \\d+)?, {KIND}{ENDS}")
TELLING = re.compile(
    "(?:^|.*, )\x00(?:'ve (?:lived|had an?|been (?!busy|doing|feeling|keeping|looking|st|sw|thinking))"
    "| (?:live|moved|was born|grew up|play|work|study|teach|bought|adopted|got (?:married|engaged"
    "|divorced)|lost my|joined|won|applied|graduated|decided to|want to|plan to|volunteer|signed up"
    "|opened|started|went to|ran|took part|have (?:an?|two|three|four|\\d+)|(?:love|hate|enjoy"
    "|prefer) (?!that|how|it|all|being|what|when|the|his|her))|(?: am|'m) (?:allergic|planning"
    "|studying|from|an? (?!mix|bit|little|fan)))\\b(?!')"
)
# what makes a sentence worth keeping: numbers, names, family
CONCRETE = re.compile(r"\d|(?<=[a-z,] )[A-Z](?!['\s])|\b[Mm]y (?:own )?\w+|\b(?:years?|months?)\b")
POINTING = re.compile(r"\b(?:[Yy]our?|[Tt]h(?:is|ese|ose)|here|it|them|one|stuff|something|things)\b")
# of whom a line alone would not say
NOBODY = re.compile(r"(?:S?[Hh]e|They|It|Its|His|Hers?|Their|This|That|These|Those)\b")


class Note(NamedTuple):
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
    #: of what the user says or what is said of them: `said` with USER in place of the user; else empty
    marked: str = ""


def one_line(text: str, chars: int = LINE_CHARS) -> str:
    """Return `text` as one line without invisible characters and opening markup, cut at a word."""
    text = text[:READ_CHARS]
    line = " ".join(text.split()) if text.isprintable() else UNSEEN.sub(" ", text)
    line = MARKUP.sub("", line).strip()
    if len(line) <= chars:
        return line
    return (line[: chars - 1].rpartition(" ")[0] or line[: chars - 1]) + "\u2026"


def noted(material: Material, now_s: float) -> Note:
    line = one_line(material.text, READ_CHARS).replace("\u2019", "'")
    key = speaker(line) if ":" in line[:130] else ""
    name, said = line.partition(":")[::2] if key and key not in HEADINGS else ("", line)
    when_s = material.moment_s if material.moment_s <= now_s else min(material.created_s, now_s)
    return Note(
        material.id, material, when_s, key if name else "", name.strip(), CAPTION.sub("", said).strip()
    )


def names_told(note: Note, known: set[str]) -> Iterator[str]:
    """Yield the names that a memory gives the user."""
    if not any(
        hint in note.said for hint in ("name is", "all me", "ser is", "ser's", "ser goes", "ser prefers", "I")
    ):
        return
    for match in INTRODUCTION.finditer(note.said):
        yield one_line(match["name"], ITEM_CHARS)
    for match in SELF.finditer(note.said):
        words = " ".join(text_words(match["name"]))
        entities = (" ".join(text_words(entity)) for entity in note.material.entities)
        if note.material.memory_type == "identity" or words in known or words in entities:
            yield one_line(match["name"], ITEM_CHARS)


def is_named(key: str, name: str) -> bool:
    return set(key.split()) <= set(text_words(name))


def owned(notes: Iterable[Note], names: Sequence[str]) -> list[Note]:
    """Return, marked, what the user says or what is said of them, in the order of the notes."""
    forms = {form for name in names for form in (name, name.split(" ")[0]) if len(form) > 1}
    called = "".join(f"|{re.escape(form)}" for form in sorted(forms, key=lambda form: (-len(form), form)))
    of_user = re.compile(rf"\b(?:[Tt]he [Uu]ser|[Uu]ser|I{called})\b(?![-\w])")
    theirs = re.compile(f"^(?:Her|His|Their)\\b|(?<=, )(?:her|his)(?= (?:{KIN}|\\w+ (?:{KIN}))\\b)")
    own = []
    for note in notes:
        if not note.speaker:
            marked = of_user.sub(USER, note.said)
            if note.material.memory_type == "relationship":
                marked = theirs.sub(f"{USER}'s", marked, count=1)
            own.append(note._replace(marked=marked))
        elif set(note.speaker.split()) & NAMELESS or any(is_named(note.speaker, name) for name in names):
            marked = re.sub(r"\bI\b(?!-)", USER, ELLIPSIS.sub(f"{USER} am ", note.said))
            own.append(note._replace(marked=marked))
    return own


def statements(note: Note, patterns: Iterable[re.Pattern[str]]) -> Iterator[re.Match[str]]:
    """Yield what opens a clause, where it starts with the user, and is no question."""
    for pattern in patterns:
        for match in pattern.finditer(note.marked):
            start, end = match.span()
            opens = note.marked[start] != USER or OPENING.search(note.marked[max(0, start - 16) : start])
            if opens and note.marked[end : end + 1] != "?":
                yield match


def wished(note: Note, patterns_by_key: Mapping[str, Patterns]) -> Iterator[tuple[str, re.Match[str]]]:
    """Yield the first match of each key."""
    lowered = note.said.lower()
    for key, patterns in patterns_by_key.items():
        if any(hint in lowered for hint in HINTS[key]):
            for match in itertools.islice(statements(note, patterns), 1):
                yield key, match


def core(phrase: str) -> str:
    """Return a phrase without its determiner and tail; empty where it says nothing."""
    named = TAIL.sub("", PROJECT_OF.sub("", phrase)).strip(" -'")
    core = one_line(DETERMINER.sub("", named), ITEM_CHARS)
    return "" if len(core) < 2 or VAGUE.fullmatch(core) else core


def stems(text: str) -> set[str]:
    return {word.removesuffix("s") for word in text_words(text) if word not in STOP_WORDS}


def alike(one: set[str], other: set[str], share: float = 0.5) -> bool:
    return len(one & other) >= max(1.0, share * min(len(one), len(other)))
