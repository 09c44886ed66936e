"""The only place that says how important a memory is when nobody said so, and how that fades. Pure."""

from __future__ import annotations

import re

from redismem.words import STOP_WORDS, speaker, text_words

#: age in days up to which weights are tabled; an older memory has the last one
DAYS = 1_095
#: characters that are read
_MAX_CHARS = 1_000
#: words from which a statement is not short
_SHORT_WORDS = 4

_OTHER = "*"

#: importance before the wording is looked at
_BASES = {
    "identity": 0.9,
    "instruction": 0.8,
    "rule": 0.8,
    "preference": 0.7,
    "fact": 0.6,
    "goal": 0.6,
    "project": 0.6,
    "relationship": 0.6,
    "skill": 0.6,
    "semantic": 0.5,
    "episodic": 0.5,
    "event": 0.5,
    "procedural": 0.5,
    "message": 0.4,
    _OTHER: 0.5,
}

#: half-lives by type, where semantic is 1
_HALF_LIVES = {
    "identity": 4.0,
    "instruction": 4.0,
    "rule": 4.0,
    "preference": 2.0,
    "fact": 2.0,
    "relationship": 2.0,
    "skill": 2.0,
    "procedural": 2.0,
    "semantic": 1.0,
    "goal": 1.0,
    "project": 1.0,
    "episodic": 0.5,
    "event": 0.5,
    "message": 0.25,
    _OTHER: 1.0,
}

_PINNED = 0.9

#: what the wording adds
_CRITICAL, _LASTING, _PARTICULAR = 0.2, 0.1, 0.05
_QUESTION, _SHORT, _MOSTLY_CHATTER, _CHATTER = -0.1, -0.1, -0.1, -0.25

_CRITICAL_WORDS = frozenset(
    """allergic allergies allergy anaphylaxis asthma cancer celiac coeliac diabetes diabetic diagnosed
    diagnosis died disability emergency epilepsy epileptic hospital insulin intolerant medication
    overdose passport password passwords pregnant prescription suicidal suicide surgery wheelchair""".split()
)
_LASTING_WORDS = frozenset(
    """adopted always anniversary birthday born deadline divorced engaged favorite favourite fired
    graduated hired important married must named never prefer prefers promoted promotion quit
    remember vegan vegetarian""".split()
)
#: greetings, thanks, praise, encouragement and fillers
_CHATTER_WORDS = frozenset(
    """absolutely agree agreed ah amazing appreciate appreciated aw awesome aww awww beautiful best bet bye
    care catching chat chatting cheer congrats congratulations cool cute definitely doubt
    encouragement exactly excited exciting fab fantastic fine forward fun glad good goodbye great
    guys ha haha heartwarming hello hey hi huge hugs impressive incredible inspiring kidding lol
    lovely luck nice oh ok okay ooh perfect please pleasure positive pretty proud pumped sorry sure
    sweet thank thanks thrilled totally tough vibes welcome well wonderful worries wow ya yay yeah
    yep yes yo yup""".split()
)
#: what they are made of besides
_VAGUE_WORDS = STOP_WORDS.union(
    """back backing believe better bit bunch catch cheering couldn course day days difference dreams em
    enjoy feel folks get gets getting give go goes going gonna got gotta guess hang happening happy
    have hear hearing help helps hope impact job keep keeps kind know later let lets like ll look
    looking looks lot lots love loved make makes making man mate mean means morning news night
    problem re right rock see seem seems share sharing soon sound sounds stay stuff super support
    supporting supportive take talk talking thing things think time ton tons true truly try up ve
    wait want way whatever wish words worry""".split()
)
_OF_WRITER = frozenset("i me my mine we our us".split())
# a name inside a sentence; `Thanks, Jon` and `Hey Jon` only address somebody
_NAME = re.compile(r"[A-Z](?<=[a-z] [A-Z])(?<!Hey .)(?<!Hi .)(?<!Thanks .)(?<!Wow .)(?<!Yeah .)[a-z]{2}")
_DIGIT = re.compile(r"\d")
# anybody named or addressed where no sentence opens
_CAPITAL = re.compile(r"(?<=[\w,] )[A-Z]\w+")
_ASIDE = re.compile(r"\[[^\]]*\]")
_QUESTION_SENTENCE = re.compile(r"[^.!?\n]*\?")
# must have been great, always here for you, never give up: nothing of that lasts
_PHRASE = re.compile(
    r"\b(?:must(?:['\u2019]ve| have| be| feel)|always (?:be )?(?:here|there)|never giv(?:e|es|ing) up"
    r"|(?:never|not|won['\u2019]t|don['\u2019]t) quit)\b"
)
_DATES = frozenset(
    """monday tuesday wednesday thursday friday saturday sunday january february april june july august
    september october november december""".split()
)


