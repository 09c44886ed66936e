// The dashboard: asks /v1/dashboard every two seconds while somebody looks, and shows what it says.

import { askForKey, bar, byId, bytes, call, clock, count, duration, el, milliseconds, say, share, showKeyState, svg }
  from "/assets/client.js";
import { drawChart } from "/assets/chart.js";

const EVERY_MS = 2000;

const NAMES = {
  retrieval_p95: "Retrieval P95", retrieval_p99: "Retrieval P99", retrieval_availability: "Retrieval availability",
  retrieval_errors: "Retrieval errors", context_p95: "Context P95", context_p99: "Context P99",
  update_p95: "Update P95", update_success: "Update success", cache_hit_rate: "Cache hit rate",
  cache_eviction_rate: "Cache evictions per hour",
};
const nameOf = (objective) => NAMES[objective.name] ?? objective.name.replaceAll("_", " ");

// what each light is besides its colour: a word and a shape
const LIGHTS = {
  met: { tone: "good", shape: "M3.5 8.5l3 3 6-7" },
  missed: { tone: "bad", shape: "M4 4l8 8M12 4l-8 8" },
  "no data": { tone: "dim", shape: "M4 8h8" },
};
const lightOf = (met) => (met === null ? "no data" : met ? "met" : "missed");

let lights = null; // name -> light, as last shown
let answeredAt = Date.now();
let timer = 0;

function light(state) {
  const { tone, shape } = LIGHTS[state];
  const path = svg("path", { d: shape, fill: "none", stroke: "currentColor", "stroke-width": 2, "stroke-linecap": "round" });
  return el(`span.light.${tone}`, {}, svg("svg", { viewBox: "0 0 16 16", "aria-hidden": "true" }, path), state);
}

function showVerdict(board) {
  const missed = board.slo.filter((one) => one.met === false);
  const silent = board.slo.filter((one) => one.met === null);
  const title = byId("verdict");
  const met = board.slo.length - silent.length;
  say(title, missed.length
    ? `${missed.length} of ${met} objectives missed`
    : met ? `All ${met} objectives${silent.length ? " with data" : ""} are met` : "No data yet");
  title.className = missed.length ? "bad" : "";
  document.title = `${missed.length ? `(${missed.length}) ` : ""}redismem dashboard`;
  say(byId("service"), `version ${board.version} · up ${duration(board.uptime_s)} · ` +
    `${count(board.processes)} ${board.processes === 1 ? "process" : "processes"}, answered by ${board.process}`);
  const now = new Map(board.slo.map((one) => [one.name, lightOf(one.met)]));
  const turned = board.slo.filter((one) => lights && lights.get(one.name) !== now.get(one.name));
  if (turned.length) {
    say(byId("news"), turned.map((one) => `${nameOf(one)}: ${now.get(one.name)}`).join(". "));
  }
  lights = now;
}

function figure(name, big, unit, ...notes) {
  return el("div", {}, el("dt", {}, ...name), el("dd.big", {}, big, unit && el("small", {}, unit)),
    notes.map((note) => el("dd", {}, note)));
}

function showLatency({ now, hour, series }, slo) {
  const target = (name) => slo.find((one) => one.name === `retrieval_${name}`)?.target;
  const shown = ["p50", "p95", "p99"].map((name) => {
    const [is, was, bound] = [now[`${name}_ms`], hour[`${name}_ms`], target(name)];
    const key = svg("svg", { class: "dash", viewBox: "0 0 18 8", "aria-hidden": "true" },
      svg("path", { class: `line ${name}`, d: "M1 4H17" }));
    const figured = figure([key, name.toUpperCase()], milliseconds(is), "ms", `hour ${milliseconds(was)} ms`,
      bound === undefined ? null : `target < ${bound} ms`);
    if (bound !== undefined && is !== null && is >= bound) figured.querySelector(".big").classList.add("bad");
    return figured;
  });
  const rate = now.per_second;
  byId("figures").replaceChildren(...shown,
    figure(["Requests"], rate < 10 ? rate.toFixed(1) : count(Math.round(rate)), "/s", `hour ${count(hour.count)}`),
    figure(["Cache hit rate"], share(now.hit_rate), "", `hour ${share(hour.hit_rate)}`));
  drawChart(byId("chart"), byId("readout"), series, { p95: target("p95"), p99: target("p99") });
  rows("minutes", [...series].reverse(), (one) => [
    el("th", { scope: "row" }, clock(one.at * 1000)), number(count(one.count)),
    ...["p50_ms", "p95_ms", "p99_ms"].map((name) => number(milliseconds(one[name]))),
    number(share(one.hit_rate), ".less"), number(count(one.errors), ".less"),
  ]);
}

const number = (text, more = "") => el(`td.number${more}`, {}, text);

function rows(table, items, cells, empty = "Nothing yet") {
  const made = items.map((item) => el("tr", {}, ...cells(item)));
  byId(table).tBodies[0].replaceChildren(...(made.length ? made : [el("tr", {}, el("td.dim", { colspan: 9 }, empty))]));
}

function showObjectives(slo) {
  const inUnit = (one, value) => (one.unit === "ms" ? `${milliseconds(value)} ms` : share(value, true));
  byId("objectives").replaceChildren(...slo.map((one) => {
    const value = one.value === null ? "–" : inUnit(one, one.value);
    const left = one.budget?.left;
    return el("li", {}, light(lightOf(one.met)), el("span", {}, nameOf(one)),
      el("span.value", {}, el("b", {}, value), el("span.dim", {}, ` ${one.comparison} ${inUnit(one, one.target)}`)),
      one.budget && el("div.budget", {}, bar(left, left <= 0 ? "bad" : left < 0.25 ? "warn" : "good"),
        el(left < 0 ? "span.bad" : "span", {}, left < 0 ? "budget overspent" : `${share(left)} of budget left`)));
  }));
}

