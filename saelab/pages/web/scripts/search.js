// What the search field means: 123, ~123, tok:" the", text:"…", re:/…/, or words of labels, notes and tokens.

/** @import { Sae } from "./feature-data.js" */
/**
 * @typedef {object} Found
 * @property {ArrayLike<number> | null} only latents, or null for all
 * @property {string} message
 * @property {boolean} [ordered] whether their order means something
 */

import { at } from "./feature-data.js";
import { latentsOf, notes } from "./notes.js";
import { count, plural } from "./numbers.js";
import { say } from "./parts.js";

/** @param {string} s @returns {[words: string, quoted: boolean]} */
const unquote = (s) => (/^".*"?$/.test(s) ? [s.slice(1).replace(/"$/, ""), true] : [s, false]);
/** @param {string} s */
const folded = (s) => s.toLocaleLowerCase();

/**
 * {only: latents or null for all, message, ordered: whether their order means something}.
 * @param {Sae} sae
 * @param {string} query
 * @returns {Promise<Found>}
 */
export async function search(sae, query) {
  const q = query.trim();
  if (!q) return { only: null, message: "" };
  if (/^#?\d+$/.test(q)) {
    const latent = Number(q.replace("#", ""));
    return latent < sae.size
      ? { only: [latent], message: "" }
      : { only: [], message: `There is no latent ${q}: the last is ${sae.size - 1}` };
  }
  if (/^~\d+$/.test(q)) return similar(sae, Number(q.slice(1)));
  if (q.startsWith("tok:")) return byToken(sae, ...unquote(query.trimStart().slice(4)));
  if (q.startsWith("text:")) return byText(sae, unquote(query.trimStart().slice(5))[0]);
  if (q.startsWith("re:")) {
    let pattern;
    try {
      pattern = new RegExp(q.slice(3).replace(/^\/(.*)\/$/, "$1"), "iu");
    } catch (error) {
      return { only: [], message: /** @type {Error} */ (error).message };
    }
    return { only: labelled(sae, (s) => pattern.test(s)), message: "in labels and notes" };
  }
  const [words, exact] = unquote(q);
  const labels = labelled(sae, (s) => folded(s).includes(folded(words)));
  const tokens = exact ? [] : (await byToken(sae, words, false, true)).only;
  return {
    only: Uint32Array.from(new Set([...labels, ...tokens])),
    message: "in labels, notes and tokens",
    ordered: true,
  };
}

/** Latents by their relevance, the lower number among equals. @param {Map<number, number>} relevance */
const ranked = (relevance) =>
  Uint32Array.from([...relevance].sort((a, b) => b[1] - a[1] || a[0] - b[0]).map(([latent]) => latent));

/** @param {Sae} sae @param {(label: string) => boolean} test */
function labelled(sae, test) {
  const found = new Set();
  for (const [latent, { text: label }] of sae.labels)
    if (test(notes.labels.get(sae.key(latent)) ?? label)) found.add(latent);
  for (const kind of [notes.labels, notes.notes])
    for (const [key, value] of kind) if (test(value)) for (const latent of latentsOf(sae, [key])) found.add(latent);
  return Uint32Array.from(found).sort();
}

/** @param {Sae} sae @param {number} latent @returns {Promise<Found>} */
async function similar(sae, latent) {
  if (latent >= sae.size) return { only: [], message: `There is no latent ${latent}` };
  const feature = sae.hasPage(latent) ? await sae.feature(latent) : null;
  const near = feature
    ? Array.from(feature.list("dec_near")).filter((l) => l < sae.size)
    : [at((await sae.openMore())?.near, latent)].filter((l) => l !== null);
  return {
    only: [latent, ...near.filter((l) => l !== latent)],
    message: `nearest to #${latent} by decoder`,
    ordered: true,
  };
}

// What makes a latent relevant to a token, the strongest first: its place among the three that characterise the latent, its
// being among the ten of its page, its being written. Within a place the latent's focus decides.
const PLACES = { tok0: 5, tok1: 4, tok2: 3, acts: 2, logits: 1 };

/**
 * Latents that a token characterises, or that write it, the most relevant first: exact when quoted, else any token that is
 * the word but for case and spaces.
 * @param {Sae} sae
 * @param {string} words
 * @param {boolean} exact
 * @param {boolean} [whole]
 * @returns {Promise<{ only: Uint32Array, message: string, ordered: boolean }>}
 */
async function byToken(sae, words, exact, whole = false) {
  const { vocab } = sae.dataset;
  const wanted = folded(words.trim());
  if (!wanted && !exact) return { only: new Uint32Array(0), message: "", ordered: true };
  const hit = new Uint8Array(vocab.size);
  let n = 0;
  for (let token = 0; token < vocab.size; token++) {
    if (vocab.offsets[token + 1] - vocab.offsets[token] > 4 * words.length + 64) {
      if (exact || whole) continue;
    }
    const string = vocab.string(token);
    const same = exact ? string === words : whole ? folded(string.trim()) === wanted : folded(string).includes(wanted);
    if (same) {
      hit[token] = 1;
      n++;
    }
  }
  /** @type {Map<number, number>} */
  const found = new Map();
  /** @param {number} latent @param {"tok0" | "tok1" | "tok2" | "acts" | "logits"} place */
  const add = (latent, place) => {
    const relevance = PLACES[place] + (sae.index.focus?.[latent] ?? 0);
    if (relevance > (found.get(latent) ?? 0)) found.set(latent, relevance);
  };
  if (n)
    for (const place of /** @type {const} */ (["tok0", "tok1", "tok2"]))
      for (let latent = 0; latent < sae.size; latent++) if (hit[sae.index[place][latent]]) add(latent, place);
  if (n && sae.has("inv")) {
    const inverted = (await sae.chunk("inv")).columns;
    for (const kind of /** @type {const} */ (["acts", "logits"])) {
      const lengths = inverted[`${kind}_n`],
        pages = inverted[kind];
      for (let token = 0, from = 0; token < vocab.size; from += lengths[token++]) {
        if (hit[token]) for (let k = from; k < from + lengths[token]; k++) add(sae.pageLatents[pages[k]], kind);
      }
    }
  }
  return { only: ranked(found), message: n ? `${plural(n, "token")} match` : "no such token", ordered: true };
}

const TEXT_CHUNKS = 64; // a search through texts reads this many chunks: 4,096 latents at 64 a chunk

/**
 * Latents with an example that has this text, from pages read one chunk after the other.
 * @param {Sae} sae
 * @param {string} words
 * @returns {Promise<Found>}
 */
async function byText(sae, words) {
  if (!words) return { only: [], message: "" };
  const wanted = folded(words);
  /** @type {Map<number, number>} */
  const found = new Map(); // how much of a latent's maximum the strongest example with the text has
  const ranks = sae.pageLatents.length,
    { per_chunk: size } = sae.info;
  const chunks = Math.min(TEXT_CHUNKS, Math.ceil(ranks / size));
  for (let c = 0; c < chunks; c++) {
    for (let rank = c * size; rank < Math.min(ranks, (c + 1) * size); rank++) {
      const feature = await sae.feature(sae.pageLatents[rank]);
      if (!feature) continue;
      const shares = feature.windows
        .filter((w) => folded(w.text).includes(wanted))
        .map((w) => w.act / (feature.value("max") ?? Infinity));
      if (shares.length) found.set(feature.latent, Math.max(...shares));
    }
    say(`Reading texts: ${c + 1} of ${chunks}`);
  }
  const all = chunks * size >= ranks;
  return {
    only: ranked(found),
    ordered: true,
    message: all ? "in example texts" : `in the texts of the first ${count(chunks * size)} latents with a page`,
  };
}
