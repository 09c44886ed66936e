"""Prometheus' rules and Grafana's dashboards: they hold together, and they read metrics that exist."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # it ships no types

from redismem.http.table import OPERATIONS
from redismem.metrics import Metrics
from redismem.slo import BOUNDS_MS, GOALS, GROUPS

ROOT = Path(__file__).parent.parent
PROMETHEUS = ROOT / "docker" / "prometheus"
RULES = ("rules.yml", "alerts.yml")
TESTS = ("rules_test.yml", "burn_test.yml")
DASHBOARDS = sorted((ROOT / "docker" / "grafana" / "dashboards").glob("*.json"))

#: what Prometheus itself makes
OWN_SERIES = {
    "up": {"job", "instance"},
    "ALERTS": {"job", "instance", "alertname", "alertstate", "severity", "slo", "window"},
}
OWN_LABELS = {"job", "instance"}
KEYWORDS = {
    "and",
    "or",
    "unless",
    "bool",
    "by",
    "without",
    "on",
    "ignoring",
    "group_left",
    "group_right",
    "offset",
}

#: the alerts of the specification: expression, how long, severity
SPECIFIED = {
    "HighRetrievalLatency": ("job:redismem_retrieval_seconds:p95_2m > 0.150", "5m", "warning"),
    "CriticalRetrievalLatency": ("job:redismem_retrieval_seconds:p95_2m > 0.250", "2m", "critical"),
    "LowCacheHitRate": ("job:redismem_cache_hits:ratio_rate5m < 0.50", "10m", "warning"),
    "HighErrorRate": ("job:redismem_failed:ratio_rate2m > 0.01", "5m", "critical"),
    "IndexBuildSlow": ("max by (job) (redismem_index_build_seconds) > 1800", None, "warning"),
}


def rules() -> list[dict[str, Any]]:
    files = [yaml.safe_load((PROMETHEUS / name).read_text()) for name in RULES]
    return [rule for file in files for group in file["groups"] for rule in group["rules"]]


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in rules() if "alert" in rule]


def panels(path: Path) -> list[dict[str, Any]]:
    return [panel for panel in json.loads(path.read_text())["panels"] if panel["type"] != "row"]


def shown() -> list[tuple[str, str]]:
    """Return each expression of the dashboards, with where it stands."""
    return [
        (f"{path.stem}: {panel['title']}", target["expr"].replace("$__rate_interval", "5m"))
        for path in DASHBOARDS
        for panel in panels(path)
        for target in panel["targets"]
    ]


def expressions() -> list[tuple[str, str]]:
    return [(rule.get("record") or rule["alert"], rule["expr"]) for rule in rules()] + shown()


def series_of_metrics() -> dict[str, set[str]]:
    """Return the series that the service exposes, with their labels."""
    found: dict[str, set[str]] = {}
    registry = Metrics()._registry
    for family in registry.collect():
        labels = set(registry._names_to_collectors[family.name]._labelnames)  # type: ignore[attr-defined]
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}.get(
            family.type, ("",)
        )
        for suffix in suffixes:
            found[family.name + suffix] = labels | ({"le"} if suffix == "_bucket" else set())
    return found


def series() -> dict[str, set[str]]:
    known = series_of_metrics() | OWN_SERIES
    for rule in rules():
        if "record" in rule:
            known[rule["record"]] = {*rule["record"].partition(":")[0].split("_"), "job"}
    return known


def names_in(expr: str) -> set[str]:
    """Return the series that an expression reads."""
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b(by|without|on|ignoring)\s*\([^)]*\)", " ", expr)
    words = re.findall(r"(?<![\w:.])([A-Za-z_:][\w:]*)(?!\s*\(|[\w:])", bare)
    return {word for word in words if word not in KEYWORDS}


def promtool(*arguments: str) -> str:
    tool = shutil.which("promtool")
    if tool is None:
        if os.environ.get("REDISMEM_NEEDS_TOOLS"):
            pytest.fail("promtool is missing: install prometheus")
        pytest.skip("promtool is missing: install prometheus")
    done = subprocess.run([tool, *arguments], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_takes_its_configuration(tmp_path: Path) -> None:
    for name in RULES:
        shutil.copy(PROMETHEUS / name, tmp_path)
    key = tmp_path / "metrics_key"
    key.write_text("rmk_x\n")
    config = (PROMETHEUS / "prometheus.yml").read_text()
    assert "/run/secrets/metrics_key" in config
    (tmp_path / "prometheus.yml").write_text(config.replace("/run/secrets/metrics_key", str(key)))
    checked = promtool("check", "config", "--lint-fatal", str(tmp_path / "prometheus.yml"))
    assert f"{len(alerts())} rules found" in checked


@pytest.mark.parametrize("name", TESTS)
def test_rules_and_alerts_do_what_their_tests_say(name: str) -> None:
    assert "SUCCESS" in promtool("test", "rules", str(PROMETHEUS / name))


def test_every_expression_of_a_dashboard_is_one(tmp_path: Path) -> None:
    made = [{"record": f"panel_{i}", "expr": expr} for i, (_, expr) in enumerate(shown())]
    path = tmp_path / "panels.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": made}]}))
    assert f"{len(made)} rules found" in promtool("check", "rules", str(path))


def test_names_are_found_in_expressions() -> None:
    expr = 'sum by (job, le) (rate(a_bucket{le="0.1"}[5m])) / (b:c > bool 1.5e3) or on (job) d and 0 * max(e)'
    assert names_in(expr) == {"a_bucket", "b:c", "d", "e"}


def test_rules_and_dashboards_read_series_that_exist() -> None:
    known = series()
    unknown = {(where, name) for where, expr in expressions() for name in names_in(expr) - set(known)}
    assert not unknown


def test_selectors_use_labels_that_exist() -> None:
    known = series()
    wrong = [
        (where, name, label)
        for where, expr in expressions()
        for name, body in re.findall(r"([A-Za-z_:][\w:]*)\{([^}]*)\}", expr)
        for label in re.findall(r"(\w+)\s*(?:=|!=|=~|!~)\s*\"", body)
        if label not in known[name] | OWN_LABELS
    ]
    assert not wrong


def test_aggregations_keep_labels_that_exist() -> None:
    known = series()
    wrong = [
        (where, label)
        for where, expr in expressions()
        for body in re.findall(r"\bby\s*\(([^)]*)\)", expr)
        for label in body.replace(" ", "").split(",")
        if label not in set().union(*(known[name] for name in names_in(expr))) | OWN_LABELS
    ]
    assert not wrong


def test_every_metric_is_watched_or_shown() -> None:
    used = {name for _, expr in expressions() for name in names_in(expr)}
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in series_of_metrics()}
    assert families <= {re.sub(r"_(bucket|count|sum)$", "", name) for name in used}


def test_every_recorded_series_is_used() -> None:
    used = {name for _, expr in expressions() for name in names_in(expr)}
    unused = {rule["record"] for rule in rules() if "record" in rule} - used
    assert not unused


def test_the_alerts_of_the_specification_are_as_specified() -> None:
    for name, (expr, lasting, severity) in SPECIFIED.items():
        (rule,) = (rule for rule in alerts() if rule["alert"] == name)
        assert rule["expr"].splitlines()[0] == expr
        assert (rule.get("for"), rule["labels"]["severity"]) == (lasting, severity)


def test_every_alert_says_what_it_is_and_where_help_is() -> None:
    for rule in alerts():
        assert set(rule["annotations"]) == {"summary", "description", "runbook"}, rule["alert"]
        assert rule["annotations"]["runbook"] == f"README.md#runbook: {rule['alert']}"
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["labels"]["notify"] in ("page", "ticket")


def test_the_runbook_tells_of_every_alert() -> None:
    _, heading, rest = (ROOT / "README.md").read_text().partition("\n## Runbook\n")
    assert heading, "the alerts lead to a section `## Runbook` of the README"
    runbook = rest.partition("\n## ")[0]
    assert {rule["alert"] for rule in alerts() if rule["alert"] not in runbook} == set()


def test_every_alert_is_seen_firing() -> None:
    seen = "".join((PROMETHEUS / name).read_text() for name in TESTS)
    for rule in alerts():
        fired = rf'alertname="{rule["alert"]}"'
        if window := rule["labels"].get("window"):
            fired += rf', window="{window}"'
        assert fired in seen


def test_budgets_are_those_of_the_objectives() -> None:
    allowed = {goal.name: goal.allowed for goal in GOALS}
    of = {
        "availability": allowed["retrieval_availability"],
        "latency": allowed["retrieval_p95"],
        "updates": allowed["update_success"],
    }
    burning = [rule for rule in alerts() if "slo" in rule["labels"]]
    factors = {"1h": 14.4, "6h": 6, "1d": 3, "3d": 1}
    assert len(burning) == len(of) * len(factors)
    for rule in burning:
        bounds = re.findall(r"> ([\d.]+) \* ([\d.]+)", rule["expr"])
        assert {(float(factor), float(share)) for factor, share in bounds} == {
            (factors[rule["labels"]["window"]], of[rule["labels"]["slo"]])
        }
        assert len(bounds) == 2
    left = {rule["record"]: rule["expr"] for rule in rules() if "left30d" in rule.get("record", "")}
    for slo, share in of.items():
        assert left[f"job:redismem_{slo}_budget:left30d"].endswith(f" / {share}")


def test_the_bound_of_slow_is_a_bucket_and_the_objective() -> None:
    (goal,) = (goal for goal in GOALS if goal.name == "retrieval_p95")
    bounds = {float(bound) for _, expr in expressions() for bound in re.findall(r'le="([\d.]+)"', expr)}
    assert bounds == {goal.target / 1000}
    assert goal.target in BOUNDS_MS["retrieval"]


def test_rules_know_which_operations_are_updates_and_which_are_no_requests() -> None:
    told = {rule["record"]: rule["expr"] for rule in rules() if "record" in rule}
    (updates,) = re.findall(r'operation=~"([^"]+)"', told["job_outcome:redismem_updates:rate5m"])
    assert {name for name in GROUPS if re.fullmatch(updates, name)} == {
        name for name, group in GROUPS.items() if group == "update"
    }
    others = {operation.name for operation in OPERATIONS} - set(GROUPS) | {"metrics", "page"}
    for window in ("2m", "5m"):
        expr = told[f"job_outcome:redismem_requests:rate{window}"]
        (excluded,) = re.findall(r'operation!~"([^"]+)"', expr)
        assert set(excluded.split("|")) == others


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_complete_and_leads_nowhere_else(path: Path) -> None:
    board = json.loads(path.read_text())
    assert board["uid"].startswith("redismem-")
    assert not re.search(r"https?://", path.read_text())
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in panels(path):
        assert panel["targets"], panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert [target["refId"] for target in panel["targets"]] == list("ABCDE"[: len(panel["targets"])])


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_of_a_dashboard_do_not_overlap(path: Path) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(path.read_text())["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_dashboards_have_names_of_their_own() -> None:
    boards = [json.loads(path.read_text()) for path in DASHBOARDS]
    assert len(boards) == 3
    assert len({board["uid"] for board in boards}) == len({board["title"] for board in boards}) == 3