function showOperations(operations) {
  const most = Math.max(1, ...operations.map((one) => one.p95_ms ?? 0));
  rows("operations", operations, (one) => [
    el("th", { scope: "row" }, one.operation), number(count(one.count)), number(milliseconds(one.p50_ms), ".less"),
    el("td.barred", {}, bar((one.p95_ms ?? 0) / most)), number(milliseconds(one.p95_ms)),
    number(milliseconds(one.p99_ms)), number(count(one.failed), `.less${one.failed ? ".bad" : ""}`),
  ], "No requests in the last hour");
}

function showCache(cache) {
  const rate = (name, value) => el("p", {}, el("b", {}, value), name);
  byId("rates").replaceChildren(rate("hits", share(cache.hit_rate)), rate("misses", share(cache.miss_rate)),
    rate("evictions in the hour", count(cache.evictions_hour)), rate("of entries evicted per hour", share(cache.eviction_rate)));
  byId("hits").replaceChildren(el("i", { share: cache.hit_rate ?? 0, tone: "good" }),
    el("i", { share: cache.hit_rate === null ? 1 : cache.miss_rate, tone: "line" }));
  rows("tiers", cache.tiers, (one) => {
    const asked = one.hits + one.misses;
    const rate = asked ? one.hits / asked : null;
    return [el("th", { scope: "row" }, `${one.tier.toUpperCase()} ${one.kind}`), el("td.barred", {}, bar(rate ?? 0, "good")),
      number(share(rate)), ...["hits", "misses", "evictions", "invalidations", "entries"].map((name) => number(count(one[name]))),
      number(bytes(one.bytes))];
  });
}

function facts(id, pairs) {
  byId(id).replaceChildren(...pairs.flatMap(([name, value, tone]) =>
    value instanceof Element ? [value] : [el("dt", {}, name), el(`dd${tone ? `.${tone}` : ""}`, {}, value)]));
}

function showWorker(worker) {
  facts("worker", worker === null ? [["State", "not known: Redis is away", "bad"]] : [
    ["Waiting", count(worker.waiting)], ["Due", count(worker.due)], ["Started", count(worker.started)],
    ["Failing", count(worker.failing), worker.failing ? "warn" : ""], ["Dead", count(worker.dead), worker.dead ? "bad" : ""],
    ["Oldest is late by", duration(worker.late_s), worker.late_s > 60 ? "warn" : ""],
  ]);
}

function showRedis(redis) {
  if (!redis?.up) return facts("redis", [["State", "away", "bad"]]);
  const most = redis.max_memory_bytes;
  const used = most ? redis.memory_bytes / most : null;
  return facts("redis", [
    ["State", `up, ${redis.version}`, "good"],
    ["Memory", most ? `${bytes(redis.memory_bytes)} of ${bytes(most)}` : bytes(redis.memory_bytes)],
    ...(most ? [["", bar(used, used > 0.9 ? "bad" : used > 0.75 ? "warn" : "link")]] : []),
    ["Indexes", bytes(redis.index_bytes)], ["Vectors", count(redis.vectors)], ["Users", count(redis.users)],
    ["Graphs", count(redis.graphs)], ["Parked indexes", count(redis.parked)],
  ]);
}

function showLoad({ load, coherence }) {
  const used = load.limit ? load.in_flight / load.limit : 0;
  facts("load", [
    ["In flight", load.limit ? `${count(load.in_flight)} of ${count(load.limit)}` : count(load.in_flight)],
    ["", bar(used, used > 0.9 ? "bad" : used > 0.75 ? "warn" : "link")],
    ["Refused in the hour", count(load.refused_hour), load.refused_hour ? "warn" : ""],
    ["L1 may answer", coherence.live ? "yes" : "no: no lease", coherence.live ? "good" : "warn"],
    ["Barriers", count(coherence.barriers)], ["Barriers that timed out", count(coherence.barrier_timeouts), coherence.barrier_timeouts ? "warn" : ""],
  ]);
}

function show(board) {
  showVerdict(board);
  showLatency(board.latency, board.slo);
  showObjectives(board.slo);
  showOperations(board.operations);
  showCache(board.cache);
  showWorker(board.worker);
  showRedis(board.redis);
  showLoad(board);
}

function setAway(text) {
  byId("away").hidden = !text;
  byId("main").classList.toggle("away", Boolean(text));
  if (text) say(byId("away"), text);
}

async function poll() {
  clearTimeout(timer);
  if (document.hidden) return;
  try {
    const { body } = await call("GET", "/v1/dashboard", { timeoutMs: 10_000 });
    answeredAt = Date.now();
    setAway("");
    say(byId("state"), `Live · ${clock(answeredAt, true)}`);
    show(body);
  } catch (error) {
    if (error.status === 401 || error.status === 403) return void askForKey(error, poll);
    if (error.status === undefined) throw error;
    say(byId("state"), "Away");
    const what = error.status ? `The service answers with an error (${error.message})` : "No answer";
    setAway(`${what} since ${clock(answeredAt, true)}. Asking again every ${EVERY_MS / 1000} s; what is shown is from before.`);
  }
  timer = setTimeout(poll, EVERY_MS);
}

document.addEventListener("visibilitychange", poll);
showKeyState();
poll();
