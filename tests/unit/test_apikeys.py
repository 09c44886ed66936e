from __future__ import annotations

import hmac
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from redismem.apikeys import SCOPES, ApiKey, KeyFacts, KeyTable, Scope, digest_of, issued
from redismem.errors import InvalidInput

NOW = datetime(2026, 3, 1, tzinfo=UTC)


def made(**values: Any) -> tuple[ApiKey, str]:
    return issued(**{"name": "agent", "scopes": ["read"], "now": NOW, **values})


def table_of(*keys: ApiKey) -> KeyTable:
    return KeyTable.parsed({key.id.encode(): msgspec.json.encode(key) for key in keys})


def test_a_token_finds_its_key_and_no_other() -> None:
    (ada, ada_token), (bob, bob_token) = made(name="ada"), made(name="bob")
    table = table_of(ada, bob)
    assert table.holder(ada_token) == ada
    assert table.holder(bob_token) == bob
    assert table_of(bob).holder(ada_token) is None


def test_the_id_of_one_key_with_the_secret_of_another_finds_nothing() -> None:
    (ada, ada_token), (bob, bob_token) = made(), made()
    crossed = f"rmk_{ada.id}_{bob_token.split('_', 2)[2]}"
    assert len(crossed) == len(ada_token)
    assert table_of(ada, bob).holder(crossed) is None


def test_a_revoked_key_is_refused_but_still_counts() -> None:
    key, token = made()
    table = table_of(msgspec.structs.replace(key, revoked_at=NOW))
    assert table.holder(token) is None
    assert not table.is_empty
    assert table.get(key.id) is not None


@pytest.mark.parametrize(
    "change",
    [
        str.upper,
        lambda token: token + "\n",
        lambda token: " " + token,
        lambda token: token[:-1],
        lambda token: token + "A",
        lambda token: token.replace("rmk_", "rmk-"),
        lambda token: token[:20] + "\0" + token[21:],
        lambda token: token[:20] + "é" + token[21:],
        lambda token: token[:20] + "\ud800" + token[21:],
        lambda token: "rmk_" + "٣" * 12 + token[16:],  # digits, but not ours
        lambda token: "Bearer " + token,
        lambda _: "",
        lambda token: token * 100_000,
    ],
)
def test_what_is_not_exactly_a_token_finds_nothing(change: Any) -> None:
    key, token = made()
    assert change(token) != token
    assert table_of(key).holder(change(token)) is None


@given(st.text() | st.from_regex(r"rmk_[0-9a-f]{12}_[A-Za-z0-9_-]{43}", fullmatch=True))
def test_no_text_raises_or_passes(text: str) -> None:
    assert table_of(made()[0]).holder(text) is None


def test_every_byte_that_a_header_may_hold_is_refused_in_a_token() -> None:
    key, token = made()
    table = table_of(key)
    for byte in range(256):
        odd = token[:30] + bytes([byte]).decode("latin-1") + token[31:]
        assert (table.holder(odd) is None) == (odd != token)


def test_an_unknown_id_costs_the_comparison_that_a_wrong_secret_costs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return one == other

    monkeypatch.setattr(hmac, "compare_digest", compare)
    (key, token), (_, strange_token) = made(), made()
    table = table_of(key)
    table.holder(f"rmk_{key.id}_{'A' * 43}")
    table.holder(strange_token)
    table_of(msgspec.structs.replace(key, revoked_at=NOW)).holder(token)
    assert compared == [(64, 64)] * 3


def test_the_secret_is_in_nothing_but_the_token() -> None:
    key, token = made()
    secret = token.split("_", 2)[2]
    assert len(secret) == 43
    assert secret not in repr(key) + msgspec.json.encode(key).decode()
    assert key.digest == digest_of(secret)


def test_two_keys_share_neither_id_nor_secret() -> None:
    tokens = [made()[1] for _ in range(1000)]
    for part in (1, 2):
        assert len({token.split("_", 2)[part] for token in tokens}) == 1000


