// Small charts in SVG: one path a series, so that a chart costs a dozen nodes whatever its bins.

/** @import { Numbers } from "./types.d.ts" */

import { el, svg } from "./dom.js";
import { clamp, number } from "./numbers.js";

const WIDE = 340;

/**
 * @typedef {object} Histogram
 * @property {string} label
 * @property {Numbers | number[]} counts heights
 * @property {Numbers | number[] | null} [none] other heights, drawn as a faint dashed outline
 * @property {boolean} [log] logarithmic heights
 * @property {{ share: number, words: string }[]} [axis]
 * @property {(i: number) => string} [kind] class of a bar
 * @property {(i: number) => string} describe what is read out
 * @property {(i: number) => void} [pick] click or Enter
 * @property {number} [rule] a share to mark
 * @property {string} [hint] what stands where the bars are read out before one looks
 * @property {number} [height]
 */

/** Bars. @param {Histogram} options */
export function histogram({
  label,
  counts,
  none,
  log,
  axis = [],
  kind = () => "bars",
  describe,
  pick,
  rule,
  hint = "",
  height = 84,
}) {
  const n = counts.length;
  /** @type {(c: number) => number} */
  const scale = log ? (c) => Math.log1p(c) : (c) => c;
  let top = 0;
  for (const series of [counts, none ?? []]) for (const c of series) top = Math.max(top, scale(c));
  /** @param {number} c */
  const y = (c) => height - (c > 0 ? Math.max(1.5, (scale(c) / (top || 1)) * (height - 4)) : 0);
  const width = WIDE / n;
  const gap = width > 4 ? 1 : 0;
  /** @type {Record<string, string>} */
  const paths = {};
  for (let i = 0; i < n; i++) {
    if (counts[i] > 0)
      paths[kind(i)] =
        (paths[kind(i)] || "") +
        `M${(i * width).toFixed(2)} ${height}V${y(counts[i]).toFixed(2)}h${Math.max(0.5, width - gap).toFixed(2)}V${height}z`;
  }
  let outline = "";
  if (none)
    for (let i = 0; i < n; i++) outline += `${i ? "V" : "M0 "}${y(none[i]).toFixed(2)}H${((i + 1) * width).toFixed(2)}`;
  const aim = svg("path.aim", { d: "" });
  const drawing = svg(
    "svg",
    { viewBox: `0 0 ${WIDE} ${height + 16}`, role: "img", "aria-label": label },
    Object.entries(paths).map(([name, d]) => svg(`path.${name}`, { d })),
    outline && svg("path.null", { d: outline }),
    aim,
    rule !== undefined && svg("path.rule", { d: `M${rule * WIDE} 0V${height}` }),
    svg("path.axis", { d: `M0 ${height}.5H${WIDE}` }),
    axis.map(({ share, words }) =>
      svg(
        "text",
        { x: share * WIDE, y: height + 13, "text-anchor": share < 0.08 ? "start" : share > 0.92 ? "end" : "middle" },
        words,
      ),
    ),
  );
  const readout = el("div.readout", { "aria-hidden": "true" });
  const figure = el(
    "div.chart",
    {
      role: "slider",
      tabindex: 0,
      "aria-label": label,
      "aria-valuemin": 0,
      "aria-valuemax": n - 1,
      "aria-valuenow": 0,
    },
    drawing,
    readout,
  );
  let at = -1;
  /** @param {number} i */
  const aimAt = (i) => {
    at = i;
    const c = counts[i];
    aim.setAttribute(
      "d",
      i < 0 || !(c > 0) ? "" : `M${i * width} ${height}V${y(c)}h${Math.max(1, width - gap)}V${height}z`,
    );
    readout.textContent = i < 0 ? hint : describe(i);
    figure.setAttribute("aria-valuenow", String(Math.max(0, i)));
    figure.setAttribute("aria-valuetext", i < 0 ? "" : describe(i));
  };
  drawing.addEventListener("pointermove", (event) => {
    const box = drawing.getBoundingClientRect();
    aimAt(clamp(Math.floor(((event.clientX - box.left) / box.width) * n), 0, n - 1));
  });
  drawing.addEventListener("pointerleave", () => aimAt(-1));
  figure.addEventListener("focus", () => aimAt(Math.max(at, 0)));
  figure.addEventListener("blur", () => aimAt(-1));
  figure.addEventListener("keydown", (event) => {
    const move = {
      ArrowRight: 1,
      ArrowUp: 1,
      ArrowLeft: -1,
      ArrowDown: -1,
      PageUp: 10,
      PageDown: -10,
      Home: -n,
      End: n,
    }[event.key];
    if (move) aimAt(clamp(at + move, 0, n - 1));
    else if (event.key === "Enter" && pick && at >= 0) pick(at);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  if (pick) drawing.addEventListener("click", () => at >= 0 && pick(at));
  figure.setAttribute("aria-valuetext", "");
  aimAt(-1);
  return figure;
}

/**
 * A sparkline of a curve over shares: [[x, y]], with y from 0 to the largest. For sweeps and evaluation curves.
 * @param {{ label: string, points: [number, number][], xs?: number[], mark?: number | null, height?: number, yText?: (y: number) => string }} options
 */
export function curve({ label, points, xs, mark, height = 110, yText = number }) {
  const low = Math.min(...points.map((p) => p[0])),
    high = Math.max(...points.map((p) => p[0]));
  const top = Math.max(...points.map((p) => p[1]), 1e-12),
    bottom = Math.min(0, ...points.map((p) => p[1]));
  /** @param {number} v */
  const x = (v) => 36 + ((v - low) / (high - low || 1)) * (WIDE - 46);
  /** @param {number} v */
  const y = (v) => 6 + (1 - (v - bottom) / (top - bottom || 1)) * (height - 12);
  return el(
    "div.chart",
    null,
    svg(
      "svg",
      { viewBox: `0 0 ${WIDE} ${height + 18}`, role: "img", "aria-label": label },
      svg("path.axis", { d: `M36 ${height}.5H${WIDE - 6}` }),
      svg("path.curve", {
        d: points.map((p, i) => `${i ? "L" : "M"}${x(p[0]).toFixed(1)} ${y(p[1]).toFixed(1)}`).join(""),
      }),
      points.map((p) => svg("circle.aim", { cx: x(p[0]), cy: y(p[1]), r: p[0] === mark ? 4.5 : 2 })),
      svg("text", { x: 30, y: 12, "text-anchor": "end" }, yText(top)),
      svg("text", { x: 30, y: height, "text-anchor": "end" }, yText(bottom)),
      (xs || [low, high]).map((v) => svg("text", { x: x(v), y: height + 14, "text-anchor": "middle" }, number(v, 2))),
    ),
  );
}

/**
 * A table row's meter: a bar of a share 0..1. Sign is shown by side and texture too.
 * @param {number} share
 * @param {string} [kind]
 */
export function meter(share, kind = "") {
  const fillBar = el("i", null);
  fillBar.style.width = `${(clamp(share, 0, 1) * 100).toFixed(1)}%`;
  return el(kind ? `div.meter.${kind}` : "div.meter", { "aria-hidden": "true" }, fillBar);
}
