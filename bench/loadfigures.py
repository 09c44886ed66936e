"""What the records of a load test say: percentiles, hits, recovery, growth, and which promises held."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
from harness import percentiles
from openloop import NO_REPLY, Table

Figures = dict[str, Any]

#: a step is too much when more than this share was not answered, or P95 is above
FAILING_SHARE, FAILING_P95_MS = 0.01, 200.0
#: P95 is back when it is within 1.2 times of before for a window; 5 ms, because 1.2 times 8 ms is noise
RECOVERED, RECOVERED_MS, RECOVERED_WINDOW_S = 1.2, 5.0, 3.0
#: share of an endurance run that warms caches up, and growth over the rest (of its mean) that is none
ENDURANCE_WARM_UP, NO_GROWTH, NO_DRIFT = 0.25, 0.03, 0.15
#: what promises are made about
GROUPS = {"retrieval": ("search", "get"), "update": ("patch text", "patch metadata")}
SLICES, SHORTEST_SLICE_S = 120, 1.0
BOUNDS_MS = (0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 50, 75, 100, 150, 200, 300, 500, 1_000, 2_000, 5_000)
#: what a ramp is to reach
RAMP_TARGET_PER_S = 1_000.0


def figures(table: Table, seconds: float, groups: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return by name, by group of names, and for `all`, what was answered, refused and failed.

    Returns:
        n, per_s and milliseconds are those of answers with 2xx, from when they were due; the milliseconds of
        refusals (429, 503) stand apart; every other status, or none, is an error.
    """
    found: dict[str, Any] = {}
    named = {**{name: [name] for name in sorted(table.names)}, **groups, "all": table.names}
    for name, names in named.items():
        rows = table.named(*names)
        if not len(rows.status):
            continue
        refused = rows.where(rows.refused)
        bad = rows.status[~rows.ok & ~rows.refused].tolist()
        found[name] = {
            **spread(rows.took_ms[rows.ok]),
            "offered_per_s": round(len(rows.status) / seconds, 1),
            "achieved_per_s": round(int(rows.ok.sum()) / seconds, 1),
            "refused": {
                **spread(refused.took_ms),
                "by_status": dict(Counter(map(str, refused.status.tolist()))),
            },
            "errors": dict(Counter(NO_REPLY.get(status, str(status)) for status in bad)),
        }
    return found


def spread(milliseconds: NDArray[np.float32]) -> dict[str, float | int | None]:
    """Return n, p50, p95, p99 (nearest rank) and max; null where there is nothing."""
    ordered = np.sort(milliseconds)
    n = len(ordered)
    ranks = {"p50": int(n * 0.5), "p95": int(n * 0.95), "p99": int(n * 0.99), "max": n - 1}
    told = {name: round(float(ordered[min(rank, n - 1)]), 3) if n else None for name, rank in ranks.items()}
    return {"n": n, **told}


def slices(table: Table, seconds: float, every_s: float) -> list[dict[str, Any]]:
    """Return rates and percentiles over time, by when requests were due."""
    rows = []
    for begin_s in np.arange(0, seconds, every_s).tolist():
        part = table.between(begin_s, begin_s + every_s)
        row = {"at_s": round(begin_s, 3), "offered": len(part.status), "ok": int(part.ok.sum())}
        row["refused"] = int(part.refused.sum())
        row["errors"] = row["offered"] - row["ok"] - row["refused"]
        rows.append({**row, **spread(part.took_ms[part.ok])})
    return rows


def histogram(table: Table) -> dict[str, Any]:
    """Return how many answers took up to each bound; the last count is of those above every bound."""
    into = np.searchsorted(BOUNDS_MS, table.took_ms[table.ok])
    return {"bounds_ms": BOUNDS_MS, "counts": np.bincount(into, minlength=len(BOUNDS_MS) + 1).tolist()}


def recovered_s(table: Table, from_s: float, to_s: float, bar_ms: float, window_s: float) -> float | None:
    """Return the seconds after `from_s` from when P95 stays within the bar for a window; null: it never did.

    More than FAILING_SHARE refused or failed in a window keeps it from counting as recovered.
    """
    for begin_s in np.arange(from_s, to_s - window_s, 0.25).tolist():
        part = table.between(begin_s, begin_s + window_s)
        told = spread(part.took_ms[part.ok])
        is_answering = len(part.ok) - part.ok.sum() <= FAILING_SHARE * len(part.ok)
        if is_answering and told["p95"] is not None and told["p95"] <= bar_ms:
            return round(begin_s - from_s, 2)
    return None


