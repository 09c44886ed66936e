// The explorer: who there is, and one user's search, memories, topics, profile, summaries and contexts.

import { askForKey, byId, call, count, el, say, showKeyState } from "/assets/client.js";
import { contextView, profileView, summariesView, topicsView } from "/assets/derived.js";
import { memoriesView, searchView } from "/assets/memories.js";

const VIEWS = {
  search: ["Search", searchView], memories: ["Memories", memoriesView], topics: ["Topics", topicsView],
  profile: ["Profile", profileView], summaries: ["Summaries", summariesView], context: ["Context", contextView],
};
const PAGE = 50;

let shown = { user: null, tab: null };
let people = { cursor: null, names: new Set() };
let asked = 0;

/** What the views share of the page: the user, and where outcomes are told. */
const page = {
  user: "",
  // the newest generation that a write of this page returned: what is read next must show it
  generation: 0,
  // what went wrong last
  problem: "",

  /** Do some work and return its result; tell what went wrong, and mark its field in `form`. */
  async attempt(work, form = null) {
    const user = page.user;
    tell("", "");
    form?.querySelectorAll("[aria-invalid]").forEach((field) => field.removeAttribute("aria-invalid"));
    try {
      return await work();
    } catch (error) {
      if (error.status === undefined) throw error;
      if (user !== page.user) return undefined; // nobody asks any more
      if (error.status === 401) askForKey(error, start);
      else page.complain(error.field ? `${error.message} (field ${error.field})` : error.message);
      const field = error.field && form?.elements.namedItem(error.field);
      if (field instanceof Element) {
        field.closest("details")?.setAttribute("open", "");
        field.setAttribute("aria-invalid", "true");
        field.focus();
      }
      return undefined;
    }
  },

  /** As `call`, remembering the generation of a write. */
  async write(method, path, options) {
    const reply = await call(method, path, options);
    page.generation = Math.max(page.generation, Number(reply.headers.get("Redismem-Generation") ?? 0));
    return reply;
  },

  say: (text) => tell(text, ""),
  complain(text) {
    page.problem = text;
    tell("", text);
  },
};

function tell(good, bad) {
  for (const [id, text] of [["status", good], ["error", bad]]) {
    byId(id).hidden = !text;
    say(byId(id), text);
  }
}

async function listPeople({ more = false } = {}) {
  const ticket = ++asked;
  const contains = byId("people-contains").value.trim();
  if (!more) people = { cursor: null, names: new Set() };
  const found = [];
  say(byId("people-note"), "Looking …");
  const done = await page.attempt(async () => {
    do { // a page may be empty where the store is large
      const query = new URLSearchParams({ limit: PAGE, ...(contains && { contains }), ...(people.cursor && { cursor: people.cursor }) });
      const { body } = await call("GET", `/v1/users?${query}`);
      if (ticket !== asked) return false;
      found.push(...body.users.filter((one) => !people.names.has(one.user)));
      found.forEach((one) => people.names.add(one.user));
      people.cursor = body.cursor;
    } while (people.cursor && found.length < PAGE / 2);
    return true;
  });
  if (ticket !== asked) return;
  if (!more) byId("people").replaceChildren();
  const first = found.length ? personItem(found[0]) : null;
  byId("people").append(...(first ? [first, ...found.slice(1).map(personItem)] : []));
  byId("people-more").hidden = !people.cursor;
  if (more) first?.firstChild.focus();
  say(byId("people-note"), done === undefined ? "" : people.names.size
    ? `${count(people.names.size)}${people.cursor ? " so far" : people.names.size === 1 ? " user" : " users"}`
    : contains ? "No user id contains this." : "There are no users yet.");
  markPerson();
}

function personItem({ user, memories }) {
  const button = el("button", { type: "button", title: user, onclick: () => go({ user, tab: shown.tab ?? "search" }, true) },
    el("span", {}, user), el("span", {}, count(memories), el("span.quiet", {}, memories === 1 ? " memory" : " memories")));
  button.user = user;
  return el("li", {}, button);
}

function markPerson() {
  for (const button of byId("people").querySelectorAll("button")) {
    button.setAttribute("aria-current", String(button.user === shown.user));
  }
}

function makeTabs() {
  byId("tabs").replaceChildren(...Object.entries(VIEWS).map(([name, [title]]) =>
    el("button", { id: `tab-${name}`, type: "button", role: "tab", "aria-controls": `panel-${name}`,
      onclick: () => go({ user: shown.user, tab: name }) }, title)));
  byId("panels").replaceChildren(...Object.keys(VIEWS).map((name) =>
    el("div", { id: `panel-${name}`, role: "tabpanel", "aria-labelledby": `tab-${name}`, tabindex: "0", hidden: true })));
  byId("tabs").onkeydown = (event) => {
    const names = Object.keys(VIEWS), at = names.indexOf(shown.tab);
    const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: names.length - 1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    go({ user: shown.user, tab: names.at(next % names.length) });
    byId(`tab-${shown.tab}`).focus();
  };
}

/** Show a user and a tab, and keep them in the address. */
function go({ user, tab }, isPicked = false) {
  const address = `#${new URLSearchParams({ user, tab })}`;
  if (location.hash !== address) history.pushState(null, "", address);
  show({ user, tab });
  if (isPicked) byId("user-title").focus();
}

function show({ user, tab }) {
  const isOther = user !== shown.user;
  if (!isOther && tab === shown.tab) return;
  shown = { user, tab };
  page.user = user;
  tell("", "");
  markPerson();
  byId("tabs").hidden = !user;
  say(byId("user-title"), user || "Pick a user");
  document.title = user ? `${user} – redismem explorer` : "redismem explorer";
  if (isOther) {
    page.generation = 0;
    makeTabs();
  }
  for (const [name, [, view]] of Object.entries(VIEWS)) {
    const isChosen = Boolean(user) && name === tab, panel = byId(`panel-${name}`), button = byId(`tab-${name}`);
    button.setAttribute("aria-selected", String(isChosen));
    button.tabIndex = isChosen ? 0 : -1;
    panel.hidden = !isChosen;
    // what was found stays; what may have changed meanwhile is read again
    if (isChosen && (name !== "search" || !panel.hasChildNodes())) view(panel, page);
  }
}

function fromAddress() {
  const address = new URLSearchParams(location.hash.slice(1));
  const tab = address.get("tab");
  return { user: address.get("user") || null, tab: tab in VIEWS ? tab : "search" };
}

function start() {
  showKeyState();
  makeTabs();
  shown = { user: null, tab: null };
  show(fromAddress());
  listPeople();
}

let typing = 0;
byId("people-contains").oninput = () => {
  clearTimeout(typing);
  asked++; // what is on its way, and more of what is shown, is of what was typed before
  byId("people-more").hidden = true;
  typing = setTimeout(listPeople, 200);
};
byId("people-form").onsubmit = (event) => {
  event.preventDefault();
  clearTimeout(typing);
  listPeople();
};
byId("people-more").onclick = () => listPeople({ more: true });
window.addEventListener("popstate", () => show(fromAddress()));
start();
