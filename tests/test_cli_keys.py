"""`redismem keys`, in process on the test server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest
from click.testing import CliRunner, Result

from redismem.apikeys import ApiKey
from redismem.cli import main
from redismem.keyring import KeyRing
from redismem.service import Service
from tests.conftest import until

Run = Callable[..., Result]


@pytest.fixture
def run(service: Service, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command on the test server, without an embedder that could be opened."""
    monkeypatch.setenv("REDISMEM_REDIS_URL", service.settings.redis_url)
    monkeypatch.setenv("REDISMEM_EMBEDDER", "openai")
    monkeypatch.setenv("REDISMEM_EMBEDDER_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("REDISMEM_EMBEDDER_MODEL", "none")
    monkeypatch.setenv("REDISMEM_NAMESPACE", "shop")
    return lambda *args: CliRunner().invoke(main, ["keys", *args])


def created(run: Run, *options: str) -> str:
    result = run("create", "--name", "agent", "--scope", "read", *options)
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def listed(run: Run) -> list[dict[str, object]]:
    return list(json.loads(run("list", "--json").stdout)["keys"])


@pytest.fixture
def ring(tiered: Service) -> KeyRing:
    """The keys as a service sees them that has an L1."""
    return KeyRing(tiered.client, tiered.l1, tiered.coherence, tiered.settings)


async def holder(ring: KeyRing, token: str) -> ApiKey | None:
    return (ring.known() or await ring.table()).holder(token)


async def test_a_created_token_is_valid_in_a_service_that_runs(run: Run, ring: KeyRing) -> None:
    assert (await ring.table()).is_empty
    token = await asyncio.to_thread(created, run)
    key = await holder(ring, token)
    assert key is not None
    assert (key.name, key.scopes, key.namespace, key.users) == ("agent", ("read",), "shop", ())


async def test_a_revoked_token_is_invalid_in_a_service_that_runs(run: Run, ring: KeyRing) -> None:
    token = await asyncio.to_thread(created, run)
    key = await holder(ring, token)
    assert key is not None

    async def known() -> bool:
        await ring.table()
        return ring.known() is not None

    await until("L1 has it", known)
    result = await asyncio.to_thread(run, "revoke", key.id)
    assert (result.exit_code, result.stdout) == (0, f"revoked {key.id}\n")
    assert await holder(ring, token) is None
    assert not (await ring.table()).is_empty


def test_the_token_alone_is_on_stdout_and_the_warning_beside_it(run: Run) -> None:
    result = run("create", "--name", "agent", "--scope", "read")
    assert result.stdout.startswith("rmk_")
    assert result.stdout.count("\n") == 1
    assert "cannot be shown again" in result.stderr
    assert "rmk_" not in result.stderr


def test_every_option_of_create_reaches_the_key(run: Run) -> None:
    options = "--scope write --namespace other --user ada --user bob --rate 2.5 --burst 9".split()
    created(run, *options)
    key = listed(run)[0]
    assert (key["scopes"], key["namespace"], key["users"]) == (["read", "write"], "other", ["ada", "bob"])
    assert (key["rate_per_s"], key["burst"]) == (2.5, 9)


def test_the_list_shows_no_secret_and_what_each_key_is(run: Run) -> None:
    token = created(run, "--rate", "5")
    key = listed(run)[0]
    assert set(key) == {
        *("id", "name", "scopes", "namespace", "users"),
        *("rate_per_s", "burst", "created_at", "revoked_at"),
    }
    table = run("list")
    assert str(key["id"]) in table.stdout
    assert token.split("_", 2)[2] not in table.stdout + json.dumps(key)


def test_a_revoked_key_stays_in_the_list(run: Run) -> None:
    created(run)
    assert run("revoke", str(listed(run)[0]["id"])).exit_code == 0
    assert listed(run)[0]["revoked_at"] is not None


def test_an_unknown_key_is_told_in_one_line(run: Run) -> None:
    result = run("revoke", "0123456789ab")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "0123456789ab" in result.stderr


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--name", "", "--scope", "read"), "name"),
        (("--name", "a", "--scope", "read", "--burst", "2"), "burst"),
        (("--name", "a", "--scope", "read", "--rate", "0"), "rate_per_s"),
        (("--name", "a", "--scope", "root"), "--scope"),
        (("--name", "a"), "--scope"),
    ],
)
def test_a_wrong_option_creates_nothing(run: Run, options: tuple[str, ...], word: str) -> None:
    result = run("create", *options)
    assert result.exit_code != 0
    assert word in result.stderr
    assert listed(run) == []


def test_no_keys_are_an_empty_list(run: Run) -> None:
    assert run("list").exit_code == 0
    assert listed(run) == []