def slope(at_s: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Return least squares' change an hour, and the change over the whole time as a share of the mean."""
    per_s = float(np.polyfit(at_s, values, 1)[0])
    return per_s * 3600, per_s * (at_s[-1] - at_s[0]) / float(np.mean(values))


def overdue(rows: Table, due_s: Sequence[float]) -> int:
    """Return how many requests of a step, which ends now, are late and not answered yet."""
    late_s = due_s[-1] - FAILING_P95_MS / 1000 if due_s else 0.0
    return len({at_s for at_s in due_s if at_s < late_s}.difference(rows.due_s.tolist()))


def failing(rows: Table, unanswered: int) -> str:
    """Return why a step was too much, or an empty text.

    Args:
        unanswered: requests that are late and have no row yet.
    """
    n = len(rows.status) + unanswered
    bad = len(rows.status) - int(rows.ok.sum())
    if bad > FAILING_SHARE * n:
        return f"{bad} of {n} refused or failed"
    took_ms = np.concatenate([rows.took_ms[rows.ok], np.full(unanswered, np.inf, np.float32)])
    p95 = spread(took_ms)["p95"]
    if p95 is None or p95 <= FAILING_P95_MS:
        return ""
    return f"P95 {p95:.0f} ms" if np.isfinite(p95) else f"{unanswered} of {n} late and not answered yet"


def held(steps: Sequence[Figures]) -> float:
    """Return the highest rate that was answered in a step that was not too much."""
    return max((step["achieved_per_s"] for step in steps if not step["failed"]), default=0.0)


def recovery(table: Table, over_s: float, again_s: float, end_s: float) -> Figures:
    """Return P95 before, while and after there was too much, and when it was back."""
    before, during = table.between(0, over_s), table.between(over_s, again_s)
    p95 = spread(before.took_ms[before.ok])["p95"] or 0.0
    bar_ms = max(RECOVERED * p95, p95 + RECOVERED_MS)
    window_s = min(RECOVERED_WINDOW_S, (end_s - again_s) / 4)
    during_p95 = spread(during.took_ms[during.ok])["p95"]
    return {
        "before_p95_ms": p95,
        "during_p95_ms": during_p95,
        "ratio": round(during_p95 / p95, 3) if during_p95 and p95 else None,
        "bar_ms": round(bar_ms, 3),
        "recovered_s": recovered_s(table, again_s, end_s, bar_ms, window_s),
    }


def hits(table: Table, gets_from_l1: int | None) -> Figures:
    """Return hit rates: of searches by tier as each reply tells, of gets as the service counts."""
    told = table.where(table.ok & (table.tier > 0))
    searches, gets = len(told.status), int(table.named("get").ok.sum())
    served = {f"l{tier}": int((told.tier == tier).sum()) for tier in (1, 2, 3)}
    cached = served["l1"] + served["l2"]
    rates = {
        "search": cached / searches if searches else None,
        "get": gets_from_l1 / gets if gets and gets_from_l1 is not None else None,
        "retrieval": (cached + gets_from_l1) / (searches + gets)
        if gets_from_l1 is not None and gets
        else None,
    }
    return {"served_by": served} | {name: rate and round(rate, 4) for name, rate in rates.items()}


def used(rows: Sequence[Figures], name: str) -> float | None:
    """Return the share of one core that was used between the first and the last look."""
    first, last = rows[0], rows[-1]
    if first[name] is None or last[name] is None or last["at_s"] == first["at_s"]:
        return None
    return round((last[name] - first[name]) / (last["at_s"] - first["at_s"]), 3)


def resources(rows: Sequence[Figures]) -> Figures:
    """Return memory (first, last, highest look) and cores used."""
    told: Figures = {}
    for name in ("service_rss_bytes", "redis_rss_bytes", "redis_used_bytes"):
        values = [row[name] for row in rows if row[name] is not None]
        told[name] = {"first": values[0], "last": values[-1], "max": max(values)} if values else None
    return {**told, **{f"{who}_cores": used(rows, f"{who}_cpu_s") for who in ("service", "redis")}}


def thinned(rows: Sequence[Figures]) -> list[Figures]:
    """Return at most as many looks as a plot needs."""
    return list(rows[:: 1 + len(rows) // (2 * SLICES)])


def growth(told: Figures, from_s: float) -> Figures:
    """Return what grew after the warm-up, by least squares, and whether that is none."""
    found: Figures = {"from_s": from_s}
    looks = [row for row in told["samples"] if row["at_s"] >= from_s]
    parts = [row for row in told["slices"] if row["at_s"] >= from_s and row["n"]]
    for name in ("service_rss_bytes", "redis_used_bytes"):
        values = [row[name] for row in looks]
        if len(values) > 2 and None not in values:
            per_hour, share = slope([row["at_s"] for row in looks], values)
            found[name] = {"mb_per_hour": round(per_hour / 1e6, 3), "share": round(share, 4)}
            found[name]["none"] = share <= NO_GROWTH
    for name in ("p50", "p95") if len(parts) > 2 else ():
        per_hour, share = slope([row["at_s"] for row in parts], [row[name] for row in parts])
        found[name] = {"ms_per_hour": round(per_hour, 3), "share": round(share, 4), "none": share <= NO_DRIFT}
    return found


def floor_figures(measured: Sequence[dict[str, list[float]]]) -> Figures:
    """Return what both measurements of the floor say together; `search_ms` is the least of a new search."""
    told: Figures = {}
    for name in measured[0]:
        values = [value for one in measured for value in one[name]]
        told[name] = round(max(values), 1) if name == "empty_per_s" else percentiles(values)
    parts = ("empty", "embedding", "ft_search")
    if all(part in told for part in parts):
        told["search_ms"] = round(sum(told[part]["p50"] for part in parts), 3)
    return told


def targets(name: str, told: Figures) -> list[Figures]:
    """Return which promises a pattern tests, and whether they held."""
    operations = told["operations"]
    everything, retrieval = operations["all"], operations["retrieval"]
    failed = sum(everything["errors"].values())
    total = everything["n"] + everything["refused"]["n"] + failed
    rows: list[tuple[str, float | None, str, float]] = [("errors, share", failed / total, "<", 0.001)]
    if name == "overload":
        rows += [
            ("P95 of accepted ones at 5x / before", told["recovery"]["ratio"], "<", 2.0),
            ("seconds until recovered", told["recovery"]["recovered_s"], "<=", 10.0),
        ]
    else:
        percentiles = (("p50", 50), ("p95", 100), ("p99", 200))
        rows += [(f"retrieval {p.upper()}, ms", retrieval[p], "<", bar) for p, bar in percentiles]
    if "update" in operations:
        rows.append(("update P95, ms", operations["update"]["p95"], "<", 500))
    if name in ("steady", "burst", "endurance"):
        rate = told["hits"]["retrieval"]
        rows.append(("hit rate", told["hits"]["search"] if rate is None else rate, ">", 0.7))
    if "capacity" in told:
        rows.append(("requests a second, closed loop", told["capacity"]["per_s"], ">", 1_000))
    if "held_per_s" in told:
        rows.append(("requests a second, held", told["held_per_s"], ">=", 0.95 * RAMP_TARGET_PER_S))
    for what, grown in told.get("growth", {}).items():
        if what != "from_s":
            bar = NO_GROWTH if what.endswith("bytes") else NO_DRIFT
            rows.append((f"growth of {what} after warm-up, share", grown["share"], "<=", bar))
    # what nobody answered, or what never came back, is missed; a hit rate may not be known
    met = {"<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal}
    return [
        {"what": what, "value": value, "sign": sign, "target": bar}
        | {"met": (None if what == "hit rate" else False) if value is None else bool(met[sign](value, bar))}
        for what, value, sign, bar in rows
    ]


def show(measured: Figures) -> None:
    """Print what a reader looks for first."""
    for pattern, told in measured["patterns"].items():
        heads = ("P50", "P95", "P99", "max")
        print(f"{pattern:28}{'n':>9}{'per s':>9}" + "".join(f"{head + ' ms':>10}" for head in heads))
        for name, row in told["operations"].items():
            cells = ("-" if row[p] is None else f"{row[p]:.2f}" for p in ("p50", "p95", "p99", "max"))
            bad = {**{f"refused {k}": v for k, v in row["refused"]["by_status"].items()}, **row["errors"]}
            line = f"  {name:26}{row['n']:9}{row['achieved_per_s']:9.1f}" + "".join(f"{c:>10}" for c in cells)
            print(line, bad or "")
        for row in told["targets"]:
            value = "-" if row["value"] is None else f"{row['value']:.4g}"
            verdict = {True: "met", False: "MISSED", None: "not known"}[row["met"]]
            print(f"  {row['what']:44}{value:>10} {row['sign']:2} {row['target']:<8g}{verdict}")
    print("floor", json.dumps(measured["floor"]))
