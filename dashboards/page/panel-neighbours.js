// Latents near a latent, its heads and weights, and how a latent is named elsewhere: links, tokens, badges.

function neighboursPanel(feature) {
  const body = el("div", { id: freshId("near"), role: "tabpanel", tabindex: -1 });
  const { sae } = feature;
  const row = (latent, value, share) =>
    el(
      "tr",
      null,
      el("td.num", null, latentLink(sae, latent)),
      el("td", null, latentName(sae, latent)),
      el("td", { "aria-hidden": "true" }, meter(share)),
      el("td.num", null, value),
    );
  const rows = {
    dec: () =>
      Array.from(feature.list("dec_near"), (l, i) => [l, feature.list("dec_cos")[i]])
        .filter(([l]) => l < sae.size)
        .map(([l, cos]) => row(l, number(cos), cos)),
    enc: () =>
      Array.from(feature.list("enc_near"), (l, i) => [l, feature.list("enc_cos")[i]])
        .filter(([l]) => l < sae.size)
        .map(([l, cos]) => row(l, number(cos), cos)),
    coact: () =>
      Array.from(feature.list("coact"), (l, i) => {
        if (l >= sae.size) return null;
        const both = feature.list("coact_both")[i],
          jaccard = both / (feature.value("contexts") + feature.list("coact_contexts")[i] - both);
        return row(l, percent(jaccard, 2), jaccard);
      }),
  };
  const headings = { dec: "cosine", enc: "cosine", coact: "shared contexts" };
  const paint = (kind) =>
    replace(
      body,
      el(
        "table.pairs",
        null,
        el(
          "thead",
          null,
          el(
            "tr",
            null,
            el("th", { scope: "col" }, "latent"),
            el("th", { scope: "col" }, "label or tokens"),
            el("th.num", { scope: "col", colspan: 2 }, headings[kind]),
          ),
        ),
        el("tbody", null, rows[kind]()),
      ),
    );
  paint("dec");
  return panel(
    "Neighbours",
    null,
    tabs(
      "Neighbours by",
      [
        ["dec", "decoder"],
        ["enc", "encoder"],
        ["coact", "together in a context"],
      ],
      "dec",
      body.id,
      paint,
      true,
    ),
    body,
  );
}

function headsPanel(feature) {
  const heads = feature.list("heads", feature.sae.info.heads ?? 0);
  if (!heads.length) return null;
  const shares = Array.from(heads);
  const best = shares.indexOf(Math.max(...shares));
  return panel(
    "Heads",
    null,
    histogram({
      label: `Share of latent ${feature.latent}'s decoder by attention head`,
      counts: shares,
      axis: [
        [0.5 / shares.length, "0"],
        [1 - 0.5 / shares.length, String(shares.length - 1)],
      ],
      describe: (i) => `head ${i}: ${percent(shares[i])}`,
      height: 56,
    }),
    el(
      "p.note",
      null,
      `Share of the decoder row's squared norm. Most in head ${best} (${percent(shares[best], 2)}). Hover an example's peak for its sources by position and head.`,
    ),
  );
}

function weightsPanel(feature) {
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

const latentLink = (sae, latent, changes = {}) =>
  el(
    "a",
    {
      href: here({
        f: sae.letter === "A" ? latent : `${latent}@${sae.letter}`,
        p: "",
        view: "",
        ex: "",
        t: "",
        ...changes,
      }),
    },
    `#${latent}`,
  );

/** What to call a latent where there is little room: its label, or the tokens it fires on. */
function latentName(sae, latent) {
  const label = sae.label(latent);
  return el("span.text", null, label ? textNodes(label.slice(0, 300)) : tokenChips(sae, latent));
}

/** The tokens a latent fires on most, from the index. */
function tokenChips(sae, latent) {
  const tokens = [sae.index.tok0, sae.index.tok1, sae.index.tok2]
    .map((column) => at(column, latent))
    .filter((t) => t !== null);
  return tokens.map((token) => [sae.dataset.vocab.chip(token), " "]);
}

function badges(sae, latent, more) {
  const flags = sae.index.flags[latent];
  const seeds = sae.info.seeds;
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
    seeds && more?.seeds
      ? el(
          "span.badge",
          {
            class: more.seeds[latent] === seeds.others ? "badge good" : "badge",
            title: `decoder cosine at least ${seeds.threshold} with a latent of that seed's SAE`,
          },
          `in ${more.seeds[latent]} of ${seeds.others} other seeds`,
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
