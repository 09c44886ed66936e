// What both pages share: requests with the reader's key, and elements without HTML text.

const KEY = "redismem.key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** An answer of the service that is an error, or its absence (status 0). */
export class ApiError extends Error {
  constructor(status, { code = "away", message = "the service does not answer", field } = {}) {
    super(message);
    Object.assign(this, { status, code, field });
  }
}

/** Return {status, body, headers} of a request that succeeded; throw an ApiError otherwise. */
export async function call(method, path, { body, headers = {}, timeoutMs = 20_000 } = {}) {
  const sent = { Accept: "application/json", ...headers };
  if (key.get()) sent.Authorization = `Bearer ${key.get()}`;
  if (body !== undefined) sent["Content-Type"] = "application/json";
  let reply, found;
  try {
    reply = await fetch(path, {
      method, headers: sent, cache: "no-store", credentials: "same-origin",
      body: body === undefined ? undefined : JSON.stringify(body),
      signal: AbortSignal.timeout(timeoutMs),
    });
    found = await reply.text();
  } catch {
    throw new ApiError(0);
  }
  let json = null;
  try { json = JSON.parse(found); } catch { /* a proxy's page, told by its status */ }
  if (!reply.ok) throw new ApiError(reply.status, json?.error ?? { code: "error", message: `status ${reply.status}` });
  return { status: reply.status, body: json, headers: reply.headers };
}

/** Return the path of a user, or of something of theirs; each part may hold any character. */
export const pathOf = (user, ...parts) =>
  ["/v1/users", ...[user, ...parts].map((part) => encodeURIComponent(part).replaceAll(".", "%2E"))].join("/");

/** Return an element. `on…` are listeners, `share` is 0..1 of a bar; children are elements or plain text. */
export function el(tag, attributes = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const made = document.createElement(name);
  if (classes.length) made.className = classes.join(" ");
  for (const [attribute, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (attribute.startsWith("on")) made.addEventListener(attribute.slice(2), value);
    else if (attribute === "share") made.style.setProperty("--share", Math.min(1, Math.max(0, value)));
    else if (attribute === "tone") made.style.setProperty("--tone", `var(--${value})`);
    else made.setAttribute(attribute, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

export const svg = (name, attributes, ...children) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  made.append(...children);
  return made;
};

export const bar = (share, tone = "link") => el("span.bar", { "aria-hidden": "true" }, el("i", { share, tone }));

export const byId = (id) => document.getElementById(id);

/** Say something without rewriting what is said already: a live region would speak again. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

const plain = new Intl.NumberFormat("en");
const percent = new Intl.NumberFormat("en", { style: "percent", maximumFractionDigits: 1 });
const fine = new Intl.NumberFormat("en", { style: "percent", maximumFractionDigits: 3 });

const ABSENT = "–";
const isAbsent = (value) => value === null || value === undefined;

export const count = (value) => (isAbsent(value) ? ABSENT : plain.format(value));
export const share = (value, exact = false) => (isAbsent(value) ? ABSENT : (exact ? fine : percent).format(value));
export const digits = (value, places) => (isAbsent(value) ? ABSENT : value.toFixed(places));
export const milliseconds = (value) => (isAbsent(value) ? ABSENT : value.toFixed(value < 10 ? 1 : 0));

export function bytes(value) {
  if (isAbsent(value)) return ABSENT;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; value >= 1024 && unit < units.length - 1; unit++) value /= 1024;
  return `${value.toFixed(unit === 0 || value >= 100 ? 0 : 1)} ${units[unit]}`;
}

export function duration(seconds) {
  if (isAbsent(seconds)) return ABSENT;
  const parts = [["d", 86_400], ["h", 3600], ["min", 60], ["s", 1]];
  const first = parts.findIndex(([, size]) => seconds >= size);
  if (first === -1) return seconds > 0 ? `${seconds.toFixed(1)} s` : "0 s";
  return parts.slice(first, first + 2).map(([name, size]) => {
    const whole = Math.floor(seconds / size);
    seconds -= whole * size;
    return `${whole} ${name}`;
  }).filter((part, place) => place === 0 || !part.startsWith("0 ")).join(" ");
}

const clockTime = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit" });
const clockFull = new Intl.DateTimeFormat("en-GB", { timeStyle: "medium" });
const date = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "short" });
export const clock = (ms, full = false) => (full ? clockFull : clockTime).format(new Date(ms));
export const moment = (text) => (isAbsent(text) ? ABSENT : date.format(new Date(text)));

/** Show the form that asks for a key in place of `main`; `retry` is called when one was given. */
export function askForKey(error, retry) {
  const box = byId("key"), form = byId("key-form");
  const isNew = box.hidden;
  box.hidden = false;
  byId("main").hidden = true;
  say(byId("key-why"), error.status === 403
    ? "This key does not allow that. Give one that does."
    : key.get() ? "The service does not know this key." : "The service asks for an API key.");
  form.onsubmit = (event) => {
    event.preventDefault();
    key.set(byId("key-value").value.trim());
    byId("key-value").value = "";
    closeKeyForm();
    retry();
  };
  if (isNew) byId("key-value").focus();
}

function closeKeyForm() {
  byId("key").hidden = true;
  byId("main").hidden = false;
  showKeyState();
}

/** Show the button that forgets the key, where there is one. */
export function showKeyState() {
  const button = byId("forget-key");
  button.hidden = !key.get();
  button.onclick = () => {
    key.forget();
    location.reload();
  };
}
