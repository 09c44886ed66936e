"""The only place that keeps the replies to requests with an Idempotency-Key, for their repetitions.

The first to come claims the key and does the work; whoever repeats it meanwhile is told to wait, and whoever
repeats it later gets the reply that was kept. So a repetition changes nothing, not even where what the first
try stored was deleted since. A claim of a process that died expires; the repetition then does the work again,
harmlessly: ids come from the content or, by `named`, from the key. Replies hold ids and outcomes, no text;
they go with their owner.

Source: draft-ietf-httpapi-idempotency-key-header.
"""

from __future__ import annotations

import secrets
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b

from redismem.errors import InProgress, InvalidInput, RedisMemError
from redismem.keys import Owner
from redismem.lualib import Functions
from redismem.settings import Settings

#: seconds that a claim outlives the longest request
_MARGIN_S = 1.0


def named(key: str, *parts: object) -> str:
    """Return the id, 32 hexadecimal digits, of something that a request and its repetition make."""
    return blake2b("\n".join(map(str, (key, *parts))).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to answer a request, of whoever holds `token`."""

    owner: Owner
    name: str
    token: str


class Idempotency:
    """The replies of one store."""

    def __init__(self, functions: Functions, settings: Settings) -> None:
        self._functions = functions
        self._claim_ms = int(1000 * (settings.request_timeout_s + _MARGIN_S))
        self._keep_ms = int(1000 * settings.idempotency_ttl_s)

    async def claim(self, owner: Owner, key: str, request: bytes) -> Claim | bytes:
        """Return the reply that was kept, or the claim of who is first. Cost: one round trip.

        Args:
            request: all of it, to tell a repetition from another one.

        Raises:
            InProgress: somebody answers it now.
            InvalidInput: the key stands for another request.
        """
        claim = Claim(owner, named(key), secrets.token_hex(8))
        fingerprint = blake2b(request, digest_size=16).hexdigest()
        try:
            word, *kept = await self._functions.call(
                "rm_claim_v1", [owner.replies], claim.name, fingerprint, claim.token, self._claim_ms
            )
        except BaseException:  # perhaps only the answer is missing
            await self.released(claim)
            raise
        if word == b"BUSY":
            raise InProgress("the first request with this Idempotency-Key is still being answered; try again")
        if word == b"OTHER":
            raise InvalidInput(
                "`Idempotency-Key` was used for another request; use a new one", field="Idempotency-Key"
            )
        return claim if word == b"CLAIMED" else bytes(kept[0])

    async def answered(self, claim: Claim, reply: bytes) -> None:
        """Keep the reply; where Redis is away it is only not kept. Cost: one round trip."""
        with suppress(RedisMemError):
            await self._functions.call(
                "rm_answered_v1", [claim.owner.replies], claim.name, claim.token, reply, self._keep_ms
            )

    async def released(self, claim: Claim) -> None:
        """Let the request be tried again; where Redis is away the claim expires. Cost: one round trip."""
        with suppress(RedisMemError):
            await self._functions.call("rm_released_v1", [claim.owner.replies], claim.name, claim.token)
