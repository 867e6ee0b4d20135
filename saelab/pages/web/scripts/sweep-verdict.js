// What a sweep says of a latent, in a sentence: where its effect stands among those of random directions.

import { number, signed } from "./numbers.js";

/** @typedef {{ latent: number, operation: string, p: number | null, directions: number, matched_effect: number | null, matched_kl: number | null, matched_random: number | null, note: string }} Ranked a row of `Sweep.summary` */

export const LEVEL = 0.05; // of the rank p, above which a latent is as a random direction may be

/** @param {Ranked} row @returns {"above" | "inside" | "low" | "unknown"} */
export function standing({ p, matched_effect: effect, matched_random: random }) {
  if (p === null) return "unknown";
  if (p <= LEVEL) return "above";
  return p === 1 && (effect ?? 0) < (random ?? 0) ? "low" : "inside";
}

/** @type {Record<"above" | "inside" | "low", string>} */
const PLACES = {
  above: "above the random band",
  inside: "inside the random band",
  low: "at the low end of the random band, no random direction has less",
};

/**
 * [where it stands, why]: `[“Latent 3, add: above the random band”, “: rise_text +0.12 ...”]`.
 * @param {Ranked} row
 * @param {string} effect
 * @returns {[place: string, why: string]}
 */
export function verdict(row, effect) {
  const who = `Latent ${row.latent}, ${row.operation}`;
  const place = standing(row);
  if (place === "unknown") return [`${who}: not ranked`, `, ${row.note || "nothing was measured"}.`];
  const kl = row.matched_kl === null ? "" : ` at ${number(row.matched_kl)} nats`;
  return [
    `${who}: ${PLACES[place]}`,
    `. ${effect} is ${signed(row.matched_effect)}${kl}, of random directions ${signed(row.matched_random)} on average ` +
      `(p = ${number(row.p)} among ${row.directions}${row.note ? `; ${row.note}` : ""}).`,
  ];
}
