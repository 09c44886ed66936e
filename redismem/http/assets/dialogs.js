// The dialogs: native ones, which keep the focus inside, end with Escape and give the focus back.

import { el, moment } from "/assets/client.js";

/** Show a dialog until it closes; return what it was closed with, "" when it was left. */
function shown(title, ...content) {
  const heading = el("h2", { id: "dialog-title" }, title);
  const dialog = el("dialog", { "aria-labelledby": "dialog-title" }, el("form", { method: "dialog" }, heading, ...content));
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue);
    });
  });
}

const leave = (text = "Cancel", attributes = {}) => el("button", { value: "", formnovalidate: true, ...attributes }, text);

/** Ask for what is true instead of a text; return null when it was left or stays the same. */
export async function askFor(text) {
  const field = el("textarea", { required: true, maxlength: 32_768 });
  field.value = text;
  field.setAttribute("autofocus", "");
  const answer = await shown("Correct this memory",
    el("p.dim", {}, "A new memory with its topics, entities and date replaces it. The old one is kept as superseded, and no search returns it."),
    el("label", {}, "What is true", field),
    el("div.do", {}, leave(), el("button.main", { value: "yes" }, "Correct")));
  return answer === "yes" && field.value !== text ? field.value : null;
}

/** Ask whether a memory shall be deleted. */
export async function confirmDelete(text) {
  const answer = await shown("Delete this memory?",
    el("p.quote", { tabindex: "0" }, text),
    el("p.dim", {}, "It goes for good, with everything made from it. Its history stays, without the text."),
    el("div.do", {}, leave("Cancel", { autofocus: true }), el("button.danger", { value: "yes" }, "Delete")));
  return answer === "yes";
}

/** Show what happened to a memory, oldest first. */
export function showHistory(events) {
  return shown("History",
    el("ol", { tabindex: "0", "aria-label": "Events" }, events.map(({ at, event, other = [] }) => el("li", {}, el("b", {}, event.replaceAll("_", " ")),
      ` · ${moment(at)}`, other.length ? el("span.dim", {}, ` · ${other.join(", ")}`) : null))),
    el("div.do", {}, leave("Close", { autofocus: true })));
}
