"""Text to unit vectors: the contract, and the one way to open an embedder."""

from redismem.embed.protocol import Embedder, Vectors
from redismem.embed.registry import open_embedder

__all__ = ["Embedder", "Vectors", "open_embedder"]
