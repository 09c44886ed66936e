"""The only place that knows which embedders exist."""

from __future__ import annotations

import asyncio

from redismem.embed.protocol import Embedder
from redismem.settings import Settings


async def open_embedder(settings: Settings) -> Embedder:
    """Load the embedder that `settings.embedder` names, and run it once so that the first query is warm.

    Raises:
        Misconfigured: packages or model files are missing, or key or URL are unusable.
        EmbedderUnavailable: the endpoint does not answer as it should.
    """
    embedder: Embedder
    # Imports stand in their cases: onnxruntime takes 0.1 s, torch seconds, and only one of them is needed.
    match settings.embedder:
        case "deterministic":
            from redismem.embed.deterministic import DeterministicEmbedder  # noqa: PLC0415

            embedder = DeterministicEmbedder()
        case "openai":
            from redismem.embed.openai import OpenAIEmbedder  # noqa: PLC0415

            return await OpenAIEmbedder.open(settings)  # the probe for its dimension has warmed it
        case "sentence-transformers":
            from redismem.embed.sentence_transformer import SentenceTransformerEmbedder  # noqa: PLC0415

            embedder = await asyncio.to_thread(SentenceTransformerEmbedder, settings.embedder_model)
        case "minilm":
            from redismem.embed.minilm import MiniLMEmbedder  # noqa: PLC0415

            embedder = await asyncio.to_thread(MiniLMEmbedder, threads=settings.embedder_threads)
    try:
        await embedder.embed(["warm up"])
    except BaseException:
        await embedder.close()
        raise
    return embedder
