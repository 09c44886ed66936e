// Search, the list of memories, and what can be done with one: pin, correct, delete, see its history.

import { bar, call, count, digits, el, milliseconds, moment, pathOf } from "/assets/client.js";
import { askFor, confirmDelete, showHistory } from "/assets/dialogs.js";

const TYPES = ["", "semantic", "episodic"];
const PAGE = 20;

const labelled = (text, field, more = "") => el(`label${more}`, {}, text, field);
export const textField = (name, attributes = {}) => el("input", { name, autocomplete: "off", ...attributes });
export const chosen = (name, options) =>
  el("select", { name }, options.map(([value, text]) => el("option", { value }, text ?? value)));
const check = (name, text) => el("label.check", {}, el("input", { type: "checkbox", name }), text);

/** Return the fields that were filled in, as the API nests them; a name such as `filters.topics` is a path. */
function requestOf(form) {
  const request = {};
  for (const field of form.elements) {
    if (!field.name || (field.type === "checkbox" ? !field.checked : !field.value.trim())) continue;
    let value = field.type === "checkbox" ? true : field.type === "number" ? Number(field.value) : field.value;
    if (field.dataset.list !== undefined) value = value.split(",").map((one) => one.trim()).filter(Boolean);
    if (field.type === "date") value = `${value}T00:00:00Z`;
    if (field.dataset.yes !== undefined) value = value === "yes";
    const path = field.name.split("."), last = path.pop();
    path.reduce((at, part) => (at[part] ??= {}), request)[last] = value;
  }
  return request;
}

/** Show a search with all its options. */
export function searchView(panel, page) {
  const list = memoryList(page);
  const note = el("p.dim", { role: "status" });
  const number = (name, text, attributes) => labelled(text, textField(name, { type: "number", ...attributes }));
  const pinned = chosen("filters.pinned", [["", "any"], ["yes", "pinned only"], ["no", "not pinned"]]);
  pinned.dataset.yes = "";
  const form = el("form.ask", { role: "search", "aria-label": "Memories", novalidate: true },
    el("div.row", {},
      labelled("Look for", textField("text", { type: "search", required: true }), ".long"),
      labelled("Mode", chosen("search_mode", [["hybrid"], ["semantic"], ["keyword"]])),
      check("explain", "Explain"), el("button.main", {}, "Search")),
    el("details.options", {}, el("summary", {}, "Filters and options"),
      el("fieldset", {}, el("legend", {}, "Only memories with"),
        labelled("Type", textField("filters.memory_type", { list: "memory-types", placeholder: "any" })),
        el("datalist", { id: "memory-types" }, TYPES.filter(Boolean).map((value) => el("option", { value }))),
        labelled("Topics, any of", textField("filters.topics", { "data-list": "", placeholder: "travel, work" })),
        labelled("Entities, any of", textField("filters.entities", { "data-list": "", placeholder: "Ana, Oslo" })),
        labelled("Session", textField("filters.session_id")),
        labelled("Pinned", pinned),
        labelled("Superseded", chosen("filters.superseded", [["exclude", "left out"], ["include", "included"], ["only", "only these"]])),
        labelled("Happened from", textField("filters.event_date.gte", { type: "date" })),
        labelled("Happened before", textField("filters.event_date.lt", { type: "date" })),
        labelled("Written from", textField("filters.created_at.gte", { type: "date" })),
        labelled("Written before", textField("filters.created_at.lt", { type: "date" }))),
      el("fieldset", {}, el("legend", {}, "How to search"),
        number("limit", "Limit", { value: 10, min: 1, max: 100 }),
        labelled("Query type", chosen("query_type", [["primary"], ["suggestion"], ["prefetch"], ["verification"]])),
        number("min_similarity", "Least similarity", { min: -1, max: 1, step: 0.05 }),
        number("max_ms", "At most, ms", { min: 1, max: 60_000 }),
        number("recency_weight", "Weight of recency", { min: 0, max: 1, step: 0.05 }),
        number("importance_weight", "Weight of importance", { min: 0, max: 1, step: 0.05 }))));
  list.refresh = () => list.load(async () => {
    const request = requestOf(form);
    if (page.generation) Object.assign(request, { consistency: "session", min_version: page.generation });
    const { body } = await call("POST", pathOf(page.user, "search"), { body: request });
    note.textContent = told(body, request.explain);
    return { ...body, cursor: null };
  }, form);
  form.onsubmit = (event) => {
    event.preventDefault();
    list.refresh();
  };
  panel.replaceChildren(form, note, list.box);
}

