"""Do the promises hold under load: steady, in bursts, growing, for hours, and beyond what can be served?

Open loop: every simulated user sends at times drawn in advance (Poisson), whether or not it was answered, and
latency counts from when a request was due. The mix is that of the specification (80 % search, 15 % get, 5 %
update); who asks and what is asked follows Zipf's law as in bench/tiers.py, so that texts come again as in
conversations. `overload` sends new texts only: each costs an embedding.

Beside it the floor, measured before and after with the same generator: an empty endpoint, one raw embedding
and one raw FT.SEARCH; their sum is the least that a new search can take.
Usage: python bench/load.py --pattern steady [--time-scale 0.1] [--url URL] [--out FILE] [--html FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import accumulate, count, repeat, takewhile
from pathlib import Path
from typing import Any

import httpx
from redis.asyncio import Redis as AsyncRedis

sys.path.insert(0, str(Path(__file__).parent))
import harness
from harness import Connection, Tally, Watch, closed_loop, request_bytes, sentences
from loadfigures import (
    ENDURANCE_WARM_UP,
    GROUPS,
    RAMP_TARGET_PER_S,
    SHORTEST_SLICE_S,
    SLICES,
    failing,
    figures,
    floor_figures,
    growth,
    held,
    histogram,
    hits,
    overdue,
    recovery,
    resources,
    show,
    slices,
    spread,
    targets,
    thinned,
    used,
)
from loadreport import html_report
from openloop import Due, OpenLoop, Phase, Records, Table, arrivals, is_loopback
from read_path import floor
from tiers import MIX, MIX_QUERIES, QUERY_WORDS, ZIPF, repeats

from redismem.embed import open_embedder
from redismem.settings import Settings

Figures = dict[str, Any]

SEED = 41
PATTERNS = ("steady", "burst", "ramp", "overload", "endurance")
#: seconds are those at --time-scale 1
STEADY = Phase("steady", 50, 600)
BURST = (Phase("before", 10, 60), Phase("burst", 200, 30), Phase("after", 10, 120))
RAMP_FIRST, RAMP_MORE, RAMP_STEP_S = 1, 10, 30.0
ENDURANCE = Phase("endurance", 100, 4 * 3600)
#: seconds from a scale of 0.1 on: steps of new texts until they are too many; then once, 5 times, once that
OVERLOAD_FIRST_PER_S, OVERLOAD_GROWTH, OVERLOAD_STEPS, OVERLOAD_STEP_S = 40.0, 1.25, 16, 3.0
OVERLOAD_FACTOR = 5
#: of the highest rate that was held for a step, which is at the edge: a longer one would fall over it
SUSTAINABLE_SHARE = 0.7
OVERLOAD_S = {"before": 10.0, "overload": 20.0, "after": 20.0}

#: seconds of the mix before anything counts: caches are warm, as they are in a service that runs
WARM_UP_S, SHORTEST_WARM_UP_S = 30.0, 3.0
#: clients and seconds of the closed loop that tells how much there could be
CAPACITY_CLIENTS, CAPACITY_S, SHORTEST_CAPACITY_S = 16, 20.0, 3.0
FLOOR_N, FLOOR_PER_S, FLOOR_S = 60, 50.0, 2.0
#: bytes of a reply with ten memories
REPLY_BYTES = 4_000


class Mix:
    """What users send: the seed mix, and new texts; the same for the same seed."""

    def __init__(self, people: int, memories: int, seed: int) -> None:
        self.people, self.memories = people, memories
        self.chooser = random.Random(seed)
        self._queries = sentences(people * MIX_QUERIES, seed + 1, QUERY_WORDS)
        self._sums = list(
            accumulate(rank**-ZIPF for rank in range(1, 1 + max(people, memories, MIX_QUERIES)))
        )
        self._kinds, self._shares = list(MIX), list(accumulate(MIX.values()))
        self._revisions = count()
        #: when which search was asked, for `repeats`
        self.asked: list[tuple[float, str]] = []

    def texts(self, person: int) -> list[str]:
        """Return the memories that a person begins with."""
        return sentences(self.memories, SEED * 1_000 + person)

    def _one_of(self, n: int) -> int:
        return self.chooser.choices(range(n), cum_weights=self._sums[:n])[0]

    def request(self, at_s: float) -> Due:
        """Return the next request of the mix."""
        kind, person = (
            self.chooser.choices(self._kinds, cum_weights=self._shares)[0],
            self._one_of(self.people),
        )
        if kind == "search":
            text = self._queries[person * MIX_QUERIES + self._one_of(MIX_QUERIES)]
            self.asked.append((at_s, text))
            return Due(at_s, kind, request_bytes("POST", f"/v1/users/load{person}/search", {"text": text}))
        path = f"/v1/users/load{person}/memories/m{self._one_of(self.memories)}"
        if kind == "get":
            return Due(at_s, kind, request_bytes("GET", path))
        revision = next(self._revisions)
        text = f"{self.chooser.choice(self._queries)} at {revision}"
        change = {"text": text} if kind == "patch text" else {"metadata": {"revision": revision}}
        return Due(at_s, kind, request_bytes("PATCH", path, change))

    def new_search(self, at_s: float) -> Due:
        """Return a search of a text that nobody asked before."""
        text = f"{self.chooser.choice(self._queries)} anew {next(self._revisions)}"
        path = f"/v1/users/load{self._one_of(self.people)}/search"
        return Due(at_s, "search", request_bytes("POST", path, {"text": text}))


class Target:
    """The service under load, and what is known of it.

    Args:
        pid, redis_url: None where the service is not ours; then its memory and CPU are not told.
        processes: that serve, of which each must tell its hits.
    """

    def __init__(self, url: str, pid: int | None, redis_url: str | None, processes: int) -> None:
        self.url, self.pid, self.redis_url, self.processes = url, pid, redis_url, processes

    async def load(self, mix: Mix) -> None:
        """Store everybody's first memories; twice is once."""
        http = Connection(self.url)
        for person in range(mix.people):
            batch = [{"id": f"m{i}", "text": text} for i, text in enumerate(mix.texts(person))]
            path = f"/v1/users/load{person}/memories"
            for first in range(0, len(batch), 50):
                status, reply = await http.request("POST", path, {"memories": batch[first : first + 50]})
                if status != 201:
                    raise SystemExit(f"memories were not stored: {status} {reply.decode()}")
        http.close()

    def l1_gets(self) -> int | None:
        """Return how many reads of memories L1 has answered so far; null if not each process told it."""
        hits: dict[str, int] = {}
        for _ in range(50 * self.processes):  # which one answers is chance
            reply = httpx.get(self.url + "/v1/stats")
            if reply.status_code != 200:
                return None
            told = reply.json()
            hits[told["process"]] = told["l1"]["memory"]["hits"]
            if len(hits) == self.processes:
                return sum(hits.values())
        return None