def default_importance(memory_type: str, text: str, pinned: bool) -> float:
    """Return the importance, 0.15 to 1 in steps of 0.01, of a memory whose writer gave none.

    | type                                      | base  |
    |-------------------------------------------|-------|
    | identity                                  | 0.9   |
    | instruction, rule                         | 0.8   |
    | preference                                | 0.7   |
    | fact, goal, project, relationship, skill  | 0.6   |
    | semantic, episodic, event, procedural, others | 0.5 |
    | message                                   | 0.4   |

    | wording (English)                         | adds  |
    |-------------------------------------------|-------|
    | critical: allergic, surgery, password     | +0.2  |
    | lasting: always, must, birthday           | +0.1  |
    | particular: a number, a day, a name       | +0.05 |
    | nothing but questions                     | -0.1  |
    | nothing but greetings, thanks, praise     | -0.25 |
    | a message: as much of that as of others   | -0.1  |
    | a message: fewer than 4 different words   | -0.1  |

    Critical takes the place of lasting and particular. Those two count in messages only where they say I, my
    or we. The first of the last three counts, where nothing above them does. Questions beside statements
    are not read.

    Pinned: 0.9 at least. Cost: 30 us for 200 characters, half of it to find the words; the first 1,000
    are read.
    """
    said = text[:_MAX_CHARS]
    if speaker(said):
        said = said.split(":", 1)[1]
    importance = _BASES.get(memory_type, _BASES[_OTHER]) + _wording(said, memory_type)
    return round(min(1.0, max(_PINNED if pinned else 0.0, importance)), 2)


def _wording(said: str, memory_type: str) -> float:
    stated = _statements(said)
    words = set(text_words(stated))
    if not words:
        return _QUESTION
    adds = 0.0
    # a turn that only answers the other side ("it's important, you must …") tells nothing that lasts
    if memory_type != "message" or words & _OF_WRITER:
        adds += _LASTING * bool(words & _LASTING_WORDS)
        adds += _PARTICULAR * bool(_NAME.search(stated) or _DIGIT.search(stated) or words & _DATES)
    if words & _CRITICAL_WORDS:
        return _CRITICAL
    return adds or _emptiness(stated, words, memory_type)


def _statements(said: str) -> str:
    """Return a text without its questions, asides in brackets, and phrases."""
    said = _ASIDE.sub(" ", said) if "[" in said else said
    said = _QUESTION_SENTENCE.sub(" ", said) if "?" in said else said
    return _PHRASE.sub(" ", said)


def _emptiness(stated: str, words: set[str], memory_type: str) -> float:
    chatter = len(words & _CHATTER_WORDS)
    telling = words - _CHATTER_WORDS - _VAGUE_WORDS
    if chatter and telling.issubset(name.lower() for name in _CAPITAL.findall(stated)):
        return _CHATTER
    if memory_type != "message":
        return 0.0
    if chatter and chatter >= len(telling):
        return _MOSTLY_CHATTER
    says_something = telling and words & _OF_WRITER  # I love pizza
    return _SHORT if len(words) < _SHORT_WORDS and not says_something else 0.0


def half_life_days(memory_type: str, base_days: float) -> float:
    """Return the days after which the importance of a memory has halved.

    Args:
        base_days: half-life of semantic memories, which other types multiply: identity, instruction, rule 4;
            fact, preference, procedural, relationship, skill 2; episodic, event 0.5; message 0.25; others 1.
    """
    return base_days * _HALF_LIVES.get(memory_type, _HALF_LIVES[_OTHER])


def temporal_weights(base_days: float) -> dict[str, list[float]]:
    """Return for each type the weights of ages of 0 to `DAYS` whole days: 0.5 ** (age / half-life).

    `*` stands for every type that is not a key.
    """
    return {
        memory_type: [0.5 ** (age / half_life_days(memory_type, base_days)) for age in range(DAYS + 1)]
        for memory_type in _HALF_LIVES
    }
