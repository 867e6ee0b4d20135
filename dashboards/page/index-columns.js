// The columns of the index, and the figures above it.

function saeCards(sae) {
  const {
    info,
    dataset: { manifest },
  } = sae;
  const e = info.evaluation ?? {};
  const card = (term, value, note) =>
    el("div.figure-card", null, el("dt", null, term), el("dd", null, value, note && el("small", null, note)));
  return el("dl.cards", null, [
    card("latents", count(sae.size), `${count(info.pages)} with a page`),
    card(
      "dead",
      percent(info.dead / sae.size, 2),
      `${count(info.dead)} silent in ${count(manifest.corpus.counted)} tokens`,
    ),
    card("dense", count(info.dense), "fire on over a tenth"),
    card("L0", number(e.l0 ?? info.l0), "latents a token"),
    card(
      "variance explained",
      percent(e.explained_variance ?? info.explained_variance),
      e.explained_variance == null ? "on the tokens read" : "held out",
    ),
    Number.isFinite(e.ce_score) &&
      card(
        "CE recovered",
        percent(e.ce_score),
        e.delta_ce == null && e.ce_sae == null ? null : `+${number(e.delta_ce ?? e.ce_sae - e.ce_clean)} nats`,
      ),
    Number.isFinite(e.kl) && card("KL", number(e.kl), "nats a token"),
  ]);
}

function indexColumns(sae, view) {
  const { index } = sae;
  const compact = matchMedia("(max-width: 48rem)").matches;
  const pin = (latent) => {
    const star = el(
      "button.star",
      {
        type: "button",
        tabindex: -1,
        "aria-pressed": notes.pins.has(sae.key(latent)),
        "aria-label": `Pin latent ${latent}`,
        click: (event) => {
          const on = togglePin(sae.key(latent));
          event.currentTarget.setAttribute("aria-pressed", on);
          event.currentTarget.textContent = on ? "★" : "☆";
        },
      },
      notes.pins.has(sae.key(latent)) ? "★" : "☆",
    );
    return star;
  };
  const name = (latent) => {
    const label = sae.label(latent);
    return el(
      "a",
      {
        href: here({ f: sae.letter === "A" ? latent : `${latent}@${sae.letter}`, tab: "", ex: "", t: "" }),
        tabindex: -1,
      },
      label
        ? el("span.text", null, textNodes(label.slice(0, 300)))
        : compact
          ? tokenChips(sae, latent)
          : el("span.muted", null, sae.hasPage(latent) ? "unlabelled" : "no page"),
    );
  };
  const more = (key, show) => (latent) => (view.more ? show(view.more[key][latent]) : "…");
  const has = (key) =>
    sae.has("idx-1") && (key !== "match_cos" || sae.info.matches !== null) && (key !== "seeds" || sae.info.seeds);
  return [
    { key: "pin", title: "★", width: "1.6rem", sort: true, cell: pin },
    {
      key: "id",
      title: "latent",
      width: compact ? "3.4rem" : "4.6rem",
      right: true,
      sort: true,
      cell: (l) => latentLinkCell(sae, l),
    },
    { key: "label", title: "label", width: compact ? "minmax(0, 1fr)" : "minmax(9rem, 1.5fr)", sort: true, cell: name },
    { key: "tokens", title: "fires on", width: "minmax(9rem, 1.2fr)", cell: (l) => tokenChips(sae, l) },
    {
      key: "density",
      title: "density",
      width: compact ? "4.6rem" : "5.6rem",
      right: true,
      sort: true,
      cell: (l) => density(sae.density(l)),
    },
    { key: "max", title: "max", width: "4rem", right: true, sort: true, cell: (l) => number(index.max[l]) },
    { key: "mean", title: "mean", width: "4rem", right: true, sort: true, cell: (l) => number(index.mean[l]) },
    has("near_cos") && {
      key: "near_cos",
      title: "nearest",
      width: "4.6rem",
      right: true,
      sort: true,
      cell: more("near_cos", (v) => number(v, 2)),
    },
    has("match_cos") && {
      key: "match_cos",
      title: "in other SAE",
      width: "6rem",
      right: true,
      sort: true,
      cell: more("match_cos", (v) => number(v, 2)),
    },
    has("seeds") && {
      key: "seeds",
      title: "seeds",
      width: "3.6rem",
      right: true,
      sort: true,
      cell: more("seeds", (v) => `${v} of ${sae.info.seeds.others}`),
    },
  ]
    .filter(Boolean)
    .filter((c) => !compact || ["pin", "id", "label", "density"].includes(c.key));
}
const latentLinkCell = (sae, latent) =>
  el(
    "a",
    {
      href: here({ f: sae.letter === "A" ? latent : `${latent}@${sae.letter}`, tab: "", ex: "", t: "" }),
      tabindex: -1,
    },
    latent,
  );

/** The rows that j and k walk through: those of the index as the URL has it. */
const order = { key: "", rows: new Uint32Array(0), message: "" };
async function currentOrder(sae, params) {
  const key = [
    sae.letter,
    ...["q", "s", "show", "d", "m"].map((k) => params.get(k) ?? ""),
    notes.pins.size,
    notes.labels.size,
    notes.notes.size,
  ].join("\n");
  if (order.key !== key) {
    const { rows, message } = await selectRows(sae, params);
    Object.assign(order, { key, rows, message });
  }
  return order;
}