class Run:
    """One invocation: its target, mix and scale."""

    def __init__(
        self, target: Target, mix: Mix, scale: float, rate_per_user: float, ramp_rate: float
    ) -> None:
        self.target, self.mix, self.scale = target, mix, scale
        self.rate, self.ramp_rate = rate_per_user, ramp_rate

    def scaled(self, phase: Phase) -> Phase:
        return phase._replace(seconds=phase.seconds * self.scale)

    async def played(
        self,
        requests: Callable[[Records], Iterable[Due]],
        seconds: float,
    ) -> tuple[Table, Figures]:
        """Send requests; return their records and what every pattern tells.

        Args:
            requests: made while they are sent, so that they may depend on what became of earlier ones.
            seconds: that the pattern takes at most.
        """
        mix, target = self.mix, self.target
        mix.asked.clear()
        every_s = max(SHORTEST_SLICE_S, seconds / SLICES)
        records, gets = Records(), target.l1_gets()
        generator = OpenLoop(target.url, records=records)
        with Watch(target.pid, target.redis_url, every_s) as watch:
            await generator.run(requests(records))
        table, after = records.table(), target.l1_gets()
        took_s = min(seconds, float(table.due_s.max()))
        return table, {
            "seconds": round(took_s, 2),
            "operations": figures(table, took_s, GROUPS),
            "hits": hits(table, None if gets is None or after is None else after - gets),
            "repeats": repeats(mix.asked, took_s / 3) if mix.asked else None,
            "generator": {
                "lag_ms": spread(table.lag_ms),
                "most_outstanding": records.most_open,
                "cpu_share": used(watch.rows, "generator_cpu_s"),
            },
            "resources": resources(watch.rows),
            "slices": slices(table, took_s, every_s),
            "samples": thinned(watch.rows),
            "histogram": histogram(table),
        }

    async def phased(
        self, phases: Sequence[Phase], rate: float, request: Callable[[float], Due]
    ) -> tuple[Table, Figures]:
        """Play one phase after the other."""
        due = arrivals(phases, rate, self.mix.chooser)
        seconds = sum(phase.seconds for phase in phases)
        table, told = await self.played(lambda _: map(request, due), seconds)
        begins = accumulate((phase.seconds for phase in phases), initial=0.0)
        told["phases"] = [
            {"name": phase.name, "users": phase.users, "at_s": at_s, "seconds": phase.seconds}
            | figures(table.between(at_s, at_s + phase.seconds), phase.seconds, {})["all"]
            for phase, at_s in zip(phases, begins, strict=False)
        ]
        return table, told

    async def warm_up(self) -> None:
        """Let caches fill with what comes again."""
        seconds = max(SHORTEST_WARM_UP_S, WARM_UP_S * self.scale)
        due = arrivals([Phase("warm-up", STEADY.users, seconds)], self.rate, self.mix.chooser)
        await OpenLoop(self.target.url).run(map(self.mix.request, due))

    async def steady(self) -> Figures:
        """50 users; then as many requests as there can be, from clients that wait for their replies."""
        _, told = await self.phased([self.scaled(STEADY)], self.rate, self.mix.request)
        tally, seconds = Tally(), max(SHORTEST_CAPACITY_S, CAPACITY_S * self.scale)
        requests = ((due.name, due.content) for due in map(self.mix.request, count()))
        tally.seconds = await closed_loop(
            self.target.url, requests, tally.saw, clients=CAPACITY_CLIENTS, seconds=seconds
        )
        told["capacity"] = tally.figures()
        return told

    async def burst(self) -> Figures:
        """Few users, many for a short time, few again; told is when P95 was back."""
        phases = [self.scaled(phase) for phase in BURST]
        table, told = await self.phased(phases, self.rate, self.mix.request)
        before, during, after = (phase.seconds for phase in phases)
        told["recovery"] = recovery(table, before, before + during, before + during + after)
        return told

    async def endurance(self) -> Figures:
        """100 users for hours; told is what grows after the warm-up."""
        phase = self.scaled(ENDURANCE)
        _, told = await self.phased([phase], self.rate, self.mix.request)
        told["growth"] = growth(told, phase.seconds * ENDURANCE_WARM_UP)
        return told

    async def ramp(self) -> Figures:
        """More users by steps until requests fail, or are late, or the target is reached."""
        users = (RAMP_FIRST + RAMP_MORE * number for number in count())
        rates = list(takewhile(lambda rate: rate < RAMP_TARGET_PER_S, (n * self.ramp_rate for n in users)))
        rates.append(rates[-1] + RAMP_MORE * self.ramp_rate)
        step_s = RAMP_STEP_S * self.scale
        steps = Steps(step_s, self.mix, self.mix.request)
        table, told = await self.played(lambda records: steps.requests(records, rates), len(rates) * step_s)
        rows = steps.rows(table)
        for row in rows:
            row["users"] = round(row["offered_per_s"] / self.ramp_rate)
        return {**told, "steps": rows, "ended_by": steps.failed or "target reached", "held_per_s": held(rows)}

    async def overload(self) -> Figures:
        """New texts: the rate that can be sustained, then five times that, then that again."""
        share = min(1.0, 10 * self.scale)
        steps = Steps(OVERLOAD_STEP_S * share, self.mix, self.mix.new_search, patience=2)
        records = Records()
        rates = [OVERLOAD_FIRST_PER_S * OVERLOAD_GROWTH**number for number in range(OVERLOAD_STEPS)]
        await OpenLoop(self.target.url, records=records).run(steps.requests(records, rates))
        rows = steps.rows(records.table())
        once = int(SUSTAINABLE_SHARE * held(rows)) or int(OVERLOAD_FIRST_PER_S / 2)
        loads = {"before": once, "overload": OVERLOAD_FACTOR * once, "after": once}
        phases = [Phase(name, loads[name], seconds * share) for name, seconds in OVERLOAD_S.items()]
        table, told = await self.phased(phases, 1.0, self.mix.new_search)
        before, during, after = (phase.seconds for phase in phases)
        return {
            **told,
            "steps": rows,
            "sustainable_per_s": once,
            "recovery": recovery(table, before, before + during, before + during + after),
        }


