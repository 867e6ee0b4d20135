// Small charts in SVG: one path a series, so that a chart costs a dozen nodes whatever its bins.

/** @import { Child, Numbers } from "./types.d.ts" */

import { el, svg } from "./dom.js";
import { clamp, figure, number } from "./numbers.js";

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

/** @typedef {{ name: string, points: [x: number, y: number][] }} Series */

/**
 * Lines through points, from 0 or below to the largest y, over a band of [x, low, high]. What is not finite is left out.
 * @param {{ label: string, series: Series[], band?: [number, number, number][], mark?: number | null, xName?: string, height?: number }} options
 */
export function curve({ label, series, band = [], mark, xName, height = 110 }) {
  const drawn = series.map(({ points }) => points.filter((p) => p.every(Number.isFinite)));
  const around = band.filter((p) => p.every(Number.isFinite));
  const xs = [...drawn.flat(), ...around].map(([x]) => x);
  const ys = [...drawn.flat().map(([, y]) => y), ...around.flatMap(([, ...ends]) => ends)];
  if (!xs.length) return null;
  const [low, high] = [Math.min(...xs), Math.max(...xs)];
  const [bottom, top] = [Math.min(0, ...ys), Math.max(1e-12, ...ys)];
  const [ceiling, floor] = [number(top), number(bottom)];
  const left = Math.max(36, 6 * Math.max(ceiling.length, floor.length) + 6); // room for what stands at the axis
  /** @param {number} v */
  const x = (v) => left + ((v - low) / (high - low || 1)) * (WIDE - 10 - left);
  /** @param {number} v */
  const y = (v) => 6 + (1 - (v - bottom) / (top - bottom || 1)) * (height - 12);
  /** @param {(readonly [number, number])[]} points */
  const path = (points) => points.map((p, i) => `${i ? "L" : "M"}${x(p[0]).toFixed(1)} ${y(p[1]).toFixed(1)}`).join("");
  /** @type {[number, number][]} */
  const edge = [
    ...around.map((p) => /** @type {[number, number]} */ ([p[0], p[1]])),
    ...around.toReversed().map((p) => /** @type {[number, number]} */ ([p[0], p[2]])),
  ];
  return el(
    "div.chart",
    null,
    svg(
      "svg",
      { viewBox: `0 0 ${WIDE} ${height + 18}`, role: "img", "aria-label": label },
      edge.length > 0 && svg("path.band", { d: `${path(edge)}z` }),
      svg("path.axis", { d: `M${left} ${y(0).toFixed(1)}H${WIDE - 6}` }),
      drawn.toReversed().map((points, k) => svg(`path.curve.s${drawn.length - 1 - k}`, { d: path(points) })),
      drawn[0].map((p) => svg("circle.aim", { cx: x(p[0]), cy: y(p[1]), r: p[0] === mark ? 4.5 : 2 })),
      svg("text", { x: left - 6, y: 12, "text-anchor": "end" }, ceiling),
      svg("text", { x: left - 6, y: height, "text-anchor": "end" }, floor),
      [low, high].map((v) =>
        svg(
          "text",
          { x: Math.min(x(v), WIDE - 3 * figure(v).length), y: height + 14, "text-anchor": "middle" },
          figure(v),
        ),
      ),
      xName && svg("text", { x: (WIDE - 10 + left) / 2, y: height + 14, "text-anchor": "middle" }, xName),
    ),
  );
}

/** What the lines of a curve are, and its band. @param {string[]} lines @param {string} [band] */
export function curveLegend(lines, band) {
  /** @param {Child} mark @param {string} words */
  const entry = (mark, words) =>
    el(
      "span",
      null,
      svg("svg.swatch", { viewBox: "0 0 18 8", width: 18, height: 8, "aria-hidden": "true" }, mark),
      " ",
      words,
    );
  return el(
    "p.legend.chart",
    null,
    lines.map((words, k) => entry(svg(`path.curve.s${k}`, { d: "M0 4H18" }), words)),
    band && entry(svg("path.band", { d: "M0 0H18V8H0z" }), band),
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
