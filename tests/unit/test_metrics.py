"""Names, buckets and labels of the metrics, and that nothing is counted twice or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from prometheus_client.parser import text_string_to_metric_families

from redismem.metrics import HistogramName, Metrics
from redismem.slo import BOUNDS_MS

#: the contract with dashboards and alerts: histogram -> labels, upper bounds
HISTOGRAMS: dict[str, tuple[tuple[str, ...], list[float]]] = {
    "memory_retrieval_seconds": (
        ("operation", "cache_status"),
        [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0],
    ),
    "redismem_context_seconds": (
        ("operation",),
        [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 1.0],
    ),
    "redismem_context_stage_seconds": (
        ("stage",),
        [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 1.0],
    ),
    "redismem_update_seconds": (("operation",), [0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2]),
    "redismem_embedding_seconds": (
        (),
        [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5],
    ),
    "redismem_barrier_seconds": (
        (),
        [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5],
    ),
    "redismem_event_loop_lag_seconds": ((), [0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0]),
    "redismem_redis_round_trips": (("operation",), [0, 1, 2, 3, 4, 6, 10]),
    "redismem_job_seconds": (("kind",), [0.01, 0.1, 1, 10, 60, 600]),
}
SHORT: dict[HistogramName, str] = {
    "retrieval": "memory_retrieval_seconds",
    "context": "redismem_context_seconds",
    "stage": "redismem_context_stage_seconds",
    "update": "redismem_update_seconds",
    "embedding": "redismem_embedding_seconds",
    "barrier": "redismem_barrier_seconds",
    "lag": "redismem_event_loop_lag_seconds",
    "trips": "redismem_redis_round_trips",
    "job": "redismem_job_seconds",
}
COUNTERS = {
    "redismem_requests": ("operation", "outcome"),
    "redismem_refused": ("reason",),
    "cache_hits": ("cache_type",),
    "cache_misses": ("cache_type",),
    "redismem_cache_evictions": ("cache_type",),
    "redismem_cache_invalidations": ("cache_type",),
    "redismem_prefetch": ("signal", "outcome"),
    "redismem_jobs_done": ("kind", "outcome"),
    "redismem_slow_requests": ("operation",),
}
GAUGES: dict[str, tuple[str, ...]] = {
    "cache_size_bytes": ("cache_type",),
    "redismem_cache_entries": ("cache_type",),
    "index_size_vectors": (),
    "index_memory_bytes": (),
    "redismem_users": (),
    "redismem_index_build_seconds": (),
    "redismem_redis_memory_bytes": (),
    "redismem_redis_max_memory_bytes": (),
    "redismem_redis_up": (),
    "redismem_jobs": ("state",),
    "redismem_job_lag_seconds": (),
    "redismem_lease_live": (),
    "redismem_processes": (),
    "redismem_in_flight": (),
    "redismem_in_flight_limit": (),
}


def told(metrics: Metrics) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Return the samples of an exposition: name -> labels -> value. The parser refuses what is malformed."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            labels = tuple(sorted(sample.labels.items()))
            assert labels not in found.setdefault(sample.name, {}), "told twice"
            found[sample.name][labels] = sample.value
    return found


def buckets(metrics: Metrics, name: str, **labels: str) -> list[tuple[float, float]]:
    """Return upper bounds and counts (cumulative) of a histogram."""
    wanted = set(labels.items())
    found = [
        (float(dict(key)["le"]), value)
        for key, value in told(metrics)[f"{name}_bucket"].items()
        if wanted <= set(key)
    ]
    return sorted(found)


@pytest.mark.parametrize("short", SHORT)
def test_a_histogram_has_the_name_the_labels_and_the_buckets_of_the_contract(short: HistogramName) -> None:
    labels, bounds = HISTOGRAMS[SHORT[short]]
    metrics = Metrics()
    metrics.observe(short, 0.0, *["x" for _ in labels])
    found = told(metrics)
    (key,) = found[f"{SHORT[short]}_count"]
    assert {name for name, _ in key} == set(labels)
    assert [bound for bound, _ in buckets(metrics, SHORT[short])] == [*bounds, float("inf")]


def test_every_metric_of_the_contract_is_told_and_no_other() -> None:
    families = text_string_to_metric_families(Metrics().exposition().decode())
    kinds = {family.name: family.type for family in families if not family.name.endswith("_created")}
    assert kinds == {
        **dict.fromkeys(HISTOGRAMS, "histogram"),
        **dict.fromkeys(COUNTERS, "counter"),
        **dict.fromkeys(GAUGES, "gauge"),
    }


def test_counters_and_gauges_take_the_labels_of_the_contract() -> None:
    metrics = Metrics()
    for name, labels in COUNTERS.items():
        metrics.count(name, *("x" for _ in labels))
    for name, labels in GAUGES.items():
        metrics.set(name, 2.5, *("x" for _ in labels))
    found = told(metrics)
    for name, labels in COUNTERS.items():
        assert found[f"{name}_total"] == {tuple(sorted((label, "x") for label in labels)): 1.0}
    for name, labels in GAUGES.items():
        assert found[name] == {tuple(sorted((label, "x") for label in labels)): 2.5}


def test_a_value_at_a_bound_is_below_it_and_one_above_all_is_in_the_last() -> None:
    metrics = Metrics()
    for value in (0.0, 0.01, 0.010001, 1.0, 1.5, 99.0):
        metrics.observe("retrieval", value, "search", "l1")
    counts = buckets(metrics, "memory_retrieval_seconds")
    assert counts[:2] == [(0.01, 2), (0.025, 3)]
    assert counts[-2:] == [(1.0, 4), (float("inf"), 6)]


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["search", "get"]),
            st.sampled_from(["l1", "l3", "none"]),
            st.one_of(st.floats(0, 3), st.sampled_from([bound / 1000 for bound in BOUNDS_MS["retrieval"]])),
            st.sampled_from(["", "", "flush", "taken", "told"]),
        ),
        max_size=60,
    )
)
def test_nothing_is_lost_or_counted_twice_whenever_it_is_moved(
    observations: list[tuple[str, str, float, str]],
) -> None:
    metrics, moved = Metrics(), []
    model: dict[tuple[str, str], list[float]] = {}
    for operation, status, value, then in observations:
        metrics.observe("retrieval", value, operation, status)
        metrics.count("redismem_requests", operation, "ok")
        model.setdefault((operation, status), []).append(value)
        if then == "flush":
            metrics.flush()
        elif then == "taken":
            moved.append(metrics.taken())
        elif then == "told":
            metrics.exposition()
    moved.append(metrics.taken())
    assert metrics.taken() == ({}, {})
    found = told(metrics)
    for labels, values in model.items():
        key = tuple(sorted(zip(("operation", "cache_status"), labels, strict=True)))
        assert found["memory_retrieval_seconds_count"][key] == len(values)
        assert found["memory_retrieval_seconds_sum"][key] == pytest.approx(sum(values))
        taken = [counts for observed, _ in moved if (counts := observed.get(("retrieval", labels)))]
        assert sum(sum(counts[:-1]) for counts in taken) == len(values)
        assert sum(counts[-1] for counts in taken) == pytest.approx(sum(values))
        for bound, count in buckets(
            metrics, "memory_retrieval_seconds", operation=labels[0], cache_status=labels[1]
        ):
            assert count == sum(value <= bound for value in values)
    events = sum(by for _, counted in moved for by in counted.values())
    assert events == len(observations) == sum(found.get("redismem_requests_total", {}).values())


def test_a_total_that_others_keep_is_counted_by_its_differences() -> None:
    metrics = Metrics()
    for total in (3, 3, 10):
        metrics.total("cache_hits", total, "l1_search")
        metrics.total("cache_hits", 1, "l2_search")
    assert told(metrics)["cache_hits_total"] == {
        (("cache_type", "l1_search"),): 10.0,
        (("cache_type", "l2_search"),): 1.0,
    }


def test_services_of_one_process_do_not_share_what_they_count() -> None:
    one, other = Metrics(), Metrics()
    one.count("redismem_requests", "search", "ok")
    assert told(other).get("redismem_requests_total", {}) == {}


COUNTING = """
import os, sys, time
from pathlib import Path
from redismem.metrics import Metrics, share
if sys.argv[2] == "first":
    share(Path(sys.argv[1]))
