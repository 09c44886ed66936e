"""Is a build slower, less able or larger than another? The gate of bench/load.py's results.

Latencies and rates are compared as ratios to the floor that each run measured itself (an empty endpoint, an
embedding, an FT.SEARCH), so that runs of different machines may be compared; hit rates and memory as they
are. Of several files a side the median of each figure counts, or with --take best the best: load of others
only ever adds. Latencies of fewer than 200 requests are not judged.
Usage: python bench/regress.py --baseline A.json … --current B.json … [--take best] [--json]
Ends with 0 (nothing, or warnings), 1 (it got worse), 2 (these files cannot be compared).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Figures = dict[str, Any]
Verdict = Literal["ok", "better", "warn", "fail"]

#: change that warns, change that fails; more is worse, but of rates and hits less is
THRESHOLDS = {
    "P95 / floor": (0.15, 0.30),
    "rate / floor": (-0.10, -0.25),
    "hit rate": (-0.05, -0.15),
    "memory": (0.20, 0.50),
    "answered": (-0.001, -0.01),  # the specification names none: the promise is 0.1 % errors
}
#: requests from which a 95th percentile says something: ten are above it
ENOUGH = 200
#: what both sides must have run
SAME = ("time_scale", "workers", "rate_per_user", "ramp_rate_per_user", "people", "memories")

#: value of a figure, and how many requests it comes from (0: does not matter)
Measured = tuple[float, int]


class Unusable(Exception):
    """A file is no result, or was made by another load than the others: name the right files."""


@dataclass(frozen=True)
class Row:
    """One comparison."""

    pattern: str
    what: str
    kind: str
    baseline: float
    current: float
    change: float
    verdict: Verdict


#: what is compared: its pattern, what it is, and its kind of threshold
Key = tuple[str, str, str]


def figures_of(result: Figures, where: str) -> dict[Key, Measured]:
    """Return what is compared.

    Raises:
        Unusable: a field is missing.
    """
    try:
        found: dict[Key, Measured] = {}
        for pattern, told in result["figures"]["patterns"].items():
            found |= {(pattern, *key): value for key, value in _pattern(told).items()}
    except (KeyError, TypeError, AttributeError) as exc:
        raise Unusable(f"{where} is no whole result of bench/load.py: {exc!r} is missing or odd") from exc
    return found


def _pattern(told: Figures) -> dict[tuple[str, str], Measured]:
    every = told["operations"]["all"]
    found: dict[tuple[str, str], Measured] = {
        (f"P95 of {name}", "P95 / floor"): (row["p95_over_floor"], row["n"])
        for name, row in told["operations"].items()
        if row["p95_over_floor"] is not None
    }
    found["share answered", "answered"] = (every["achieved_per_s"] / every["offered_per_s"], 0)
    if "capacity" in told:
        found["requests a second", "rate / floor"] = (told["capacity"]["over_floor"], 0)
    if "held_per_s" in told:
        found["requests a second held", "rate / floor"] = (told["held_over_floor"], 0)
    for name in ("search", "retrieval"):
        if told["hits"][name] is not None:
            found[f"hit rate of {name}", "hit rate"] = (told["hits"][name], 0)
    for name, what in (("service_rss_bytes", "service"), ("redis_used_bytes", "Redis")):
        if told["resources"][name] is not None:
            found[f"memory of {what}, bytes", "memory"] = (told["resources"][name]["max"], 0)
    return found


def load(paths: Sequence[Path]) -> list[Figures]:
    """Return results.

    Raises:
        Unusable: one cannot be read.
    """
    found = []
    for path in paths:
        try:
            found.append(json.loads(path.read_text()))
        except (OSError, ValueError) as exc:
            raise Unusable(f"{path} cannot be read: {exc}") from exc
        if not isinstance(found[-1], dict) or found[-1].get("bench") != "load":
            raise Unusable(f"{path} is no result of bench/load.py")
    return found


def check_same(results: Sequence[tuple[Path, Figures]]) -> None:
    """Raise Unusable unless all results come from the same load."""
    first_path, first = results[0]
    for path, result in results[1:]:
        pairs = [("patterns", *(sorted(one["figures"]["patterns"]) for one in (first, result)))]
        pairs += [(name, *(one["parameters"].get(name) for one in (first, result))) for name in SAME]
        for name, one, other in pairs:
            if one != other:
                raise Unusable(f"{first_path} and {path} are of different loads: {name} {one} and {other}")


def compare(
    baseline: Sequence[dict[Key, Measured]],
    current: Sequence[dict[Key, Measured]],
    take: Literal["median", "best"] = "median",
) -> list[Row]:
    """Return a row for each figure, the worst first.

    Raises:
        Unusable: a file lacks what another has; but a P95 of rare requests is left out.
    """
    rows = []
    everyone = (*baseline, *current)
    for key in dict.fromkeys(key for one in everyone for key in one):
        pattern, what, kind = key
        warn, fail = THRESHOLDS[kind]
        if kind == "P95 / floor" and any(one.get(key, (0.0, 0))[1] < ENOUGH for one in everyone):
            continue
        if not all(key in one for one in everyone):
            raise Unusable(f"not every file tells {what} of {pattern}")
        pick: Callable[[list[float]], float] = statistics.median
        if take == "best":
            pick = min if fail > 0 else max
        before, now = (pick([one[key][0] for one in side]) for side in (baseline, current))
        change = now / before - 1 if before else 0.0
        worse = change if fail > 0 else -change
        verdict: Verdict = "ok"
        if worse > abs(fail):
            verdict = "fail"
        elif worse > abs(warn):
            verdict = "warn"
        elif worse < -abs(warn):
            verdict = "better"
        rows.append(Row(pattern, what, kind, before, now, change, verdict))
    order = ("fail", "warn", "ok", "better")
    return sorted(rows, key=lambda row: order.index(row.verdict))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--baseline", type=Path, nargs="+", required=True)
    parser.add_argument("--current", type=Path, nargs="+", required=True)
    parser.add_argument(
        "--take", choices=("median", "best"), default="median", help="of several files a side"
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    try:
        sides = [(paths, load(paths)) for paths in (arguments.baseline, arguments.current)]
        figures = [
            [figures_of(result, str(path)) for path, result in zip(paths, results, strict=True)]
            for paths, results in sides
        ]
        check_same([pair for paths, results in sides for pair in zip(paths, results, strict=True)])
        rows = compare(figures[0], figures[1], arguments.take)
    except Unusable as exc:
        print(exc, file=sys.stderr)
        return 2
    if not rows:
        print("the files have no figure in common that can be judged", file=sys.stderr)
        return 2
    failed = [row for row in rows if row.verdict == "fail"]
    if arguments.json:
        print(json.dumps({"failed": bool(failed), "rows": [asdict(row) for row in rows]}, indent=1))
        return 1 if failed else 0
    print(f"{'':6}{'pattern':12}{'figure':30}{'baseline':>14}{'current':>14}{'change':>9}   warns / fails")
    for row in rows:
        warn, fail = THRESHOLDS[row.kind]
        cells = (f"{value:,.0f}" if value > 1e4 else f"{value:.4g}" for value in (row.baseline, row.current))
        line = f"{row.verdict:6}{row.pattern:12}{row.what:30}" + "".join(f"{cell:>14}" for cell in cells)
        print(f"{line}{row.change:>+9.1%}   {warn:+.0%} / {fail:+.0%}")
    warned = sum(row.verdict == "warn" for row in rows)
    print(f"{len(failed)} failed, {warned} to look at. P95 and rates are ratios to each run's own floor.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