class Steps:
    """Load that grows by steps until one is too much."""

    def __init__(
        self, step_s: float, mix: Mix, request: Callable[[float], Due], *, patience: int = 1
    ) -> None:
        self._step_s, self._mix, self._request = step_s, mix, request
        #: steps in a row that must be too much: a short one may be so by chance
        self._patience = patience
        self._rates: list[float] = []
        #: why the last step was too much; empty: it was not
        self.failed = ""

    def requests(self, records: Records, rates: Iterable[float]) -> Iterator[Due]:
        """Yield the requests of each step in turn; end when they are too much."""
        in_a_row = 0
        for number, rate in enumerate(rates):
            begin_s, due_s = number * self._step_s, list[float]()
            for at_s in arrivals([Phase("step", 1, self._step_s)], rate, self._mix.chooser, begin_s):
                yield self._request(at_s)
                due_s.append(at_s)
            self._rates.append(rate)
            rows = records.table().between(begin_s, begin_s + self._step_s)
            self.failed = failing(rows, overdue(rows, due_s))
            in_a_row = in_a_row + 1 if self.failed else 0
            if in_a_row == self._patience:
                return

    def rows(self, table: Table) -> list[Figures]:
        """Return what became of each step."""
        told = []
        for number, rate in enumerate(self._rates):
            rows = table.between(number * self._step_s, (number + 1) * self._step_s)
            row = figures(rows, self._step_s, {})["all"]
            is_last = number == len(self._rates) - 1
            failed = (self.failed if is_last else "") or failing(rows, 0)
            told.append({**row, "offered_per_s": round(rate, 1), "failed": failed})
        return told


