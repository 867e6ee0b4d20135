// The left column of a feature: histograms, tokens, logits, neighbours, heads, weights, statistics.

/** @import { Child, Numbers } from "./types.d.ts" */
/** @import { Feature } from "./feature-data.js" */

import { histogram, meter } from "./charts.js";
import { el, freshId, replace } from "./dom.js";
import { at } from "./feature-data.js";
import { count, density, number, percent, plural, signed } from "./numbers.js";
import { pairs, panel, table, tabs, tinted } from "./parts.js";
import { preferences } from "./preferences.js";

/** @param {number} b */
const binEdge = (b) => 2 ** (b / 4);

/** The model that stands behind the figures, and what the latent does there. @param {Feature} feature */
function nullWords({ sae, latent }) {
  const { null_count: times, null_max: largest } = sae.more ?? { null_count: null, null_max: [] };
  const name = sae.info.null?.name ?? "the model re-initialised";
  if (!times) return name;
  return `${name}: fires on ${density(times[latent] / sae.dataset.manifest.corpus.counted)}, maximum ${number(largest[latent])}`;
}

/** @param {Feature} feature @param {(range: [low: number, high: number]) => void} onPick */
export function activationPanel(feature, onPick) {
  const { first, counts } = feature.activations;
  const none = feature.histogram("null");
  const facts = [
    ["fires on", density(feature.density)],
    ["tokens", count(feature.value("count"))],
    ["contexts", count(feature.value("contexts"))],
    ["maximum", number(feature.value("max"))],
    ["mean", number(feature.value("mean"))],
    ["std", number(feature.value("std"))],
    ["minimum", number(feature.value("min"))],
    ["skewness", number(feature.value("skew"))],
    ["kurtosis", number(feature.value("kurtosis"))],
    ["mean a²", number(feature.value("square"))],
  ];
  /** @type {Child} */
  let body = el("p.empty", null, "It never fired on these tokens.");
  if (counts.length) {
    const low = none ? Math.min(first, none.first) : first;
    const high = Math.max(first + counts.length, none ? none.first + none.counts.length : -Infinity);
    /** @param {{ first: number, counts: Numbers }} h */
    const spread = (h) => Array.from({ length: high - low }, (_, i) => h.counts[low + i - h.first] ?? 0);
    const heights = spread({ first, counts });
    body = [
      histogram({
        label: `Activations of latent ${feature.latent}, ${preferences.logY ? "logarithmic" : "linear"} counts`,
        counts: heights,
        none: none && spread(none),
        log: preferences.logY,
        axis: [0, 0.5, 1].map((share) => ({ share, words: number(binEdge(low + share * (high - low)), 2) })),
        describe: (i) =>
          `${number(binEdge(low + i))} to ${number(binEdge(low + i + 1))}: ${plural(heights[i], "firing")}`,
        pick: (i) => onPick([binEdge(low + i), binEdge(low + i + 1)]),
        hint: `${preferences.logY ? "logarithmic" : "linear"} counts (l)`,
      }),
      none && el("p.note", null, `Dashed: the same with ${nullWords(feature)}.`),
    ];
  }
  return panel("Activations", null, body, pairs("stats", facts));
}

/** @param {Feature} feature */
export function tokensPanel(feature) {
  const tokens = Array.from(feature.list("tok")).flatMap((_, i) => {
    const token = at(feature.list("tok"), i);
    return token === null ? [] : [{ token, times: feature.list("tok_count")[i], mean: feature.list("tok_mean")[i] }];
  });
  if (!tokens.length) return null;
  const n = feature.figure("tok_n");
  /** @param {{ token: number, times: number, mean: number }} entry */
  const row = ({ token, times, mean }) => [
    feature.vocab.chip(token),
    percent(times / (feature.vocab.counts[token] || times), 2),
    count(times),
    number(mean),
  ];
  return panel(
    "Fires on",
    null,
    table(["token", "#of its reads", "#firings", "#mean"], tokens.map(row)),
    el("p.note", null, `Of ${plural(n, "firing")} in all; ordered by the share of a token's reads times the mean.`),
  );
}

/** @param {Feature} feature */
export function logitsPanel(feature) {
  if (!feature.columns.top) return null;
  const body = el("div", { id: freshId("logits"), role: "tabpanel", tabindex: -1 });
  /** @param {string} kind */
  const paint = (kind) => {
    /** @param {string} name */
    const values = (name) => feature.list(`${kind}${name}_value`);
    const largest = Math.max(Math.abs(values("top")[0] ?? 0), Math.abs(values("bottom")[0] ?? 0)) || 1;
    /** @param {string} name @param {string} sign @param {string} words */
    const side = (name, sign, words) => {
      /** @param {number} value @param {number} i */
      const row = (value, i) => {
        const token = at(feature.list(kind + name), i);
        if (token === null) return null;
        return [feature.vocab.chip(token), meter(Math.abs(value) / largest, sign), tinted(value, signed(value))];
      };
      return table([words, "size", "#logit"], Array.from(values(name), row), true);
    };
    replace(
      body,
      el("div.columns", null, side("top", "plus", "raised tokens"), side("bottom", "minus", "lowered tokens")),
    );
  };
  const choices = [
    ["", "with the final norm"],
    ["raw_", "without"],
  ];
  paint("");
  return panel("Logits", null, feature.columns.raw_top && tabs("Logits", choices, "", body.id, paint, true), body);
}

/** @param {Feature} feature */
export function logitHistogramPanel(feature) {
  const counts = feature.list("logit_hist", 40);
  if (!counts.length) return null;
  const low = feature.figure("logit_lo");
  const high = feature.figure("logit_hi");
  /** @param {number} i */
  const edge = (i) => low + ((high - low) * i) / 40;
  const zero = low < 0 && high > 0 ? -low / (high - low) : undefined;
  return panel(
    "Logits of all tokens",
    null,
    histogram({
      label: `Logits of latent ${feature.latent} over the vocabulary`,
      counts,
      log: preferences.logY,
      rule: zero,
      axis: [
        { share: 0, words: number(low) },
        ...(zero !== undefined && zero > 0.15 && zero < 0.85 ? [{ share: zero, words: "0" }] : []),
        { share: 1, words: number(high) },
      ],
      kind: (i) => (edge(i + 0.5) > 0 ? "plus" : "minus"),
      describe: (i) => `${number(edge(i))} to ${number(edge(i + 1))}: ${plural(counts[i], "token")}`,
      height: 60,
    }),
  );
}
