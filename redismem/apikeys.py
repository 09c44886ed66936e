"""The only place that says what an API key is: its token, what it allows and whose memories it is for.

Pure. A secret is 256 random bits. A slow password hash keeps short secrets from being guessed; these cannot
be guessed at all, so one SHA-256 is right, and a check costs microseconds on every request.
"""

from __future__ import annotations

import hmac
import math
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from hashlib import sha256
from typing import Literal, get_args

import msgspec

from redismem.errors import InvalidInput

Scope = Literal["read", "write", "admin"]

SCOPES: tuple[Scope, ...] = get_args(Scope)

#: characters of a name, of a namespace and of a user id
MAX_NAME, MAX_NAMESPACE, MAX_USER = 100, 256, 256
#: users that one key may be bound to: they are looked through at every request
MAX_USERS = 1000
#: requests a second, and requests at once, that a limit may allow
RATES, MAX_BURST = (0.001, 1_000_000.0), 1_000_000

#: bytes of an id, hexadecimal in the token, and of a secret, in 43 characters of base64
_ID_BYTES, _SECRET_BYTES = 6, 32
_TOKEN = re.compile(r"rmk_([0-9a-f]{12})_([A-Za-z0-9_-]{43})", re.ASCII)

#: compared with where there is no such key; no secret has it
_NO_DIGEST = "0" * 64


class KeyFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may be shown of a key."""

    id: str
    name: str
    scopes: tuple[Scope, ...]
    namespace: str
    #: the users it is bound to; empty: all of the namespace
    users: tuple[str, ...] = ()
    #: requests a second in the long run; None: no limit
    rate_per_s: float | None = None
    #: requests at once; None: as many as come in a second
    burst: int | None = None
    created_at: datetime
    revoked_at: datetime | None = None

    def allows(self, scope: Scope) -> bool:
        """Return whether it may be used for this; `admin` is for everything."""
        return scope in self.scopes or "admin" in self.scopes

    def covers(self, user: str) -> bool:
        """Return whether it may be used for this user of its namespace."""
        return not self.users or user in self.users

    @property
    def capacity(self) -> int:
        """Requests at once, where there is a limit."""
        return self.burst or max(1, math.ceil(self.rate_per_s or 0))


class ApiKey(KeyFacts, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key as it is stored.

    Fields that this version does not know make it unreadable: they might restrict it.
    """

    #: SHA-256 of the secret, hexadecimal
    digest: str

    def facts(self) -> KeyFacts:
        """Return it without the digest."""
        return KeyFacts(**{name: getattr(self, name) for name in KeyFacts.__struct_fields__})


_decoder = msgspec.json.Decoder(ApiKey)


class KeyTable:
    """All keys of a store, the revoked ones too. Not to be changed."""

    def __init__(self, keys: Mapping[str, ApiKey], *, unreadable: int = 0) -> None:
        self._keys = dict(keys)
        #: keys that this version cannot read; they are refused
        self.unreadable = unreadable

    @classmethod
    def parsed(cls, raw: Mapping[bytes, bytes]) -> KeyTable:
        """Return the table of a hash as Redis sends it: id -> JSON."""
        keys: dict[str, ApiKey] = {}
        for raw_id, body in raw.items():
            try:
                key = _decoder.decode(body)
            except msgspec.MsgspecError:
                continue
            if key.id.encode() == raw_id:
                keys[key.id] = key
        return cls(keys, unreadable=len(raw) - len(keys))

    @property
    def is_empty(self) -> bool:
        """Whether the store never had a key; where each was revoked it had."""
        return not self._keys and not self.unreadable

    def __iter__(self) -> Iterator[ApiKey]:
        return iter(self._keys.values())

    def get(self, key_id: str) -> ApiKey | None:
        """Return the key of an id, revoked or not."""
        return self._keys.get(key_id)

    def holder(self, token: str) -> ApiKey | None:
        """Return the key whose token this is; None for any other text, and for a revoked key.

        Cost: the same for a wrong secret and an unknown id, so that time does not tell which ids exist.
        """
        parts = _TOKEN.fullmatch(token)
        if parts is None:
            return None
        key = self._keys.get(parts[1])
        expected = _NO_DIGEST if key is None else key.digest
        is_right = hmac.compare_digest(digest_of(parts[2]).encode(), expected.encode())
        return key if is_right and key is not None and key.revoked_at is None else None


def digest_of(secret: str) -> str:
    """Return what is stored of a secret."""
    return sha256(secret.encode()).hexdigest()


def issued(
    *,
    name: str,
    scopes: Sequence[str],
    namespace: str = "",
    users: Sequence[str] = (),
    rate_per_s: float | None = None,
    burst: int | None = None,
    now: datetime,
) -> tuple[ApiKey, str]:
    """Return a new key and its token, which is kept nowhere.

    Raises:
        InvalidInput: a value is outside its contract; the error names the field.
    """
    if not (0 < len(name) <= MAX_NAME and name.isprintable() and name.strip() == name):
        raise InvalidInput(f"a name has 1 to {MAX_NAME} printable characters", field="name")
    if not scopes or not set(scopes) <= set(SCOPES):
        raise InvalidInput(f"scopes are one or more of {', '.join(SCOPES)}", field="scopes")
    if len(namespace) > MAX_NAMESPACE or "\0" in namespace:
        raise InvalidInput(
            f"a namespace has at most {MAX_NAMESPACE} characters, none of them NUL", field="namespace"
        )
    if len(users) > MAX_USERS:
        raise InvalidInput(f"a key is bound to at most {MAX_USERS:,} users", field="users")
    for user in users:
        if not 0 < len(user) <= MAX_USER or "\0" in user:
            raise InvalidInput(f"a user id has 1 to {MAX_USER} characters, none of them NUL", field="users")
    _check_limit(rate_per_s, burst)
    key_id, secret = secrets.token_hex(_ID_BYTES), secrets.token_urlsafe(_SECRET_BYTES)
    key = ApiKey(
        id=key_id,
        name=name,
        scopes=tuple(scope for scope in SCOPES if scope in scopes),
        namespace=namespace,
        users=tuple(sorted(set(users))),
        rate_per_s=rate_per_s,
        burst=burst,
        created_at=now,
        digest=digest_of(secret),
    )
    return key, f"rmk_{key_id}_{secret}"


def _check_limit(rate_per_s: float | None, burst: int | None) -> None:
    low, high = RATES
    if rate_per_s is not None and not low <= rate_per_s <= high:
        raise InvalidInput(f"a rate is {low:g} to {high:,.0f} requests a second", field="rate_per_s")
    if burst is not None and not 1 <= burst <= MAX_BURST:
        raise InvalidInput(f"a burst is 1 to {MAX_BURST:,} requests", field="burst")
    if burst is not None and rate_per_s is None:
        raise InvalidInput("a burst needs a rate", field="burst")
