"""The tests' embedder: reproducible, and near for texts that share words."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import numpy as np
import pytest

from redismem.embed import open_embedder
from redismem.embed.deterministic import DeterministicEmbedder
from redismem.errors import Misconfigured
from redismem.settings import Settings


def test_the_same_text_has_the_same_vector_in_another_process() -> None:
    code = (
        "import asyncio; from redismem.embed.deterministic import DeterministicEmbedder as D;"
        "print(asyncio.run(D().embed(['Anna plays chess'])).tobytes().hex())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = asyncio.run(DeterministicEmbedder().embed(["Anna plays chess"]))
    assert other.stdout.strip() == here.tobytes().hex()


async def test_rows_are_unit_float32_for_any_string() -> None:
    texts = ["", "  \n", "!?", "word", "Grüße aus Köln", "東京", "\ud800 lone", "x" * 10_000, "a b " * 500]
    vectors = await DeterministicEmbedder().embed(texts)
    assert vectors.shape == (len(texts), 384)
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=1e-6)


async def test_no_texts_give_no_rows() -> None:
    assert (await DeterministicEmbedder().embed([])).shape == (0, 384)


async def test_texts_without_words_share_one_vector() -> None:
    vectors = await DeterministicEmbedder().embed(["", "...", "   "])
    assert (vectors == vectors[0]).all()


async def test_case_and_punctuation_do_not_matter() -> None:
    first, second = await DeterministicEmbedder().embed(["Dinner, with Anna!", "dinner with anna"])
    assert np.array_equal(first, second)


async def test_shared_words_and_stems_are_nearer_than_unrelated_words() -> None:
    base, shared, stem, unrelated = await DeterministicEmbedder().embed(
        ["dinner with Anna on Friday", "Anna cooked dinner", "dinners Fridays", "motor oil pressure"]
    )
    assert base @ shared > 0.4
    assert base @ stem > 0.1
    assert abs(base @ unrelated) < 0.1


def test_tokens_are_estimated_for_any_string() -> None:
    texts = [
        "",
        "  \n",
        "Anna plays chess.",
        "Anna plays chess. " * 500,
        "🎉",
        "東京",
        "\ud800",
        "2026-06-14",
    ]
    assert DeterministicEmbedder().count_tokens(texts) == [0, 0, 4, 2000, 3, 2, 1, 6]


async def test_the_dimension_is_configurable() -> None:
    embedder = DeterministicEmbedder(16)
    assert embedder.dim == 16
    assert embedder.name == "deterministic-16"
    assert (await embedder.embed(["one two"])).shape == (1, 16)


async def test_settings_open_it_only_for_tests() -> None:
    embedder = await open_embedder(Settings(embedder="deterministic", testing=True))
    assert embedder.name == "deterministic-384"
    await embedder.close()
    with pytest.raises(Misconfigured, match="REDISMEM_TESTING"):
        Settings(embedder="deterministic")
