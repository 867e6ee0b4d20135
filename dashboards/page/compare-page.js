// Two latents side by side, of one SAE or of two, or the SAEs themselves.

const sameLatent = (place) => (place.letter === "A" ? String(place.latent) : `${place.latent}@${place.letter}`);

function askCompare(sae, latent) {
  const input = el("input", {
    type: "text",
    "aria-label": "The other latent",
    placeholder: sae.dataset.saes.length > 1 ? "number, or number@B" : "number",
  });
  const pinned = [...notes.pins]
    .map((key) => key.split(":"))
    .filter(([letter, l]) => letter !== sae.letter || Number(l) !== latent)
    .slice(0, 12);
  const target = (other) =>
    here({ f: `${sameLatent({ latent, letter: sae.letter })},${other}`, p: "", view: "", ex: "", t: "" });
  const dialog = openDialog(
    `Compare #${latent} with`,
    input,
    pinned.length > 0 &&
      el(
        "p.muted",
        null,
        "Pinned: ",
        pinned.map(([letter, l]) => [
          button(letter === "A" ? `#${l}` : `#${l}@${letter}`, () => {
            dialog.close();
            go(target(sameLatent({ latent: Number(l), letter })));
          }),
          " ",
        ]),
      ),
    el(
      "div.row",
      null,
      button("Compare", () => submit()),
    ),
  );
  const submit = () => {
    const other = parseLatent(input.value.trim().replace(/^#/, ""));
    if (!other) {
      say("Give the number of a latent");
      return;
    }
    dialog.close();
    go(target(sameLatent(other)));
  };
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter") {
      event.preventDefault();
      submit();
    }
  });
  input.focus();
}

async function comparePage(main, dataset, params, current) {
  const wanted = (params.get("f") ?? "").split(",").slice(0, 2).map(parseLatent);
  if (wanted.length < 2) return compareSaes(main, dataset, current);
  const halves_ = await Promise.all(
    wanted.map(async (place) => {
      const sae = await dataset.sae(place?.letter);
      if (!place || place.latent >= sae.size) return { sae, missing: true };
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
  const shown = halves_.map((half) => half.feature).filter(Boolean);
  const exporting = () => shown.length > 0 && exportFeatures(...shown);
  Object.assign(actions, { compare: () => !a.missing && askCompare(a.sae, a.latent), export: exporting });
  const shared = new Set();
  if (a.feature && b.feature) {
    const contexts = new Set(a.feature.windows.map((w) => w.context));
    for (const w of b.feature.windows) if (contexts.has(w.context)) shared.add(w.context);
  }
  const columns = halves_.map((half) => compareHalf(half, shared, current));
  const node = el("div.compare", null, columns);
  // A context that both show is lit in both while either is looked at.
  const light = (event) => {
    const context = event.target.closest?.(".example")?.dataset.context;
    for (const row of node.querySelectorAll(".example"))
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
        button("Swap", () => go(here({ f: [...wanted].reverse().map(sameLatent).join(",") }))),
        button("Link", () => copyLink()),
        shown.length > 0 && button("Export", exporting),
      ),
    ),
    pairs("facts", relation(a, b, shared)),
    node,
  );
  columns.forEach((column) => column.start?.());
  actions.repaint = again;
  return { title: `Compare ${wanted.map((place) => (place ? `#${place.latent}` : "?")).join(" and ")}` };
}

/** What is known of the two together. */
function relation(a, b, shared) {
  if (!a.feature || !b.feature) return [];
  const entries = [];
  if (a.sae === b.sae) {
    const cosine = (near, cos) => {
      const i = a.feature.list(near).indexOf(b.latent);
      return i < 0 ? "not among the ten nearest" : number(a.feature.list(cos)[i]);
    };
    entries.push(["decoder cosine", cosine("dec_near", "dec_cos")], ["encoder cosine", cosine("enc_near", "enc_cos")]);
    const i = a.feature.list("coact").indexOf(b.latent);
    entries.push([
      "contexts with both",
      i < 0
        ? "not among the ten most"
        : `${count(a.feature.list("coact_both")[i])} of ${count(a.sae.dataset.manifest.coactivation.contexts)}`,
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
  const tops = (f) => new Set(Array.from(f.list("top")).filter((_, i) => at(f.list("top"), i) !== null));
  const common = [...tops(a.feature)].filter((t) => tops(b.feature).has(t));
  entries.push(
    ["raised tokens in common", common.length ? common.map((t) => [a.feature.vocab.chip(t), " "]) : "none of the ten"],
    ["examples from one context", count(shared.size)],
  );
  return entries;
}

function compareHalf({ sae, latent, feature, missing }, shared, current) {
  if (missing)
    return el(
      "div.alert",
      { role: "alert" },
      el("p", null, `SAE ${sae.letter} has no such latent: they run from 0 to ${count(sae.size - 1)}.`),
    );
  const title = el(
    "h2.title",
    null,
    latentLink(sae, latent),
    " ",
    sae.dataset.saes.length > 1 && el("span.badge", null, `SAE ${sae.letter}`),
    " ",
    el("span.text", null, textNodes(sae.label(latent))),
  );
  if (!feature) return el("section.half", null, title, el("p.empty", null, "No page was made for this latent."));
  const top = feature.value("max") || 1;
  const windows = feature.windows.filter((w) => ["top", "interval"].includes(kindOf(w)));
  const chosen = [...windows.filter((w) => shared.has(w.context)), ...windows.filter((w) => !shared.has(w.context))]
    .slice(0, 12)
    .sort((x, y) => y.act - x.act);
  const examples = el(
    "div.examples",
    null,
    exampleList(chosen, () => ({ effects: 0, top })),
  );
  const half = el(
    "section.half",
    { "aria-label": `Latent ${latent} of SAE ${sae.letter}` },
    title,
    activationPanel(feature, () => go(here({ f: sameLatent({ latent, letter: sae.letter }) }))),
    logitsPanel(feature),
    panel("Examples", null, examples),
  );
  for (const row of examples.querySelectorAll(".example"))
    if (shared.has(Number(row.dataset.context))) row.classList.add("shared");
  half.start = () =>
    tokenCards(examples, (token) => {
      const row = token.closest(".example");
      return (
        row && tokenCard(feature.windows[Number(row.dataset.w)], Number(token.dataset.i), Number(token.dataset.n), null)
      );
    });
  return half;
}
