// The map of the index: how often a latent fires against how strongly at most, both logarithmic. Dragging selects.

/** @typedef {[low: number, high: number]} Range */
/** @import { Sae } from "./feature-data.js" */

import { brushed } from "./brush.js";
import { densityScale } from "./density-scale.js";
import { el } from "./dom.js";
import { clamp, count, number } from "./numbers.js";
import { currentRamp, isDark } from "./preferences.js";

const MAP = { columns: 72, rows: 40 };

/**
 * {node, paint(rows)}: `onBrush([dLow, dHigh], [mLow, mHigh])` with nulls when cleared.
 * @param {Sae} sae
 * @param {(density: Range | null, largest: Range | null) => void} onBrush
 */
export function densityMap(sae, onBrush) {
  const counted = sae.dataset.manifest.corpus.counted;
  const { count: counts, max } = sae.index;
  const scale = densityScale(counts, max, counted);
  const cell = new Uint16Array(sae.size).fill(0xffff);
  for (let i = 0; i < sae.size; i++) {
    if (counts[i])
      cell[i] =
        clamp(Math.floor(scale.x(counts[i] / counted) * MAP.columns), 0, MAP.columns - 1) +
        MAP.columns * clamp(Math.floor(scale.y(max[i]) * MAP.rows), 0, MAP.rows - 1);
  }
  const canvas = el("canvas", {
    width: MAP.columns * 10,
    height: MAP.rows * 10,
    role: "img",
    "aria-label": "Latents by density and largest activation; drag to select a region, or type bounds below",
  });
  const { node, frame } = brushed(canvas, (corners) => {
    if (!corners) return onBrush(null, null);
    const [low, high] = corners;
    onBrush([scale.density(low[0]), scale.density(high[0])], [scale.largest(1 - high[1]), scale.largest(1 - low[1])]);
  });
  const figure = el(
    "div.chart",
    null,
    el("div.ylabel", null, `largest activation, ${number(scale.bottom, 2)} to ${number(scale.top, 2)} ↑`),
    node,
    el(
      "div.xlabels",
      null,
      el("span", null, `1 in ${count(counted)}`),
      el("span", null, "density →"),
      el("span", null, "every token"),
    ),
  );
  /** @param {Uint32Array} rows */
  function paint(rows) {
    const shown = new Uint32Array(MAP.columns * MAP.rows),
      all = new Uint32Array(MAP.columns * MAP.rows);
    for (let i = 0; i < cell.length; i++) if (cell[i] !== 0xffff) all[cell[i]]++;
    for (let i = 0; i < rows.length; i++) if (cell[rows[i]] !== 0xffff) shown[cell[rows[i]]]++;
    const most = Math.log1p(all.reduce((a, b) => Math.max(a, b), 1));
    const colours = currentRamp(32);
    const context = canvas.getContext("2d");
    if (!context) return;
    context.fillStyle = isDark() ? "#101115" : "#f3f1ec";
    context.fillRect(0, 0, canvas.width, canvas.height);
    for (let c = 0; c < all.length; c++) {
      if (!all[c]) continue;
      const [x, y] = [(c % MAP.columns) * 10, (MAP.rows - 1 - Math.floor(c / MAP.columns)) * 10];
      context.fillStyle = shown[c]
        ? colours[clamp(6 + Math.round((Math.log1p(shown[c]) / most) * 25), 6, 31)].css
        : isDark()
          ? "#2b2e35"
          : "#dedad2";
      context.fillRect(x, y, 9, 9);
    }
  }
  /** Draws the frame of bounds that came from the URL or the fields. @param {Range} density @param {Range} largest */
  function bounds([dLow, dHigh], [mLow, mHigh]) {
    if (dLow <= 0 && dHigh === Infinity && mLow <= 0 && mHigh === Infinity) {
      frame();
      return;
    }
    frame(
      [dLow > 0 ? clamp(scale.x(dLow), 0, 1) : 0, 1 - (mHigh < Infinity ? scale.y(mHigh) : 1)],
      [dHigh < Infinity ? clamp(scale.x(dHigh), 0, 1) : 1, 1 - (mLow > 0 ? scale.y(mLow) : 0)],
    );
  }
  return { node: figure, paint, bounds };
}
