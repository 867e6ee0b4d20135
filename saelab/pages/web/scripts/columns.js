// Rows of the index: which latents, in which order. A million rows sort in tens of milliseconds by radix on 32-bit keys.

/** @import { Numbers } from "./types.d.ts" */
/** @import { Sae } from "./feature-data.js" */

import { inRegion, parseRegion } from "./direction-map.js";
import { at, FLAG } from "./feature-data.js";
import { latentsOf, notes } from "./notes.js";
import { search } from "./search.js";

/**
 * Keys of 32 bits in the order of the values: numbers by their float bits, NaN last whichever way one sorts.
 * @param {Numbers} values
 * @param {Uint32Array} rows
 * @param {boolean} descending
 */
function sortKeys(values, rows, descending) {
  const bits = new Uint32Array(rows.length);
  const float = new Float32Array(1);
  const raw = new Uint32Array(float.buffer);
  const integers = values instanceof Uint32Array || values instanceof Uint16Array || values instanceof Uint8Array;
  for (let i = 0; i < rows.length; i++) {
    const value = values[rows[i]];
    let key;
    if (integers) key = value;
    else {
      float[0] = value;
      key = raw[0] & 0x80000000 ? ~raw[0] >>> 0 : (raw[0] | 0x80000000) >>> 0;
    }
    if (!integers && Number.isNaN(value)) bits[i] = 0xffffffff;
    else bits[i] = descending ? ~key >>> 0 : key;
  }
  return bits;
}

/**
 * The rows ordered by value, stable: two passes of 16 bits.
 * @param {Numbers} values
 * @param {Uint32Array} rows
 * @param {boolean} descending
 */
export function radixSort(values, rows, descending) {
  let keys = sortKeys(values, rows, descending);
  for (const shift of [0, 16]) {
    const ends = new Uint32Array(65537);
    for (let i = 0; i < keys.length; i++) ends[((keys[i] >>> shift) & 0xffff) + 1]++;
    for (let b = 0; b < 65536; b++) ends[b + 1] += ends[b];
    const sortedKeys = new Uint32Array(keys.length),
      sortedRows = new Uint32Array(rows.length);
    for (let i = 0; i < keys.length; i++) {
      const place = ends[(keys[i] >>> shift) & 0xffff]++;
      sortedKeys[place] = keys[i];
      sortedRows[place] = rows[i];
    }
    keys = sortedKeys;
    rows = sortedRows;
  }
  return rows;
}

const collator = new Intl.Collator("en", { numeric: true });

/** Values to sort by, one per latent. @param {Sae} sae @param {string} key @returns {Promise<Numbers>} */
async function sortColumn(sae, key) {
  const { index } = sae;
  if (key === "density") return index.count;
  if (key === "max" || key === "mean" || key === "focus") return index[key] ?? index.count;
  if (key === "label" || key === "pin") {
    const ranks = new Uint32Array(sae.size).fill(0xffffffff);
    const named = new Set([...sae.labels.keys(), ...latentsOf(sae, notes.labels.keys())]);
    if (key === "pin") for (const latent of latentsOf(sae, notes.pins)) ranks[latent] = 0;
    else
      [...named]
        .filter((l) => l < sae.size)
        .sort((a, b) => collator.compare(sae.label(a), sae.label(b)) || a - b)
        .forEach((latent, i) => {
          ranks[latent] = i;
        });
    return ranks;
  }
  const more = await sae.openMore().catch(() => undefined);
  const column = more?.[key];
  if (column instanceof Uint8Array) return Float32Array.from(column, (_, i) => at(column, i) ?? Number.NaN);
  return column ?? index.count;
}

/** @type {[key: string, words: string][]} */
export const SHOWS = [
  ["all", "All"],
  ["page", "With a page"],
  ["dead", "Dead"],
  ["silent", "Silent here"],
  ["dense", "Dense"],
  ["duplicate", "Duplicate"],
  ["pinned", "Pinned"],
  ["noted", "With notes"],
];

/** @param {Sae} sae */
export const defaultShow = (sae) => (sae.info.pages < sae.size ? "page" : "all");