async def floors(target: Target, mix: Mix) -> dict[str, list[float]]:
    """Return milliseconds of an empty endpoint under open load, of an embedding and of an FT.SEARCH alone."""
    found: dict[str, list[float]] = {}
    due = arrivals([Phase("floor", 1, FLOOR_S)], FLOOR_PER_S, mix.chooser)
    tally, body = Tally(), request_bytes("POST", "/large", {"text": "what is the floor"})
    with harness.empty_endpoint(REPLY_BYTES) as empty:
        await OpenLoop(empty).run(Due(at_s, "warm", body) for at_s in (0.0, 0.01, 0.02))
        table = (await OpenLoop(empty).run(Due(at_s, "empty", body) for at_s in due)).table()
        tally.seconds = await closed_loop(
            empty, repeat(("empty", body)), tally.saw, clients=CAPACITY_CLIENTS, seconds=FLOOR_S / 2
        )
    found["empty"] = table.took_ms[table.ok].tolist()
    found["empty_per_s"] = [tally.n / tally.seconds]
    if target.redis_url is not None:
        raw, embedder = AsyncRedis.from_url(target.redis_url, protocol=2), await open_embedder(Settings())
        texts = [f"{text} floor" for text in sentences(FLOOR_N, mix.chooser.randrange(2**32), QUERY_WORDS)]
        pairs = [await floor(raw, embedder, "load0", text) for text in texts][FLOOR_N // 6 :]
        found["embedding"], found["ft_search"] = ([pair[i] for pair in pairs] for i in (0, 1))
        await embedder.close()
        await raw.aclose()
    return found


async def measure(target: Target, mix: Mix, arguments: argparse.Namespace, names: Sequence[str]) -> Figures:
    """Return the floor and the figures of each pattern."""
    begun_s = time.perf_counter()

    def say(what: str) -> None:
        print(f"{time.perf_counter() - begun_s:7.1f} s  {what}", file=sys.stderr, flush=True)

    say(f"stores {mix.people} x {mix.memories} memories")
    await target.load(mix)
    run = Run(target, mix, arguments.time_scale, arguments.rate_per_user, arguments.ramp_rate_per_user)
    say("measures the floor")
    measured = [await floors(target, mix)]
    say("warms up")
    await run.warm_up()
    found: Figures = {}
    for name in names:
        say(name)
        found[name] = await getattr(run, name)()
        found[name]["targets"] = targets(name, found[name])
    say("measures the floor again")
    measured.append(await floors(target, mix))
    say("is done")
    lowest = floor_figures(measured)
    for told in found.values():
        operations = told["operations"].values()
        for row in operations if "search_ms" in lowest else ():
            row["p95_over_floor"] = row["p95"] and round(row["p95"] / lowest["search_ms"], 3)
        if "capacity" in told:
            told["capacity"]["over_floor"] = round(told["capacity"]["per_s"] / lowest["empty_per_s"], 4)
        if "held_per_s" in told:
            told["held_over_floor"] = round(told["held_per_s"] / lowest["empty_per_s"], 4)
    return {"floor": lowest, "patterns": found}


def arguments_of(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pattern", nargs="+", choices=(*PATTERNS, "all"), default=["steady"])
    parser.add_argument("--time-scale", type=float, default=1.0, help="of the seconds of each pattern")
    parser.add_argument("--url", help="of a running service on this machine; one is started unless given")
    parser.add_argument("--pid", type=int, help="with --url: of the service, to tell its memory and CPU")
    parser.add_argument("--redis-url", help="with --url: of its Redis")
    parser.add_argument("--workers", type=int, default=1, help="processes that serve")
    parser.add_argument("--rate-per-user", type=float, default=1.0, help="requests a second")
    parser.add_argument("--ramp-rate-per-user", type=float, default=5.0, help="the same while it ramps up")
    parser.add_argument("--people", type=int, default=200, help="whose memories are searched")
    parser.add_argument("--memories", type=int, default=50, help="that each begins with")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="of the service")
    parser.add_argument("--out", type=Path, help="JSON; bench/results/load.json unless given")
    parser.add_argument("--html", type=Path, help="report in one file")
    arguments = parser.parse_args(argv)
    if arguments.url and not is_loopback(arguments.url):
        parser.error("--url must be on this machine, such as http://127.0.0.1:8000")
    return arguments


def main() -> None:
    arguments, started = arguments_of(), time.perf_counter()
    names = PATTERNS if "all" in arguments.pattern else tuple(dict.fromkeys(arguments.pattern))
    mix = Mix(arguments.people, arguments.memories, arguments.seed)
    with ExitStack() as stack:
        if arguments.url:
            target = Target(arguments.url, arguments.pid, arguments.redis_url, arguments.workers)
            redis_info = None
        else:
            chosen = dict(item.split("=", 1) for item in arguments.env)
            server = stack.enter_context(
                harness.running_server(**{"REDISMEM_WORKERS": str(arguments.workers), **chosen})
            )
            target = Target(server.url, server.pid, server.redis_url, arguments.workers)
            redis_info = server.redis_info
        measured = harness.run(measure(target, mix, arguments, names))
    show(measured)
    parameters = {
        name: getattr(arguments, name)
        for name in (
            "time_scale",
            "workers",
            "rate_per_user",
            "ramp_rate_per_user",
            "people",
            "memories",
            "seed",
        )
    }
    told = {
        "redis": redis_info,
        "parameters": parameters,
        "took_s": round(time.perf_counter() - started, 1),
        "figures": measured,
    }
    data = "\n".join(text for person in range(mix.people) for text in mix.texts(person)).encode()
    path = harness.write_result("load", told, data, arguments.out)
    print(path)
    if arguments.html:
        arguments.html.write_text(html_report(json.loads(path.read_text())))
        print(arguments.html)


if __name__ == "__main__":
    main()
