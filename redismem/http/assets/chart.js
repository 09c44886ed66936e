// Lines of the percentiles over the last hour, with a text for who does not see them.

import { clock, count, milliseconds, svg } from "/assets/client.js";

const LINES = ["p50", "p95", "p99"];
const LEFT = 40, RIGHT = 8, TOP = 8, BOTTOM = 22, HEIGHT = 240;

/** Return a round number at least `value`: 1, 2, 2.5 or 5 times a power of ten. */
function rounded(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].find((step) => step * power >= value) * power;
}

/** Return the parts of a line: minutes without requests part it. */
function runs(points) {
  const found = [[]];
  for (const point of points) {
    if (point[1] === null) found.push([]);
    else found.at(-1).push(point);
  }
  return found.filter((run) => run.length);
}

/** Draw `series`, oldest first, into `box`; `readout` tells the minute under the pointer. */
export function drawChart(box, readout, series, targets) {
  const width = Math.max(200, box.clientWidth);
  const values = series.flatMap((one) => LINES.map((name) => one[`${name}_ms`])).filter((value) => value !== null);
  const most = rounded(Math.max(10, ...values) * 1.05);
  const x = (place) => LEFT + (place / (series.length - 1)) * (width - LEFT - RIGHT);
  const y = (value) => TOP + (1 - value / most) * (HEIGHT - TOP - BOTTOM);
  const drawn = svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": told(series) });

  for (const value of [0, most / 2, most]) {
    drawn.append(svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) }),
      svg("text", { class: "axis", x: LEFT - 8, y: y(value) + 4, "text-anchor": "end" }, value ? `${value}` : "0 ms"));
  }
  for (let place = 0; place < series.length; place++) {
    const at = new Date(series[place].at * 1000);
    if (at.getMinutes() % 15 === 0) {
      drawn.append(svg("text", { class: "axis", x: x(place), y: HEIGHT - 4, "text-anchor": place < 3 ? "start" : place > series.length - 4 ? "end" : "middle" }, clock(at)));
    }
  }
  for (const [name, target] of Object.entries(targets)) {
    if (target === undefined || target > most) continue;
    drawn.append(svg("line", { class: "target", x1: LEFT, x2: width - RIGHT, y1: y(target), y2: y(target) }),
      svg("text", { class: "axis", x: width - RIGHT, y: y(target) - 4, "text-anchor": "end" }, `target ${name.toUpperCase()}`));
  }
  for (const name of LINES) {
    for (const run of runs(series.map((one, place) => [place, one[`${name}_ms`]]))) {
      const path = run.map(([place, value]) => `${x(place).toFixed(1)} ${y(value).toFixed(1)}`).join("L");
      if (run.length === 1) {
        drawn.append(svg("circle", { class: `dot ${name}`, cx: x(run[0][0]), cy: y(run[0][1]), r: 2.5 }));
        continue;
      }
      if (name === "p95") {
        drawn.append(svg("path", { class: "under", d: `M${path}L${x(run.at(-1)[0])} ${y(0)}L${x(run[0][0])} ${y(0)}Z` }));
      }
      drawn.append(svg("path", { class: `line ${name}`, d: `M${path}` }));
    }
  }
  const pointer = svg("line", { class: "at", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  drawn.append(pointer);
  drawn.onpointermove = (event) => {
    const { left } = drawn.getBoundingClientRect();
    const place = Math.round(((event.clientX - left - LEFT) / (width - LEFT - RIGHT)) * (series.length - 1));
    const one = series[Math.min(series.length - 1, Math.max(0, place))];
    pointer.setAttribute("x1", x(series.indexOf(one)));
    pointer.setAttribute("x2", x(series.indexOf(one)));
    pointer.setAttribute("visibility", "visible");
    readout.textContent = one.count
      ? `${clock(one.at * 1000)} · ${LINES.map((name) => `${name.toUpperCase()} ${milliseconds(one[`${name}_ms`])} ms`).join(" · ")} · ${count(one.count)} requests`
      : `${clock(one.at * 1000)} · no requests`;
  };
  drawn.onpointerleave = () => {
    pointer.setAttribute("visibility", "hidden");
    readout.textContent = "";
  };
  if (box.querySelector("svg")?.matches(":hover")) return; // who points at it reads it
  box.replaceChildren(drawn);
}

function told(series) {
  const known = series.filter((one) => one.count && one.p95_ms !== null);
  if (!known.length) return "Latency of the last 60 minutes: no requests.";
  const highest = known.reduce((worst, one) => (one.p95_ms > worst.p95_ms ? one : worst));
  const last = known.at(-1);
  return `Latency of the last 60 minutes. At ${clock(last.at * 1000)}: ` +
    LINES.map((name) => `${name.toUpperCase()} ${milliseconds(last[`${name}_ms`])} milliseconds`).join(", ") +
    `. The highest P95 was ${milliseconds(highest.p95_ms)} milliseconds at ${clock(highest.at * 1000)}. The table below has every minute.`;
}
