// The map of decoder directions: latents with a page as points, on their principal components or by neighbours. A frame that
// is dragged keeps the latents in it.

/** @import { Columns } from "./types.d.ts" */
/** @import { Sae } from "./feature-data.js" */
/** @typedef {{ plane: string, low: [x: number, y: number], high: [x: number, y: number] }} Region */

import { brushed } from "./brush.js";
import { el } from "./dom.js";
import { currentRamp, isDark } from "./preferences.js";

const SIZE = 720; // pixels of the canvas
const MARGIN = 0.03; // share of it at each edge
/** @type {Record<string, string>} */
export const PLANES = { pca: "principal components", neighbours: "neighbours (t-SNE)" };

/** A coordinate in -1 to 1 as a share of the canvas. @param {number} x */
const share = (x) => MARGIN + ((1 - 2 * MARGIN) * (x + 1)) / 2;
/** @param {number} s */
const unshare = (s) => (2 * (s - MARGIN)) / (1 - 2 * MARGIN) - 1;

/** "pca:-0.1,0.2,0.3,0.4" (left, bottom, right, top) as a region; null for none. @param {string | null} text @returns {Region | null} */
export function parseRegion(text) {
  const [plane, rest] = (text ?? "").split(":");
  const numbers = (rest ?? "").split(",").map(Number);
  if (!Object.hasOwn(PLANES, plane) || numbers.length !== 4 || !numbers.every(Number.isFinite)) return null;
  return { plane, low: [numbers[0], numbers[1]], high: [numbers[2], numbers[3]] };
}

/** @param {Region} region */
export const regionText = ({ plane, low, high }) => `${plane}:${[...low, ...high].map((x) => x.toFixed(3)).join(",")}`;

/** The latents with a page in a region. @param {Sae} sae @param {Region} region @returns {Promise<Set<number>>} */
export async function inRegion(sae, { plane, low, high }) {
  const { columns } = await sae.chunk("map");
  const [x, y] = [columns[`${plane}_x`] ?? [], columns[`${plane}_y`] ?? []];
  const found = new Set();
  for (let i = 0; i < x.length; i++)
    if (x[i] >= low[0] && x[i] <= high[0] && y[i] >= low[1] && y[i] <= high[1]) found.add(sae.pageLatents[i]);
  return found;
}

/**
 * {node, paint(rows), bounds(region)} of one plane.
 * @param {Sae} sae
 * @param {Columns} columns
 * @param {string} plane
 * @param {(region: Region | null) => void} onBrush
 */
export function directionMap(sae, columns, plane, onBrush) {
  const [x, y] = [columns[`${plane}_x`], columns[`${plane}_y`]];
  const canvas = el("canvas", {
    width: SIZE,
    height: SIZE,
    role: "img",
    "aria-label": `Decoder directions by ${PLANES[plane]}; drag to keep a region`,
  });
  const { node, frame } = brushed(canvas, (corners) => {
    if (!corners) return onBrush(null);
    const [low, high] = corners; // y goes up
    onBrush({
      plane,
      low: [unshare(low[0]), unshare(1 - high[1])],
      high: [unshare(high[0]), unshare(1 - low[1])],
    });
  });
  /** @param {Uint32Array} rows */
  function paint(rows) {
    const context = canvas.getContext("2d");
    if (!context) return;
    context.fillStyle = isDark() ? "#101115" : "#f3f1ec";
    context.fillRect(0, 0, SIZE, SIZE);
    const kept = new Set(rows);
    const colour = currentRamp(32)[24].css;
    for (const shown of [false, true]) {
      context.fillStyle = shown ? colour : isDark() ? "#2b2e35" : "#dedad2";
      for (let i = 0; i < x.length; i++)
        if (kept.has(sae.pageLatents[i]) === shown)
          context.fillRect(share(x[i]) * SIZE - 2, (1 - share(y[i])) * SIZE - 2, 4, 4);
    }
  }
  /** @param {Region | null} region */
  const bounds = (region) => {
    if (region?.plane !== plane) return frame();
    const { low, high } = region;
    frame([share(low[0]), 1 - share(high[1])], [share(high[0]), 1 - share(low[1])]);
  };
  return { node: el("div.chart", null, node), paint, bounds };
}
