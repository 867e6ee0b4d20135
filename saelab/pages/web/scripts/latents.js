// How a latent is named on other pages: address, link, label or tokens, badges.

/** @import { Changes, Child, Columns, Place, Props } from "./types.d.ts" */
/** @import { Sae } from "./feature-data.js" */

import { el } from "./dom.js";
import { at, FLAG } from "./feature-data.js";
import { count, density } from "./numbers.js";
import { here } from "./route.js";
import { textNodes } from "./text.js";

/**
 * "12" or "12@B" to {latent, letter}; null for anything else.
 * @param {string | null | undefined} string
 * @returns {Place | null}
 */
export function parseLatent(string) {
  const match = /^(\d{1,9})(?:@([AB]))?$/.exec(string ?? "");
  return match && { latent: Number(match[1]), letter: match[2] ?? "A" };
}

/** @param {Place} place */
export const sameLatent = (place) => (place.letter === "A" ? String(place.latent) : `${place.latent}@${place.letter}`);

/** The address of a latent's page. @param {Sae} sae @param {number} latent @param {Changes} [changes] */
export const latentHash = (sae, latent, changes = {}) =>
  here({
    f: sameLatent({ latent, letter: sae.letter }),
    sae: sae.prefix && sae.letter,
    p: "",
    view: "",
    ex: "",
    t: "",
    ...changes,
  });

/**
 * Words that lead to a latent's page, or say that there is none.
 * @param {Sae} sae
 * @param {number} latent
 * @param {Child} words
 * @param {Changes} [changes]
 * @param {Props} [props]
 */
export const linked = (sae, latent, words, changes = {}, props = {}) =>
  sae.hasPage(latent)
    ? el("a", { href: latentHash(sae, latent, changes), ...props }, words)
    : el("span.muted", { title: "no page was made for this latent" }, words);

/** @param {Sae} sae @param {number} latent @param {Changes} [changes] */
export const latentLink = (sae, latent, changes = {}) => linked(sae, latent, `#${latent}`, changes);

/**
 * What to call a latent where there is little room: its label, or the tokens it fires on.
 * @param {Sae} sae
 * @param {number} latent
 */
export function latentName(sae, latent) {
  const label = sae.label(latent);
  return el("span.text", null, label ? textNodes(label.slice(0, 300)) : tokenChips(sae, latent));
}

/**
 * The tokens a latent fires on most, from the index: as many as there is room for; null where it never fired.
 * @param {Sae} sae
 * @param {number} latent
 */
export function tokenChips(sae, latent) {
  const tokens = [sae.index.tok0, sae.index.tok1, sae.index.tok2]
    .map((column) => at(column, latent))
    .filter((t) => t !== null);
  const chips = tokens.map((token) => [sae.dataset.vocab.chip(token), " "]);
  return chips.length > 0 ? el("span.chips", null, chips) : null;
}

/** @param {Sae} sae @param {number} latent @param {Columns} [more] @returns {Child[]} */
export function badges(sae, latent, more) {
  const flags = sae.index.flags[latent];
  const seeds = sae.info.seeds;
  const found = at(more?.seeds, latent);
  return [
    flags & FLAG.dead
      ? el("span.badge.warn", null, "dead")
      : flags & FLAG.silent
        ? el(
            "span.badge.warn",
            { title: `silent in ${count(sae.dataset.manifest.corpus.counted)} tokens` },
            "silent here",
          )
        : null,
    flags & FLAG.dense ? el("span.badge.warn", { title: "fires on more than a tenth of the tokens" }, "dense") : null,
    flags & FLAG.duplicate
      ? el(
          "span.badge.warn",
          { title: "decoder cosine with its nearest above 0.9" },
          "duplicate",
          more ? [" of ", latentLink(sae, more.near[latent])] : "",
        )
      : null,
    seeds && found !== null
      ? el(
          "span.badge",
          {
            class: found === seeds.others ? "badge good" : "badge",
            title: `decoder cosine at least ${seeds.threshold} with a latent of that seed's SAE`,
          },
          `in ${found} of ${seeds.others} other seeds`,
        )
      : null,
    more?.null_count
      ? el(
          "span.badge",
          { title: `the same figure with ${sae.info.null?.name ?? "the model re-initialised"}` },
          `null fires on ${density(more.null_count[latent] / sae.dataset.manifest.corpus.counted)}`,
        )
      : null,
  ];
}
