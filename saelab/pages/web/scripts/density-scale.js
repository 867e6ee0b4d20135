// Where a latent stands on the map of the index: shares 0..1 of both logarithmic axes, and back.

/** @import { Numbers } from "./types.d.ts" */

import { clamp } from "./numbers.js";

/**
 * @param {Numbers} counts firings of each latent, of `counted` tokens
 * @param {Numbers} max its largest activation
 * @param {number} counted
 */
export function densityScale(counts, max, counted) {
  let top = 0;
  let bottom = Infinity;
  for (let i = 0; i < counts.length; i++)
    if (counts[i]) {
      top = Math.max(top, max[i]);
      bottom = Math.min(bottom, max[i] || Infinity);
    }
  if (!(top > 0) || !Number.isFinite(top)) top = 1;
  bottom = Math.max(Math.min(bottom, top / 2), top / 1e4);
  const left = Math.log(1 / counted); // one token of all; every token stands at the right, where the logarithm is 0
  const low = Math.log(bottom);
  const high = Math.log(top * 1.02);
  return {
    bottom,
    top,
    /** Share of the way from one token to every token. @param {number} density */
    x: (density) => (Math.log(density) - left) / (-left || 1),
    /** Share of the way from the smallest to the largest. @param {number} largest */
    y: (largest) => clamp((Math.log(largest) - low) / (high - low || 1), 0, 1),
    /** @param {number} share */
    density: (share) => Math.exp(left - share * left),
    /** @param {number} share */
    largest: (share) => Math.exp(low + share * (high - low)),
  };
}
