// What the worker made of a user's memories: topics, profile, summaries; and contexts.

import { call, count, digits, el, milliseconds, moment, pathOf } from "/assets/client.js";
import { chosen, listOf, memoryList, textField } from "/assets/memories.js";

const RETRY_MS = 1000, MAX_RETRIES = 30;

/** Show topics; a click shows the memories of one. */
export async function topicsView(panel, page) {
  panel.replaceChildren(el("p.dim", {}, "Loading …"));
  const reply = await page.attempt(() => call("GET", pathOf(page.user, "topics")));
  if (!reply) return panel.replaceChildren();
  const { topics, uncategorized } = reply.body;
  let cluster = null;
  const list = listOf(page, () => ({ cluster }));
  const heading = el("h2", { tabindex: "-1" });
  const below = el("div.found", { hidden: true }, heading, list.box);
  const button = (id, label, size, note) => el("li", {}, el("button", { type: "button", "aria-pressed": "false", onclick: pick(id, label) },
    el("b", {}, label, el("span", {}, count(size))), note ? el("small", {}, note) : null));
  const pick = (id, label) => async ({ currentTarget }) => {
    panel.querySelectorAll("[aria-pressed]").forEach((one) => one.setAttribute("aria-pressed", String(one === currentTarget)));
    [cluster, heading.textContent, below.hidden] = [id, `Memories in ${label}`, false];
    await list.refresh();
    heading.focus();
  };
  panel.replaceChildren(
    topics.length ? "" : el("p.dim", {}, `No topics yet, ${count(uncategorized)} memories: the worker makes them when there are enough that are alike.`),
    el("ul.topics", {}, topics.map((topic) => button(topic.id, topic.label, topic.size, topic.words.join(" · "))),
      topics.length && uncategorized ? button("uncategorized", "In no topic", uncategorized, "like nothing else; those of late are not looked at yet") : null),
    below);
}

const FIELDS = {
  display_name: "Name", communication_style: "Style", topics_of_interest: "Interests", known_expertise: "Expertise",
  preferred_formats: "Formats", current_projects: "Projects", recent_topics: "Lately", relationship_context: "Known",
};

/** Show the profile. */
export async function profileView(panel, page) {
  panel.replaceChildren(el("p.dim", {}, "Loading …"));
  const reply = await page.attempt(() => call("GET", pathOf(page.user, "profile")));
  if (!reply) return panel.replaceChildren();
  const profile = reply.body;
  const text = (value) => (Array.isArray(value) ? value.join(", ")
    : value !== null && typeof value === "object" ? Object.entries(value).map((pair) => pair.join(": ")).join(", ") : value ?? "");
  const known = Object.entries(FIELDS).filter(([name]) => text(profile[name]));
  panel.replaceChildren(
    el("p.dim", {}, profile.compiled_at ? `compiled ${moment(profile.compiled_at)}` : "not compiled yet; the worker does it in about a second"),
    profile.context_summary ? el("div.sheet", {}, profile.context_summary) : "",
    el("dl.said", {}, known.flatMap(([name, title]) => [el("dt", {}, title),
      el("dd", {}, text(profile[name]), profile.patched.includes(name) ? el("span.dim", {}, " (set by hand)") : null)])));
  if (!profile.important_memory_ids.length) return;
  const list = memoryList(page);
  list.refresh = () => list.load(async () => {
    const query = page.generation ? `?consistency=session&min_version=${page.generation}` : "";
    const each = profile.important_memory_ids.map((id) =>
      call("GET", pathOf(page.user, "memories", id) + query).catch((error) => {
        if (error.status !== 404) throw error; // it was deleted since the profile was compiled
      }));
    const memories = (await Promise.all(each)).filter(Boolean).map((one) => one.body);
    return { memories, total: memories.length, cursor: null };
  });
  panel.append(el("h2", {}, "Important memories"), list.box);
  await list.refresh();
}

const EXAMPLES = { topic: "number of a topic", day: "2026-03-01", week: "2026-W09", month: "2026-03", entity: "Ana", session: "id of a session" };