function told({ memories, total, served_by, timing, plan, partial, reason, skipped = [], archived = [], stale }, explain) {
  const parts = [`${count(memories.length)} of ${count(total)} ${total === 1 ? "memory" : "memories"}`,
    `${milliseconds(timing.total)} ms`];
  if (explain) {
    parts.push(`embed ${milliseconds(timing.embed)} ms`, `search ${milliseconds(timing.search)} ms`, `served by ${served_by}`);
    if (plan) parts.push(`plan ${plan.index}${plan.ef ? `, ef ${plan.ef}` : ""}${plan.staged ? ", staged" : ""}`);
  }
  if (partial) parts.push(`partial: ${reason ?? skipped.join(", ")}`);
  if (archived.length) parts.push(`archived: ${archived.join(", ")}`);
  if (stale) parts.push("stale: Redis is away");
  return parts.join(" · ");
}

/** Show memories, newest first. */
export function memoriesView(panel, page) {
  const superseded = chosen("superseded", [["exclude", "current"], ["include", "all"], ["only", "superseded only"]]);
  const pinned = chosen("pinned", [["", "pinned or not"], ["true", "pinned only"], ["false", "not pinned"]]);
  const type = textField("memory_type", { placeholder: "any type" });
  const list = listOf(page, () => ({ superseded: superseded.value, pinned: pinned.value, memory_type: type.value.trim() }));
  const form = el("form.ask", { "aria-label": "Which memories" }, el("div.row", {},
    labelled("Show", superseded), labelled("Pinned", pinned), labelled("Type", type)));
  form.onchange = () => list.refresh();
  form.onsubmit = (event) => {
    event.preventDefault();
    list.refresh();
  };
  panel.replaceChildren(form, list.box);
  list.refresh();
}

/** Return a list of memories, newest first, that `filters` lets through. */
export function listOf(page, filters) {
  const list = memoryList(page, { isCounted: true });
  list.refresh = (cursor = null) => list.load(async () => {
    const given = Object.entries({ ...filters(), cursor, limit: PAGE }).filter(([, value]) => value);
    return (await call("GET", `${pathOf(page.user, "memories")}?${new URLSearchParams(given)}`)).body;
  }, null, cursor);
  return list;
}

/** Return a list of memories that reads itself again after every change: set its `refresh`. */
export function memoryList(page, { isCounted = false } = {}) {
  const items = el("ul.memories"), more = el("button", { type: "button", hidden: true }, "More memories");
  const total = el("p.dim", { role: "status" });
  const list = { box: el("div.found", {}, isCounted ? total : null, items, el("div", {}, more)), refresh: null };
  let ticket = 0;

  list.load = async (read, form = null, cursor = null) => {
    const mine = ++ticket, user = page.user;
    const found = await page.attempt(read, form);
    if (found === undefined || mine !== ticket || user !== page.user) return;
    const made = found.memories.map((memory) => memoryItem(memory, page, list));
    if (cursor === null) items.replaceChildren();
    items.append(...(made.length || cursor ? made : [el("li.dim", {}, "No memories.")]));
    total.textContent = `${count(found.total)} ${found.total === 1 ? "memory" : "memories"}`;
    more.hidden = !found.cursor;
    more.onclick = () => list.refresh(found.cursor);
    if (cursor !== null) made[0]?.focus();
  };

  /** Read again and tell what was done; focus goes on where it was, or to what stands there now. */
  list.changed = async (text, id, action) => {
    const place = [...items.children].findIndex((item) => item.dataset.id === id);
    await list.refresh();
    page.say(text);
    const same = [...items.children].find((item) => item.dataset.id === id);
    const target = same?.querySelector(`[data-do=${action}]`) ?? items.children[Math.min(place, items.children.length - 1)];
    target?.focus();
  };
  return list;
}

