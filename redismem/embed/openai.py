"""Any OpenAI-compatible endpoint: the only embedder that sends text over the network.

Nothing the endpoint says is quoted in an error, since it may echo the key or the texts.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx
import msgspec
import numpy as np

from redismem.embed.protocol import Vectors, estimated_tokens
from redismem.errors import EmbedderUnavailable, Misconfigured
from redismem.settings import Settings

_BATCH_TEXTS = 128
_RETRIED = frozenset({408, 429})  # and every 5xx
_FIRST_DELAY_S = 0.1
_LONGEST_DELAY_S = 5.0

_REMEDIES = {
    400: "check REDISMEM_EMBEDDER_MODEL, and that the text is not too long for that model",
    401: "check REDISMEM_EMBEDDER_KEY",
    403: "check that REDISMEM_EMBEDDER_KEY may use REDISMEM_EMBEDDER_MODEL",
    404: "check REDISMEM_EMBEDDER_URL (it usually ends in /v1) and REDISMEM_EMBEDDER_MODEL",
}


class _Row(msgspec.Struct):
    index: int
    embedding: list[float]


class _Reply(msgspec.Struct):
    data: list[_Row]


class OpenAIEmbedder:
    """Embeds by POST {url}/embeddings; made by `open`, bound to the event loop that opened it."""

    def __init__(self, settings: Settings) -> None:
        self._url = endpoint_url(settings.embedder_url, "/embeddings", field="embedder_url")
        headers = key_headers(settings.embedder_key, field="embedder_key")
        self.name = settings.embedder_model
        self.dim = 0
        self._deadline_s = settings.embedder_deadline_s
        self._client = httpx.AsyncClient(headers=headers, timeout=settings.embedder_deadline_s)
        self._closed = False
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @classmethod
    async def open(cls, settings: Settings) -> OpenAIEmbedder:
        """Connect, and learn the dimension from one probe.

        Raises:
            Misconfigured: key or URL are unusable.
            EmbedderUnavailable: the endpoint does not answer the probe.
        """
        embedder = cls(settings)
        try:
            embedder.dim = (await embedder.embed(["probe"])).shape[1]
        except BaseException:
            await embedder.close()
            raise
        return embedder

    async def embed(self, texts: list[str], *, urgent: bool = True) -> Vectors:  # noqa: ARG002  # the contract's
        """Return one row per text; see `Embedder.embed`. The deadline covers all batches and retries.

        Raises:
            EmbedderUnavailable: out of time, refused, or the reply is not what the protocol promises.

        Cost: one round trip per 128 texts, one after the other.
        """
        if self._closed:
            raise EmbedderUnavailable("The embedder is closed.")
        if not texts:
            return np.empty((0, self.dim), np.float32)
        self._running += 1
        self._idle.clear()
        until = asyncio.get_running_loop().time() + self._deadline_s
        try:
            async with asyncio.timeout_at(until):
                batches = (
                    texts[start : start + _BATCH_TEXTS] for start in range(0, len(texts), _BATCH_TEXTS)
                )
                return np.concatenate([await self._batch(batch, until) for batch in batches])
        except TimeoutError as exc:
            raise self._unavailable(f"did not answer within {self._deadline_s:g} s") from exc
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Estimate the tokens of each text, without asking; see `Embedder.count_tokens`."""
        return [estimated_tokens(text) for text in texts]

    async def close(self) -> None:
        """Finish what was accepted, then close the connections."""
        self._closed = True
        await self._idle.wait()
        await self._client.aclose()

    async def _batch(self, texts: list[str], until: float) -> Vectors:
        """Post until it succeeds, is refused for good, or the next try would start after `until`."""
        inputs = [text.encode("utf-8", "replace").decode() or " " for text in texts]  # "" is refused
        body = {"model": self.name, "input": inputs, "encoding_format": "float"}
        delay_s = _FIRST_DELAY_S
        while True:
            asked_s = 0.0
            cause: httpx.TransportError | None = None
            try:
                response = await self._client.post(self._url, json=body)
            except httpx.TransportError as exc:
                reason, cause = f"cannot be reached ({type(exc).__name__})", exc
            else:
                status = response.status_code
                if status == 200:
                    return self._vectors(response.content, len(texts))
                reason = f"answered {status}"
                if status not in _RETRIED and status < 500:
                    raise self._unavailable(f"{reason}: {_REMEDIES.get(status, 'it refuses this request')}")
                asked_s = asked_delay_s(response.headers.get("Retry-After", ""))
            wait_s = max(asked_s, delay_s * random.uniform(0.5, 1.0))  # noqa: S311  # jitter is no secret
            delay_s = min(2 * delay_s, _LONGEST_DELAY_S)
            if asyncio.get_running_loop().time() + wait_s >= until:
                raise self._unavailable(f"{reason}, and the deadline leaves no time to try again") from cause
            await asyncio.sleep(wait_s)

    def _vectors(self, content: bytes, count: int) -> Vectors:
        """Return the reply's rows by index, normalised; refuse anything that is not one good row per text."""
        try:
            rows = msgspec.json.decode(content, type=_Reply).data
        except (msgspec.MsgspecError, RecursionError) as exc:
            raise self._unavailable("sent a reply that is not a list of embeddings") from exc
        if sorted(row.index for row in rows) != list(range(count)):
            raise self._unavailable(f"sent {len(rows)} embeddings, or wrong indexes, for {count} texts")
        rows.sort(key=lambda row: row.index)
        dim = self.dim or len(rows[0].embedding)
        if any(len(row.embedding) != dim for row in rows):
            raise self._unavailable(f"sent an embedding that does not have {dim} numbers")
        matrix = np.array([row.embedding for row in rows], np.float64)
        with np.errstate(over="ignore"):  # an infinite norm is refused below
            norms = np.linalg.norm(matrix, axis=1, keepdims=True)
        if not (np.isfinite(norms) & (norms > 0)).all():
            raise self._unavailable("sent an embedding without a direction (zero, or not finite)")
        vectors: Vectors = (matrix / norms).astype(np.float32)
        return vectors

    def _unavailable(self, what: str) -> EmbedderUnavailable:
        return EmbedderUnavailable(f"The embedding endpoint at {self._url.host} {what}.")


def endpoint_url(url: str, path: str, *, field: str) -> httpx.URL:
    """Return the URL of `path` below an endpoint's.

    Raises:
        Misconfigured: the setting `field` is no URL, or holds a password, which would be logged.
    """
    try:
        found = httpx.URL(url.rstrip("/") + path)
    except httpx.InvalidURL as exc:
        raise Misconfigured(f"REDISMEM_{field.upper()} is not a URL.", field=field) from exc
    if found.scheme not in ("http", "https") or not found.host or found.userinfo:  # httpx logs URLs
        raise Misconfigured(
            f"REDISMEM_{field.upper()} must be http(s)://host/…, without a password.", field=field
        )
    return found


def key_headers(key: str, *, field: str) -> dict[str, str]:
    """Return the header that carries `key`; none for an empty one.

    Raises:
        Misconfigured: the setting `field` cannot stand in a header.
    """
    if not (key.isascii() and key.isprintable()) or " " in key:  # httpx would quote it in its error
        raise Misconfigured(f"REDISMEM_{field.upper()} has an impossible character.", field=field)
    return {"Authorization": f"Bearer {key}"} if key else {}


def asked_delay_s(header: str) -> float:
    """Return the seconds of a Retry-After header, given as seconds or a date; 0 when absent or unreadable."""
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0
