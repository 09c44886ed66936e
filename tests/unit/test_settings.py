"""Settings: every wrong value names its variable, and no secret is shown."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from redismem.errors import Misconfigured
from redismem.settings import Settings


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("REDISMEM_REDIS_URL", "http://localhost"),
        ("REDISMEM_REDIS_URL", "localhost:6379"),
        ("REDISMEM_REDIS_IN_FLIGHT", "0"),
        ("REDISMEM_REDIS_IN_FLIGHT", "many"),
        ("REDISMEM_REDIS_TIMEOUT_S", "nan"),
        ("REDISMEM_REDIS_TIMEOUT_S", "inf"),
        ("REDISMEM_REDIS_TIMEOUT_S", "-1"),
        ("REDISMEM_PORT", "65536"),
        ("REDISMEM_PORT", "80.5"),
        ("REDISMEM_WORKERS", ""),
        ("REDISMEM_EMBEDDER", "bert"),
        ("REDISMEM_EMBEDDER", "deterministic"),
        ("REDISMEM_EMBEDDER_DEADLINE_S", "soon"),
        ("REDISMEM_EMBEDDER_THREADS", "0"),
        ("REDISMEM_TESTING", "maybe"),
        ("REDISMEM_MAX_BODY_BYTES", "1"),
        ("REDISMEM_LOG_LENGTH", "0"),
        ("REDISMEM_NAMESPACE", "x" * 257),
        ("REDISMEM_NAMESPACE", "a\0b"),
        ("REDISMEM_PREFETCH", "topic,mood"),
        ("REDISMEM_SESSION_TTL_S", "59"),
    ],
)
def test_a_wrong_value_names_its_variable(name: str, raw: str) -> None:
    with pytest.raises(Misconfigured, match=name) as caught:
        Settings.from_environment({name: raw})
    assert caught.value.field == name.removeprefix("REDISMEM_").lower()


def test_an_endpoint_needs_url_and_model() -> None:
    for environ in ({}, {"REDISMEM_EMBEDDER_URL": "http://x"}, {"REDISMEM_EMBEDDER_MODEL": "m"}):
        with pytest.raises(Misconfigured, match=r"REDISMEM_EMBEDDER_URL .*REDISMEM_EMBEDDER_MODEL"):
            Settings.from_environment({"REDISMEM_EMBEDDER": "openai", **environ})


def test_secrets_are_not_shown() -> None:
    settings = Settings(redis_url="redis://user:hunter2@host", embedder_key="sk-hunter2")
    assert "hunter2" not in repr(settings)
    assert "hunter2" not in str(settings)


def test_a_refused_url_does_not_show_its_password() -> None:
    with pytest.raises(Misconfigured) as caught:
        Settings(redis_url="http://user:hunter2@host")
    assert "hunter2" not in str(caught.value)


def test_the_deterministic_embedder_needs_testing() -> None:
    with pytest.raises(Misconfigured, match="REDISMEM_TESTING"):
        Settings(embedder="deterministic")
    assert Settings(embedder="deterministic", testing=True).embedder == "deterministic"


def test_every_field_is_read_from_its_variable() -> None:
    raws = {
        "redis_url": "redis://h",
        "data_dir": "/d",
        "redis_in_flight": "3",
        "redis_timeout_s": "1.5",
        "host": "0.0.0.0",
        "port": "1",
        "workers": "2",
        "namespace": "n",
        "embedder": "openai",
        "embedder_model": "m",
        "embedder_url": "http://u",
        "embedder_key": "k",
        "embedder_deadline_s": "2.5",
        "embedder_threads": "4",
        "testing": "yes",
        "l1_entries": "7",
        "l1_bytes": "4096",
        "l2_searches": "9",
        "search_ttl_s": "1.5",
        "past_search_ttl_s": "2.5",
        "memory_ttl_s": "3.5",
        "embedding_ttl_s": "4.5",
        "hot_capacity": "5",
        "hot_ttl_s": "6.5",
        "lease_s": "0.5",
        "stale_if_error": "1",
        "hnsw_threshold": "200",
        "hnsw_profile": "low_latency",
        "idle_index_days": "1.5",
        "archive_url": "memory://a",
        "archive_after_quarters": "4",
        "maintain_every_s": "5.5",
        "warm_users": "6",
        "session_ttl_s": "7200",
        "prefetch": "topic,entity",
        "prefetch_lanes": "3",
        "spacy_model": "en_core_web_sm",
        "worker": "0",
        "half_life_days": "90.5",
        "llm_url": "http://127.0.0.1:1/v1",
        "llm_model": "m",
        "llm_key": "k",
        "llm_timeout_s": "3.5",
        "max_body_bytes": "2048",
        "log_length": "5",
        "insecure": "yes",
        "max_in_flight": "12",
        "overload_ms": "50.5",
        "request_timeout_s": "2.5",
        "idempotency_ttl_s": "3600.5",
        "cors_origins": "https://a.example",
        "log_format": "json",
        "slow_request_ms": "100.5",
        "access_log": "1",
    }
    assert set(raws) == {item.name for item in fields(Settings)}
    settings = Settings.from_environment({"REDISMEM_" + name.upper(): raw for name, raw in raws.items()})
    for name, raw in raws.items():
        value = getattr(settings, name)
        flags = dict.fromkeys(("testing", "stale_if_error", "insecure", "access_log"), "True")
        flags["worker"] = "False"
        assert str(value) == flags.get(name, raw)
        assert type(value) is type(getattr(Settings(), name)) or isinstance(value, Path)


def test_a_chosen_value_wins_and_none_chooses_nothing() -> None:
    environ = {"REDISMEM_PORT": "1", "REDISMEM_HOST": "a"}
    settings = Settings.from_environment(environ, port=2, host=None)
    assert (settings.port, settings.host) == (2, "a")


def test_the_data_dir_expands_the_home_directory() -> None:
    assert Settings.from_environment({"REDISMEM_DATA_DIR": "~/x"}).data_dir == Path.home() / "x"


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Settings().port = 1  # type: ignore[misc]


def test_defaults_serve_on_loopback_only() -> None:
    assert Settings().host == "127.0.0.1"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_a_store_without_keys_may_be_open_where_only_this_machine_connects(host: str) -> None:
    assert Settings(host=host).may_be_open


@pytest.mark.parametrize(
    "host",
    ["0.0.0.0", "::", "", "10.0.0.1", "::ffff:0.0.0.0", "example.com", "localhost.example.com", "0", "*"],
)
def test_anywhere_else_it_may_be_open_only_when_told_so(host: str) -> None:
    assert not Settings(host=host).may_be_open
    assert Settings(host=host, insecure=True).may_be_open


def test_origins_are_parted_by_commas_and_are_none_by_default() -> None:
    assert Settings().origins == ()
    assert Settings(cors_origins=" https://a.example , http://localhost:3000,").origins == (
        "https://a.example",
        "http://localhost:3000",
    )


@pytest.mark.parametrize(
    "origin",
    ["*", "null", "a.example", "https://a.example/", "https://a.example/app", "https://*.example", "ftp://a"],
)
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(Misconfigured, match="REDISMEM_CORS_ORIGINS"):
        Settings(cors_origins=f"https://b.example,{origin}")


def test_a_log_format_is_one_of_those_there_are() -> None:
    with pytest.raises(Misconfigured, match="REDISMEM_LOG_FORMAT"):
        Settings.from_environment({"REDISMEM_LOG_FORMAT": "xml"})
