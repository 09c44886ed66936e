"""Nobody sees another owner's memory, and a filter finds exactly its value, whatever the characters."""

from __future__ import annotations

import asyncio
import re
import unicodedata
from typing import Any, get_args
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from redismem.errors import NotFound
from redismem.fields import checked_name
from redismem.filters import Filters, TagMatch
from redismem.keys import Owner
from redismem.service import Service
from redismem.types import CorrectionRequest, MemoryInput, MemoryPatch, SearchMode, SearchRequest
from tests.conftest import lasting_keys

MODES: tuple[SearchMode, ...] = get_args(SearchMode)

bounded = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

HOSTILE = [
    *"a A a,b a|b a/b a%2Fb a%7Cb {a} }a{ a}:b * a* ? [a] %a% ~a : . .. a-b _ __init__ 1 1.0 the".split(),
    *"\"a\" 'a' w'a' \\ a\\ \\| \\\\a $a @topics:{a} -a (a a) a=>[KNN or OR and not inf nan as".split(),
    *"isempty ismissing ismissing(@pk) 3f2b8c1e-0d4a-4c55-9d3e-6a7f8b9c0d1e é e\u0301 É ß SS İ ﬁ ǅ Ω".split(),
    *"א مرحبا 東京都 ひらがな カタカナ 한국어 नमस्ते ไทย 😀 👩\u200d👧 🇩🇪 a\u200db \u200b".split(),
    *("NOT a", "\u202etxet", "the of and", "a\tb", "א ב", "a" * 256, "東" * 256),
]

#: any text a request can hold: no lone surrogates, no NUL
characters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
names = st.one_of(
    st.sampled_from(HOSTILE),
    st.text(st.sampled_from("aA,|/%{}[]()*?\"'\\-@:~=$&!;<> _1é😀"), min_size=1, max_size=8),
    st.text(characters, min_size=1, max_size=20),
)


def is_name(text: str) -> bool:
    try:
        return checked_name(text, "name") != ""
    except ValueError:
        return False


clean_names = names.filter(is_name).map(str.strip)
texts = st.one_of(
    names, st.lists(names, min_size=1, max_size=6).map(" ".join), st.text(characters, max_size=100)
).filter(lambda text: bool(text.strip()))


def look_alikes(user: str) -> list[Owner]:
    """Return different owners that a careless encoding would take for `user`, and `user`."""
    owners = [Owner(user), Owner(user, "n"), Owner(f"n/{user}"), Owner(f"n%2F{user}"), Owner("x", user)]
    changed = [
        *(user.swapcase(), user.casefold(), user + user[-1], user[:-1], user + "*", user + " ", f"{user}:a"),
        *(quote(user, safe=""), user.replace(",", "|"), user.replace("|", ","), user.replace("/", "%2F")),
        *(
            unicodedata.normalize("NFC", user),
            unicodedata.normalize("NFD", user),
            user + "}",
            "{" + user + "}",
        ),
    ]
    owners += [Owner(one) for one in changed if one]
    if 0 < user.find("/") < len(user) - 1:
        owners.append(Owner(user.split("/", 1)[1], user.split("/", 1)[0]))
    return list(dict.fromkeys(owners))


async def everything(service: Service, owner: Owner, memory_id: str, filters: list[Filters]) -> list[str]:
    """Return the text of every memory that any read shows to an owner."""
    requests = [
        SearchRequest(text=text, search_mode=mode, limit=100, filters=one)
        for one in filters
        for mode in MODES
        for text in (memory_id, "shared secret")
    ]
    shown = [hit.text for reply in await service.tiers.find(owner, requests) for hit in reply.memories]
    for one in filters:
        shown += [memory.text for memory in (await service.tiers.page(owner, one, 100, None)).memories]
    async for page in service.browser.export(owner):
        shown += [memory.text for memory in page]
    return [*shown, (await service.browser.get(owner, memory_id)).text]


