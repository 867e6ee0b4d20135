// Latents near a latent, its heads and its weights.

/** @import { Feature } from "./feature-data.js" */

import { histogram, meter } from "./charts.js";
import { el, freshId, replace } from "./dom.js";
import { kindOf } from "./examples.js";
import { at } from "./feature-data.js";
import { latentLink, latentName } from "./latents.js";
import { count, number, percent, plural, signed } from "./numbers.js";
import { pairs, panel, table, tabs } from "./parts.js";

/** @param {Feature} feature */
export function neighboursPanel(feature) {
  const body = el("div", { id: freshId("near"), role: "tabpanel", tabindex: -1 });
  const { sae } = feature;
  /** @param {number} latent */
  const named = (latent) => [latentLink(sae, latent), latentName(sae, latent)];
  /** @param {string} kind */
  const byCosine = (kind) => {
    const cosines = feature.list(`${kind}_cos`);
    /** @param {number} l @param {number} i */
    const row = (l, i) => (l < sae.size ? [...named(l), meter(cosines[i]), number(cosines[i])] : null);
    return table(["#latent", "label or tokens", "", "#cosine"], Array.from(feature.list(`${kind}_near`), row));
  };
  const together = () => {
    const found = coactive(feature);
    const lags = found.some(({ lag }) => lag !== null);
    /** @param {ReturnType<typeof coactive>[number]} pair */
    const row = ({ latent, jaccard, pmi, phi, lag, before, after, both }) => [
      ...named(latent),
      percent(jaccard, 2),
      number(pmi, 2),
      number(phi, 2),
      ...(lags ? [el("span", { title: order(before, after, both) }, lag === null ? "–" : signed(lag, 2))] : []),
    ];
    /** @param {number | null} before @param {number | null} after @param {number} both */
    const order = (before, after, both) =>
      `of ${plural(both, "context")} with both, the other fires first in ${count(before)}, later in ${count(after)}`;
    return [
      table(["#latent", "label or tokens", "#shared", "#PMI", "#φ", ...(lags ? ["#lag"] : [])], found.map(row)),
      el(
        "p.note",
        null,
        "Over contexts. Shared: with both of those with either; PMI in bits.",
        lags && " Lag: by how many tokens the other fires before this one.",
      ),
    ];
  };
  /** @param {string} kind */
  const paint = (kind) => replace(body, kind === "coact" ? together() : byCosine(kind));
  const choices = [
    ["dec", "decoder"],
    ["enc", "encoder"],
    ["coact", "together in a context"],
  ];
  paint("dec");
  return panel("Neighbours", null, tabs("Neighbours by", choices, "dec", body.id, paint, true), body);
}

/**
 * Latents that fire in the same contexts, with what is known of each pair, from counts of contexts (N in all).
 * @param {Feature} feature
 */
export function coactive(feature) {
  const { sae } = feature;
  const all = sae.dataset.manifest.coactivation.contexts;
  const a = feature.figure("contexts");
  /** @param {string} name @param {number} i */
  const one = (name, i) => at(feature.list(name), i);
  return Array.from(feature.list("coact"), (latent, i) => {
    const [both, b] = [feature.list("coact_both")[i], feature.list("coact_contexts")[i]];
    const spread = Math.sqrt(a * b * (all - a) * (all - b));
    return {
      latent,
      both,
      jaccard: both / (a + b - both),
      pmi: Math.log2((all * both) / (a * b)),
      phi: spread ? (all * both - a * b) / spread : null,
      before: one("coact_before", i),
      after: one("coact_after", i),
      lag: one("coact_lag", i),
    };
  }).filter(({ latent }) => latent < sae.size);
}

/**
 * Attention heads: the decoder row's share by head and, at the peaks of the top examples, what the heads contribute.
 * @param {Feature} feature
 */
export function headsPanel(feature) {
  const heads = Array.from(feature.list("heads", feature.sae.info.heads ?? 0));
  if (!heads.length) return null;
  const found = feature.windows.filter((w) => kindOf(w) === "top").flatMap((w) => w.sources);
  /** @param {{ value: number }[]} list */
  const sum = (list) => list.reduce((total, { value }) => total + value, 0);
  const whole = found.reduce((total, { value }) => total + Math.abs(value), 0);
  const given = heads.map((_, h) => sum(found.filter(({ head }) => head === h)) / (whole || 1));
  const best = heads.indexOf(Math.max(...heads));
  const far = Math.min(24, Math.max(0, ...found.map(({ back }) => back)));
  const byPlace = Array.from(
    { length: far + 1 },
    (_, d) => sum(found.filter(({ back }) => Math.min(back, far) === d)) / (whole || 1),
  );
  /** @param {number} d */
  const place = (d) => (d === 0 ? "the peak itself" : d === far && far === 24 ? "24 and more before" : `${d} before`);
  return [
    panel(
      "Heads",
      null,
      histogram({
        label: `Attention heads of latent ${feature.latent}`,
        counts: heads,
        none: whole ? given.map(Math.abs) : undefined,
        axis: [
          { share: 0.5 / heads.length, words: "0" },
          { share: 1 - 0.5 / heads.length, words: String(heads.length - 1) },
        ],
        describe: (h) =>
          `head ${h}: ${percent(heads[h])} of the weights${whole ? `, ${signed(100 * given[h])}% at peaks` : ""}`,
        height: 56,
      }),
      el(
        "p.note",
        null,
        `Bars: share of the decoder row's norm by head; most in head ${best} (${percent(heads[best], 2)}).`,
        whole > 0 && " Dashed: share of the sources' contributions at the peaks of the top examples.",
      ),
    ),
    whole > 0 &&
      panel(
        "Where it reads from",
        null,
        histogram({
          label: `Contributions to latent ${feature.latent} by distance of the source`,
          counts: byPlace.map(Math.abs),
          kind: (d) => (byPlace[d] < 0 ? "minus" : "plus"),
          axis: [
            { share: 0.5 / byPlace.length, words: "peak" },
            { share: 1 - 0.5 / byPlace.length, words: place(far) },
          ],
          describe: (d) => `${place(d)}: ${signed(100 * byPlace[d])}% of the contributions`,
          height: 56,
        }),
        el(
          "p.note",
          null,
          "Sources of the peaks of the top examples, by tokens back. See each in its text: Sources (s).",
        ),
      ),
  ];
}

/** @param {Feature} feature */
export function weightsPanel(feature) {
  return panel(
    "Weights",
    null,
    pairs("stats", [
      ["‖decoder‖", number(feature.value("dec_norm"))],
      ["‖encoder‖", number(feature.value("enc_norm"))],
      ["encoder · decoder", number(feature.value("enc_dec"))],
      ["encoder bias", number(feature.value("b_enc"))],
    ]),
  );
}
