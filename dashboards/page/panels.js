// The left column of a feature: histograms, tokens, logits, neighbours, heads, weights, statistics.

const binEdge = (b) => 2 ** (b / 4);

/** The model that stands behind the figures, and what the latent does there. */
function nullWords({ sae, latent }) {
  const { null_count: times, null_max: largest } = sae.more ?? {};
  const name = sae.info.null?.name ?? "the model re-initialised";
  if (!times) return name;
  return `${name}: fires on ${density(times[latent] / sae.dataset.manifest.corpus.counted)}, maximum ${number(largest[latent])}`;
}

function activationPanel(feature, onPick) {
  const { first, counts } = feature.histogram();
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
  let body = el("p.empty", null, "It never fired on these tokens.");
  if (counts.length) {
    const low = none ? Math.min(first, none.first) : first;
    const high = Math.max(first + counts.length, none ? none.first + none.counts.length : -Infinity);
    const spread = (h) => Array.from({ length: high - low }, (_, i) => h.counts[low + i - h.first] ?? 0);
    const heights = spread({ first, counts });
    body = [
      histogram({
        label: `Activations of latent ${feature.latent}, ${preferences.logY ? "logarithmic" : "linear"} counts`,
        counts: heights,
        none: none && spread(none),
        log: preferences.logY,
        axis: [0, 0.5, 1].map((share) => [share, number(binEdge(low + share * (high - low)), 2)]),
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

function tokensPanel(feature) {
  const tokens = Array.from(feature.list("tok"))
    .map((_, i) => [at(feature.list("tok"), i), feature.list("tok_count")[i], feature.list("tok_mean")[i]])
    .filter(([t]) => t !== null);
  if (!tokens.length) return null;
  const n = feature.value("tok_n");
  const row = ([token, times, mean]) => [
    feature.vocab.chip(token),
    meter(times / n),
    percent(times / n, 2),
    number(mean),
  ];
  return panel(
    "Fires on",
    null,
    table(["token", "share of firings", "#", "#mean"], tokens.map(row)),
    el("p.note", null, `Counted on ${plural(n, "firing")} in all.`),
  );
}

function logitsPanel(feature) {
  if (!feature.columns.top) return null;
  const body = el("div", { id: freshId("logits"), role: "tabpanel", tabindex: -1 });
  const paint = (kind) => {
    const values = (name) => feature.list(`${kind}${name}_value`);
    const largest = Math.max(Math.abs(values("top")[0] ?? 0), Math.abs(values("bottom")[0] ?? 0)) || 1;
    const side = (name, sign, words) => {
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

function logitHistogramPanel(feature) {
  const counts = feature.list("logit_hist", 40);
  if (!counts.length) return null;
  const low = feature.value("logit_lo"),
    high = feature.value("logit_hi");
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
      axis: [[0, number(low)], ...(zero > 0.15 && zero < 0.85 ? [[zero, "0"]] : []), [1, number(high)]],
      kind: (i) => (edge(i + 0.5) > 0 ? "plus" : "minus"),
      describe: (i) => `${number(edge(i))} to ${number(edge(i + 1))}: ${plural(counts[i], "token")}`,
      height: 60,
    }),
  );
}
