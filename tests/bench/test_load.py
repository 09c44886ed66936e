"""The load test, run for real and short."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from tests.bench.conftest import BUDGET_S, Loaded, bench

pytestmark = pytest.mark.accept


def test_a_short_load_is_answered_in_time_and_without_errors(loaded: Loaded) -> None:
    everything = loaded.steady["operations"]["all"]
    assert everything["errors"] == {}
    assert everything["refused"]["n"] == 0
    assert everything["n"] > 200, "6 seconds of 50 requests a second"
    assert {"search", "get"} < loaded.steady["operations"].keys()
    assert 0 < everything["p50"] <= everything["p95"] <= everything["p99"] <= everything["max"]
    assert loaded.took_s < BUDGET_S


def test_the_mix_is_the_specified_one(loaded: Loaded) -> None:
    operations = loaded.steady["operations"]
    shares = {name: operations[name]["n"] / operations["all"]["n"] for name in ("search", "get", "update")}
    assert shares["search"] == pytest.approx(0.80, abs=0.08)
    assert shares["get"] == pytest.approx(0.15, abs=0.08)
    assert shares["update"] == pytest.approx(0.05, abs=0.05)
    assert sum(shares.values()) == pytest.approx(1)


def test_a_result_tells_the_floor_the_machine_and_what_the_service_used(loaded: Loaded) -> None:
    result, steady = loaded.result, loaded.steady
    floor = result["figures"]["floor"]
    assert floor["search_ms"] >= floor["embedding"]["p50"] > 0
    assert steady["operations"]["search"]["p95_over_floor"] > 0
    assert steady["capacity"]["over_floor"] > 0
    assert steady["resources"]["service_rss_bytes"]["max"] > 50e6
    assert steady["resources"]["redis_used_bytes"]["max"] > 1e6
    assert 0 < steady["hits"]["retrieval"] < 1
    assert sum(steady["hits"]["served_by"].values()) == steady["operations"]["search"]["n"]
    assert sum(steady["histogram"]["counts"]) == steady["operations"]["all"]["n"]
    assert {row["what"] for row in steady["targets"] if row["met"]} >= {"errors, share"}
    assert {"cpu", "cores", "python", "when", "data_sha256", "redis"} <= result.keys()


class _Seen(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.outside += [
            value
            for name, value in attrs
            if name in ("src", "href", "xlink:href") and value and not value.startswith("data:")
        ]


def test_the_report_is_one_file_with_plots_and_promises(loaded: Loaded) -> None:
    page = loaded.html.read_text()
    seen = _Seen()
    seen.feed(page)
    assert seen.outside == []
    assert "script" not in seen.tags
    assert "url(" not in page
    assert seen.tags.count("figure") == 4
    assert "prefers-color-scheme:dark" in page
    assert "retrieval P95, ms" in page
    assert "NaN" not in page


def test_load_goes_to_this_machine_only() -> None:
    ended = bench("load.py", "--url", "http://192.0.2.1:8000")
    assert ended.returncode == 2
    assert "must be on this machine" in ended.stderr