@settings(bounded, max_examples=20)
@given(user=names, memory_id=clean_names, tag=clean_names)
@example(user="a/b", memory_id="a}:b", tag="a|b")
@example(user="a,b", memory_id="l", tag="*")
@example(user="a%2Fb", memory_id="%", tag="a%7Cb")
async def test_nobody_sees_another_owners_memory(
    service: Service, user: str, memory_id: str, tag: str
) -> None:
    """All store the same, but for the number in the text; then one deletes and one is forgotten."""
    owners = look_alikes(user)
    for number, owner in enumerate(owners):
        common: dict[str, Any] = {
            "topics": [tag],
            "entities": [tag],
            "session_id": tag,
            "metadata": {tag: tag},
        }
        shared = MemoryInput(id=memory_id, text=f"shared secret {tag} of{number}", **common)
        alone = MemoryInput(id=f"only{number}", text=f"shared secret of{number}", **common)
        items = (await service.writer.put(owner, [shared, alone])).memories
        assert [item.outcome for item in items] == ["CREATED"] * 2
    filters = [
        Filters(),
        Filters(topics=tag, entities=[tag], session_id=tag, metadata={tag: tag}),
        Filters(topics=TagMatch(none=[f"{tag}x"[-256:]]), superseded="include"),
    ]
    try:
        for number, owner in enumerate(owners):
            shown = await everything(service, owner, memory_id, filters)
            assert {text.rsplit(" ", 1)[1] for text in shown} == {f"of{number}"}, owner
            assert len((await service.browser.history(owner, memory_id)).events) == 1
            for read in (service.browser.get, service.browser.history):
                with pytest.raises(NotFound):
                    await read(owner, f"only{(number + 1) % len(owners)}")
        await service.writer.delete(owners[0], memory_id)
        await service.writer.forget(owners[1])
        assert (await service.tiers.page(owners[0], Filters(), 10, None)).total == 1
        assert (await service.tiers.page(owners[1], Filters(), 10, None)).total == 0
        for owner in owners[2:]:
            assert (await service.tiers.page(owner, Filters(), 10, None)).total == 2
            assert len((await service.browser.history(owner, memory_id)).events) == 1
    finally:
        await asyncio.gather(*(service.writer.forget(owner) for owner in owners))
    left = await lasting_keys(service.client)
    assert [key for key in left if key != b"redismem:store"] == []


async def test_what_a_user_without_memories_asks_leaves_nothing(service: Service, owner: Owner) -> None:
    memory = MemoryInput(text="new")
    for refused in (
        service.browser.get(owner, "a"),
        service.browser.history(owner, "a"),
        service.writer.delete(owner, "a"),
        service.writer.update(owner, "a", MemoryPatch(text="new")),
        service.writer.correct(owner, CorrectionRequest(ids=["a"], memory=memory)),
    ):
        with pytest.raises(NotFound):
            await refused
    for mode in MODES:
        assert (await service.search(owner, SearchRequest(text="a", search_mode=mode))).total == 0
    assert (await service.tiers.page(owner, Filters(), 10, None)).total == 0
    assert await lasting_keys(service.client) == [b"redismem:store"]
    assert await service.client.execute("FT._LIST") == []


@bounded
@given(
    pool=st.lists(clean_names, min_size=2, max_size=5, unique=True), seed=st.randoms(use_true_random=False)
)
@example(pool=[name for name in HOSTILE if is_name(name)], seed=None)
async def test_a_filter_finds_exactly_the_memories_with_its_value(
    service: Service, owner: Owner, pool: list[str], seed: Any
) -> None:
    """With every value comes one that differs in case, one a character longer, one encoded."""
    alike = [
        other for one in pool for other in (one.swapcase(), one + "x", quote(one, safe=""), f"{one}|{one}")
    ]
    values = list(dict.fromkeys([*pool, *(one for one in alike if is_name(one) and one == one.strip())]))[
        :120
    ]
    memories = [
        MemoryInput(
            id=f"m{i}",
            text=f"memory {i}",
            topics=values[i : i + 2],
            entities=[values[-i - 1]],
            session_id=value,
            metadata={value: values[-i - 1]},
        )
        for i, value in enumerate(values)
    ]
    if seed is not None:
        seed.shuffle(memories)
    await service.writer.put(owner, memories, wait=False)
    try:
        for i, value in enumerate(values[:40]):
            last = values[-i - 1]
            either = {one.id for one in memories if {value, last} & set(one.entities)}
            cases: list[tuple[Filters, set[str | None]]] = [
                (Filters(topics=value), {one.id for one in memories if value in one.topics}),
                (
                    Filters(topics=TagMatch(none=[value])),
                    {one.id for one in memories if value not in one.topics},
                ),
                (Filters(entities=[value, last]), either),
                (Filters(session_id=value), {f"m{i}"}),
                (Filters(metadata={value: last}), {f"m{i}"}),
            ]
            requests = [
                SearchRequest(text="memory", search_mode="keyword", limit=100, filters=filters)
                for filters, _ in cases
            ]
            replies = await service.tiers.find(owner, requests)
            for (filters, expected), reply in zip(cases, replies, strict=True):
                assert reply.total == len(expected), filters
                assert {hit.id for hit in reply.memories} <= expected, filters
    finally:
        assert await service.backfill.drained(10)
        await service.writer.forget(owner)


