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

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import median
from typing import Any, NamedTuple

from redismem.material import LABEL_WORDS, Material, Topic
from redismem.views import BUDGETS
from redismem.wording import (
    ABOUT_JOB,
    AIMS,
    ASSISTANTS,
    CHATTY,
    CONCRETE,
    CRAFT_ENDINGS,
    CRAFTS,
    DATES,
    ENDING,
    FORMATS,
    ITEM_CHARS,
    LINE_CHARS,
    NAMELESS,
    NOBODY,
    PEOPLE,
    PHRASE,
    POINTING,
    PROFESSIONS,
    RELATIONS,
    SKILLS,
    STYLES,
    TELLING,
    VENTURES,
    Note,
    alike,
    core,
    is_named,
    names_told,
    noted,
    one_line,
    owned,
    statements,
    stems,
    wished,
)
from redismem.words import STOP_WORDS, day_words, text_words

#: items of a list that is shown, important memories, topics, and lines of the summary that are memories
LISTED, IMPORTANT, TOPICS, FACTS = 10, 20, 20, 24
#: memories that a profile names, unless first witnesses alone are more: each costs a read of it 10 us
SOURCES = 100
DAY_S = 86_400.0
HALF_LIFE_S = 90 * DAY_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """A profile without what the store adds to it.

    `values`: the derived fields of `views.Profile`. `sources`: ids that all it says rests on, distinct.
    """

    values: dict[str, Any]
    sources: tuple[str, ...]


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
    notes = sorted((noted(one, now_s) for one in materials), key=lambda note: (-note.when_s, note.id))
    display_name, names = _display_name(user, notes)
    own = owned(notes, [*names, *([str(patched["display_name"])] if patched.get("display_name") else [])])
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


def _display_name(user: str, notes: Sequence[Note]) -> tuple[list[_Shown], list[str]]:
    """Return the name that is shown, and all names that mean the user."""
    turns: dict[str, list[Note]] = defaultdict(list)
    for note in notes:
        if note.speaker and not set(note.speaker.split()) & (ASSISTANTS | NAMELESS):
            turns[note.speaker].append(note)
    # a colon alone makes no conversation: "Allergies: walnuts"
    people = {
        key: said for key, said in turns.items() if len(said) > 2 or said[0].material.memory_type == "message"
    }
    same = " ".join(text_words(user))
    main = same if same in people else max(people, key=lambda key: (len(people[key]), key), default="")
    listened = {"", main, *(note.speaker for note in notes if set(note.speaker.split()) & NAMELESS)}
    told = [
        (name, note.id)
        for note in notes
        if note.speaker in listened
        for name in names_told(note, {same, *people})
    ]
    names = list(dict.fromkeys(name for name, _ in told))[:LISTED]
    if main and (main == same or len(people) == 1 or not told or any(is_named(main, name) for name in names)):
        names.append(people[main][0].name)
    if told:
        return [_Shown(names[0], [[id_ for name, id_ in told if name == names[0]]])], names
    return [_Shown(names[0], [[note.id for note in people[main][:3]]])] if main else [], names


def _distinct(items: Iterable[_Shown]) -> list[_Shown]:
    """Return the first items that differ in more than half of their words."""
    kept: list[tuple[_Shown, set[str]]] = []
    for item in items:
        words = stems(item.value)
        if words and not any(alike(words, seen) for _, seen in kept):
            kept.append((item, words))
        if len(kept) == LISTED:
            break
    return [item for item, _ in kept]


def _said(phrases: Iterable[str], note: Note) -> list[_Shown]:
    return [_Shown(phrase, [[note.id]]) for phrase in phrases if phrase]


def _expertise(own: Sequence[Note]) -> list[_Shown]:
    found = []
    for note in own:
        jobs = (ABOUT_JOB.split(core(match["phrase"]))[0] for match in statements(note, PROFESSIONS))
        phrases = [
            job
            for job in jobs
            if job and (job.lower().split()[-1] in CRAFTS or job.lower().endswith(CRAFT_ENDINGS))
        ]
        phrases += [core(match["phrase"]) for match in statements(note, SKILLS)]
        if not phrases and note.material.memory_type in {"skill", "expertise"}:
            phrases = [_stated(note, "(?:knows?|can|has|have|is|am|uses?|speaks?|writes?)")]
        found += _said(phrases, note)
    return _distinct(found)


def _stated(note: Note, verbs: str) -> str:
    """Return what a memory of a telling type says of the user, or its text where that is a mere title."""
    match = re.match(f"\x00 {verbs} (?:to )?{PHRASE}", note.marked)
    if match:
        return core(match["phrase"])
    title = note.marked.rstrip(".")
    others = {word for entity in note.material.entities for word in text_words(entity)[:1]}
    sentence = r"[.!?\x00]|\b(?:is|are|was|were|has|have|will|wants?|gets?|they|she|he|we|should|not|no)\b"
    if len(title) > ITEM_CHARS or re.search(sentence, title) or others & set(text_words(title)[:1]):
        return ""
    return core(title)


def _projects(own: Sequence[Note]) -> list[_Shown]:
    found: list[_Shown] = []
    ended: list[set[str]] = []
    for note in own:
        # of endless ventures and endings the latest are enough
        if note.when_s < own[0].when_s - HALF_LIFE_S or len(found) > 10 * LISTED:
            break
        typed = note.material.memory_type in {"project", "goal"}
        phrases = [core(match["phrase"]) for match in statements(note, AIMS if typed else VENTURES)]
        if typed and not phrases:
            phrases = [_stated(note, "(?:started|has started)")]
        for item in _said(phrases, note):
            words = stems(item.value)
            if not any(2 * len(words & end) >= len(words) for end in ended):
                found.append(item)
        if len(ended) < 10 * LISTED and ENDING.search(note.marked):
            ended += [stems(part) for part in re.split("[.!?;]", note.marked) if ENDING.search(part)]
    return _distinct(found)


