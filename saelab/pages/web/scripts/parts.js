// The parts of which pages are made: panels, lists of figures, tables, tabs, messages.

/** @import { Child, Choice, Props } from "./types.d.ts" */

import { all, button, byId, el, freshId, maybeById, nearest } from "./dom.js";
import { clamp, figure } from "./numbers.js";
import { textNodes } from "./text.js";

/**
 * A section with a title: the unit of which pages are made.
 * @param {string} title
 * @param {Props | null} props
 * @param {Child[]} body
 */
export function panel(title, props, ...body) {
  const id = freshId("panel");
  return el("div.panel", { role: "group", "aria-labelledby": id, ...props }, el("h2", { id }, title), body);
}

/**
 * Definition list of [name, value] pairs.
 * @param {string} kind
 * @param {(readonly Child[])[]} entries
 * @param {string} [item]
 */
export function pairs(kind, entries, item = "") {
  /** @param {Child} term @param {Child} value */
  const wrap = (term, value) => el(item ? `div.${item}` : "div", null, el("dt", null, term), el("dd", null, value));
  return el(
    `dl.${kind}`,
    null,
    entries.filter(([, value]) => value !== undefined && value !== null).map(([t, v]) => wrap(t, v)),
  );
}

/**
 * A table. heads: a text a column, "#" first where its cells are numbers, "" for none; rows of cells, null for no row.
 * @param {string[]} heads
 * @param {(readonly Child[] | null | false)[]} rows
 * @param {boolean} [hidden]
 */
export function table(heads, rows, hidden = false) {
  /** @param {string} head */
  const kind = (head) => (head.startsWith("#") ? ".num" : "");
  /** @param {string} head */
  const title = (head) => {
    const words = head.replace("#", "");
    return words ? el(`th${kind(head)}`, { scope: "col" }, textNodes(words)) : el("td");
  };
  /** @param {readonly Child[]} row */
  const cells = (row) => row.map((cell, i) => el(`td${kind(heads[i])}`, null, cell));
  return el(
    "table.pairs",
    null,
    el("thead", { class: hidden && "offscreen" }, el("tr", null, heads.map(title))),
    el(
      "tbody",
      null,
      rows.map((row) => row && el("tr", null, cells(row))),
    ),
  );
}

/**
 * A table of figures that scrolls on its own: numbers as people read them at the right, all else at the left.
 * @param {string[]} heads
 * @param {(Child)[][]} rows
 * @param {string} label
 */
export function figures(heads, rows, label) {
  /** @param {Child} cell */
  const shown = (cell) =>
    typeof cell === "string" ? textNodes(cell) : typeof cell === "number" || cell === null ? figure(cell) : cell;
  const right = heads.map((_, i) => rows.some((row) => typeof row[i] === "number"));
  const made = table(
    heads.map((head, i) => (right[i] ? `#${head}` : head)),
    rows.map((row) => row.map(shown)),
  );
  made.classList.add("figures");
  return el("div.scroll", { tabindex: 0, role: "region", "aria-label": label }, made);
}

/**
 * A table whose cells are tinted by their share of the largest absolute value, or of a tenth where all are smaller.
 * @param {string} corner
 * @param {string[]} names of the rows
 * @param {string[]} columns
 * @param {(number | null)[][]} values
 * @param {(x: number | null) => string} format
 */
export function matrix(corner, names, columns, values, format) {
  const largest = Math.max(0.1, ...values.flat().map((x) => Math.abs(x ?? 0)));
  /** @param {number | null} x */
  const cell = (x) =>
    el(
      (x ?? 0) < 0 ? "td.minus" : "td.plus",
      { data: { share: "" }, style: { "--share": String(Math.abs(x ?? 0) / largest) } },
      format(x),
    );
  const heads = [corner, ...columns].map((words, i) => el(i ? "th.num" : "th", { scope: "col" }, textNodes(words)));
  const rows = names.map((words, i) =>
    el("tr", null, el("th", { scope: "row" }, textNodes(words)), values[i].map(cell)),
  );
  return el(
    "div.scroll",
    { tabindex: 0, role: "region", "aria-label": `Table by ${corner}` },
    el("table.pairs.figures", null, el("thead", null, el("tr", null, heads)), el("tbody", null, rows)),
  );
}

/** @param {number} x @param {Child} words */
export const tinted = (x, words) => el(x < 0 ? "span.minus" : "span.plus", null, words);

/**
 * Tabs with roving focus. `choices` is [[key, label, panelMaker?]]; `onChange(key)` paints into the panel of id
 * `panelId`.
 * @param {string} label
 * @param {Choice[]} choices
 * @param {string} current
 * @param {string} panelId
 * @param {(key: string) => void} onChange
 * @param {boolean} [small]
 */
export function tabs(label, choices, current, panelId, onChange, small = false) {
  const bar = el(small ? "div.tabs.small" : "div.tabs", { role: "tablist", "aria-label": label });
  /** @param {string} key @param {boolean} [focus] */
  const choose = (key, focus) => {
    for (const tab of all(bar, "button")) {
      const on = tab.dataset.key === key;
      tab.setAttribute("aria-selected", String(on));
      tab.tabIndex = on ? 0 : -1;
      if (on && focus) tab.focus();
      if (on) maybeById(panelId)?.setAttribute("aria-labelledby", tab.id);
    }
  };
  for (const [key, text] of choices) {
    bar.append(
      el(
        "button",
        {
          type: "button",
          role: "tab",
          id: freshId("tab"),
          data: { key },
          "aria-controls": panelId,
          click: () => {
            choose(key);
            onChange(key);
          },
        },
        text,
      ),
    );
  }
  bar.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    const keys = choices.map(([key]) => key);
    const at = keys.indexOf(nearest(event, "button")?.dataset.key ?? "");
    const key = keys[Number.isFinite(step) ? (at + step + keys.length) % keys.length : clamp(step, 0, keys.length - 1)];
    choose(key, true);
    onChange(key);
  });
  choose(current);
  return Object.assign(bar, { choose });
}

let saying = 0; // the timer of what is said now

/** A short message at the foot of the page, read out by screen readers. @param {string} message */
export function say(message) {
  const status = byId("status");
  status.textContent = message;
  clearTimeout(saying);
  saying = setTimeout(() => {
    status.textContent = "";
  }, 3500);
}

/**
 * What a person sees where something could not be shown: what failed, and that the rest goes on.
 * @param {string} title
 * @param {unknown} error
 * @param {() => void} [again]
 */
export function errorCard(title, error, again) {
  const { message, hint } = /** @type {{ message?: string, hint?: string }} */ (error);
  return el(
    "div.alert",
    { role: "alert" },
    el("h2", null, title),
    el("p", null, hint || "The rest of the page works on."),
    el("p", null, el("code", null, message || String(error))),
    again && button("Try again", again),
  );
}
