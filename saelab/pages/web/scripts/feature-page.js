// One latent: its figures at the left, its examples at the right, steering at the foot.

/** @import { Columns, Shown } from "./types.d.ts" */
/** @import { Dataset, Feature, Sae } from "./feature-data.js" */

import { all, el, replace } from "./dom.js";
import { examplesView } from "./examples-view.js";
import { at } from "./feature-data.js";
import { exportFeatures } from "./feature-export.js";
import { featureHead, notesPanel } from "./feature-head.js";
import { currentOrder } from "./index-columns.js";
import { latentLink, parseLatent, sameLatent, tokenChips } from "./latents.js";
import { count, density, number } from "./numbers.js";
import { headsPanel, neighboursPanel, weightsPanel } from "./panel-neighbours.js";
import { activationPanel, logitHistogramPanel, logitsPanel, tokensPanel } from "./panels.js";
import { errorCard, pairs, say } from "./parts.js";
import { actions, go, here } from "./route.js";
import { steering } from "./steer.js";

/**
 * @param {HTMLElement} main
 * @param {Dataset} dataset
 * @param {URLSearchParams} params
 * @param {() => boolean} current
 * @returns {Promise<Shown | undefined>}
 */
export async function featurePage(main, dataset, params, current) {
  const place = parseLatent(params.get("f"));
  const sae = await dataset.sae(place?.letter);
  if (!place || place.latent >= sae.size) {
    if (current()) replace(main, noSuchLatent(sae));
    return { title: "No such latent" };
  }
  const { latent } = place;
  const [{ rows }, feature, more] = await Promise.all([
    currentOrder(sae, params),
    sae.feature(latent),
    sae.openMore().catch(() => undefined), // the index says what is wrong with it
  ]);
  if (!current()) return;
  const where = rows.indexOf(latent);
  /** @param {number} by */
  const stepTo = (by) => {
    const next = rows[where < 0 ? 0 : where + by];
    const edge = by > 0 ? "last" : "first";
    if (next === undefined) say(`This is the ${edge} latent in this order`);
    else go(here({ f: sameLatent({ latent: next, letter: sae.letter }), ex: "", t: "" }));
  };
  const position = rows.length ? `${where < 0 ? "–" : count(where + 1)} of ${count(rows.length)}` : "";
  replace(main, featureHead(sae, latent, feature, more, stepTo, position));
  Object.assign(actions, { next: () => stepTo(1), previous: () => stepTo(-1) });
  if (feature) featureBody(main, feature, params, current);
  else main.append(...withoutPage(sae, latent, more));
  return { title: `#${latent} ${sae.label(latent)}` };
}

/** @param {Sae} sae */
function noSuchLatent(sae) {
  const back = el("a", { href: "#" }, "Back to the index");
  return el(
    "div.alert",
    { role: "alert" },
    el("h1", null, "There is no such latent"),
    el("p", null, `Latents run from 0 to ${count(sae.size - 1)}. `, back),
  );
}

/**
 * What the index knows of a latent that has no page.
 * @param {Sae} sae
 * @param {number} latent
 * @param {Columns} [more]
 */
function withoutPage(sae, latent, more) {
  const near = at(more?.near, latent);
  const figures = [
    ["density", density(sae.density(latent))],
    ["largest activation", number(sae.index.max[latent])],
    ["mean", number(sae.index.mean[latent])],
    ["fires on", tokenChips(sae, latent)],
    ["nearest", near === null ? undefined : latentLink(sae, near)],
  ];
  const hint = [
    "No page was made for this latent; these are its figures in the index. Name it in ",
    el("code", null, "latents="),
    " to see examples.",
  ];
  return [el("p.empty", null, hint), pairs("stats", figures), notesPanel(sae, latent)];
}

/** @param {HTMLElement} main @param {Feature} feature @param {URLSearchParams} params @param {() => boolean} current */
function featureBody(main, feature, params, current) {
  const { sae, latent } = feature;
  const examples = examplesView(feature, params, current);
  const steer = el("div", { "aria-busy": "true" });
  const panels = () => [
    activationPanel(feature, (range) => examples.aim(range)),
    tokensPanel(feature),
    logitsPanel(feature),
    logitHistogramPanel(feature),
  ];
  const left = el("div.left", null, panels());
  const under = [
    neighboursPanel(feature),
    el("div", null, headsPanel(feature), weightsPanel(feature), notesPanel(sae, latent)),
  ];
  main.append(el("div.feature", null, left, el("div.right", null, examples.node, steer, el("div.under", null, under))));
  Object.assign(actions, {
    nextGroup: () => examples.turn(1),
    previousGroup: () => examples.turn(-1),
    errors: () => examples.toggleMisses(),
    sources: () => examples.toggleSources(),
    export: () => exportFeatures(feature),
    repaint: () => {
      const charts = () => all(left, "[role=slider]");
      const at = charts().indexOf(/** @type {HTMLElement} */ (document.activeElement));
      replace(left, panels());
      charts()[at]?.focus();
      examples.paint();
    },
  });
  examples.start();
  steering(sae, latent)
    .then((drawer) => current() && drawer && steer.append(drawer))
    .catch((error) => current() && steer.append(errorCard("The steering sweep could not be read", error)))
    .finally(() => steer.removeAttribute("aria-busy"));
}
