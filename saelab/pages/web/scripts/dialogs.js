// Dialogs, and a choice with its label.

/** @import { Child, Choice } from "./types.d.ts" */

import { button, el, fieldValue, freshId } from "./dom.js";

/** @param {string} title @param {Child[]} body */
export function openDialog(title, ...body) {
  const id = freshId("dialog");
  const dialog = el(
    "dialog",
    { "aria-labelledby": id, close: () => dialog.remove() },
    el("h2", { id }, title),
    body,
    el(
      "div.row",
      null,
      button("Close", () => dialog.close(), { "data-close": true }),
    ),
  );
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

/** @param {string} label @param {string} value @param {Choice[]} options @param {(key: string) => void} onChange */
export function choice(label, value, options, onChange) {
  return el(
    "label.field",
    null,
    label,
    el(
      "select",
      { change: (event) => onChange(fieldValue(event)) },
      options.map(([key, words]) => el("option", { value: key, selected: key === value }, words)),
    ),
  );
}