/** Show the summary of a kind and a name; where it is being made, wait for it. */
export async function summariesView(panel, page) {
  const kind = chosen("kind", Object.keys(EXAMPLES).map((name) => [name]));
  const name = textField("name", { required: true, list: "summary-names", placeholder: EXAMPLES.topic });
  const names = el("datalist", { id: "summary-names" });
  const result = el("div.found", { "aria-live": "polite" });
  const form = el("form.ask", { "aria-label": "Summary" }, el("div.row", {}, el("label", {}, "Summary of", kind),
    el("label.long", {}, "Name", name), el("button.main", {}, "Show")), names);
  let topics = [], asked = 0;
  kind.onchange = () => {
    name.value = "";
    name.placeholder = EXAMPLES[kind.value];
    names.replaceChildren(...(kind.value === "topic" ? topics.map((topic) => el("option", { value: topic.id }, topic.label)) : []));
  };
  form.onsubmit = async (event) => {
    event.preventDefault();
    const mine = ++asked, path = pathOf(page.user, "summaries", kind.value, name.value.trim());
    result.replaceChildren();
    for (let tried = 0; tried < MAX_RETRIES && mine === asked && panel.isConnected; tried++) {
      const reply = await page.attempt(() => call("GET", path), form);
      if (!reply || mine !== asked) return;
      if (reply.status === 200) return showSummary(result, reply.body);
      if (tried === 0) result.replaceChildren(el("p.notice", {}, "It is being made …"));
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    }
    if (mine === asked) result.replaceChildren(el("p.notice.warn", {}, "It is still not there. Does a worker run?"));
  };
  panel.replaceChildren(form, result);
  const reply = await page.attempt(() => call("GET", pathOf(page.user, "topics")));
  topics = reply?.body.topics ?? [];
  if (kind.value === "topic") names.replaceChildren(...topics.map((topic) => el("option", { value: topic.id }, topic.label)));
}

function showSummary(result, summary) {
  result.replaceChildren(
    el("p.dim", {}, `${summary.kind} ${summary.name} · ${count(summary.tokens)} tokens · ${summary.method} · made ${moment(summary.generated_at)}`),
    el("div.sheet", {}, summary.text),
    el("details", {}, el("summary", {}, `${count(summary.sources.length)} sources`), el("ul", {}, summary.sources.map((id) => el("li", {}, el("code", {}, id))))));
}

/** Show the context that an assistant would get for a text. */
export function contextView(panel, page) {
  const text = textField("text", { type: "search", required: true });
  const stages = chosen("stages", [["1"], ["2"], ["3"], ["4"]]);
  stages.value = "3";
  const result = el("div.found", { "aria-live": "polite" });
  const form = el("form.ask", { "aria-label": "Context" }, el("div.row", {}, el("label.long", {}, "What the user says", text),
    el("label", {}, "Up to stage", stages), el("button.main", {}, "Assemble")));
  form.onsubmit = async (event) => {
    event.preventDefault();
    const body = { text: text.value, stages: Number(stages.value), ...(page.generation && { consistency: "session", min_version: page.generation }) };
    const reply = await page.attempt(() => call("POST", pathOf(page.user, "context"), { body }), form);
    if (!reply) return;
    const made = reply.body;
    result.replaceChildren(
      el("p.dim", {}, `${count(made.tokens)} tokens · ${milliseconds(made.total_ms)} ms${made.partial ? " · partial" : ""}`),
      el("div.sheet", {}, made.text || "(empty)"),
      el("table", {}, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Stage"), el("th", { scope: "col" }, "Parts"),
        el("th.number", { scope: "col" }, "Tokens"), el("th.number", { scope: "col" }, "At ms"))),
      el("tbody", {}, (made.stages ?? []).map((stage) => el("tr", {}, el("th", { scope: "row" }, String(stage.stage)),
        el("td", {}, stage.blocks.map((block) => block.part).join(", ") || "–"), el("td.number", {}, count(stage.tokens)),
        el("td.number", {}, digits(stage.at_ms, 1)))))));
  };
  panel.replaceChildren(form, result);
}
