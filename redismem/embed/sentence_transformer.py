"""Any sentence-transformers model, by name or path: the only user of torch."""

from __future__ import annotations

import asyncio
import copy
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import numpy as np

from redismem.embed.protocol import Vectors
from redismem.errors import EmbedderUnavailable, Misconfigured

_DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
_SLICE_TEXTS = 16  # an urgent query waits for at most one slice per running bulk call


class SentenceTransformerEmbedder:
    """Embeds with torch in one thread of its own.

    Args:
        model: name on the Hugging Face hub, or a directory (nothing is downloaded then).

    Raises:
        Misconfigured: the package is missing, or the model cannot be loaded.
    """

    def __init__(self, model: str = "") -> None:
        model = model or _DEFAULT_MODEL
        try:
            library = import_module("sentence_transformers")
        except ImportError as exc:
            raise Misconfigured(
                "The embedder 'sentence-transformers' needs more packages: pip install torch==2.13.0 "
                "&& pip install 'redismem[sentence-transformers]' (torch first: else gigabytes of CUDA)."
            ) from exc
        try:
            self._model = library.SentenceTransformer(model)
        except Exception as exc:  # a wrong name, path or file raises any of a dozen types
            raise Misconfigured(
                f"REDISMEM_EMBEDDER_MODEL {model!r} cannot be loaded ({type(exc).__name__}); "
                "give a model's name on the hub, or the directory of a saved model.",
                field="embedder_model",
            ) from exc
        # A copy: counting sets its limit aside, while the executor's thread relies on the model's own.
        self._counter = copy.deepcopy(self._model.tokenizer)
        self.name = _name(model)
        self.dim = self._encode([""]).shape[1]
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="redismem-torch")
        self._closed = False

    async def embed(self, texts: list[str], *, urgent: bool = True) -> Vectors:  # noqa: ARG002  # the contract's
        """Return one row per text; see `Embedder.embed`. Calls of several slices give way in between."""
        loop = asyncio.get_running_loop()
        parts = [np.empty((0, self.dim), np.float32)]
        for start in range(0, len(texts), _SLICE_TEXTS):
            if self._closed:
                raise EmbedderUnavailable("The embedder is closed.")
            texts_of_slice = texts[start : start + _SLICE_TEXTS]
            try:
                parts.append(await loop.run_in_executor(self._executor, self._encode, texts_of_slice))
            except Exception as exc:  # torch's, or that of an executor that was shut down meanwhile
                raise EmbedderUnavailable(f"The model failed: {type(exc).__name__}.") from exc
        return np.concatenate(parts)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return the tokens of each text by the model's own tokenizer; see `Embedder.count_tokens`."""
        if not texts:
            return []
        # not verbose: it would warn of texts longer than the model reads
        found = self._counter(
            _clean(texts), add_special_tokens=False, truncation=False, padding=False, verbose=False
        )
        return [len(ids) for ids in found["input_ids"]]

    async def close(self) -> None:
        """Finish the slices that were accepted, then end the thread."""
        self._closed = True
        await asyncio.to_thread(self._executor.shutdown)

    def _encode(self, texts: list[str]) -> Vectors:
        vectors = self._model.encode(_clean(texts), normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(vectors, np.float32)


def _clean(texts: Sequence[str]) -> list[str]:
    """Return the texts without lone surrogates, which tokenizers refuse."""
    return [text.encode("utf-8", "replace").decode() for text in texts]


def _name(model: str) -> str:
    """Return the hub's name, or `<directory>-<hash of its files>`: the files may change, the path may not."""
    directory = Path(model)
    if not directory.is_dir():
        return model
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if path.suffix in (".json", ".txt", ".model", ".safetensors", ".bin"):
            digest.update(path.relative_to(directory).as_posix().encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"{directory.resolve().name}-{digest.hexdigest()[:12]}"
