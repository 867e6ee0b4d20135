// The head of a latent: its number, label, badges and what one can do with it. Its note, and its export.

function featureHead(sae, latent, feature, more, stepTo, position) {
  const key = sae.key(latent);
  const given = sae.labels.get(latent);
  const title = el("span.text", null, textNodes(sae.label(latent)));
  const edit = () => {
    const input = el("input", {
      type: "text",
      value: sae.label(latent),
      "aria-label": `Label of latent ${latent}`,
      maxlength: 1000,
    });
    const dialog = openDialog(
      `Label of #${latent}`,
      input,
      el(
        "div.row",
        null,
        button("Save", () => {
          setNote("labels", key, input.value.trim());
          replace(title, textNodes(sae.label(latent)));
          dialog.close();
        }),
        notes.labels.has(key) &&
          button("Back to the label it came with", () => {
            setNote("labels", key, "");
            replace(title, textNodes(sae.label(latent)));
            dialog.close();
          }),
      ),
    );
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter") dialog.querySelector("button").click();
    });
    input.focus();
  };
  const star = button(notes.pins.has(key) ? "★ Pinned" : "☆ Pin", () => pin(), { "aria-pressed": notes.pins.has(key) });
  const pin = () => {
    const on = togglePin(key);
    star.setAttribute("aria-pressed", on);
    star.textContent = on ? "★ Pinned" : "☆ Pin";
  };
  const python = `# ${sae.info.site}\nsae.show(${latent})\nfrom saelab import steering\nwith lm.steer(steering.add(sae, ${latent}, strength=4.0, unit="max_activation")):\n    print(lm.generate("The", max_new_tokens=40))\n`;
  Object.assign(actions, { pin, compare: () => askCompare(sae, latent), note: () => byId("note")?.focus() });
  return el(
    "div.page-head",
    null,
    el(
      "h1",
      null,
      el("span.num", null, `#${latent}`),
      sae.letter !== "A" && el("span.badge", null, `SAE ${sae.letter}`),
      title,
    ),
    given &&
      !notes.labels.has(key) &&
      el(
        "span.badge",
        null,
        el("span.text", null, textNodes(given.source.slice(0, 60))),
        given.score !== null && ` ${number(given.score, 2)}`,
      ),
    badges(sae, latent, more),
    el(
      "div.actions",
      null,
      el("span.muted.num", null, position),
      button("‹", () => stepTo(-1), { "aria-label": "Previous latent (k)", title: "previous (k)" }),
      button("›", () => stepTo(1), { "aria-label": "Next latent (j)", title: "next (j)" }),
      star,
      button("Label", edit),
      button("Compare", () => askCompare(sae, latent)),
      button("Link", () => copyLink()),
      button("Python", () => copy(python, "Python")),
      feature && button("Export", () => exportFeatures(feature)),
    ),
  );
}

function notesPanel(sae, latent) {
  const area = el("textarea", {
    id: "note",
    rows: 3,
    "aria-label": `Note on latent ${latent}`,
    value: notes.notes.get(sae.key(latent)) ?? "",
    placeholder: "Kept in this browser. View → Export takes notes out.",
    change: () => setNote("notes", sae.key(latent), area.value),
  });
  return panel("Note", null, area);
}

const EXAMPLE = "sae,latent,label,group,activation,document,context,position,peak_token,text,repeat".split(",");

/** The examples of a latent as rows under EXAMPLE. */
function exampleRows({ vocab, sae, latent, heading, windows }) {
  const { groups } = sae.dataset.manifest;
  const place = (w) => [w.document, w.context, w.start + w.peak];
  return windows.map((w) => [
    sae.letter,
    latent,
    heading,
    groups[w.group].name,
    w.act,
    ...place(w),
    vocab.string(w.tokens[w.peak]),
    w.text,
    w.repeat ? 1 : 0,
  ]);
}

const FIGURES = "count,contexts,max,min,mean,std,skew,kurtosis,square,dec_norm,enc_norm,enc_dec,b_enc".split(",");

/** All that the page knows of a latent, as JSON. */
function featureJson(feature) {
  const { vocab, sae, latent } = feature;
  const kinds = sae.dataset.manifest.groups;
  const tokens = (name, value) =>
    Array.from(feature.list(name), (t, i) => ({ token: at(feature.list(name), i), value: feature.list(value)[i] }))
      .filter(({ token }) => token !== null)
      .map(({ token, value: v }) => ({ id: vocab.ids[token], text: vocab.string(token), value: v }));
  const near = (name, value) =>
    Array.from(feature.list(name), (l, i) => ({ latent: l, value: feature.list(value)[i] })).filter(
      ({ latent: l }) => l < sae.size,
    );
  const bins = "bin b is [2^(b/4), 2^((b+1)/4))";
  return {
    latent,
    sae: sae.info.name,
    site: sae.info.site,
    digest: sae.info.digest,
    label: feature.heading,
    note: notes.notes.get(sae.key(latent)) ?? "",
    density: feature.density,
    ...Object.fromEntries(FIGURES.map((name) => [name, feature.value(name)])),
    histogram: { bins, ...feature.histogram() },
    null_histogram: feature.histogram("null") ?? undefined,
    heads: feature.columns.heads && feature.list("heads", sae.info.heads),
    tokens: tokens("tok", "tok_count"),
    raises: tokens("top", "top_value"),
    lowers: tokens("bottom", "bottom_value"),
    decoder_neighbours: near("dec_near", "dec_cos"),
    encoder_neighbours: near("enc_near", "enc_cos"),
    together: coactive(feature),
    examples: feature.windows.map((w) => ({
      group: kinds[w.group].name,
      document: w.document,
      context: w.context,
      start: w.start,
      peak: w.peak,
      activation: w.act,
      repeat: w.repeat,
      text: w.text,
      token_ids: Array.from(w.tokens, (t) => vocab.ids[t]),
      activations: Array.from(w.tokens, (_, i) => w.activation(i)),
      effects: w.storedEffects && Array.from(w.tokens, (_, i) => w.effect(i)),
      sources: w.sources.length ? w.sources : undefined,
    })),
  };
}

/** Asks how to export these latents: all their examples as rows, or all that is known of them. */
function exportFeatures(...features) {
  const name = features.map(({ latent, sae: { letter } }) => sameLatent({ latent, letter })).join("-");
  const json = features.map(featureJson);
  openExport(
    `latent-${name}`,
    EXAMPLE,
    () => features.flatMap(exampleRows),
    () => (features.length > 1 ? json : json[0]),
  );
}
