// Two latents side by side, of one SAE or of two.

/** @import { Child, Columns, Shown } from "./types.d.ts" */
/** @import { Dataset, Feature, Sae } from "./feature-data.js" */
/** @typedef {{ sae: Sae, latent: number, feature: Feature | null, more?: Columns, missing?: boolean }} Half */

import { tokenCards } from "./card.js";
import { askCompare } from "./compare-ask.js";
import { compareSaes } from "./compare-saes.js";
import { all, button, el, nearest, replace } from "./dom.js";
import { exampleList, kindOf, tokenCard } from "./examples.js";
import { copyLink } from "./export.js";
import { at } from "./feature-data.js";
import { exportFeatures } from "./feature-export.js";
import { latentLink, parseLatent, sameLatent } from "./latents.js";
import { count, number } from "./numbers.js";
import { activationPanel, logitsPanel } from "./panels.js";
import { pairs, panel } from "./parts.js";
import { actions, again, go, here } from "./route.js";
import { textNodes } from "./text.js";

/**
 * @param {HTMLElement} main
 * @param {Dataset} dataset
 * @param {URLSearchParams} params
 * @param {() => boolean} current
 * @returns {Promise<Shown | undefined>}
 */
export async function comparePage(main, dataset, params, current) {
  const wanted = (params.get("f") ?? "").split(",").slice(0, 2).map(parseLatent);
  if (wanted.length < 2) return compareSaes(main, dataset, current);
  const halves_ = await Promise.all(
    wanted.map(async (place) => {
      const sae = await dataset.sae(place?.letter);
      if (!place || place.latent >= sae.size) return { sae, latent: -1, feature: null, missing: true };
      return {
        sae,
        latent: place.latent,
        feature: await sae.feature(place.latent),
        more: await sae.openMore().catch(() => undefined),
      };
    }),
  );
  if (!current()) return;
  const [a, b] = halves_;
  const shown = halves_.map((half) => half.feature).filter((feature) => feature !== null);
  const exporting = () => shown.length > 0 && exportFeatures(...shown);
  Object.assign(actions, { compare: () => !a.missing && askCompare(a.sae, a.latent), export: exporting });
  const shared = new Set();
  if (a.feature && b.feature) {
    const contexts = new Set(a.feature.windows.map((w) => w.context));
    for (const w of b.feature.windows) if (contexts.has(w.context)) shared.add(w.context);
  }
  const columns = halves_.map((half) => compareHalf(half, shared));
  const node = el(
    "div.compare",
    null,
    columns.map((column) => column.node),
  );
  // A context that both show is lit in both while either is looked at.
  /** @param {Event} event */
  const light = (event) => {
    const context = nearest(event, ".example")?.dataset.context;
    for (const row of all(node, ".example"))
      row.classList.toggle(
        "shared-now",
        context !== undefined && shared.has(Number(context)) && row.dataset.context === context,
      );
  };
  node.addEventListener("pointerover", light);
  node.addEventListener("focusin", light);
  replace(
    main,
    el(
      "div.page-head",
      null,
      el("h1", null, "Compare"),
      el(
        "div.actions",
        null,
        button("Swap", () =>
          go(
            here({
              f: [...wanted]
                .reverse()
                .map((place) => place && sameLatent(place))
                .join(","),
            }),
          ),
        ),
        button("Link", () => copyLink()),
        shown.length > 0 && button("Export", exporting),
      ),
    ),
    pairs("facts", relation(a, b, shared)),
    node,
  );
  for (const column of columns) column.start?.();
  actions.repaint = again;
  return { title: `Compare ${wanted.map((place) => (place ? `#${place.latent}` : "?")).join(" and ")}` };
}

/** What is known of the two together. @param {Half} a @param {Half} b @param {Set<number>} shared */
function relation(a, b, shared) {
  const [one, two] = [a.feature, b.feature];
  if (!one || !two) return [];
  /** @type {[Child, Child][]} */
  const entries = [];
  if (a.sae === b.sae) {
    /** @param {string} near @param {string} cos */
    const cosine = (near, cos) => {
      const i = one.list(near).indexOf(b.latent);
      return i < 0 ? "not among the ten nearest" : number(one.list(cos)[i]);
    };
    entries.push(["decoder cosine", cosine("dec_near", "dec_cos")], ["encoder cosine", cosine("enc_near", "enc_cos")]);
    const i = one.list("coact").indexOf(b.latent);
    entries.push([
      "contexts with both",
      i < 0
        ? "not among the ten most"
        : `${count(one.list("coact_both")[i])} of ${count(a.sae.dataset.manifest.coactivation.contexts)}`,
    ]);
  } else if (a.more?.match) {
    entries.push([
      `nearest of SAE ${b.sae.letter} to #${a.latent}`,
      [latentLink(b.sae, a.more.match[a.latent]), ` (${number(a.more.match_cos[a.latent])})`],
    ]);
    if (b.more?.match)
      entries.push([
        `nearest of SAE ${a.sae.letter} to #${b.latent}`,
        [latentLink(a.sae, b.more.match[b.latent]), ` (${number(b.more.match_cos[b.latent])})`],
      ]);
  }
  /** @param {Feature} f */
  const tops = (f) => new Set(Array.from(f.list("top")).filter((_, i) => at(f.list("top"), i) !== null));
  const common = [...tops(one)].filter((t) => tops(two).has(t));
  entries.push(
    ["raised tokens in common", common.length ? common.map((t) => [one.vocab.chip(t), " "]) : "none of the ten"],
    ["examples from one context", count(shared.size)],
  );
  return entries;
}

/**
 * A latent's side of the page; `start` once it stands there.
 * @param {Half} half
 * @param {Set<number>} shared
 * @returns {{ node: HTMLElement, start?: () => void }}
 */
function compareHalf({ sae, latent, feature, missing }, shared) {
  if (missing) {
    const words = `SAE ${sae.letter} has no such latent: they run from 0 to ${count(sae.size - 1)}.`;
    return { node: el("div.alert", { role: "alert" }, el("p", null, words)) };
  }
  const title = el(
    "h2.title",
    null,
    latentLink(sae, latent),
    " ",
    sae.dataset.saes.length > 1 && el("span.badge", null, `SAE ${sae.letter}`),
    " ",
    el("span.text", null, textNodes(sae.label(latent))),
  );
  if (!feature) {
    const empty = el("p.empty", null, "No page was made for this latent.");
    return { node: el("section.half", null, title, empty) };
  }
  const top = feature.figure("max") || 1;
  const windows = feature.windows.filter((w) => ["top", "interval"].includes(kindOf(w)));
  const chosen = [...windows.filter((w) => shared.has(w.context)), ...windows.filter((w) => !shared.has(w.context))]
    .slice(0, 12)
    .sort((x, y) => y.act - x.act);
  const examples = el(
    "div.examples",
    null,
    exampleList(chosen, () => ({ effects: 0, top })),
  );
  const node = el(
    "section.half",
    { "aria-label": `Latent ${latent} of SAE ${sae.letter}` },
    title,
    activationPanel(feature, () => go(here({ f: sameLatent({ latent, letter: sae.letter }) }))),
    logitsPanel(feature),
    panel("Examples", null, examples),
  );
  for (const row of all(examples, ".example")) if (shared.has(Number(row.dataset.context))) row.classList.add("shared");
  const start = () =>
    tokenCards(examples, (token) => {
      const row = /** @type {HTMLElement} */ (token.closest(".example"));
      return tokenCard(feature.windows[Number(row.dataset.w)], Number(token.dataset.i), Number(token.dataset.n), null);
    });
  return { node, start };
}
