// A frame that is dragged over a canvas: shares of its width and height from the top left.

import { el } from "./dom.js";
import { clamp } from "./numbers.js";

/** @typedef {[x: number, y: number]} Place */

/**
 * {node, frame(a, b) or frame() for none}; `onBrush(low, high)` with two corners, or with null when a click clears it.
 * @param {HTMLCanvasElement} canvas
 * @param {(corners: [low: Place, high: Place] | null) => void} onBrush
 */
export function brushed(canvas, onBrush) {
  const brush = el("div.brush", { hidden: true });
  /** @type {(event: MouseEvent) => Place} */
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return [clamp((event.clientX - box.left) / box.width, 0, 1), clamp((event.clientY - box.top) / box.height, 0, 1)];
  };
  /** @type {Place | null} */
  let from = null;
  /** @type {(a: Place, b: Place) => [low: Place, high: Place]} */
  const corners = (a, b) => [
    [Math.min(a[0], b[0]), Math.min(a[1], b[1])],
    [Math.max(a[0], b[0]), Math.max(a[1], b[1])],
  ];
  /** @param {Place} [a] @param {Place} [b] */
  const frame = (a, b) => {
    brush.hidden = !a || !b;
    if (!a || !b) return;
    const [low, high] = corners(a, b);
    brush.style.left = `${100 * low[0]}%`;
    brush.style.top = `${100 * low[1]}%`;
    brush.style.width = `${100 * (high[0] - low[0])}%`;
    brush.style.height = `${100 * (high[1] - low[1])}%`;
  };
  canvas.addEventListener("pointerdown", (event) => {
    from = place(event);
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (from) frame(from, place(event));
  });
  canvas.addEventListener("pointerup", (event) => {
    if (!from) return;
    const to = place(event);
    const small = Math.abs(from[0] - to[0]) < 0.01 && Math.abs(from[1] - to[1]) < 0.01;
    if (small) frame();
    onBrush(small ? null : corners(from, to));
    from = null;
  });
  return { node: el("div", { style: { position: "relative" } }, canvas, brush), frame };
}