const PARTS = ["similarity", "words", "semantic", "keyword", "neighbours", "relevance", "recency", "importance"];

function explained(explain) {
  return el("dl.parts-of", {}, PARTS.filter((name) => explain[name] !== undefined && explain[name] !== null).map((name) =>
    el("div", {}, el("dt", {}, name), el("dd", {}, digits(explain[name], 3)), name === "words" ? null : bar(explain[name]))));
}

function memoryItem(memory, page, list) {
  const path = pathOf(page.user, "memories", memory.id);
  const act = (name, text, run, more = "") => el(`button.plain${more}`, { type: "button", "data-do": name, onclick: run }, text);
  const tags = [
    memory.pinned && el("span.tag.pin", {}, "pinned"),
    memory.superseded_by && el("span.tag.gone", {}, `superseded by ${memory.superseded_by}`),
    ...memory.topics.map((topic) => el("span.tag", { title: "topic" }, topic)),
    ...memory.entities.map((entity) => el("span.tag.who", { title: "entity" }, entity)),
  ].filter(Boolean);

  /** Send a change; then read again, also where it failed: somebody else may have been first. */
  const change = async (action, told, send) => {
    if (await page.attempt(send)) return list.changed(told, memory.id, action);
    const { problem } = page;
    await list.refresh();
    page.complain(problem);
  };
  const pin = () => change("pin", memory.pinned ? "The memory is not pinned any more." : "The memory is pinned.",
    () => page.write("PATCH", path, { body: { pinned: !memory.pinned }, headers: { "If-Match": `"${memory.version}"` } }));
  const correct = async () => {
    const text = await askFor(memory.text);
    if (text === null) return;
    const { memory_type, topics, entities, session_id, event_date, pinned, metadata } = memory;
    await change("correct", "The memory is corrected; the old one is superseded.", () => page.write("POST", pathOf(page.user, "corrections"), {
      body: { ids: [memory.id], memory: { text, memory_type, topics, entities, session_id, event_date, pinned, metadata } } }));
  };
  const remove = async () => {
    if (await confirmDelete(memory.text)) await change("delete", "The memory is deleted.", () => page.write("DELETE", path));
  };
  const tell = async () => {
    const reply = await page.attempt(() => call("GET", `${path}/history`));
    if (reply) await showHistory(reply.body.events);
  };

  return el(`li.memory${memory.superseded_by ? ".old" : ""}`, { "data-id": memory.id, tabindex: "-1" },
    el("div.head", {}, el("p.text", {}, memory.text),
      memory.score !== undefined && el("span.score", { title: "score" }, el("span.quiet", {}, "score "), digits(memory.score, 3))),
    tags.length ? el("div.tags", {}, tags) : null,
    memory.explain ? explained(memory.explain) : null,
    el("p.about", {}, el("span", {}, memory.memory_type),
      memory.event_date ? el("span", {}, `happened ${moment(memory.event_date)}`) : null,
      el("span", {}, `written ${moment(memory.created_at)}`), el("span", {}, `importance ${digits(memory.importance, 2)}`),
      memory.session_id ? el("span", {}, `session ${memory.session_id}`) : null, el("code", {}, memory.id)),
    el("div.do", {}, act("pin", memory.pinned ? "Unpin" : "Pin", pin), act("correct", "Correct…", correct),
      act("history", "History", tell), act("delete", "Delete…", remove, ".risky")));
}
