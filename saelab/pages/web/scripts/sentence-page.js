// A sentence of the reader's own: matched to latents by its tokens alone, since no model runs in a page.

/** @import { Dataset, Sae, Vocab } from "./feature-data.js" */
/** @import { Child, Shown } from "./types.d.ts" */

import { el, replace } from "./dom.js";
import { at } from "./feature-data.js";
import { latentLink, tokenChips } from "./latents.js";
import { count, percent } from "./numbers.js";
import { pairs } from "./parts.js";
import { mark } from "./route.js";

const MOST = 2_000; // characters
const EACH = 8; // latents a token

/**
 * The tokens of a text, from the left the longest that the page knows; null for a character that none begins with.
 * @param {string} text
 * @param {Vocab} vocab
 */
export function longestTokens(text, vocab) {
  /** @type {Map<string, number>} */
  const known = new Map();
  let longest = 0;
  for (let token = 0; token < vocab.size; token++) {
    if (vocab.special(token)) continue;
    const string = vocab.string(token);
    if (!string || string.length > MOST || known.has(string)) continue;
    known.set(string, token);
    longest = Math.max(longest, string.length);
  }
  /** @type {{ text: string, token: number | null }[]} */
  const found = [];
  for (let i = 0; i < text.length; ) {
    let n = Math.min(longest, text.length - i);
    while (n > 0 && !known.has(text.slice(i, i + n))) n--;
    const token = n ? (known.get(text.slice(i, i + n)) ?? null) : null;
    const piece = n ? text.slice(i, i + n) : String.fromCodePoint(text.codePointAt(i) ?? 0);
    found.push({ text: piece, token });
    i += piece.length;
  }
  return found;
}

/** The latents that each token characterises, the most focused first. @param {Sae} sae */
function byToken(sae) {
  const { index } = sae;
  /** @type {Map<number, number[]>} */
  const found = new Map();
  for (const column of [index.tok0, index.tok1, index.tok2]) {
    const mine = new Map();
    for (let latent = 0; latent < sae.size; latent++) {
      const token = at(column, latent);
      if (token === null || !sae.hasPage(latent)) continue;
      if (!mine.has(token)) mine.set(token, []);
      mine.get(token).push(latent);
    }
    for (const [token, latents] of mine) {
      latents.sort(
        (/** @type {number} */ a, /** @type {number} */ b) => (index.focus?.[b] ?? 0) - (index.focus?.[a] ?? 0),
      );
      found.set(token, [...(found.get(token) ?? []), ...latents]);
    }
  }
  return found;
}

/**
 * @param {HTMLElement} main
 * @param {Dataset} dataset
 * @param {URLSearchParams} params
 * @param {() => boolean} current
 * @returns {Promise<Shown | undefined>}
 */
export async function sentencePage(main, dataset, params, current) {
  const sae = await dataset.sae(params.get("sae") ?? "A");
  if (!current()) return;
  const latents = byToken(sae);
  const body = el("div", { "aria-live": "polite" });
  const area = el("textarea", {
    rows: 3,
    maxlength: MOST,
    "aria-label": "A sentence of your own",
    value: (params.get("text") ?? "").slice(0, MOST),
    input: () => {
      mark({ text: area.value });
      paint();
    },
  });
  function paint() {
    const tokens = longestTokens(area.value, dataset.vocab);
    const seen = new Set();
    /** @param {{ text: string, token: number | null }} piece @returns {[Child, Child][]} */
    const entry = ({ text, token }) => {
      if (token === null)
        return [[el("span.chip", null, text), el("span.muted", null, "not among the tokens of this page")]];
      if (seen.has(token)) return [];
      seen.add(token);
      const mine = latents.get(token) ?? [];
      const shown = mine.slice(0, EACH).map((latent) => {
        const focus = sae.index.focus && el("small.muted", null, ` ${percent(sae.index.focus[latent], 2)}`);
        return el("div", null, latentLink(sae, latent, { view: "", text: "" }), " ", tokenChips(sae, latent), focus);
      });
      if (!shown.length) shown.push(el("div.muted", null, "characterises no latent"));
      if (mine.length > EACH) shown.push(el("div.muted", null, `and ${count(mine.length - EACH)} more`));
      return [[dataset.vocab.chip(token), shown]];
    };
    replace(
      body,
      tokens.length ? pairs("sentence", tokens.flatMap(entry)) : el("p.empty", null, "Write something above."),
    );
  }
  replace(
    main,
    el("div.page-head", null, el("h1", null, "A sentence of your own")),
    el(
      "p.lead",
      null,
      "Matched by its tokens: no model runs in this page, so nothing here depends on the context. Each token (the longest ones " +
        "that this page knows, from the left, which may differ from the tokenizer's) finds the latents that it characterises, with their focus. " +
        "For what fires on a text give it to the dashboard as a prompt, or ask lm.top_latents(text, sae).",
    ),
    area,
    body,
  );
  paint();
  area.focus();
  return { title: "A sentence" };
}