def _formats(own: Sequence[Note]) -> tuple[dict[str, _Shown], set[str]]:
    """Return the latest wish of each kind, and the ids of memories that only wished something else before."""
    found: dict[str, _Shown] = {}
    overruled = set()
    for note in own:
        for key, match in wished(note, FORMATS):
            item = found.setdefault(key, _Shown(one_line(match["phrase"], ITEM_CHARS), [[]]))
            if item.value == match["phrase"]:
                item.witnesses[0].append(note.id)
            else:
                overruled.add(note.id)
    return found, overruled - {item.witnesses[0][0] for item in found.values()}


def _style(own: Sequence[Note]) -> list[_Shown]:
    for note in own:
        for style, _ in wished(note, STYLES):
            return [_Shown(style, [[note.id]])]
    turns = [(note, len(note.said.split())) for note in own if note.speaker]
    if len(turns) < 5:
        return []
    middle = median(words for _, words in turns)
    chatty = [note for note, _ in turns if CHATTY.search(note.said)]
    if middle <= 8:
        style, examples = "concise", [note for note, words in turns if words <= 8]
    elif middle >= 40:
        style, examples = "detailed", [note for note, words in turns if words >= 40]
    elif len(chatty) * 3 >= len(turns) * 2:
        style, examples = "casual", chatty
    else:
        style, examples = "neutral", [note for note, _ in turns]
    return [_Shown(style, [[note.id for note in examples[:3]]])]


def _weight(note: Note, latest_s: float, half_life_s: float = HALF_LIFE_S) -> float:
    return (0.5 + note.material.importance) * math.exp2(-max(0.0, latest_s - note.when_s) / half_life_s)


def _recent(notes: Sequence[Note], own: Sequence[Note]) -> list[Note]:
    return [note for note in notes if own and note.when_s > own[0].when_s - 7 * DAY_S]


def _interests(notes: Sequence[Note], own: Sequence[Note], labelled: _Labelled) -> list[_Shown]:
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


def _relationship(notes: Sequence[Note], own: Sequence[Note], now_s: float) -> list[_Shown]:
    sessions: dict[str | None, list[Note]] = defaultdict(list)
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


def _people(own: Sequence[Note]) -> list[_Shown]:
    found: dict[str, _Shown] = {}
    for note in sorted(own, key=lambda one: -one.material.importance):
        for match in statements(note, RELATIONS if note.material.memory_type == "relationship" else PEOPLE):
            name = match["name"].removesuffix("'s")
            if text_words(name)[0] not in STOP_WORDS | DATES:
                found.setdefault(name, _Shown(f"{name} ({match['phrase']})", [[note.id]]))
    return list(found.values())[:4]


def _important(notes: Sequence[Note], now_s: float) -> list[Note]:
    def rank(note: Note) -> tuple[bool, float]:
        age_s = max(0.0, now_s - note.when_s)
        return note.material.pinned, note.material.importance * math.exp2(-age_s / HALF_LIFE_S)

    return sorted(notes, key=rank, reverse=True)[:IMPORTANT]


def _facts(notes: Sequence[Note], own: Sequence[Note], overruled: set[str]) -> list[tuple[str, Note]]:
    """Return the lines that are memories, best first."""
    latest_s = max((note.when_s for note in notes), default=0.0)
    facts: list[tuple[float, str, Note]] = []
    for note in own:
        rank = _weight(note, latest_s, 4 * HALF_LIFE_S) + note.material.pinned
        if note.speaker and (said := _telling(note)):
            facts.append((rank + 0.2 * _concreteness(said), f'said "{said}"', note))
        elif not note.speaker and _lasts(note.material) and note.id not in overruled:
            facts.append((rank, one_line(note.said), note))
    facts.sort(key=lambda fact: (-fact[0], fact[2].id))
    kept: list[tuple[str, Note, set[str]]] = []
    for _, said, note in facts:
        words = stems(said)
        if said and not any(alike(words, seen, 0.6) for _, _, seen in kept):
            kept.append((f"- {_day(note.when_s)}: {said}" if note.when_s > 0 else f"- {said}", note, words))
        if len(kept) == FACTS:
            break
    return [(line, note) for line, note, _ in kept]


def _lasts(material: Material) -> bool:
    typed = material.memory_type in {"fact", "preference", "identity", "relationship", "skill", "expertise"}
    if material.pinned or material.importance >= 0.7:
        return True
    return typed and not NOBODY.match(material.text)


def _telling(note: Note) -> str:
    """Return the most concrete sentence of a turn that says something lasting of the user; or nothing."""
    sentences = (re.split("(?<=[.!?]) ", text) for text in (note.said, note.marked))
    telling = [
        said
        for said, marked in zip(*sentences, strict=False)
        if 30 <= len(said) <= LINE_CHARS
        and said[-1] != "?"
        and TELLING.match(marked)
        and not POINTING.search(said)
    ]
    return max(telling, key=_concreteness, default="")


def _concreteness(said: str) -> int:
    return min(3, len(CONCRETE.findall(said)))


def _summary(
    values: Mapping[str, Any],
    facts: Sequence[tuple[str, Note]],
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