@settings(bounded, max_examples=150)
@given(text=texts, value=clean_names, mode=st.sampled_from(MODES))
async def test_no_text_makes_a_search_fail(
    service: Service, owner: Owner, text: str, value: str, mode: SearchMode
) -> None:
    stored = await service.writer.put(owner, [MemoryInput(id="a", text=text, topics=[value])])
    assert stored.memories[0].outcome in ("CREATED", "UPDATED", "UNCHANGED")
    for filters in (Filters(), Filters(topics=[value, "or"], metadata={text: text}), Filters(entities=value)):
        request = SearchRequest(text=text, search_mode=mode, filters=filters, explain=True)
        reply = await service.search(owner, request)
        assert not reply.partial
        assert all(0 <= hit.score <= 1 for hit in reply.memories)
        if filters.metadata is None and filters.entities is None and mode != "keyword":
            assert [hit.id for hit in reply.memories] == ["a"]


def spoken_words(text: str) -> list[str]:
    """Return what a reader would call the words of a text, by two rules of thumb."""
    found = [*re.findall(r"\w+", text), *text.split()]
    return [word for word in dict.fromkeys(found) if any(char.isalnum() for char in word)]


letters = st.characters(categories=["Lu", "Ll", "Lt", "Lm", "Lo", "Nd", "Nl", "No", "Mn", "Mc", "Pc"])
gaps = st.one_of(
    st.sampled_from(
        [" ", "\n", "\r\n", "\t", ". ", ", ", "-", "/", "\\", "'", '"', "\u2019", "\u00a0", "。", "…"]
    ),
    st.characters(categories=["Zs", "Po", "Pd", "Ps", "Pe", "Sm", "Sc"]),
)
prose = st.lists(
    st.tuples(st.one_of(names, st.text(letters, min_size=1, max_size=12)), gaps), min_size=1, max_size=8
).map(lambda pairs: "".join(word + gap for word, gap in pairs))


@settings(bounded, max_examples=150)
@given(text=prose.filter(lambda text: bool(text.strip())))
@example(text="Straße STRASSE ﬁnal İstanbul ΣΊΣΥΦΟΣ σίσυφος Ǆ ½ x² \uff11\uff12 \uff41\uff42")
@example(text="the iPhone™ by Acme℠, 5½ cups, 20℃, 30 m²")
@example(text="C:\\Users\\anna\\notes.txt \\\\server\\share \\n")
@example(text="東京都に住んでいます。한국어를 공부해요 नमस्ते दुनिया שָׁלוֹם مُحَمَّد ไทยแลนด์")
@example(text="snake_case __init__ _x_ a_b-c d.e@f.com #tag $5 100% 1e5 0x1F 1,000.50 -inf NaN")
async def test_every_word_of_a_text_finds_it(service: Service, owner: Owner, text: str) -> None:
    others = [MemoryInput(id=f"o{i}", text="zzz") for i in range(2)]
    await service.writer.put(owner, [*others, MemoryInput(id="a", text=text)], wait=False)
    words = spoken_words(text)
    requests = [SearchRequest(text=word, search_mode="keyword", limit=100) for word in words]
    replies = await service.tiers.find(owner, requests) if requests else []
    missed = [
        word
        for word, reply in zip(words, replies, strict=True)
        if "a" not in {hit.id for hit in reply.memories}
    ]
    assert missed == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("猫が好きです", ["猫", "好き"]),
        ("我喜欢喝茶", ["茶", "喝茶", "喜欢"]),
        ("책을 읽는 밤", ["책", "밤"]),
        ("ฉันชอบกินข้าวผัดกุ้งที่กรุงเทพ", ["ชอบ", "กิน", "กรุงเทพ"]),
    ],
)
async def test_words_of_a_script_without_spaces_are_found(
    service: Service, owner: Owner, text: str, words: list[str]
) -> None:
    await service.writer.put(owner, [MemoryInput(id="a", text=text)], wait=False)
    requests = [SearchRequest(text=word, search_mode="keyword") for word in words]
    replies = await service.tiers.find(owner, requests)
    assert [word for word, reply in zip(words, replies, strict=True) if reply.total == 0] == []


@settings(bounded, max_examples=60)
@given(
    emoji=st.characters(categories=["So"]).filter(lambda c: unicodedata.is_normalized("NFKC", c)),
    before=st.sampled_from(["", " ", "hello", "東京", "\n"]),
)
async def test_every_emoji_of_a_text_finds_it(
    service: Service, owner: Owner, emoji: str, before: str
) -> None:
    await service.writer.put(owner, [MemoryInput(id="a", text=f"{before}{emoji}!")], wait=False)
    reply = await service.search(owner, SearchRequest(text=emoji, search_mode="keyword"))
    assert [hit.id for hit in reply.memories] == ["a"]