metrics = Metrics()
metrics.count("redismem_requests", "search", "ok", by=int(sys.argv[3]))
metrics.observe("trips", 1.0, "search")
metrics.set("redismem_processes", 1)
metrics.set("redismem_users", int(sys.argv[3]))
metrics.set("redismem_index_build_seconds", int(sys.argv[3]))
metrics.flush()
print(metrics.exposition().decode() if sys.argv[2] == "last" else "counted", flush=True)
sys.stdin.read()
"""


def counting(folder: Path, place: str, by: int, environ: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", COUNTING, str(folder), place, str(by)],
        env=dict(environ),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_processes_count_together_and_the_gauges_of_dead_ones_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that shares the folder has imported prometheus_client before, like `serve`."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    environ = dict(os.environ)
    first = counting(tmp_path, "first", 5, environ)
    shared = environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    dead = counting(tmp_path, "next", 7, shared)
    try:
        for process in (first, dead):
            assert process.stdout is not None
            assert process.stdout.readline() == "counted\n"
        dead.kill()
        dead.communicate()
        (tmp_path / "counter_1.db").touch()  # of one that was killed, or is stopped, before it had filled it
        last = counting(tmp_path, "last", 11, shared)
        text, _ = last.communicate()
    finally:
        for process in (first, dead):
            process.kill()
            process.communicate()
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found["redismem_requests_total", "search", "ok"] == 23
    assert found["redismem_redis_round_trips_count", "search"] == 3
    assert found["redismem_processes",] == 2
    assert found["redismem_users",] == 11
    assert found["redismem_index_build_seconds",] == 11
