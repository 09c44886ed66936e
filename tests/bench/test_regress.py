"""The regression gate: it lets the same build pass, and stops one that was slowed on purpose."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.bench.conftest import Load, Loaded, bench

pytestmark = pytest.mark.accept

#: imported by every Python of the service as it starts: a search that L1 cannot answer holds its process
#: for 20 ms more
SLOWED = """
import importlib.abc, importlib.util, sys, time

class Slowing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "redismem.tiers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        def slowed(module):
            execute(module)
            search = module.Tiers.search
            async def slow(*arguments, **named):
                time.sleep(0.02)
                return await search(*arguments, **named)
            module.Tiers.search = slow
        spec.loader.exec_module = slowed
        return spec

sys.meta_path.insert(0, Slowing())
"""

#: no embeddings: on a busy machine their queue hides 20 ms, and hides them or not by chance
QUIET = {"REDISMEM_EMBEDDER": "deterministic", "REDISMEM_TESTING": "1"}

Change = Callable[[dict[str, Any]], None]


def gate(baseline: list[Path], current: list[Path], *more: str) -> tuple[int, str]:
    """Return how the gate ended, and all that it printed."""
    ended = bench("regress.py", "--baseline", *baseline, "--current", *current, *more)
    return ended.returncode, ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def loaded(load: Load) -> Loaded:
    """One short load of this build."""
    return load(**QUIET)


@pytest.fixture
def changed(loaded: Loaded, tmp_path: Path) -> Callable[[Change], Path]:
    """A file that is that of the real load but for one change."""

    def one(change: Change) -> Path:
        result = copy.deepcopy(loaded.result)
        change(result)
        path = tmp_path / f"changed{len(list(tmp_path.iterdir()))}.json"
        path.write_text(json.dumps(result))
        return path

    return one


def steady(result: dict[str, Any]) -> dict[str, Any]:
    told: dict[str, Any] = result["figures"]["patterns"]["steady"]
    return told


def test_the_gate_stops_a_slowed_build_and_lets_the_same_one_pass(
    load: Load, loaded: Loaded, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOWED)
    slowed = load(**QUIET, PYTHONPATH=str(tmp_path))
    ended, printed = gate([loaded.path], [loaded.path])
    assert ended == 0, printed
    assert "0 failed, 0 to look at" in printed
    ended, printed = gate([loaded.path], [slowed.path], "--json")
    assert ended == 1, printed
    rows = {row["what"]: row for row in json.loads(printed)["rows"]}
    assert rows["P95 of search"]["verdict"] == "fail", printed
    # it was slowed, not broken: it may refuse what it has no time for
    assert slowed.steady["operations"]["all"]["errors"] == {}


@pytest.mark.parametrize(
    ("factor", "verdict", "status"),
    [(1.10, "ok", 0), (1.20, "warn", 0), (1.35, "fail", 1), (0.8, "better", 0)],
)
def test_p95_warns_from_15_percent_and_fails_from_30(
    loaded: Loaded, changed: Callable[[Change], Path], factor: float, verdict: str, status: int
) -> None:
    def slower(result: dict[str, Any]) -> None:
        steady(result)["operations"]["search"]["p95_over_floor"] *= factor

    assert_verdict(loaded, changed(slower), "P95 of search", verdict, status)


@pytest.mark.parametrize(
    ("factor", "verdict", "status"),
    [(0.95, "ok", 0), (0.85, "warn", 0), (0.7, "fail", 1)],
)
def test_the_rate_warns_from_10_percent_and_fails_from_25(
    loaded: Loaded, changed: Callable[[Change], Path], factor: float, verdict: str, status: int
) -> None:
    def weaker(result: dict[str, Any]) -> None:
        steady(result)["capacity"]["over_floor"] *= factor

    assert_verdict(loaded, changed(weaker), "requests a second", verdict, status)


@pytest.mark.parametrize(
    ("factor", "verdict", "status"),
    [(0.97, "ok", 0), (0.9, "warn", 0), (0.8, "fail", 1)],
)
def test_the_hit_rate_warns_from_5_percent_and_fails_from_15(
    loaded: Loaded, changed: Callable[[Change], Path], factor: float, verdict: str, status: int
) -> None:
    def missing(result: dict[str, Any]) -> None:
        steady(result)["hits"]["search"] *= factor

    assert_verdict(loaded, changed(missing), "hit rate of search", verdict, status)


@pytest.mark.parametrize(
    ("factor", "verdict", "status"),
    [(1.1, "ok", 0), (1.3, "warn", 0), (1.6, "fail", 1)],
)
def test_memory_warns_from_20_percent_and_fails_from_50(
    loaded: Loaded, changed: Callable[[Change], Path], factor: float, verdict: str, status: int
) -> None:
    def larger(result: dict[str, Any]) -> None:
        steady(result)["resources"]["service_rss_bytes"]["max"] *= factor

    assert_verdict(loaded, changed(larger), "memory of service, bytes", verdict, status)


def assert_verdict(loaded: Loaded, path: Path, what: str, verdict: str, status: int) -> None:
    ended, printed = gate([loaded.path], [path], "--json")
    rows = {row["what"]: row["verdict"] for row in json.loads(printed)["rows"]}
    assert (rows.pop(what), ended) == (verdict, status)
    assert set(rows.values()) == {"ok"}


def test_a_slower_machine_is_no_slower_build(loaded: Loaded, changed: Callable[[Change], Path]) -> None:
    def slower_machine(result: dict[str, Any]) -> None:
        result["figures"]["floor"]["search_ms"] *= 3
        for row in steady(result)["operations"].values():
            row["p95"] = row["p95"] and row["p95"] * 3

    ended, printed = gate([loaded.path], [changed(slower_machine)])
    assert ended == 0, printed


def test_one_bad_run_of_three_does_not_fail(loaded: Loaded, changed: Callable[[Change], Path]) -> None:
    def bad(result: dict[str, Any]) -> None:
        steady(result)["operations"]["search"]["p95_over_floor"] *= 2

    spoiled = changed(bad)
    assert gate([loaded.path], [loaded.path, spoiled, loaded.path])[0] == 0
    assert gate([loaded.path], [loaded.path, spoiled, spoiled])[0] == 1
    assert gate([loaded.path], [loaded.path, spoiled, spoiled], "--take", "best")[0] == 0


def test_files_that_cannot_be_compared_are_named(
    loaded: Loaded, changed: Callable[[Change], Path], tmp_path: Path
) -> None:
    def other_pattern(result: dict[str, Any]) -> None:
        result["figures"]["patterns"]["burst"] = result["figures"]["patterns"].pop("steady")

    def other_scale(result: dict[str, Any]) -> None:
        result["parameters"]["time_scale"] = 1.0

    def without_hits(result: dict[str, Any]) -> None:
        del steady(result)["hits"]

    def without_floor(result: dict[str, Any]) -> None:
        for row in steady(result)["operations"].values():
            del row["p95_over_floor"]

    def hits_unknown(result: dict[str, Any]) -> None:
        steady(result)["hits"]["search"] = None

    wrong: list[tuple[Change, str]] = [
        (other_pattern, "patterns ['steady'] and ['burst']"),
        (other_scale, "time_scale 0.01 and 1.0"),
        (without_hits, "'hits'"),
        (without_floor, "'p95_over_floor'"),
        (hits_unknown, "hit rate of search"),
    ]
    for change, told in wrong:
        ended, printed = gate([loaded.path], [changed(change)])
        assert ended == 2, printed
        assert told in printed
    (tmp_path / "none.json").write_text("{}")
    for path in (tmp_path / "none.json", tmp_path / "missing.json"):
        ended, printed = gate([loaded.path], [path])
        assert ended == 2
        assert path.name in printed
