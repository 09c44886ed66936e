"""Renders a result of bench/load.py as one HTML file: plots as inline SVG, no script, no outside asset.

Usage: python bench/loadreport.py RESULT.json REPORT.html
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

Figures = dict[str, Any]
#: name, class of its colour, values
Line = tuple[str, str, Sequence[float | None]]

#: of a plot, in its own units; it scales with the page
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 240, 52, 12, 14, 34
#: labels of an axis, about
TICKS = 5

PAGE = Template("""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>redismem under load</title>
<style>
:root{--bg:#fff;--fg:#1b1f24;--dim:#59636e;--line:#d8dee4;--soft:#f5f7f9;--a:#0b5cad;--b:#8a5300;--c:#b3261e;
--good:#1a6e3a;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--bg:#14171b;--fg:#e3e7ec;--dim:#9aa5b1;--line:#30373f;--soft:#1c2127;
--a:#79b8ff;--b:#e8b45a;--c:#ff9a92;--good:#6fce8f;--bad:#ff9a92}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem clamp(.8rem,4vw,2.5rem) 4rem;max-width:76rem;background:var(--bg);
color:var(--fg);font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.7rem;margin:.4rem 0}h2{margin:2.4rem 0 .6rem;text-transform:capitalize}
h3{font-size:1rem;margin:1.2rem 0 .3rem}
p{margin:.3rem 0;color:var(--dim)}
.plots{margin:1.2rem 0;display:grid;
grid-template-columns:repeat(auto-fit,minmax(min(100%,30rem),1fr));gap:1rem}
figure{margin:0;border:1px solid var(--line);border-radius:8px;padding:.6rem}
figcaption{font-size:.9rem;font-weight:600}
svg{width:100%;height:auto;display:block}
svg text{fill:var(--dim);font:12px system-ui,sans-serif}
svg .grid{stroke:var(--line);stroke-width:1}
svg .a,.key.a{stroke:var(--a)}svg .b,.key.b{stroke:var(--b)}svg .c,.key.c{stroke:var(--c)}
svg path{fill:none;stroke-width:2;stroke-linejoin:round}
svg rect{fill:var(--a)}
svg .b{stroke-dasharray:7 3}svg .c{stroke-dasharray:2 3}
.keys{font-size:.85rem;color:var(--dim);display:flex;gap:1rem;flex-wrap:wrap}
.keys svg{width:2rem;display:inline-block;vertical-align:middle;margin-right:.3rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;width:100%}
th,td{padding:.3rem .7rem .3rem 0;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left;white-space:normal}
th{color:var(--dim);font-weight:600}
.met{color:var(--good);font-weight:600}.missed{color:var(--bad);font-weight:600}
</style>
<h1>redismem under load</h1>
<p>$about</p>
<p>$floor</p>
$patterns
</html>
""")


def html_report(result: Figures) -> str:
    """Return the page of a result."""
    figures, parameters = result["figures"], result["parameters"]
    floor = figures["floor"]
    about = [
        f"{result['when']}, commit {result['commit'] or 'unknown'}",
        f"{result['cpu']}, {result['cores']} cores, Python {result['python']}",
        ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in parameters.items()),
    ]
    told = [f"an empty endpoint {floor['empty']['p50']:.2f} ms (P50, same generator)"]
    for name, what in (("embedding", "an embedding"), ("ft_search", "an FT.SEARCH")):
        if name in floor:
            told.append(f"{what} {floor[name]['p50']:.2f} ms")
    return PAGE.substitute(
        about=" &middot; ".join(map(escape, about)),
        floor=escape("Floor, in the same run: " + ", ".join(told) + "."),
        patterns="\n".join(_pattern(name, one) for name, one in figures["patterns"].items()),
    )


def _pattern(name: str, told: Figures) -> str:
    slices, samples, lag = told["slices"], told["samples"], told["generator"]["lag_ms"]
    at_s = [row["at_s"] for row in slices]
    width_s = at_s[1] - at_s[0] if len(at_s) > 1 else told["seconds"]
    percentiles: list[Line] = [
        (p.upper(), colour, [row[p] for row in slices])
        for p, colour in zip(("p50", "p95", "p99"), "abc", strict=True)
    ]
    rates: list[Line] = [
        (what, colour, [row[what] / width_s for row in slices])
        for what, colour in (("ok", "a"), ("offered", "b"))
    ]
    rates.append(("refused or failed", "c", [(row["refused"] + row["errors"]) / width_s for row in slices]))
    memory: list[Line] = [
        (what, colour, [row[key] and row[key] / 1e6 for row in samples])
        for what, colour, key in (
            ("service", "a", "service_rss_bytes"),
            ("Redis", "b", "redis_rss_bytes"),
            ("used by data", "c", "redis_used_bytes"),
        )
    ]
    plots = [
        _plot("Latency from when a request was due, ms (logarithmic)", at_s, percentiles, is_log=True),
        _plot("Requests a second", at_s, rates),
        _bars("How many took up to so many ms", told["histogram"]),
        _plot("Memory (RSS), MB", [row["at_s"] for row in samples], memory),
    ]
    notes = [
        f"{told['seconds']:.0f} s, at most {told['generator']['most_outstanding']} requests outstanding.",
        f"The generator's own lag, ms: P50 {lag['p50']:.2f}, P95 {lag['p95']:.2f}, max {lag['max']:.1f}.",
    ]
    if told.get("repeats"):
        notes.append(f"Share of searches asked within the minute before: {told['repeats']['repeats']:.2f}.")
    if "recovery" in told:
        back, now = told["recovery"], told["recovery"]["recovered_s"]
        notes.append(
            f"P95 before {back['before_p95_ms']:.1f} ms; within {back['bar_ms']:.1f} ms again "
            + (f"{now:.1f} s after the end." if now is not None else "never in the time watched.")
        )
    if "ended_by" in told:
        notes.append(f"Ended by: {told['ended_by']}.")
    if "sustainable_per_s" in told:
        notes.append(f"Sustainable: {told['sustainable_per_s']} new texts a second.")
    parts = [
        f"<h2>{escape(name)}</h2>",
        *(f"<p>{escape(note)}</p>" for note in notes),
        _targets(told["targets"]),
        f'<div class="plots">{"".join(plots)}</div>',
        "<h3>Operations</h3>",
        _operations(told["operations"], "operation"),
    ]
    for key in ("phases", "steps"):
        if len(told.get(key, ())) > 1:
            rows = {_step_name(row, number): row for number, row in enumerate(told[key], 1)}
            parts += [f"<h3>{key.title()}</h3>", _operations(rows, key[:-1])]
    return "\n".join(parts)


def _step_name(row: Figures, number: int) -> str:
    return f"{row.get('name', number)}: {row['offered_per_s']:g}/s" if "offered_per_s" in row else str(number)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _targets(targets: Sequence[Figures]) -> str:
    verdicts = {
        True: '<span class="met">&#10003; met</span>',
        False: '<span class="missed">&#10007; missed</span>',
        None: "not known",
    }
    rows = [
        (
            escape(row["what"]),
            "-" if row["value"] is None else f"{row['value']:.4g}",
            escape(f"{row['sign']} {row['target']:g}"),
            verdicts[row["met"]],
        )
        for row in targets
    ]
    return _table(("promise", "measured", "target", ""), rows)


def _operations(named: Figures, what: str) -> str:
    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    rows = []
    for name, row in named.items():
        refused = row.get("refused", {"n": 0, "p95": None})
        errors = ", ".join(f"{count} {kind}" for kind, count in row.get("errors", {}).items()) or "0"
        times = [cell(row[p]) for p in ("p50", "p95", "p99", "max")]
        told = f"{refused['n']:,}" + (f" ({cell(refused['p95'])})" if refused["n"] else "")
        rate = f"{row['achieved_per_s']:.1f}" if "achieved_per_s" in row else "-"
        rows.append([escape(name), f"{row['n']:,}", rate, *times, told, escape(errors)])
    heads = (what, "n", "a second", "P50 ms", "P95 ms", "P99 ms", "max ms", "refused (P95 ms)", "errors")
    return _table(heads, rows)


def _nice(highest: float) -> list[float]:
    """Return labels from 0 to at least the highest value, at 1, 2 or 5 times a power of ten."""
    raw = max(highest, 1e-9) / TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    return [step * number for number in range(math.ceil(highest / step) + 1)] or [0.0, step]


def _powers(lowest: float, highest: float) -> list[float]:
    """Return powers of ten that hold the values between them."""
    first, last = math.floor(math.log10(max(lowest, 0.01))), math.ceil(math.log10(max(highest, 0.1)))
    return [10.0**power for power in range(first, max(last, first + 1) + 1)]


def _plot(title: str, at_s: Sequence[float], lines: Sequence[Line], *, is_log: bool = False) -> str:
    known = [value for _, _, values in lines for value in values if value is not None]
    if not known or not at_s:
        return f"<figure><figcaption>{escape(title)}</figcaption><p>Not known.</p></figure>"
    marks = _powers(min(known), max(known)) if is_log else _nice(max(known))
    low, high = marks[0], marks[-1]
    end_s = max(at_s[-1], 1e-9)

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * value / end_s

    def y(value: float) -> float:
        if is_log:
            share = math.log(max(value, low) / low) / math.log(high / low)
        else:
            share = value / high if high else 0.0
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    drawn = [_grid(y(mark), f"{mark:g}") for mark in marks]
    drawn += [
        f'<text x="{x(mark):.1f}" y="{HEIGHT - 14}" text-anchor="middle">{mark:g}</text>'
        for mark in _nice(end_s)
        if mark <= end_s
    ]
    drawn.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">seconds</text>')
    for _, colour, values in lines:
        path, pen = "", "M"
        for at, value in zip(at_s, values, strict=True):
            if value is None:
                pen = "M"
                continue
            path += f"{pen}{x(at):.1f} {y(value):.1f}"
            pen = "L"
        drawn.append(f'<path class="{colour}" d="{path}"/>')
    keys = "".join(
        f'<span><svg viewBox="0 0 32 8" aria-hidden="true"><path class="{colour}" d="M0 4H32"/></svg>'
        f"{escape(name)}</span>"
        for name, colour, _ in lines
    )
    return _figure(title, drawn, f'<div class="keys">{keys}</div>')


def _bars(title: str, histogram: Figures) -> str:
    counts, bounds = histogram["counts"], histogram["bounds_ms"]
    marks = _nice(max(counts))
    room = (WIDTH - LEFT - RIGHT) / len(counts)
    tall = HEIGHT - TOP - BOTTOM
    drawn = [_grid(HEIGHT - BOTTOM - tall * mark / marks[-1], f"{mark:,.0f}") for mark in marks]
    labels = [f"{bound:g}" for bound in bounds] + ["more"]
    for number, (count, label) in enumerate(zip(counts, labels, strict=True)):
        high = tall * count / marks[-1]
        left = LEFT + room * number
        drawn.append(
            f'<rect x="{left + 1:.1f}" y="{HEIGHT - BOTTOM - high:.1f}" width="{room - 2:.1f}" '
            f'height="{high:.1f}"><title>up to {label} ms: {count:,}</title></rect>'
        )
        if number % 2 == 0:  # every one has no room
            drawn.append(
                f'<text x="{left + room / 2:.1f}" y="{HEIGHT - 14}" text-anchor="middle">{label}</text>'
            )
    return _figure(title, drawn, "")


def _grid(y: float, label: str) -> str:
    return (
        f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
        f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
    )


def _figure(title: str, drawn: Sequence[str], below: str) -> str:
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(drawn)}</svg>'
    )
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}{below}</figure>"


def main() -> None:
    source, report = map(Path, sys.argv[1:])
    report.write_text(html_report(json.loads(source.read_text())))


if __name__ == "__main__":
    main()
