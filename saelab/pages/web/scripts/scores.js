// The scores of a benchmark: a section a task, each figure with its interval, beside its controls, on one scale.

import { byId, el, replace, svg } from "./dom.js";
import { figure, number } from "./numbers.js";
import { figures } from "./parts.js";
import { filter, startReport } from "./report.js";
import { textNodes } from "./text.js";

/** @typedef {{ who: string, control: boolean, value: number | null, low: number | null, high: number | null, n: number }} Row */
/** @typedef {{ figure: string, rows: Row[] }} Group */
/** @typedef {{ task: string, asks: string, groups: Group[] }} Part */

/**
 * Where on a scale from 0 to 100 that holds 0 and all bounds.
 * @param {Row[]} rows
 */
export function scale(rows) {
  const ends = [0, ...rows.flatMap(({ value, low, high }) => [value ?? 0, low ?? 0, high ?? 0])];
  const [least, most] = [Math.min(...ends), Math.max(...ends)];
  return (/** @type {number} */ x) => (100 * (x - least)) / (most - least || 1);
}

/** @param {Row} row @param {(x: number) => number} at */
function drawn({ value, low, high }, at) {
  const y = { y1: 5, y2: 5 };
  return svg(
    "svg.interval",
    { viewBox: "-3 0 106 10", "aria-hidden": "true" },
    svg("line.zero", { x1: at(0), x2: at(0), y1: 0, y2: 10 }),
    low !== null && high !== null && svg("line", { x1: at(low), x2: at(high), ...y }),
    value !== null && svg("circle", { cx: at(value), cy: 5, r: 2.5 }),
  );
}

/** @param {Part} part */
function section({ task, asks, groups }) {
  const rows = groups.flatMap(({ figure: name, rows: of }) => {
    const at = scale(of);
    return of.map((row, i) => [
      i ? "" : name,
      row.control ? el("span.muted", null, textNodes(row.who)) : el("b", null, textNodes(row.who)),
      row.value,
      row.low === null ? "" : `${number(row.low)} to ${number(row.high)}`,
      drawn(row, at),
      row.n,
    ]);
  });
  return el(
    "section.part",
    { data: { name: `${task} ${groups.map((group) => group.figure).join(" ")}` } },
    el("h2", null, textNodes(task)),
    asks && el("p.lead", null, textNodes(asks)),
    figures(["figure", "of", "value", "95% interval", "", "n"], rows, task),
  );
}

/** @param {{ saes: string[], parts: Part[] }} data */
function paint({ saes, parts }) {
  document.title = "Scores of autoencoders";
  const sections = el("div", null, parts.map(section));
  replace(
    byId("main"),
    el("div.page-head", null, el("h1", null, "Scores of autoencoders")),
    el(
      "p.lead",
      null,
      textNodes(saes.join(", ")),
      `: ${figure(parts.reduce((n, part) => n + part.groups.length, 0))} figures, each beside its controls. Where the ` +
        "intervals of two overlap widely these data do not tell them apart; a figure within a control's shows nothing of the SAE.",
    ),
    el("div.facets", null, filter("Only tasks with", sections)),
    sections,
  );
  return el("p", null, "Made by saelab; this page reaches no network.");
}

startReport("saelab benchmark", paint);