def test_what_may_be_shown_has_no_digest() -> None:
    facts = made()[0].facts()
    assert type(facts) is KeyFacts
    assert "digest" not in msgspec.to_builtins(facts)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_scope_allows_itself_and_admin_allows_all(scope: Scope) -> None:
    key, _ = made(scopes=[scope])
    assert [other for other in SCOPES if key.allows(other)] == ([scope] if scope != "admin" else list(SCOPES))


def test_a_key_covers_its_users_and_one_without_users_covers_all() -> None:
    bound, _ = made(users=["ada", "bob"])
    assert bound.covers("ada")
    assert not bound.covers("Ada")
    assert not bound.covers("ad")
    assert made()[0].covers("anyone")


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("name", {"name": ""}),
        ("name", {"name": "a" * 101}),
        ("name", {"name": "a\nb"}),
        ("name", {"name": " a"}),
        ("name", {"name": "a\x1b[31m"}),
        ("scopes", {"scopes": []}),
        ("scopes", {"scopes": ["read", "root"]}),
        ("scopes", {"scopes": ["READ"]}),
        ("namespace", {"namespace": "n" * 257}),
        ("namespace", {"namespace": "a\0"}),
        ("users", {"users": [""]}),
        ("users", {"users": ["a\0"]}),
        ("users", {"users": ["u" * 257]}),
        ("users", {"users": ["u"] * 1001}),
        ("rate_per_s", {"rate_per_s": 0.0}),
        ("rate_per_s", {"rate_per_s": -1.0}),
        ("rate_per_s", {"rate_per_s": float("nan")}),
        ("rate_per_s", {"rate_per_s": float("inf")}),
        ("burst", {"rate_per_s": 1.0, "burst": 0}),
        ("burst", {"rate_per_s": 1.0, "burst": 1_000_001}),
        ("burst", {"burst": 5}),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_field(field: str, values: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput) as caught:
        made(**values)
    assert caught.value.field == field


def test_a_key_without_a_burst_holds_the_requests_of_a_second() -> None:
    assert made(rate_per_s=0.5)[0].capacity == 1
    assert made(rate_per_s=2.5)[0].capacity == 3
    assert made(rate_per_s=2.5, burst=50)[0].capacity == 50


def test_a_key_is_read_as_it_was_written() -> None:
    key, _ = made(scopes=["write", "read"], namespace="n", users=["b", "a", "b"], rate_per_s=2.5, burst=4)
    assert (key.scopes, key.users) == (("read", "write"), ("a", "b"))
    assert table_of(key).get(key.id) == key


@pytest.mark.parametrize(
    "change",
    [
        lambda _: b"",
        lambda _: b"{}",
        lambda _: b"\xff",
        lambda body: body.replace(b'"read"', b'"root"'),
        lambda body: body[:-1] + b',"expires_at":"2026-01-01T00:00:00Z"}',  # of a newer version
        lambda body: body.replace(b'"id":"', b'"id":"0'),
    ],
)
def test_a_key_that_cannot_be_read_is_refused_and_closes_the_store_all_the_same(change: Any) -> None:
    (key, token), (other, other_token) = made(), made()
    body = msgspec.json.encode(key)
    assert change(body) != body
    table = KeyTable.parsed({key.id.encode(): change(body)})
    assert (table.is_empty, table.unreadable, list(table)) == (False, 1, [])
    assert table.holder(token) is None
    both = KeyTable.parsed({key.id.encode(): change(body), other.id.encode(): msgspec.json.encode(other)})
    assert both.holder(other_token) == other


def test_a_digest_of_another_hand_is_only_wrong() -> None:
    key, token = made()
    assert table_of(msgspec.structs.replace(key, digest="é")).holder(token) is None


def test_a_store_without_keys_is_empty() -> None:
    assert KeyTable.parsed({}).is_empty
    assert KeyTable.parsed({}).holder(made()[1]) is None