/** How many latents each choice would show. @param {Sae} sae @returns {Record<string, number>} */
export function showCounts(sae) {
  const counts = {
    all: sae.size,
    page: 0,
    dead: 0,
    silent: 0,
    dense: 0,
    duplicate: 0,
    pinned: latentsOf(sae, notes.pins).length,
    noted: new Set([...latentsOf(sae, notes.notes.keys()), ...latentsOf(sae, notes.labels.keys())]).size,
  };
  const { flags } = sae.index;
  for (let i = 0; i < flags.length; i++) {
    const f = flags[i];
    counts.page += f & 1;
    counts.silent += (f >> 1) & 1;
    counts.dense += (f >> 2) & 1;
    counts.duplicate += (f >> 3) & 1;
    counts.dead += (f >> 4) & 1;
  }
  return counts;
}

/**
 * "1e-5..0.01" to [low, high]; open ends where nothing stands.
 * @param {string | null} string
 * @returns {[low: number, high: number]}
 */
export function parseRange(string) {
  const [low, high] = (string || "").split("..");
  /** @param {string | undefined} s @param {number} otherwise */
  const finite = (s, otherwise) => (s && Number.isFinite(Number(s)) ? Number(s) : otherwise);
  return [finite(low, 0), finite(high, Infinity)];
}

/** @param {number} low @param {number} high */
export const rangeText = (low, high) =>
  low > 0 || high < Infinity
    ? `${low > 0 ? Number(low.toPrecision(3)) : ""}..${high < Infinity ? Number(high.toPrecision(3)) : ""}`
    : "";

/**
 * Latents that pass what the URL says, in its order: {rows, message}.
 * @param {Sae} sae
 * @param {URLSearchParams} params
 * @returns {Promise<{ rows: Uint32Array, message: string, ordered: boolean }>}
 */
export async function selectRows(sae, params) {
  const found = await search(sae, params.get("q") || "");
  const show = params.get("show") || (found.only ? "all" : defaultShow(sae));
  const [dLow, dHigh] = parseRange(params.get("d")),
    [mLow, mHigh] = parseRange(params.get("m"));
  const counted = sae.dataset.manifest.corpus.counted;
  const { count: counts, max, flags } = sae.index;
  const mask = Object.hasOwn(FLAG, show) ? FLAG[show] : 0;
  const own =
    show === "pinned"
      ? new Set(latentsOf(sae, notes.pins))
      : show === "noted"
        ? new Set([...latentsOf(sae, notes.notes.keys()), ...latentsOf(sae, notes.labels.keys())])
        : null;
  const region = parseRegion(params.get("at"));
  const inside = region && sae.has("map") ? await inRegion(sae, region) : null;
  const cLow = dLow * counted,
    cHigh = dHigh * counted;
  const candidates = found.only;
  const n = candidates ? candidates.length : sae.size;
  const rows = new Uint32Array(n);
  let kept = 0;
  for (let i = 0; i < n; i++) {
    const latent = candidates ? candidates[i] : i;
    if (mask && !(flags[latent] & mask)) continue;
    if (own && !own.has(latent)) continue;
    if (inside && !inside.has(latent)) continue;
    if (counts[latent] < cLow || counts[latent] > cHigh || max[latent] < mLow || max[latent] > mHigh) continue;
    rows[kept++] = latent;
  }
  const [key, descending] = sortOf(sae, params);
  const chosen = rows.slice(0, kept);
  if (found.ordered && !params.get("s"))
    return { rows: chosen, message: `${found.message}, most relevant first`, ordered: true };
  return {
    rows:
      key === "id"
        ? descending
          ? chosen.reverse()
          : chosen
        : radixSort(await sortColumn(sae, key), chosen, descending),
    message: found.message,
    ordered: false,
  };
}

/**
 * The sort of the URL: [column, descending]; unless it says otherwise those first that one token fires most fully.
 * @param {Sae} sae
 * @param {URLSearchParams} params
 * @returns {[key: string, descending: boolean]}
 */
export function sortOf(sae, params) {
  const s = params.get("s") || (sae.index.focus ? "-focus" : "-density");
  return s.startsWith("-") ? [s.slice(1), true] : [s, false];
}
